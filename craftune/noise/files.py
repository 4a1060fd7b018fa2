"""A corrector of a conditional model, new and on disk: config.json and model.safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from craftune.errors import UserError
from craftune.noise.corrector import trigonometric
from craftune.records import read_json, write_json, written
from craftune.rows import Layout, RowDenoiser, RowNetwork

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class Shape:
    """What a corrector is built from.

    Attributes:
        latent_shape: of one image.
        patch: side of the patches that its transformer sees as rows.
        cond_width: numbers of a prompt's `summary`; 0 for an unconditional model.
        corrector_steps: it was trained to be used with.
    """

    latent_shape: tuple[int, int, int]
    patch: int
    width: int
    depth: int
    cond_width: int
    corrector_steps: int


def new_corrector(shape: Shape, seed: int) -> RowDenoiser:
    """One that has learnt nothing: it returns the noise as it is.

    Raises:
        UserError: the patches do not tile the latents.
    """
    try:
        layout = Layout(shape.latent_shape, shape.patch)
    except ValueError as error:
        raise UserError(f"method.settings.patch: {error}; use 1, or another divisor") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RowNetwork(layout.rows, shape.width, shape.depth, cond_width=shape.cond_width)
    return RowDenoiser(network, trigonometric(), layout, "prompt" if shape.cond_width else "")


def save_corrector(
    folder: Path, network: torch.nn.Module, shape: Shape, about: Mapping[str, Any]
) -> None:
    """Write the folder; config.json last.

    Args:
        about: which model, sampler, steps and guidance it belongs to; kept beside the shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().float().cpu().contiguous() for k, v in network.state_dict().items()}
    with written(folder / WEIGHTS) as partial:
        save_file(state, partial)
    write_json(folder / CONFIG, {**vars(shape), "for": dict(about)})


def load_corrector(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[RowDenoiser, Shape]:
    """The corrector of a run, 6-train/corrector, and its shape.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no corrector here (no {CONFIG}); give RUN/6-train/corrector")
    try:
        shape = Shape(**read_json(folder / CONFIG))
        corrector = new_corrector(shape, 0)
        corrector.network.load_state_dict(load_file(folder / WEIGHTS))
    except (ValidationError, TypeError, SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: damaged corrector ({reason}); run with --redo train") from None
    corrector.network.eval().requires_grad_(False).to(device)
    return corrector, shape
