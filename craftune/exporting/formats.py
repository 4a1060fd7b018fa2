"""The formats: how each is written, and how others load it. `FORMATS` is the table of names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from craftune.errors import UserError
from craftune.exporting import ldm
from craftune.exporting.kohya import to_kohya
from craftune.exporting.trained import Trained, read_lora
from craftune.models import foreign
from craftune.records import read_json, write_json

ARCHITECTURES = {
    "sd": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3-medium",
    "flux": "flux-1-dev",
}
"""ModelSpec's names."""

KOHYA_BASES = {"sd": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""kohya's `ss_base_model_version`."""

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
"""The noise that readers of one-file checkpoints assume: such a file has no scheduler."""

SCALING = {"sd": 0.18215, "sdxl": 0.13025}
"""The latents' scale that they assume."""


@dataclass(frozen=True)
class Format:
    """One way to hand a model on.

    Attributes:
        loader: of diffusers, with which the export is loaded back.
        write: (run, dtype, folder) writes the files into an existing empty folder.
        open: (run, folder) -> diffusers' pipeline with the exported weights.
        adapters: whether it holds LoRA alone, to be put on the base.
        stitches: whether `craftune.load_stitched` reads it.
    """

    loader: str
    write: Callable[[Trained, torch.dtype, Path], None]
    open: Callable[[Trained, Path], Any]
    adapters: bool
    stitches: bool = False


def _write_diffusers(run: Trained, dtype: torch.dtype, out: Path) -> None:
    foreign.write_folder(run.model, run.settings, out, dtype)
    for_older_releases(out)


def for_older_releases(out: Path) -> None:
    """Text encoders' keys as older transformers read them; no path of this machine."""
    for config in [out / "model_index.json", *out.glob("*/config.json")]:
        value = read_json(config)
        value.pop("_name_or_path", None)  # where the base lay on this machine
        write_json(config, value)
        if value.get("architectures") == ["CLIPTextModel"]:
            file = config.parent / "model.safetensors"
            save_file(ldm.text_model_names(load_file(file)), file, {"format": "pt"})


def _write_lora(run: Trained, dtype: torch.dtype, out: Path) -> None:
    layers, header = read_lora(run.lora)
    metadata = header | model_spec(run, adapters=True)
    save_file(_cast(layers, dtype), out / "pytorch_lora_weights.safetensors", metadata)


def _write_kohya(run: Trained, dtype: torch.dtype, out: Path) -> None:
    layers, _ = read_lora(run.lora)
    if run.family not in ("sd", "sdxl"):
        raise UserError(
            f"--to kohya: not for the family {run.family!r}; use --to lora, which ComfyUI and "
            "diffusers load as it is"
        )
    unet = read_json(run.model / "unet" / "config.json")
    weights = to_kohya(layers, float(run.alpha), unet, run.family)
    kind = _kind(run)
    rank, alpha = run.recipe.train.lora.rank, run.alpha
    metadata = model_spec(run, adapters=True) | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_base_model_version": KOHYA_BASES[kind],
        "ss_v2": str(kind == "sd2"),
        "ss_output_name": run.recipe.run.name,
        "ss_sd_model_name": Path(run.recipe.model.path).name,
        "ss_max_train_steps": str(run.recipe.train.steps),
        "ss_learning_rate": str(run.recipe.train.learning_rate),
    }
    save_file(_cast(weights, dtype), _named(run, out), metadata)


def _write_single(run: Trained, dtype: torch.dtype, out: Path) -> None:
    _refuse_single(run)
    unet, vae = run.part("unet"), run.part("vae")
    weights = ldm.unet_weights(*unet) | ldm.vae_weights(*vae)
    weights |= ldm.clip_weights(run.part("text_encoder")[0], run.family)
    if run.family == "sdxl":
        weights |= ldm.open_clip_weights(run.part("text_encoder_2")[0])
    save_file(_cast(weights, dtype), _named(run, out), model_spec(run, adapters=False))


