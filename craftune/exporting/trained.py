"""What an export reads of a run folder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from craftune import methods, models
from craftune.config import Recipe
from craftune.errors import UserError
from craftune.methods import METHODS
from craftune.models.files import checkpoint
from craftune.models.single_file import settings_of
from craftune.records import Prompt, read_json, read_rows
from craftune.runs import done, stage_folder


@dataclass(frozen=True)
class Trained:
    """A run whose model is trained.

    Attributes:
        folder: the run's.
        recipe: as the run was made with.
        family: of the model.
        base: what was tuned: a local diffusers folder or single file.
        settings: the diffusers folder with the base's configs and tokenizers.
        weights: sha256 of every file that training wrote, by name.
        report: report.json, or None where the run has none yet.
        funnel: the selection's counts; empty where nothing was selected.
        stitch: how a P-GRAFT run draws (stitch.json of its training); None for others.
        counts: of every finished stage, by its name.
    """

    folder: Path
    recipe: Recipe
    family: str
    base: Path
    settings: Path
    weights: Mapping[str, str]
    report: Mapping[str, Any] | None
    funnel: Mapping[str, int]
    counts: Mapping[str, Mapping[str, int]]
    stitch: Mapping[str, Any] | None = None

    @property
    def rewards(self) -> tuple[str, ...]:
        """That chose the training samples, or that were maximised."""
        method = methods.build(self.recipe.method.name, self.recipe.method.settings)
        if method.fed_with == "prompts":
            return tuple(method.rewards)
        return self.recipe.score.rewards

    @property
    def model(self) -> Path:
        """The whole tuned model, a diffusers folder."""
        return stage_folder(self.folder, "train") / "model"

    @property
    def lora(self) -> Path:
        """The adapters, in diffusers' format.

        Raises:
            UserError: all weights were trained.
        """
        file = stage_folder(self.folder, "train") / "lora" / "pytorch_lora_weights.safetensors"
        if not file.is_file():
            raise UserError(
                f"{self.folder}: all weights were trained (train.lora.rank = 0), so there is no "
                "LoRA to export; use --to diffusers, or train with lora = { rank = 32 }"
            )
        return file

    @property
    def alpha(self) -> int:
        """Of the adapters; their scale is alpha / rank."""
        return self.recipe.train.lora.alpha or self.recipe.train.lora.rank

    def part(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and config.json of a part of the tuned model, e.g. "unet"."""
        folder = self.model / name
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        return weights, read_json(folder / "config.json")

    def prompts(self, count: int) -> list[str]:
        """The first prompts of the evaluation."""
        rows = read_rows(Prompt, stage_folder(self.folder, "prompts") / "evaluation.jsonl")
        return [row.prompt for row in rows[:count]]


def read_trained(folder: Path) -> Trained:
    """A run folder, checked.

    Raises:
        UserError: it is no run folder, it is damaged, or the stage `train` has not run; the base
            is no longer where the recipe says.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder (no run.json in it)")
    try:
        recipe = TypeAdapter(Recipe).validate_python(read_json(path))
    except ValidationError:
        raise UserError(f"{path}: damaged; `craftune run` with the recipe writes it anew") from None
    record = done(folder, "train")
    if record is None:
        raise UserError(f"{folder}: stage 'train' has not run; run `craftune run` first")
    if METHODS[recipe.method.name].fed_with == "pictures":
        raise UserError(
            f"{folder}: nothing to export: method {recipe.method.name!r} leaves the model as it "
            "was; its corrector is in 6-train/corrector"
        )
    base = checkpoint(recipe.model)
    report = stage_folder(folder, "report") / "report.json"
    selection = stage_folder(folder, "select") / "selection.json"
    stitch = stage_folder(folder, "train") / "stitch.json"
    return Trained(
        folder=folder,
        recipe=recipe,
        family=models.family_of(recipe.model),
        base=base,
        settings=settings_of(base, recipe.model) if base.is_file() else base,
        weights={k: v for k, v in record["outputs"].items() if k.endswith(".safetensors")},
        report=read_json(report) if report.is_file() else None,
        funnel=read_json(selection)["funnel"] if selection.is_file() else {},
        counts=dict(_counts(folder)),
        stitch=read_json(stitch) if stitch.is_file() else None,
    )


def _counts(folder: Path) -> Iterator[tuple[str, Mapping[str, int]]]:
    for name in ("prompts", "refine", "generate", "score", "select", "train", "evaluate"):
        record = done(folder, name)
        if record is not None:
            yield name, record["counts"]


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Adapters and the header's metadata of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
