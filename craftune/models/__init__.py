"""Model families: how a checkpoint becomes a `Model`. The only place that imports diffusers.

A family is one file with `load(path, config, device) -> Model`. Heavy imports stay inside it.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from craftune.config import ModelConfig
from craftune.errors import UserError, unknown_name
from craftune.records import read_json, sha256
from craftune.types import Model


def _sd(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """Stable Diffusion 1.x and 2.x layout: CLIP text encoder, UNet, epsilon or v prediction."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # else importing diffusers remarks on an absent torchvision
    return import_module("craftune.models.sd").load(path, config, device)


FAMILIES: dict[str, Callable[[Path, ModelConfig, torch.device], Model]] = {"sd": _sd}
"""Name -> loader; the docstring's first line is what `craftune list families` prints."""

PIPELINES = {"StableDiffusionPipeline": "sd"}
"""The `_class_name` in a checkpoint's model_index.json -> family."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a checkpoint that may be missing: rewards see every image."""

EMBEDDED = "craftune:"
"""Prefix of files that ship inside the package, e.g. craftune:shapes/model."""


def resolve(name: str) -> Path:
    """A path as given, or inside the package for "craftune:..."."""
    if name.startswith(EMBEDDED):
        return Path(__file__).parent.parent / name.removeprefix(EMBEDDED)
    return Path(name).expanduser()


def checkpoint_folder(config: ModelConfig) -> Path:
    """The local diffusers folder of a recipe's model; downloads a hub id on first use.

    Raises:
        UserError: neither a folder nor a hub id that can be had.
    """
    path = resolve(config.path)
    if path.is_dir():
        return path
    if path.is_absolute() or config.path.startswith((".", "~", EMBEDDED)) or path.exists():
        raise UserError(f"model.path {config.path!r}: no such folder; give a diffusers folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision,
                allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path {config.path!r}: no such folder here, and the hub did not give it "
            f"({reason})"
        ) from None


def family_of(config: ModelConfig) -> str:
    """The family's name: as the recipe says, or by the checkpoint's model_index.json.

    Raises:
        UserError: unknown name, no model_index.json, or a pipeline of no known family.
    """
    if config.family != "auto":
        if config.family not in FAMILIES:
            raise UserError(f"model.family: {unknown_name('family', config.family, FAMILIES)}")
        return config.family
    return _family_in(checkpoint_folder(config) / "model_index.json")


def _family_in(index: Path) -> str:
    if not index.is_file():
        raise UserError(f"{index}: missing; model.path must be a diffusers folder")
    parts = read_json(index)
    pipeline = parts.get("_class_name", "") if isinstance(parts, dict) else ""
    if pipeline not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise UserError(f"{index}: pipeline {pipeline!r} is of no known family (known: {known})")
    for name, kind in parts.items():
        needed = isinstance(kind, list) and kind[0] and name not in UNUSED
        if needed and not (index.parent / name).is_dir():
            raise UserError(f"{index.parent / name}: missing; the checkpoint is not whole")
    return PIPELINES[pipeline]


def identity(config: ModelConfig) -> dict[str, Any]:
    """Which weights these are, by the content of every file that the loader reads."""
    folder = checkpoint_folder(config)
    files = sorted(p for p in folder.rglob("*") if p.suffix in {".json", ".safetensors", ".txt"})
    digests = {str(p.relative_to(folder)): sha256(p) for p in files}
    return {"family": family_of(config), "files": digests}


def load(config: ModelConfig, device: torch.device) -> Model:
    """The checkpoint of a recipe, on the device, in `config.dtype`."""
    return FAMILIES[family_of(config)](checkpoint_folder(config), config, device)
