"""From a recipe to its eight stages: what each is made from, and what it does."""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from craftune import methods, models, refiners, rewards
from craftune.config import ModelConfig, Recipe
from craftune.errors import UserError
from craftune.records import canonical, sha256, write_json
from craftune.runs import Stage, done, execute, locked, redo, stage_folder
from craftune.stages.evaluate import evaluate
from craftune.stages.generate import generate
from craftune.stages.prompts import prompts
from craftune.stages.refine import refine
from craftune.stages.report import report
from craftune.stages.score import score
from craftune.stages.select import choose
from craftune.stages.train import train


def check(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything loads.

    Raises:
        UserError: an unknown name of a reward, refiner, method, family or setting, a number out
            of range, a file or checkpoint that is missing, or an impossible device.
    """
    rewards.check_names(recipe.score.rewards, "score.rewards")
    rewards.check_names(recipe.evaluate.rewards, "evaluate.rewards")
    if recipe.refine.by != refiners.FROM_FILE:
        refiners.load(recipe.refine.by)
    methods.build(recipe.method.name, recipe.method.settings)
    _check_numbers(recipe)
    named = {recipe.select.roles.get(key, key) for key in recipe.select.weights}
    for name in sorted(named - set(recipe.score.rewards)):
        raise UserError(f"select.weights: reward {name!r} is not in score.rewards")
    for key, source in (("prompts", recipe.prompts.source), ("evaluate", recipe.evaluate.source)):
        if source and not models.resolve(source).is_file():
            raise UserError(f"{key}.source {source!r}: no such file")
    models.family_of(recipe.model)
    device_of(recipe)


def _check_numbers(recipe: Recipe) -> None:
    """Counts that must be positive."""
    least = {
        "refine.variants": 1,
        "generate.num_steps": 1,
        "generate.seeds_per_variant": 1,
        "generate.batch_size": 1,
        "generate.shard_size": 1,
        "score.batch_size": 1,
        "train.steps": 1,
        "train.batch_size": 1,
        "train.micro_batch": 0,
        "train.save_every": 1,
        "train.keep_checkpoints": 0,
        "evaluate.images_per_prompt": 1,
        "evaluate.num_prompts": 0,
        "prompts.limit": 0,
    }
    for key, lowest in least.items():
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        if value < lowest:
            raise UserError(f"{key}: expected at least {lowest}, got {value}")


def device_of(recipe: Recipe) -> torch.device:
    """Where the networks run.

    Raises:
        UserError: torch does not know the device, or has none of that kind.
    """
    if recipe.run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=recipe.run.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"run.device {recipe.run.device!r}: {reason}") from None


def run_folder(recipe: Recipe) -> Path:
    """Where the run lives."""
    return Path(recipe.run.out).expanduser() / recipe.run.name


def run(recipe: Recipe, *, only: str | None = None, again: str | None = None) -> Path:
    """All stages, or one; those that are done are skipped. Returns the run folder.

    Args:
        only: the one stage to run.
        again: throw away this stage and all later ones first.

    Raises:
        UserError: see `check` and `runs.execute`.
    """
    check(recipe)
    folder = run_folder(recipe)
    with locked(folder):
        if again:
            redo(folder, again)
        write_json(folder / "run.json", asdict(recipe))
        for make in stages(recipe, folder):
            stage = make()
            if only in (None, stage.name):
                _announce(folder, stage)
    return folder


def _announce(folder: Path, stage: Stage) -> None:
    worked = execute(folder, stage)
    record = done(folder, stage.name) or {}
    counts = ", ".join(f"{value} {name}" for name, value in record["counts"].items() if value)
    state = f"{record['seconds']:6.1f} s" if worked else "    done"
    print(f"{stage.name:>9} {state}  {counts}", file=sys.stderr, flush=True)


def stages(recipe: Recipe, folder: Path) -> Iterator[Callable[[], Stage]]:
    """The stages in order; each is made when its turn comes, as it may look at earlier files."""
    at = lambda name: stage_folder(folder, name)  # noqa: E731
    seed, device = recipe.run.seed, device_of(recipe)
    base = recipe.model
    weights = canonical(models.identity(base))
    drawn_with = {
        "model": {**asdict(base), "sha256": _digest(weights)},
        "generate": _without(asdict(recipe.generate), "shard_size"),
        "seed": seed,
    }

    def load(config: ModelConfig) -> Any:
        return models.load(config, device)

    yield lambda: Stage(
        "prompts",
        (),
        {
            "prompts": asdict(recipe.prompts),
            "evaluate": _only(asdict(recipe.evaluate), "source", "num_prompts"),
            "sha256": _files(recipe.prompts.source, recipe.evaluate.source),
            "seed": seed,
        },
        lambda out: prompts(recipe.prompts, recipe.evaluate, seed, out),
    )
    yield lambda: Stage(
        "refine",
        ("prompts",),
        {"refine": asdict(recipe.refine), "sha256": _files(recipe.refine.source), "seed": seed},
        lambda out: refine(recipe.refine, seed, at("prompts") / "prompts.jsonl", out),
    )
    yield lambda: Stage(
        "generate",
        ("prompts", "refine"),
        drawn_with,
        lambda out: generate(
            recipe.generate,
            load(base),
            seed,
            at("prompts") / "prompts.jsonl",
            at("refine") / "refined.jsonl",
            out,
        ),
        str(device),
    )
    yield lambda: Stage(
        "score",
        ("generate",),
        {"score": _only(asdict(recipe.score), "rewards")},
        lambda out: score(recipe.score, at("generate"), out),
        str(device),
    )
    yield lambda: Stage(
        "select",
        ("generate", "score"),
        {"select": asdict(recipe.select)},
        lambda out: choose(recipe.select, at("generate"), at("score"), out),
    )
    yield lambda: Stage(
        "train",
        ("generate", "select"),
        {
            "train": _without(
                asdict(recipe.train), "micro_batch", "save_every", "keep_checkpoints"
            ),
            "method": asdict(recipe.method),
            "model": drawn_with["model"],
            "seed": seed,
        },
        lambda out: train(
            recipe.train,
            methods.build(recipe.method.name, recipe.method.settings),
            load(replace(base, dtype="float32")),
            seed,
            at("select") / "selection.parquet",
            at("generate"),
            out,
        ),
        str(device),
    )

    def compare(out: Path) -> Mapping[str, int]:
        names = (*recipe.score.rewards, *recipe.evaluate.rewards)
        tuned = replace(base, path=str(at("train") / "model"), family="auto", variant=None)
        counts = {}
        for arm, config in (("base", base), ("tuned", tuned)):
            counts[f"{arm} images"] = evaluate(
                arm,
                recipe.evaluate,
                recipe.generate,
                load(config),
                names,
                seed,
                at("prompts") / "evaluation.jsonl",
                out,
            )
        shutil.copy(at("prompts") / "evaluation.jsonl", out / "prompts.jsonl")
        return counts

    yield lambda: Stage(
        "evaluate",
        ("prompts", "train"),
        {
            **drawn_with,
            "evaluate": _only(asdict(recipe.evaluate), "images_per_prompt", "rewards"),
            "rewards": list(recipe.score.rewards),
        },
        compare,
        str(device),
    )
    yield lambda: Stage(
        "report",
        ("prompts", "refine", "generate", "score", "select", "train", "evaluate"),
        {"report": asdict(recipe.report), "resamples": recipe.evaluate.resamples, "seed": seed},
        lambda out: report(folder, out),
    )


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def _files(*sources: str) -> dict[str, str]:
    """sha256 of the user's files, by name; those not given are left out."""
    return {name: sha256(models.resolve(name)) for name in sources if name}


def _only(section: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: section[key] for key in keys}


def _without(section: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}
