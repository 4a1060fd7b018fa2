"""Hand a trained model on: written, loaded back as others load it, drawn with, compared, kept.

Nothing stays of an export that does not draw what the trained model draws.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from craftune.errors import UserError
from craftune.exporting.card import card
from craftune.exporting.formats import FORMATS, Format, open_base
from craftune.exporting.trained import Trained, read_trained
from craftune.models import foreign
from craftune.models.common import LOADING_ERRORS
from craftune.pipeline import device_of
from craftune.records import read_json, write_json, write_text

PICTURES, STEPS = 2, 8
"""Drawn for the comparison, in at most this many steps."""
NOISE, VISIBLE = 1e-5, 1e-3
"""Mean absolute differences of pixels in [0, 1]: float rounding; a quarter of a grey level."""
RECORD = "export.json"


@dataclass(frozen=True)
class Check:
    """How an export's pictures compare; mean absolute differences of pixels in [0, 1].

    Attributes:
        difference: from the trained model's pictures.
        change: of the trained model's pictures from the base's.
        limit: that the difference may reach.
        loader: of diffusers, with which the export was loaded.
        pictures: compared.
        num_steps: each was drawn in.
    """

    difference: float
    change: float
    limit: float
    loader: str
    pictures: int
    num_steps: int


def limit_of(change: float) -> float:
    """What may differ: nothing visible, and no more than a tenth of what training changed."""
    return max(NOISE, min(VISIBLE, change / 10))


def export(
    folder: Path, to: str, out: Path | None = None, dtype: str | None = None
) -> tuple[Path, Check]:
    """Write a run's model in a format of `FORMATS`, with a model card, and compare its pictures.

    Args:
        folder: a run folder whose stage `train` is done.
        to: the format's name.
        out: new folder; by default <run>/export/<format>.
        dtype: of the weights; by default as the run saved them (adapters: float32).

    Returns:
        The folder, and the comparison. An export of the same weights that is there already is
        taken as it is.

    Raises:
        UserError: the run has no such model, it draws with two networks and the format's readers
            cannot, the folder holds something else, the format cannot
            say what the model needs, the export does not load, or its pictures differ.
    """
    run, form = read_trained(folder), FORMATS[to]
    if run.stitch is not None and not form.stitches:
        raise UserError(
            f"{folder}: a P-GRAFT run draws with two networks, one above t* and one below, and "
            f"what loads --to {to} cannot; use --to diffusers or --to lora with load_stitched"
        )
    out = out or folder / "export" / to
    stored = run.recipe.train.save_dtype
    precision = dtype or ("float32" if form.adapters else stored)
    key = {"format": to, "dtype": precision, "weights": dict(run.weights)}
    if out.exists():
        return out, _already(out, key)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        form.write(run, getattr(torch, precision), partial)
        check = compare(run, form, partial, stored if form.adapters else precision)
        if run.stitch is not None:
            write_json(partial / "stitch.json", run.stitch)
        write_text(partial / "README.md", card(run, to, precision, asdict(check)))
        write_json(partial / RECORD, {**key, "check": asdict(check)})
        partial.rename(out)
    except SafetensorError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out, check


def _already(out: Path, key: dict[str, Any]) -> Check:
    record = read_json(out / RECORD) if (out / RECORD).is_file() else {}
    check = record.pop("check", None)
    if record != key or check is None:
        raise UserError(
            f"{out}: exists and is not this export; delete it or choose another folder with --out"
        )
    return Check(**check)


def compare(run: Trained, form: Format, out: Path, rounded_to: str) -> Check:
    """Draw with the base, the trained model and the export; refuse an export that differs.

    Args:
        rounded_to: precision to which the weights of all three are rounded first.

    Raises:
        UserError: the export does not load, or differs; says by how much.
    """
    prompts = run.prompts(PICTURES)
    num_steps = min(STEPS, run.recipe.generate.num_steps)

    def drawn(pipe: Any) -> torch.Tensor:
        return foreign.draw(
            pipe,
            prompts,
            num_steps=num_steps,
            guidance_scale=run.recipe.generate.guidance_scale,
            rounded_to=getattr(torch, rounded_to),
            dtype=getattr(torch, run.recipe.model.dtype),
            device=device_of(run.recipe),
        )

    trained = drawn(foreign.open_folder(run.model))
    base = drawn(open_base(run))
    try:
        exported = drawn(form.open(run, out))
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{run.folder}: the export does not load with {form.loader}: {reason}"
        ) from None
    difference = float((exported - trained).abs().mean())
    change = float((base - trained).abs().mean())
    limit = limit_of(change)
    if not difference <= limit:  # NaN is no match either
        raise UserError(
            f"{run.folder}: the export, loaded with {form.loader}, does not draw what the trained "
            f"model draws: pixels in [0, 1] differ by {difference:.2g} on average (limit "
            f"{limit:.2g}; base and trained differ by {change:.2g}); nothing was exported"
        )
    return Check(difference, change, limit, form.loader, len(prompts), num_steps)
