"""What the families share: loading with one-line errors, the VAE, noise levels, saving.

The only place beside the families that imports diffusers.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_log
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_log

from craftune.config import ModelConfig
from craftune.diffusion import Grid, Schedule, Target
from craftune.errors import UserError
from craftune.records import read_json, require_space, write_json

TARGETS: dict[str, Target] = {"epsilon": "epsilon", "v_prediction": "v"}
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
"""LoRA's usual targets in diffusers' attention."""


def load_pipeline(
    pipeline: Any,
    path: Path,
    config: ModelConfig,
    what: str,
    text_encoders: Mapping[str, Any],
    **parts: Any,
) -> Any:
    """A diffusers folder as its pipeline, every weight there and finite, nothing trainable.

    Args:
        pipeline: diffusers' class.
        what: the family in words, for errors.
        text_encoders: name -> transformers class; loaded first, since transformers invents
            missing weights and the pipeline would not tell which.
        parts: given to `from_pretrained` as they are, e.g. safety_checker=None.

    Raises:
        UserError: a part is missing or damaged, or a weight is not finite.
    """
    quiet()
    common: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "variant": config.variant,
        "local_files_only": True,
    }
    try:
        for name, kind in text_encoders.items():
            parts[name] = _whole_text_encoder(kind, path, name, common)
        pipe = pipeline.from_pretrained(path, **parts, **common)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be loaded as {what}: {reason}") from None
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            _check_weights(part, path / name)
            part.requires_grad_(False).eval()
    return pipe


def _whole_text_encoder(kind: Any, path: Path, name: str, common: dict[str, Any]) -> nn.Module:
    encoder, info = kind.from_pretrained(path, subfolder=name, output_loading_info=True, **common)
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks the weight {min(info['missing_keys'])!r}")
    return encoder


def quiet() -> None:
    """Keep the libraries' bars and remarks (tiny VAE, no safety checker) off the screen."""
    diffusers_log.disable_progress_bar()
    diffusers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    transformers_log.set_verbosity_error()


def _check_weights(module: nn.Module, where: Path) -> None:
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


def vae_decoder(
    vae: Any, shift: float = 0.0
) -> Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b 3 y x"]]:
    """Scaled latents -> images float32 in [0, 1], with gradient.

    Latents are (z - shift) * scaling_factor in the denoiser's units.
    """
    scale = float(vae.config.scaling_factor)

    def decode(latents: Tensor) -> Tensor:
        image = vae.decode(latents.to(vae.dtype) / scale + shift, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    return decode


def vae_encoder(
    vae: Any, shift: float = 0.0
) -> Callable[[Float[Tensor, "b 3 y x"]], Float[Tensor, "b c h w"]]:
    """Images float32 in [0, 1] -> the mean of their scaled latents, no gradient."""
    scale = float(vae.config.scaling_factor)

    @torch.no_grad()
    def encode_images(images: Tensor) -> Tensor:
        encoded = vae.encode((images * 2 - 1).to(vae.device, vae.dtype))
        # AutoencoderTiny has no distribution; AutoencoderKL's mode is its mean.
        clean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (clean.float() - shift) * scale

    return encode_images


def discrete_schedule(pipe: Any, path: Path) -> Schedule:
    """Noise levels of the 1000-timestep families (SD1, SD2, SDXL), from the checkpoint's scheduler.

    Raises:
        UserError: the prediction type is unknown, or zero terminal SNR meets epsilon prediction.
    """
    config = path / "scheduler" / "scheduler_config.json"
    prediction = pipe.scheduler.config.prediction_type
    if prediction not in TARGETS:
        known = ", ".join(TARGETS)
        raise UserError(f"{config}: prediction_type {prediction!r} is not supported ({known})")
    scheduler: Any = DDIMScheduler.from_config(pipe.scheduler.config)
    alpha_bar = scheduler.alphas_cumprod.double()
    try:
        return Schedule(
            alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float(), TARGETS[prediction]
        )
    except ValueError as error:
        raise UserError(f"{config}: {error}") from None


def discrete_grid(pipe: Any, sampler: str, num_steps: int) -> Grid:
    """The steps that diffusers' own scheduler takes under the checkpoint's settings."""
    config = pipe.scheduler.config
    make = _ddim_grid if sampler == "ddim" else _dpm_grid
    grid = make(config, num_steps) if num_steps < config.num_train_timesteps else None
    if grid is None or grid.timesteps.diff().ge(0).any():
        raise UserError(
            f"generate.num_steps: {num_steps} are too many for this checkpoint's "
            f"{config.num_train_timesteps} timesteps, some would repeat; use fewer"
        )
    return grid


def _ddim_grid(config: Any, num_steps: int) -> Grid:
    scheduler: Any = DDIMScheduler.from_config(config)
    alpha_bar, last = scheduler.alphas_cumprod.double(), scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(num_steps)
    starts = scheduler.timesteps
    # Every step goes down by 1000 // num_steps, even where "linspace" and "trailing" place the
    # next timestep elsewhere: diffusers does, and its images are what users get from our model.
    ends = starts - len(alpha_bar) // num_steps
    levels = torch.where(ends < 0, last, alpha_bar[ends.clamp(min=0)])
    levels = torch.stack([alpha_bar[starts], levels], 1)
    return Grid(starts, levels.sqrt().float(), (1 - levels).sqrt().float())


def _dpm_grid(config: Any, num_steps: int) -> Grid:
    scheduler: Any = DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    ratios = scheduler.sigmas.double()  # sigma / alpha; karras and its like lie between timesteps
    alphas = (1 + ratios.square()).rsqrt()
    return Grid.chain(scheduler.timesteps, alphas.float(), (ratios * alphas).float())


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
    copies = {k: copy.deepcopy(part).to("cpu", dtype) for k, part in modules.items() if k != name}
    parts = pipe.components | copies | {name: copy.deepcopy(network).to("cpu", dtype)}
    settings = {k: v for k, v in pipe.config.items() if k == "requires_safety_checker"}
    type(pipe)(**parts, **settings).save_pretrained(folder)
    for text_encoder in folder.glob("text_encoder*/config.json"):
        # transformers would load the text encoder in the dtype written here, diffusers the rest
        # in float32: a plain from_pretrained could not draw. "float32" is what SD1.5 publishes.
        write_json(text_encoder, read_json(text_encoder) | {"dtype": "float32"})


def lora_saver(pipeline: Any, name: str) -> Callable[[Path, nn.Module], None]:
    """(folder, network) -> pytorch_lora_weights.safetensors, for `load_lora_weights`.

    Args:
        pipeline: diffusers' class.
        name: the trained part, "unet" or "transformer".
    """

    def save_lora(folder: Path, network: nn.Module) -> None:
        from peft import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
        settings = network.peft_config["default"].to_dict()  # type: ignore[index,union-attr]
        pipeline.save_lora_weights(
            folder,
            **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": settings},
        )

    return save_lora
