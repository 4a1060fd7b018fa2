"""Diagrams that the page draws from boxes: positions in percent of the width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from craftune.reporting import wording
from craftune.reporting.wording import Number

NO_FILTER = "none"


@dataclass(frozen=True)
class Step:
    """One row of a funnel.

    Attributes:
        label: what this row is, or why rows were lost here.
        count: what is left.
        lost: how many went at this step; 0 for the first and last row.
        left: `count` in percent of the first row.
        gone: `lost` in percent of the first row.
    """

    label: str
    count: int
    lost: int
    left: Number
    gone: Number


@dataclass(frozen=True)
class Whisker:
    """A mean and its interval on a common axis, in percent of its width."""

    entry: Mapping[str, Any]
    mean: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class Forest:
    """All measures in standard deviations of the base's images, on one axis."""

    rows: tuple[Whisker, ...]
    zero: Number
    ticks: tuple[tuple[Number, str], ...]


@dataclass(frozen=True)
class Dumbbell:
    """Base and tuned of one category on a common axis, in percent of its width."""

    category: str
    prompts: int
    base: Number
    tuned: Number
    cell: Mapping[str, Any]


def forest(entries: Sequence[Mapping[str, Any]]) -> Forest | None:
    """None where no measure varies over the base's images."""
    known = [entry for entry in entries if entry["effect"]]
    if not known:
        return None
    bounds = [0.0]
    for entry in known:
        effect = entry["effect"]
        bounds += [x for x in (effect["low"], effect["mean"], effect["high"]) if x is not None]
    low, high = min(bounds), max(bounds)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def at(value: Number) -> Number:
        return round(100 * (value - low) / (high - low), 2)

    rows = []
    for entry in known:
        effect = entry["effect"]
        ends = [effect["mean"] if x is None else x for x in (effect["low"], effect["high"])]
        rows.append(Whisker(entry, at(effect["mean"]), at(ends[0]), at(ends[1])))
    step = next(s for s in (0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 1e9) if (high - low) / s <= 5)
    marks = [step * k for k in range(-5, 6) if low <= step * k <= high]
    ticks = tuple((at(mark), _tick(mark)) for mark in marks)
    return Forest(tuple(rows), at(0.0), ticks)


def _tick(value: Number) -> str:
    """As short as it goes: 0, +0.2, +0.25."""
    digits = next(d for d in range(7) if abs(round(value, d) - value) < 1e-9 or d == 6)
    return wording.signed(value, digits)


def dumbbells(categories: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[Dumbbell, ...]:
    """One measure in every category; none where there are no categories."""
    rows = categories.get("rows", ())
    values = [row["measures"][entry["name"]][k] for row in rows for k in ("base", "tuned")]
    if not values:
        return ()
    low, high = (0.0, 1.0) if entry["kind"] == "share" else (min(values), max(values))
    span = (high - low) or 1.0
    # Scores have no natural ends: a tenth of the axis stays free on either side.
    edge = 0.0 if entry["kind"] == "share" else 10.0

    def at(value: Number) -> Number:
        return round(edge + (100 - 2 * edge) * (value - low) / span, 2)

    cells = [(row, row["measures"][entry["name"]]) for row in rows]
    return tuple(
        Dumbbell(
            row["category"] or "none", row["prompts"], at(cell["base"]), at(cell["tuned"]), cell
        )
        for row, cell in cells
    )


def prompt_funnel(counts: Mapping[str, int]) -> tuple[Step, ...]:
    """From the rows of the source to the training prompts."""
    if "rows" not in counts or "prompts" not in counts:
        return ()
    names = {"held_out": "held out for the evaluation", "not_drawn": "not drawn (prompts.limit)"}
    losses = [
        (names.get(key, key), value)
        for key, value in counts.items()
        if key not in ("rows", "prompts", "evaluation_prompts")
    ]
    return funnel("rows of the source", counts["rows"], losses, "training prompts")


def candidate_funnel(status: Mapping[str, int], select: Mapping[str, Any]) -> tuple[Step, ...]:
    """From all candidates to the selected ones."""
    rule = select["filter"]
    rule = rule if isinstance(rule, str) else " + ".join(rule)
    names = {
        "dropped_no_baseline": "in a group without a baseline",
        "dropped_nan": "in a group with a score that is not finite",
        "baseline": "images of the plain prompts: the baselines",
        "removed_by_filter": f"in a group that filter {rule} removed",
        "not_a_winner": "that do not beat the baseline themselves",
        "cut_by_cap": f"over the cap of {select['per_prompt_cap']} per prompt",
        "not_accepted": f"not accepted (rule {select.get('accept', {}).get('rule')})",
        "cut_by_k": f"beyond k = {select['k']} ({select['strategy']})",
    }
    losses = [(names.get(key, key), value) for key, value in status.items() if key != "selected"]
    return funnel("candidates", sum(status.values()), losses, "selected")


def funnel(
    first: str, total: int, losses: Sequence[tuple[str, int]], last: str
) -> tuple[Step, ...]:
    """Rows that add up: each loss is taken from what the row before left."""
    whole = max(total, 1)
    steps = [Step(first, total, 0, 100.0, 0.0)]
    left = total
    for label, lost in losses:
        if lost:
            left -= lost
            steps.append(Step(label, left, lost, 100 * left / whole, 100 * lost / whole))
    return (*steps, Step(last, left, 0, 100 * left / whole, 0.0))
