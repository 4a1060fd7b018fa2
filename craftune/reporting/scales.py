"""The tuning scaled: what lies between base and tuned on the held-out prompts, by measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from craftune import statistics
from craftune.errors import UserError
from craftune.mixing import scale_arm
from craftune.records import read_table
from craftune.reporting import comparison, wording
from craftune.reporting.comparison import Bootstrap, interval
from craftune.reporting.read import KEY, Evaluation, Run, by_reward
from craftune.runs import stage_folder


@dataclass(frozen=True)
class Sweep:
    """The images that were drawn at every scale, base and tuned among them.

    Attributes:
        prompt: of each of the m images, numbered 0..p-1.
        keys: prompt id and number of each.
        arms: scale -> what it is called in the files; 0 is the base, 1 the tuned model.
        scores: scale -> reward -> score of each image.
    """

    prompt: Int[np.ndarray, " m"]
    keys: list[tuple[str, int]]
    arms: Mapping[float, str]
    scores: Mapping[float, Mapping[str, Float[np.ndarray, " m"]]]


def summary(
    run: Run, entries: Sequence[Mapping[str, Any]], boot: Bootstrap
) -> dict[str, Any] | None:
    """What report.json says of evaluate.scales; None where it names none.

    Args:
        entries: what is said of base and tuned, composite first.

    Raises:
        UserError: the images or scores of a scale are not those of the base's prompts.
    """
    sweep = read_sweep(run)
    if sweep is None:
        return None
    rows = [_row(run, sweep, scale, boot) for scale in sweep.arms]
    headline = [entry for entry in entries if entry["role"] != "training"]
    return {
        "prompts": int(sweep.prompt.max()) + 1,
        "rows": rows,
        "sentences": [wording.by_scale(entry, rows) for entry in headline],
    }


def read_sweep(run: Run) -> Sweep | None:
    """The arms that `evaluate` made, cut to the images that the scales have."""
    scales = sorted(run.recipe["evaluate"]["scales"])
    if not scales:
        return None
    folder, evaluation = stage_folder(run.folder, "evaluate"), run.evaluation
    keys = [
        (evaluation.ids[p], int(s))
        for p, s in zip(evaluation.prompt, evaluation.sample, strict=True)
    ]
    found = {scale: _arm(folder, evaluation, scale_arm(scale)) for scale in scales}
    rows = next(iter(found.values()))[0]
    if any(not np.array_equal(rows, other) for other, _ in found.values()):
        raise UserError(f"{folder}: the scales hold other images; run with --redo evaluate")
    ends = {0.0: evaluation.base, 1.0: evaluation.tuned}
    scores = {s: {name: x[rows] for name, x in end.items()} for s, end in ends.items()}
    scores |= {scale: scored for scale, (_, scored) in found.items()}
    arms = {0.0: "base", 1.0: "tuned"} | {scale: scale_arm(scale) for scale in scales}
    return Sweep(
        prompt=np.unique(evaluation.prompt[rows], return_inverse=True)[1].ravel(),
        keys=[keys[row] for row in rows],
        arms={scale: arms[scale] for scale in sorted(arms)},
        scores=scores,
    )


def _arm(
    folder: Path, evaluation: Evaluation, arm: str
) -> tuple[Int[np.ndarray, " m"], dict[str, Float[np.ndarray, " m"]]]:
    """Places of its images among the base's pairs, and their scores."""
    order = [(key, "ascending") for key in KEY]
    table = read_table(folder.glob(f"images-{arm}-*.parquet"), [*KEY, "seed"]).sort_by(order)
    own = zip(*(table[k].to_pylist() for k in (*KEY, "seed")), strict=True)
    seeds = evaluation.seed.tolist()
    where = {
        (evaluation.ids[p], int(s), seeds[i]): i
        for i, (p, s) in enumerate(zip(evaluation.prompt, evaluation.sample, strict=True))
    }
    rows = [where.get(key) for key in own]
    if not rows or None in rows:
        raise UserError(
            f"{folder}: {arm} does not hold prompts, samples and seeds of the base's; run with "
            "--redo evaluate"
        )
    scored = by_reward(read_table(folder.glob(f"scores-{arm}-*.parquet")), table, folder, arm)
    return np.array(rows, dtype=np.int64), {name: scored[name] for name in evaluation.base}


def _row(run: Run, sweep: Sweep, scale: float, boot: Bootstrap) -> dict[str, Any]:
    """Every measure at one scale, as it is and against the base on the same images."""
    weights, centred = run.selection["weights"], comparison.composite_scales(run)
    own, base = (
        {"composite": statistics.composite(sweep.scores[s], weights, centred), **sweep.scores[s]}
        for s in (scale, 0.0)
    )
    measures = {}
    for name in own:
        found = statistics.compare(base[name], own[name], sweep.prompt, boot.rng(), boot.resamples)
        measures[name] = {"mean": found.tuned, "difference": interval(found.difference)}
    return {"scale": scale, "measures": measures, "diversity": _diversity(run, sweep, scale, boot)}


def _diversity(run: Run, sweep: Sweep, scale: float, boot: Bootstrap) -> dict[str, Any] | None:
    """How far apart a prompt's images lie, and that over the base's."""
    if np.bincount(sweep.prompt).min() < 2:
        return None
    own, base = (
        comparison.spread(run, sweep.arms[s], sweep.keys, sweep.prompt) for s in (scale, 0.0)
    )
    found = statistics.ratio(own, base, boot.rng(), boot.resamples)
    return {"mean": own.mean(), "ratio": None if found is None else interval(found)}
