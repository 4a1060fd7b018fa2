"""Models as others load and draw with them: diffusers' own pipelines, without our samplers."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor, nn

from craftune.models import common
from craftune.records import read_json

UNGUARDED = {"safety_checker": None, "requires_safety_checker": False}
"""For Stable Diffusion 1.x: a checker would black pictures out."""


def open_checkpoint(path: Path, settings: Path, variant: str | None = None) -> Any:
    """A diffusers folder or single file in float32; `settings` as `open_file` needs them."""
    if path.is_file():
        return open_file(path, settings)
    return open_folder(path, variant=variant)


def open_folder(
    folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    """`DiffusionPipeline.from_pretrained` of a diffusers folder."""
    common.quiet()
    # An SD3 that was published without T5 loads only when told that it has none.
    index = read_json(folder / "model_index.json")
    parts: dict[str, Any] = {name: None for name, kind in index.items() if kind == [None, None]}
    if _kind(folder) == "StableDiffusionPipeline":
        parts |= UNGUARDED
    return diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=dtype, variant=variant, local_files_only=True, **parts
    )


def open_file(file: Path, config: Path) -> Any:
    """`from_single_file` of a one-file checkpoint, in float32.

    Args:
        config: a diffusers folder with the settings (not the weights) of the parts, else the hub
            would be asked for them.
    """
    common.quiet()
    kind = getattr(diffusers, _kind(config))
    parts = {"safety_checker": None} if kind is diffusers.StableDiffusionPipeline else {}
    return kind.from_single_file(
        str(file), config=str(config), dtype=torch.float32, local_files_only=True, **parts
    )


def _kind(folder: Path) -> str:
    return read_json(folder / "model_index.json")["_class_name"]


def with_lora(pipe: Any, file: Path) -> Any:
    """`load_lora_weights` on the base's pipeline, merged into its weights."""
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora(components=["unet" if hasattr(pipe, "unet") else "transformer"])
    pipe.unload_lora_weights()
    return pipe


def draw(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_steps: int,
    guidance_scale: float,
    rounded_to: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "b 3 y x"]:
    """One picture per prompt by the pipeline's own call, in [0, 1]; picture i has seed i.

    Args:
        rounded_to: every weight is rounded to this first, so that two checkpoints which differ by
            the precision they are stored in draw the same.
        dtype: of the computation.
    """
    pipe.to(rounded_to).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    # FLUX's own default is 1024 whatever the checkpoint; craftune draws at its VAE's size.
    flux = isinstance(pipe, diffusers.FluxPipeline)
    side = pipe.vae.config.sample_size if flux else None
    pictures = pipe(
        list(prompts),
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="pt",
        height=side,
        width=side,
    )
    return pictures.images.float().cpu()


def write_folder(model: Path, base: Path, out: Path, dtype: torch.dtype) -> None:
    """A diffusers folder in `dtype` that older releases of transformers load as well.

    Args:
        model: the diffusers folder.
        base: a diffusers folder whose tokenizers' files are taken where transformers 5 no longer
            writes them.
    """
    write_pipeline(open_folder(model, dtype), base, out, dtype)


def write_pipeline(pipe: Any, base: Path, out: Path, dtype: torch.dtype) -> None:
    """The same of a pipeline in memory."""
    pipe.set_progress_bar_config(disable=True)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    network: nn.Module = getattr(pipe, name)
    common.save_pipeline(pipe, out, name, network, dtype)
    for tokenizer in base.glob("tokenizer*"):
        for file in tokenizer.iterdir():
            if not (out / tokenizer.name / file.name).exists():
                shutil.copy(file, out / tokenizer.name / file.name)