def _refuse_single(run: Trained) -> None:
    """Only what the readers of such files assume unasked goes into one.

    Raises:
        UserError: the family has no such layout, or the model departs from what is assumed.
    """
    mend = "use --to diffusers"
    if _kind(run) not in ("sd", "sdxl"):
        raise UserError(f"--to single-file: only for SD1.x and SDXL; {mend}")
    vae = read_json(run.model / "vae" / "config.json")
    if vae["_class_name"] != "AutoencoderKL":
        raise UserError(
            f"--to single-file: the layout has no place for {vae['_class_name']}; {mend}"
        )
    scheduler = read_json(run.model / "scheduler" / "scheduler_config.json")
    assumed = {
        **{key: (scheduler.get(key), value) for key, value in STABLE_DIFFUSION.items()},
        "prediction_type": (scheduler.get("prediction_type", "epsilon"), "epsilon"),
        "rescale_betas_zero_snr": (scheduler.get("rescale_betas_zero_snr") or False, False),
        "scaling_factor": (vae["scaling_factor"], SCALING[run.family]),
    }
    for key, (value, expected) in assumed.items():
        if value != expected:
            raise UserError(
                f"--to single-file: {key} is {value!r}, but such a file cannot say so and its "
                f"readers assume {expected!r}; {mend}"
            )


def model_spec(run: Trained, *, adapters: bool) -> dict[str, str]:
    """The header's metadata by ModelSpec 1.0.0 (github.com/Stability-AI/ModelSpec)."""
    kind = _kind(run)
    unet = run.model / "unet" / "config.json"
    spec = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[kind] + "/lora" * adapters,
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": run.recipe.run.name,
        "modelspec.description": f"{run.recipe.model.path} aligned with "
        f"{', '.join(run.rewards)} by craftune ({run.recipe.method.name})",
    }
    if unet.is_file():
        blocks = len(read_json(run.model / "vae" / "config.json").get("block_out_channels", ()))
        size = read_json(unet)["sample_size"] * 2 ** max(blocks - 1, 0)
        scheduler = read_json(run.model / "scheduler" / "scheduler_config.json")
        prediction = scheduler.get("prediction_type", "epsilon")
        spec["modelspec.resolution"] = f"{size}x{size}"
        spec["modelspec.prediction_type"] = "v" if prediction == "v_prediction" else prediction
    return {"format": "pt"} | spec


def _kind(run: Trained) -> str:
    """The family, with SD2.x told from SD1.x."""
    if run.family == "sd":
        unet = read_json(run.model / "unet" / "config.json")
        return "sd2" if unet.get("use_linear_projection") else "sd"
    return run.family


def _named(run: Trained, out: Path) -> Path:
    return out / f"{run.recipe.run.name}.safetensors"


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory, so each is a copy of its own."""
    return {name: weight.to(dtype, copy=True).contiguous() for name, weight in weights.items()}


def open_base(run: Trained) -> Any:
    """diffusers' pipeline of what was tuned."""
    return foreign.open_checkpoint(run.base, run.settings, run.recipe.model.variant)


def _open_lora(file: str) -> Callable[[Trained, Path], Any]:
    def opened(run: Trained, out: Path) -> Any:
        (found,) = out.glob(file)
        return foreign.with_lora(open_base(run), found)

    return opened


def _open_single(run: Trained, out: Path) -> Any:
    return foreign.open_file(_named(run, out), run.model)


FORMATS = {
    "diffusers": Format(
        "DiffusionPipeline.from_pretrained",
        _write_diffusers,
        lambda run, out: foreign.open_folder(out),
        adapters=False,
        stitches=True,
    ),
    "lora": Format(
        "load_lora_weights",
        _write_lora,
        _open_lora("*.safetensors"),
        adapters=True,
        stitches=True,
    ),
    "kohya": Format(
        "load_lora_weights",
        _write_kohya,
        _open_lora("*.safetensors"),
        adapters=True,
    ),
    "single-file": Format(
        "from_single_file",
        _write_single,
        _open_single,
        adapters=False,
    ),
}
"""Name -> format."""
