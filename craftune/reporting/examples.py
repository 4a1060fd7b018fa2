"""Which pictures the page shows. Every choice follows a rule that the page states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from craftune.reporting import wording
from craftune.reporting.comparison import Pair
from craftune.reporting.pictures import Picture, embed
from craftune.reporting.read import KEY, Evaluation, Run, iterate_images
from craftune.runs import stage_folder
from craftune.selection import Status

EXTREMES = 3
"""Largest gains, and as many largest losses."""
PER_VERDICT = 2
"""Candidates shown of each reason for not being selected."""


@dataclass(frozen=True)
class Line:
    """One measure on two images.

    Attributes:
        better: 1 where the second image scores higher, -1 where lower, 0 where equal or unknown.
    """

    name: str
    before: str
    after: str
    change: str
    better: int
    headline: bool


@dataclass(frozen=True)
class Example:
    """Base and tuned on one prompt and seed."""

    text: str
    category: str
    seed: int
    base: Picture
    tuned: Picture
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Verdict:
    """One candidate beside the image of its plain prompt, and what became of it."""

    text: str
    refined: str
    category: str
    status: str
    baseline: Picture | None
    image: Picture
    lines: tuple[Line, ...]
    gain: str
    advantage: str
    rank: int
    reason: str


def balanced(evaluation: Evaluation, count: int) -> list[int]:
    """The first prompts in order of id, taken from the categories in turn; by category."""
    turns: dict[str, int] = {}
    order = []
    for p, category in enumerate(evaluation.categories):
        turns[category] = turns.get(category, 0) + 1
        order.append((turns[category], category, p))
    return sorted((p for _, _, p in sorted(order)[:count]), key=lambda p: evaluation.categories[p])


def first_pairs(evaluation: Evaluation, prompts: Sequence[int]) -> list[int]:
    """Position of the first image pair of each of these prompts."""
    first = np.unique(evaluation.prompt, return_index=True)[1]
    return [int(first[p]) for p in prompts]


def extremes(
    evaluation: Evaluation, difference: Float[np.ndarray, " n"]
) -> tuple[list[int], list[int]]:
    """Image pairs with the largest gains, then with the largest losses; one pair per prompt."""
    count = min(EXTREMES, len(evaluation.ids) // 2)
    order = [int(i) for i in np.argsort(-difference, kind="stable")]
    gains = _one_per_prompt(evaluation, order, count, set())
    losses = _one_per_prompt(
        evaluation, order[::-1], count, {int(evaluation.prompt[i]) for i in gains}
    )
    return gains, losses


def _one_per_prompt(
    evaluation: Evaluation, order: Sequence[int], count: int, taken: set[int]
) -> list[int]:
    found: list[int] = []
    for i in order:
        prompt = int(evaluation.prompt[i])
        if len(found) < count and prompt not in taken:
            found.append(i)
            taken.add(prompt)
    return found


def examples(
    run: Run, pairs: Mapping[str, Pair], entries: Sequence[Mapping[str, Any]], rows: Sequence[int]
) -> list[Example]:
    """These image pairs, with all measures."""
    evaluation, folder = run.evaluation, stage_folder(run.folder, "evaluate")
    keys = [(evaluation.ids[evaluation.prompt[i]], int(evaluation.sample[i])) for i in rows]
    pictures = {
        model: {
            key: embed(data)
            for key, data in iterate_images(
                folder.glob(f"images-{model}-*.parquet"), KEY, set(keys)
            )
        }
        for model in ("base", "tuned")
    }
    return [
        Example(
            text=evaluation.texts[evaluation.prompt[i]],
            category=evaluation.categories[evaluation.prompt[i]],
            seed=int(evaluation.seed[i]),
            base=pictures["base"][key],
            tuned=pictures["tuned"][key],
            lines=tuple(
                _line(entry, pairs[entry["name"]][0][i], pairs[entry["name"]][1][i])
                for entry in entries
            ),
        )
        for i, key in zip(rows, keys, strict=True)
    ]


def _line(entry: Mapping[str, Any], before: float, after: float) -> Line:
    """Scores of two images; a share is passed or not."""
    known = bool(np.isfinite([before, after]).all())
    better = int(np.sign(after - before)) if known else 0
    texts = [_level(entry, value) for value in (before, after)]
    change = wording.signed(after - before, wording.fine(entry))
    if entry["kind"] == "share" and known:
        change = {1: "gained", 0: "same", -1: "lost"}[better]
    told = entry["role"] != "training"
    return Line(entry["name"], texts[0], texts[1], change, better, told)


def _level(entry: Mapping[str, Any], value: float) -> str:
    passed = {0.0: "fail", 1.0: "pass"} if entry["kind"] == "share" else {}
    return passed.get(value) or wording.number(value, wording.fine(entry))


def selected_rows(run: Run, count: int) -> list[int]:
    """Selected candidates at even distances of rank, the first and the last among them."""
    columns = (run.verdicts[name].to_pylist() for name in ("selected", "rank"))
    order = sorted((rank, i) for i, (s, rank) in enumerate(zip(*columns, strict=True)) if s)
    spots = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [order[spot][1] for spot in spots]


def refused_rows(run: Run) -> list[int]:
    """For each reason of not being selected, the candidates with the highest composite."""
    status = np.array(run.verdicts["status"].to_pylist())
    composite = np.array(run.verdicts["composite"].to_pylist(), dtype=np.float64)
    composite[~np.isfinite(composite)] = -np.inf
    found = []
    for kind in (s.name.lower() for s in Status):
        if kind in ("absent", "baseline", "selected"):
            continue
        rows = np.flatnonzero(status == kind)
        best = rows[np.argsort(-composite[rows], kind="stable")]
        found += [int(row) for row in best[:PER_VERDICT]]
    return found


def verdicts(
    run: Run, entries: Mapping[str, Mapping[str, Any]], rows: Sequence[int]
) -> list[Verdict]:
    """These candidates, beside the baselines of their groups.

    Args:
        entries: of each reward of the pool, and "composite".
    """
    table = run.verdicts.take(rows).to_pylist()
    plain = _baselines(run, {row["prompt_id"] for row in table})
    names = run.verdicts["candidate"].to_pylist()
    wanted = {(names[i],) for i in [*rows, *plain.values()]}
    files = stage_folder(run.folder, "generate").glob("part-*.parquet")
    images = {key[0]: embed(data, 256) for key, data in iterate_images(files, ["id"], wanted)}
    scores = {**run.pool, "composite": run.verdicts["composite"].to_numpy()}
    found = []
    for i, row in zip(rows, table, strict=True):
        baseline = plain.get(row["prompt_id"])
        lines = (
            _line(entry, _score(scores[name], baseline), float(scores[name][i]))
            for name, entry in entries.items()
        )
        found.append(
            Verdict(
                text=row["prompt"],
                refined=row["refined_prompt"],
                category=row["category"],
                status=row["status"],
                baseline=None if baseline is None else images[names[baseline]],
                image=images[names[i]],
                lines=tuple(lines),
                gain=wording.signed(row["gain"], 2),
                advantage=wording.signed(row["advantage"], 2),
                rank=row["rank"],
                reason=row["reason"],
            )
        )
    return found


def _baselines(run: Run, prompts: set[str]) -> dict[str, int]:
    """Row of the plain prompt's image of each of these prompts."""
    columns = zip(*(run.verdicts[k].to_pylist() for k in ("prompt_id", "variant")), strict=True)
    return {p: i for i, (p, variant) in enumerate(columns) if variant == 0 and p in prompts}


def _score(values: Float[np.ndarray, " n"], row: int | None) -> float:
    return float("nan") if row is None else float(values[row])
