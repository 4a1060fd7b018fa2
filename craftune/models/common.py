"""What the families share: loading with one-line errors, the VAE, saving.

The only place beside the families that imports diffusers.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_log
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_log

from craftune.config import ModelConfig
from craftune.errors import UserError
from craftune.models.files import has_variant
from craftune.models.single_file import from_file, settings_of
from craftune.records import read_json, require_space, write_json, write_text
from craftune.types import Cond

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
"""LoRA's usual targets in diffusers' attention."""
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    SafetensorError,
    SingleFileComponentError,
)
"""What diffusers and transformers raise at a checkpoint that is damaged or of another kind."""


def load_pipeline(
    pipeline: Any,
    path: Path,
    config: ModelConfig,
    what: str,
    text_encoders: Mapping[str, Any],
    *,
    float32: tuple[str, ...] = (),
    **parts: Any,
) -> Any:
    """A diffusers folder or single file as its pipeline: whole, finite, nothing trainable.

    Args:
        pipeline: diffusers' class.
        what: the family in words, for errors.
        text_encoders: name -> transformers class; loaded first, since transformers invents
            missing weights and the pipeline would not tell which.
        float32: parts that are loaded in float32 whatever `config.dtype` says.
        parts: given to `from_pretrained` as they are, e.g. safety_checker=None.

    Raises:
        UserError: a part is missing or damaged, or a weight is not finite.
    """
    quiet()
    dtypes = dict.fromkeys(float32, torch.float32) | {"default": getattr(torch, config.dtype)}
    settings = settings_of(path, config) if path.is_file() else None
    try:
        if settings:
            pipe = from_file(pipeline, path, settings, dtypes, parts)
        else:
            pipe = _from_folder(pipeline, path, config.variant, dtypes, text_encoders, parts)
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be loaded as {what}: {reason}") from None
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            check_weights(part, f"{path}: {name}" if path.is_file() else str(path / name))
            part.requires_grad_(False).eval()
    return pipe


def _from_folder(
    pipeline: Any,
    path: Path,
    variant: str | None,
    dtypes: dict[str, torch.dtype],
    text_encoders: Mapping[str, Any],
    parts: dict[str, Any],
) -> Any:
    if variant and not any(has_variant(part, variant) for part in path.iterdir()):
        raise ValueError(f"no file of model.variant {variant!r} is there")
    common: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    loaded = {}
    for name, kind in text_encoders.items():
        loaded[name], info = kind.from_pretrained(
            path,
            subfolder=name,
            output_loading_info=True,
            dtype=dtypes.get(name, dtypes["default"]),
            variant=variant if has_variant(path / name, variant) else None,
            **common,
        )
        if info["missing_keys"]:
            raise ValueError(f"{name} lacks the weight {min(info['missing_keys'])!r}")
    return pipeline.from_pretrained(
        path, dtype=dtypes, variant=variant, **parts, **loaded, **common
    )


def quiet() -> None:
    """Keep the libraries' bars and remarks (tiny VAE, no safety checker) off the screen."""
    diffusers_log.disable_progress_bar()
    diffusers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    transformers_log.set_verbosity_error()


def check_weights(module: nn.Module, where: str) -> None:
    """Raises UserError where a weight is missing or not finite."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{where}: lacks the weight {name!r}; the checkpoint is incomplete")
        if not torch.isfinite(parameter).all():
            raise UserError(f"{where}: weight {name!r} is not finite; the checkpoint is damaged")


def token_ids(tokenizer: Any, texts: list[str], length: int | None = None) -> Tensor:
    """Token ids `[b, length]`, padded and cut to the tokenizer's own length by default."""
    return tokenizer(
        texts,
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def in_batches(encode: Callable[[list[str]], Cond], size: int = 64) -> Callable[[list[str]], Cond]:
    """Any number of texts through an encoder of few, without gradient."""

    @torch.no_grad()
    def encode_prompts(texts: list[str]) -> Cond:
        return Cond.cat([encode(texts[i : i + size]) for i in range(0, len(texts), size)])

    return encode_prompts


def rest_mover(pipe: Any, name: str) -> Callable[[torch.device], None]:
    """(device) moves every network of the pipeline but `name` there."""

    def move_rest(device: torch.device) -> None:
        for part, network in pipe.components.items():
            if part != name and isinstance(network, nn.Module):
                network.to(device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else the room stays ours but cannot be used for large blocks

    return move_rest


def save_pipeline(
    pipe: Any, folder: Path, name: str, network: nn.Module, dtype: torch.dtype
) -> None:
    """The whole pipeline in `dtype`, with `network` in place of its part `name`.

    Raises:
        UserError: not enough disk space; nothing was written.
    """
    modules = {k: p for k, p in pipe.components.items() if isinstance(p, nn.Module)}
    weights = sum(w.numel() for p in modules.values() for w in p.state_dict().values())
    require_space(folder.parent, weights * dtype.itemsize, "the model")
    copies = {k: _copied(network if k == name else part, dtype) for k, part in modules.items()}
    parts = pipe.components | copies
    options = ("requires_safety_checker", "force_zeros_for_empty_prompt")
    settings = {k: v for k, v in pipe.config.items() if k in options}
    type(pipe)(**parts, **settings).save_pretrained(folder)
    for text_encoder in folder.glob("text_encoder*/config.json"):
        # transformers would load the text encoder in the dtype written here, diffusers the rest
        # in float32: a plain from_pretrained could not draw. "float32" is what SD1.5 publishes.
        write_json(text_encoder, read_json(text_encoder) | {"dtype": "float32"})
    # diffusers writes out what the checkpoint left to the scheduler's defaults, but drops defaults
    # where another scheduler is made of it: SD1.5's PNDM says no spacing, so DPM-Solver++ takes
    # its own; written out it would take PNDM's, and draw at other timesteps than the checkpoint.
    defaults = pipe.scheduler.config.get("_use_default_values", ())
    for scheduler in folder.glob("scheduler/scheduler_config.json"):
        said = json.loads(scheduler.read_text(encoding="utf-8"))  # with -Infinity, as diffusers
        kept = {key: value for key, value in said.items() if key not in defaults}
        write_text(scheduler, json.dumps(kept, indent=2) + "\n")


def _copied(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """On the CPU and in this dtype; itself where it is so already: copies may be 24 GB."""
    tensors = [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]
    if all((t.device.type, t.dtype) == ("cpu", dtype) for t in tensors):
        return network
    return copy.deepcopy(network).to("cpu", dtype)


def lora_saver(pipeline: Any, name: str) -> Callable[[Path, nn.Module], None]:
    """(folder, network) -> pytorch_lora_weights.safetensors, for `load_lora_weights`.

    Args:
        pipeline: diffusers' class.
        name: the trained part, "unet" or "transformer".
    """

    def save_lora(folder: Path, network: nn.Module) -> None:
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(network)
        if name == "unet":  # the names that other programs expect of a UNet's adapters
            layers = convert_state_dict_to_diffusers(layers)
        settings = network.peft_config["default"].to_dict()  # type: ignore[index,union-attr]
        pipeline.save_lora_weights(
            folder,
            **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": settings},
        )

    return save_lora
