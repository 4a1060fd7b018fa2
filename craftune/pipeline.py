"""A recipe checked, and its eight stages run one after the other."""

import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from craftune import methods, models, optimizers, refiners, rewards
from craftune.config import Recipe
from craftune.errors import UserError, unknown_name
from craftune.hub_prompts import on_hub, parse
from craftune.plan import stages
from craftune.processes import ALONE, Processes
from craftune.records import write_json
from craftune.runs import STAGES, Stage, done, execute, locked, redo, refuse_change, stage_folder
from craftune.selection import NothingSelected, select
from craftune.stages.invert import source_of
from craftune.stages.score import CUT
from craftune.tuning import MFLOP, SCALED

SENTENCES = {
    "prompts": "{prompts:,} of {rows:,} rows to train on, {evaluation_prompts:,} to compare on",
    "refine": "{refined:,} rewrites of {prompts:,} prompts",
    "generate": "{candidates:,} candidates",
    "score": "{scores:,} scores of {candidates:,} candidates",
    "select": "{selected:,} of {candidates:,} candidates; {groups_kept:,} of {groups:,} prompts "
    "pass the filter",
    "train": "{steps:,} steps on {examples:,} images",
    "evaluate": "{base images:,} images of base, {tuned images:,} of tuned",
    "report": "{prompts:,} prompts, {image_pairs:,} pairs of images",
}
"""What is said of a finished stage, from its counts."""
INVERTED = "{noises:,} noises of pictures"
"""The same of `generate` where it inverts."""

NOTES = {
    "refine": ("prompts with fewer rewrites", "tokens in", "tokens out"),
    "evaluate": (SCALED, *MFLOP.values()),
}
"""Counts that are said of a finished stage where they are there and not 0."""

LESS_MEMORY = {
    "refine": "lower refine.chat.batch_size",
    "generate": "lower generate.batch_size",
    "score": "lower score.batch_size",
    "train": "set train.micro_batch and train.gradient_checkpointing to 'auto', or train adapters "
    "alone",
    "evaluate": "lower generate.batch_size",
}
"""What to change where the device's memory is not enough; it changes no result."""


def check(recipe: Recipe, processes: Processes = ALONE) -> None:
    """Refuse what cannot work, before anything loads.

    Raises:
        UserError: an unknown name of a reward, refiner, method, family or setting, a selection
            that does not fit the rewards, a file or checkpoint that is missing, an impossible
            device, or more processes than rows in a batch.
    """
    rewards.check_names(recipe.score.rewards, "score.rewards")
    rewards.check_names(recipe.evaluate.rewards, "evaluate.rewards")
    rewards.check_settings(recipe.reward)
    refiners.check(recipe.refine)
    method = methods.build(recipe.method.name, recipe.method.settings)
    if isinstance(method, methods.PGRAFT) and method.after not in recipe.generate.keep_states:
        raise UserError(
            f"method.settings.after: {method.after} is none of generate.keep_states "
            f"{list(recipe.generate.keep_states)}; add it there, or choose one of them"
        )
    optimizers.check_installed(recipe.train.optimizer)
    if method.fed_with == "examples":
        _check_selection(recipe)
    elif method.fed_with == "prompts":
        _check_objective(method, recipe)
    else:
        _check_correction(method, recipe)
    for section in ("prompts", "refine", "evaluate"):
        source = getattr(recipe, section).source
        if on_hub(source) and section != "refine":
            parse(source, f"{section}.source")
        elif source and not models.resolve(source).is_file():
            here = "" if Path(source).is_absolute() else f" (looked in {Path.cwd()})"
            raise UserError(f"{section}.source {source!r}: no such file{here}")
    if not recipe.evaluate.source and not recipe.evaluate.num_prompts:
        raise UserError(
            "evaluate.num_prompts: 0 takes all of evaluate.source, but there is none; give one, "
            "or a number of prompts to hold out"
        )
    family = models.family_of(recipe.model)
    if recipe.generate.sampler != "auto":
        models.check_sampler(recipe.generate.sampler, models.ADMITTED[family])
    device_of(recipe, processes)
    if recipe.train.batch_size < processes.count:
        raise UserError(
            f"train.batch_size: {recipe.train.batch_size} is fewer than {processes.count} "
            "processes, but each must get a row; launch fewer, or choose larger batches"
        )


def _check_selection(recipe: Recipe) -> None:
    """Select from a made-up pool of the real one's shape: all names and sizes must fit."""
    columns = 1 + recipe.refine.variants * recipe.generate.seeds_per_variant
    names = recipe.score.rewards
    if not names:
        raise UserError("score.rewards: empty; name at least one reward")
    scores = np.random.default_rng(0).normal(size=(len(names), 2, columns))
    rule = recipe.select.accept.rule
    if rule in ("binary", "distinct"):
        scores = np.indices(scores.shape).sum(axis=0) % 2.0
    # Which rewards a real pool holds is not known yet: none of them exceeds the ceiling here.
    config = replace(recipe.select, accept=replace(recipe.select.accept, ceiling=None))
    try:
        select(config, names, scores, keys=np.zeros(scores.shape[1:], np.int64))
    except NothingSelected:
        pass  # what a real pool holds is not known yet
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_objective(method: methods.FromPrompts, recipe: Recipe) -> None:
    """The rewards that the method maximises: known, differentiable, scaled by their names."""
    key = "method.settings.rewards"
    rewards.check_names(method.rewards, key)
    rewards.made_from(method.rewards, recipe.reward)
    rewards.check_gradients(method.rewards, key)
    for name in method.scales:
        if name not in method.rewards:
            unknown = unknown_name("reward", name, method.rewards)
            raise UserError(f"method.settings.scales: {unknown}")


