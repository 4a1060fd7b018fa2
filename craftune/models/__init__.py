"""Model families: how a checkpoint becomes a `Model`. The only place that imports diffusers.

A family is one file with `load(path, config, device) -> Model`. Heavy imports stay inside it.
"""

import hashlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from craftune.config import ModelConfig
from craftune.errors import UserError, unknown_name
from craftune.models.files import EMBEDDED as EMBEDDED
from craftune.models.files import SETTINGS, check_whole, checkpoint
from craftune.models.files import resolve as resolve
from craftune.records import canonical, read_json, sha256
from craftune.types import Model


def _family(name: str) -> Any:
    from transformers.utils import logging

    logging.set_verbosity_error()  # else importing diffusers remarks on an absent torchvision
    return import_module(f"craftune.models.{name}").load


def _sd(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """Stable Diffusion 1.x and 2.x layout: CLIP text encoder, UNet, epsilon or v prediction."""
    return _family("sd")(path, config, device)


def _sdxl(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """Stable Diffusion XL base layout: two CLIP text encoders, UNet, epsilon or v prediction."""
    return _family("sdxl")(path, config, device)


def _sd3(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """Stable Diffusion 3 and 3.5: rectified flow, two CLIP text encoders and T5, if wanted."""
    return _family("sd3")(path, config, device)


def _flux(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """FLUX.1 dev and schnell: rectified flow, guidance embedded or none, CLIP and T5."""
    return _family("flux")(path, config, device)


FAMILIES: dict[str, Callable[[Path, ModelConfig, torch.device], Model]] = {
    "sd": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
}
"""Name -> loader; the docstring's first line is what `craftune list families` prints."""

DISCRETE_SAMPLERS = ("dpm++2m", "ddim", "unipc")
FLOW_SAMPLERS = ("euler",)
ADMITTED = {
    "sd": DISCRETE_SAMPLERS,
    "sdxl": DISCRETE_SAMPLERS,
    "sd3": FLOW_SAMPLERS,
    "flux": FLOW_SAMPLERS,
}
"""Family -> names of its samplers beside "auto"."""

PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
"""The `_class_name` in a checkpoint's model_index.json -> family."""

SINGLE_FILES = {
    "v1": "sd",
    "v2": "sd",
    "xl_base": "sdxl",
}
"""What diffusers calls the kind of a single file, by its keys -> family."""

FOLDERS_ONLY = {
    **dict.fromkeys(("sd3", "sd35_medium", "sd35_large"), "SD3Transformer2DModel"),
    **dict.fromkeys(("flux-dev", "flux-schnell"), "FluxTransformer2DModel"),
}
"""Kinds of single files that are not read: most hold the transformer alone, without text encoders
and VAE -> diffusers' class that puts it into a folder."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a checkpoint that may be missing: rewards see every image."""

LIBRARIES = ("diffusers", "transformers")
"""Where a checkpoint's parts may come from; no checkpoint brings code of its own."""


def family_of(config: ModelConfig) -> str:
    """The family's name: as the recipe says, or by the checkpoint's model_index.json or keys.

    Raises:
        UserError: unknown name, a checkpoint that is not whole, of no known family, or of
            another one than the recipe says.
    """
    given = None if config.family == "auto" else config.family
    if given and given not in FAMILIES:
        raise UserError(f"model.family: {unknown_name('family', given, FAMILIES)}")
    path = checkpoint(config)
    found, said = _family_in_keys(path) if path.is_file() else _family_in_index(path)
    if not (found or given):
        known = ", ".join(SINGLE_FILES if path.is_file() else PIPELINES)
        raise UserError(f"{said} is of no known family (known: {known})")
    if given and found and given != found:
        raise UserError(f"model.family {given!r}: {said} is of family {found!r}; leave it out")
    return given or found or ""


def _family_in_keys(path: Path) -> tuple[str | None, str]:
    single_file = import_module("craftune.models.single_file")
    kind = single_file.kind_of(path)
    if kind in FOLDERS_ONLY:
        whole = single_file.usual_settings(kind)
        raise UserError(
            f"{path}: a single file of kind {kind!r} is not read; set model.path to a diffusers "
            f"folder or hub id like {whole!r}; of a file with the transformer alone, "
            f"{FOLDERS_ONLY[kind]}.from_single_file(FILE).save_pretrained(FOLDER/transformer) "
            "makes the folder's part"
        )
    return SINGLE_FILES.get(kind), f"{path}: checkpoint of kind {kind!r}"


def _family_in_index(folder: Path) -> tuple[str | None, str]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{index}: missing; model.path must be a diffusers folder")
    parts = read_json(index)
    parts = parts if isinstance(parts, dict) else {}
    for name, kind in parts.items():
        needed = isinstance(kind, list) and kind[0] and name not in UNUSED
        if needed and kind[0] not in LIBRARIES:
            raise UserError(f"{index}: {name!r} needs code from {kind[0]!r}, which is never run")
        if needed and not (folder / name).is_dir():
            raise UserError(f"{folder / name}: missing; the checkpoint is not whole")
        if needed:
            check_whole(folder / name)
    pipeline = parts.get("_class_name", "")
    found = PIPELINES.get(pipeline) if isinstance(pipeline, str) else None
    return found, f"{index}: pipeline {pipeline!r}"


def check_sampler(name: str, admitted: tuple[str, ...]) -> None:
    """Raises UserError where the family has no such sampler."""
    if name not in admitted:
        choice = " or ".join(repr(known) for known in ("auto", *admitted))
        raise UserError(f"generate.sampler: {name!r} is not for this checkpoint; use {choice}")


def identity(config: ModelConfig) -> dict[str, Any]:
    """Which weights these are, by the content of every file that the loader reads."""
    path, family = checkpoint(config), family_of(config)
    folder, files = path, {}
    if path.is_file():
        folder = import_module("craftune.models.single_file").settings_of(path, config)
        files["weights"] = sha256(path)
    read = SETTINGS if path.is_file() else (*SETTINGS, "*.safetensors")
    found = sorted({file for pattern in read for file in folder.rglob(pattern)})
    files |= {str(file.relative_to(folder)): sha256(file) for file in found}
    return {"family": family, "files": files}


def weights_sha256(config: ModelConfig) -> str:
    """One number for `identity`; reads every weight."""
    return hashlib.sha256(canonical(identity(config)).encode()).hexdigest()


def load(config: ModelConfig, device: torch.device) -> Model:
    """The checkpoint of a recipe, on the device, in `config.dtype`.

    Raises:
        UserError: it cannot be had, it is damaged, or it does not fit the settings.
    """
    family = family_of(config)
    if not config.t5 and family != "sd3":
        raise UserError(f"model.t5: a checkpoint of family {family!r} draws as it is; leave it out")
    return FAMILIES[family](checkpoint(config), config, device)
