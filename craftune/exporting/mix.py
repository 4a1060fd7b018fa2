"""`craftune mix`: several tunings of one model as one, by the sum in `craftune.mixing`."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from craftune import models
from craftune.config import ModelConfig
from craftune.errors import UserError
from craftune.exporting.formats import for_older_releases
from craftune.mixing import check_alike, mix_into
from craftune.models import foreign
from craftune.models.common import LOADING_ERRORS, check_weights
from craftune.models.files import checkpoint, resolve, stored_dtype
from craftune.models.single_file import settings_of
from craftune.records import write_json
from craftune.runs import done, stage_folder

LORA_FILE = "pytorch_lora_weights.safetensors"
RECORD = "mix.json"
TEXT_ENCODERS = ("text_encoder", "lora_te")
"""How the names of a text encoder's adapters begin."""


@dataclass(frozen=True)
class Part:
    """One tuning and its scale.

    Attributes:
        name: as it was given, for errors.
        path: of a LoRA's file; else a whole model, as `ModelConfig.path` takes it.
        lora: whether it holds adapters alone.
        run: the run folder of a whole model, where it comes from one.
    """

    name: str
    scale: float
    path: str
    lora: bool
    run: Path | None = None


def mix(base: str, tunings: Sequence[str], out: Path, dtype: str | None = None) -> Path:
    """Write base + sum of scale * (tuned - base) as a diffusers folder.

    Text encoders and VAE are the base's. All models are in memory at once, in float32.

    Args:
        base: a diffusers folder, hub id, single .safetensors file, or "craftune:...".
        tunings: "MODEL=SCALE"; MODEL is a run folder, a folder or file of LoRA weights, or
            anything that `base` may be.
        out: new folder.
        dtype: of the weights; by default the base's own.

    Raises:
        UserError: no such model, models of different families or shapes, a run that was tuned
            from other weights or that draws with two networks, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder with --out")
    origin = ModelConfig(base)
    parts = [_part(text) for text in tunings]
    path = checkpoint(origin)
    for part in parts:
        _refuse_other(part, origin)
    settings = settings_of(path, origin) if path.is_file() else path
    pipe = _opened(base, path, settings)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    network = getattr(pipe, name)
    check_weights(network, f"{base}: {name}")
    own, states = network.state_dict(), []
    for part in parts:
        state = _state(part, path, settings, name)
        try:
            check_alike(own, [state])
        except ValueError as error:
            raise UserError(f"{part.name}: cannot be mixed into {base}: {error}") from None
        if part.lora and all(torch.equal(own[k], state[k]) for k in own):
            raise UserError(f"{part.name}: changes no weight of {base}; is it a LoRA of its kind?")
        states.append((state, part.scale))
    mix_into(network, own, states)
    _write(pipe, settings, out, dtype or stored_dtype(path), base, parts)
    return out


def _write(
    pipe: Any, settings: Path, out: Path, dtype: str, base: str, parts: Sequence[Part]
) -> None:
    """The folder, if it loads; and beside the weights what they were made of."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        foreign.write_pipeline(pipe, settings, partial, getattr(torch, dtype))
        for_older_releases(partial)
        made_of = [{"model": part.name, "scale": part.scale} for part in parts]
        write_json(partial / RECORD, {"base": base, "mixed": made_of, "dtype": dtype})
        foreign.open_folder(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _part(text: str) -> Part:
    """What "MODEL=SCALE" names.

    Raises:
        UserError: no scale, or a model that cannot take part.
    """
    name, _, number = text.rpartition("=")
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not name or not math.isfinite(scale):
        raise UserError(f"{text!r}: expected MODEL=SCALE, e.g. runs/my-lora=0.5")
    path = resolve(name)
    if (path / "run.json").is_file():
        return _of_run(name, path, scale)
    if (path / LORA_FILE).is_file():
        return Part(name, scale, str(path / LORA_FILE), lora=True)
    return Part(name, scale, name, lora=path.suffix == ".safetensors" and _holds_lora(path))


def _of_run(name: str, folder: Path, scale: float) -> Part:
    """A run's adapters, or its whole model."""
    if done(folder, "train") is None:
        raise UserError(f"{name}: stage 'train' has not run; run `craftune run` first")
    trained = stage_folder(folder, "train")
    if (trained / "stitch.json").is_file():
        raise UserError(
            f"{name}: a P-GRAFT run tunes the noisy part of the chain alone and cannot be mixed "
            "for all of it; scale it in its own run by evaluate.scales"
        )
    lora = trained / "lora" / LORA_FILE
    if lora.is_file():
        return Part(name, scale, str(lora), lora=True)
    return Part(name, scale, str(trained / "model"), lora=False, run=folder)


def _holds_lora(file: Path) -> bool:
    """Whether a file has adapters in it.

    Raises:
        UserError: there is no such file, it is damaged, or it holds adapters of a text encoder.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole file ({error}); copy it again") from None
    if any(key.startswith(TEXT_ENCODERS) and "lora" in key for key in names):
        raise UserError(f"{file}: also adapts a text encoder, which mixing leaves as it is")
    return any("lora" in key for key in names)


def _refuse_other(part: Part, base: ModelConfig) -> None:
    """Refuse a whole model of another family, or one that was tuned from other weights."""
    if part.lora:
        return
    kinds = [models.family_of(config) for config in (base, ModelConfig(part.path))]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{part.name}: of family {kinds[1]!r}, but {base.path} is of {kinds[0]!r}; only "
            "models of one architecture can be mixed"
        )
    if part.run is None:
        return
    first = part.run / "round-1"
    record = done(first if first.is_dir() else part.run, "train") or {}
    start = record["config"]["model"]
    if start["path_sha256"] != models.weights_sha256(base):
        raise UserError(
            f"{part.name}: was tuned from {start['path']}, whose weights are not those of "
            f"{base.path}; mix it into what it was tuned from"
        )


def _state(part: Part, base: Path, settings: Path, name: str) -> dict[str, Tensor]:
    """The tuned network's weights, adapters added to the base's."""
    if not part.lora:
        path = checkpoint(ModelConfig(part.path))
        network = getattr(_opened(part.name, path, settings), name)
        check_weights(network, f"{part.name}: {name}")
        return network.state_dict()
    pipe = _opened(part.name, base, settings)
    try:
        pipe = foreign.with_lora(pipe, Path(part.path))
    except (*LOADING_ERRORS, IndexError) as error:  # IndexError: none of its names is known
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{part.name}: does not load as a LoRA of {base}: {reason}") from None
    return getattr(pipe, name).state_dict()


def _opened(name: str, path: Path, settings: Path) -> Any:
    try:
        return foreign.open_checkpoint(path, settings)
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: cannot be loaded: {reason}") from None
