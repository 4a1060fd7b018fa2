"""One .safetensors file with a whole checkpoint, as the original repositories publish them.

The file holds weights alone. Which model it is follows from its keys, by diffusers' own rules;
configs and tokenizer come from a diffusers folder beside it.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils as diffusers_rules
from safetensors import SafetensorError, safe_open
from torch import Tensor

from craftune.config import ModelConfig
from craftune.errors import UserError
from craftune.models.files import settings_folder
from craftune.records import read_json

NETWORKS = ("model.diffusion_model.", "double_blocks.", "joint_blocks.")
"""How the keys of a denoiser begin; without one, the file is a LoRA, a VAE or the like."""


def kind_of(path: Path) -> str:
    """diffusers' name for the kind of checkpoint, e.g. "v1", "v2", "xl_base".

    Raises:
        UserError: the file is damaged, or holds no denoiser.
    """
    weights = _shapes(path)
    if not any(name.startswith(NETWORKS) for name in weights):
        raise UserError(
            f"{path}: holds no denoiser in the original layout (first key: "
            f"{min(weights, default='none')!r}); give a whole checkpoint, not a LoRA or VAE"
        )
    return diffusers_rules.infer_diffusers_model_type(weights)


def settings_of(path: Path, config: ModelConfig) -> Path:
    """The local diffusers folder with the file's configs and tokenizer.

    Raises:
        UserError: the folder cannot be had, the file does not say whether it predicts epsilon or
            v, or it says so and the folder's scheduler does not.
    """
    kind = kind_of(path)
    if kind == "v2" and not config.config:
        raise UserError(
            f"{path}: a Stable Diffusion 2 file does not say what it predicts; set model.config = "
            "'stabilityai/stable-diffusion-2-1' (v) or 'stabilityai/stable-diffusion-2-1-base' "
            "(epsilon), or a folder like one of them"
        )
    folder = settings_folder(config, usual_settings(kind))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = read_json(scheduler) if scheduler.is_file() else {}
    for mark, setting, wanted in (
        ("v_pred", "prediction_type", "v_prediction"),
        ("ztsnr", "rescale_betas_zero_snr", True),
    ):
        if mark in _shapes(path) and settings.get(setting) != wanted:
            raise UserError(
                f"{path}: is marked {mark!r}, but {scheduler} has {setting} = "
                f"{settings.get(setting)!r}; set model.config to a folder with {wanted!r}"
            )
    return folder


def usual_settings(kind: str) -> str:
    """The hub id that diffusers names for a kind of file."""
    return diffusers_rules.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def from_file(
    pipeline: Any,
    path: Path,
    settings: Path,
    dtypes: dict[str, torch.dtype],
    parts: dict[str, Any],
) -> Any:
    """The file as a diffusers pipeline; nothing is fetched.

    Args:
        pipeline: diffusers' class.
        settings: of `settings_of`.
        dtypes: of its parts by name, and of all others under "default".
        parts: given to diffusers as they are.

    Raises:
        ValueError: a weight is missing.
    """
    try:
        pipe = pipeline.from_single_file(
            str(path),
            config=str(settings),
            dtype=dtypes["default"],
            local_files_only=True,
            **parts,
        )
    except NotImplementedError:  # torch's, of a weight that the file did not fill
        raise ValueError(
            f"it lacks a weight that the configs in {settings} ask for; copy it again, or set "
            "model.config to a folder of its architecture"
        ) from None
    for name, dtype in dtypes.items():
        if name != "default":
            getattr(pipe, name).to(dtype)
    return pipe


def _shapes(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file as one without data; nothing but the header is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole .safetensors file ({error}); copy it again") from None