def _check_correction(method: methods.NoiseCorrection, recipe: Recipe) -> None:
    """Pictures, rewards to compare on, and nothing that speaks of the model's own weights."""
    source_of(method)
    if not (*recipe.score.rewards, *recipe.evaluate.rewards):
        raise UserError("evaluate.rewards: empty; name at least one reward to compare on")
    name = recipe.method.name
    told = {
        "run.rounds": (recipe.run.rounds, 1),
        "train.lora.rank": (recipe.train.lora.rank, 0),
        "evaluate.scales": (recipe.evaluate.scales, ()),
    }
    for key, (value, wanted) in told.items():
        if value != wanted:
            raise UserError(
                f"{key}: {value!r}, but method {name!r} leaves the model's weights as they are; "
                "leave it out"
            )


def device_of(recipe: Recipe, processes: Processes = ALONE) -> torch.device:
    """Where the networks of this process run; each process of a machine has a GPU of its own.

    Raises:
        UserError: torch does not know the device, or has none of that kind or number.
    """
    name = recipe.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if processes.count == 1:
            return torch.device(name)
    try:
        if processes.count > 1 and torch.device(name).type != "cpu":
            if torch.device(name).index is not None:
                raise UserError(
                    f"run.device {name!r}: {processes.count} processes need a device each; write "
                    f"{torch.device(name).type!r}"
                )
            name = f"{name}:{processes.local_rank}"
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"run.device {name!r}: {reason}") from None


def run_folder(recipe: Recipe) -> Path:
    """Where the run lives."""
    return Path(recipe.run.out).expanduser() / recipe.run.name


def run(
    recipe: Recipe,
    processes: Processes = ALONE,
    *,
    only: str | None = None,
    again: str | None = None,
) -> Path:
    """All stages, or one; those that are done are skipped. Returns the run folder.

    A run folder is of one recipe: where a stage was made with other settings, nothing is touched.

    Args:
        processes: those that share the work; each calls this function.
        only: the one stage to run.
        again: throw away this stage and all later ones first.

    With `run.rounds` above 1, the rounds before the last come first, whole and as they are;
    `only` and `again` are about the last.

    Raises:
        UserError: see `check` and `runs.execute`.
    """
    check(recipe, processes)
    folder, device = run_folder(recipe), device_of(recipe, processes)
    if processes.count > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # rewards of the user's may say just "cuda"
    with processes.one_voice(), locked(folder, processes):
        where = f"{processes.count} x {device.type}" if processes.count > 1 else str(device)
        print(f"{folder}: {recipe.model.path} on {where}", file=sys.stderr, flush=True)
        before = None
        for number in range(1, recipe.run.rounds):
            before = _round(recipe, folder / f"round-{number}", device, processes, before)
        planned = stages(recipe, folder, device, processes, before)
        names = [stage.name for stage in planned]
        for wanted in {only, again} - {None, *names}:
            raise UserError(
                f"stage {wanted!r}: method {recipe.method.name!r} does without it; its stages are "
                f"{', '.join(names)}"
            )
        if processes.main:
            _prepare(recipe, folder, planned, again)
        for stage in planned:
            if only in (None, stage.name):
                _execute(folder, stage, processes)
    return folder


def _round(
    recipe: Recipe, folder: Path, device: torch.device, processes: Processes, before: Path | None
) -> Path:
    """All stages up to `train` of a round that is not the last. Returns its folder."""
    planned = stages(recipe, folder, device, processes, before)
    if processes.main:
        print(f"{folder.name} of {recipe.run.rounds}", file=sys.stderr, flush=True)
        folder.mkdir(exist_ok=True)
        _prepare(recipe, folder, planned, None)
    for stage in planned:
        if STAGES.index(stage.name) <= STAGES.index("train"):
            _execute(folder, stage, processes)
    return folder


def _prepare(recipe: Recipe, folder: Path, planned: list[Stage], again: str | None) -> None:
    """Refuse settings that differ from the folder's; throw away what is made again."""
    for stage in planned:
        if stage.name == again:
            break
        refuse_change(folder, stage)
    if again:
        redo(folder, again)
    write_json(folder / "run.json", asdict(recipe))


def _out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of the machine, as torch and numpy say it."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _execute(folder: Path, stage: Stage, processes: Processes = ALONE) -> None:
    """Run one stage and say so on a line of standard error."""
    try:
        worked = execute(folder, stage, processes)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = ([*str(error).splitlines(), "out of memory"])[0]
        mend = LESS_MEMORY.get(stage.name, "free some of the device's memory")
        raise UserError(f"stage {stage.name!r}: {reason}; {mend} and run again") from None
    except OSError as error:
        error.filename = error.filename or str(stage_folder(folder, stage.name))
        raise
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        reason = os.strerror(int(number[1]))
        raise OSError(int(number[1]), reason, str(stage_folder(folder, stage.name))) from None
    if not processes.main:
        return
    record = done(folder, stage.name) or {}
    counts = record["counts"]
    rejected = ", ".join(
        f"{n:,} {name.removeprefix('rejected: ')}"
        for name, n in counts.items()
        if n and name.startswith("rejected: ")
    )
    notes = [f"; {counts[name]:,} {name}" for name in NOTES.get(stage.name, ()) if counts.get(name)]
    state = f"{record['seconds']:7.1f} s" if worked else "  already"
    sentence = INVERTED if "noises" in counts else SENTENCES[stage.name]
    text = sentence.format_map(counts) + (f" (rejected: {rejected})" * bool(rejected))
    for name, n in counts.items():
        if name.startswith(CUT):
            text += f"; {n:,} of {counts['prompts']:,} {name}"
    text += "".join(notes)
    number = STAGES.index(stage.name) + 1
    print(f"{number} {stage.name:<8} {state}  {text}", file=sys.stderr, flush=True)
