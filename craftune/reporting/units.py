"""Scores as people read them: in the units of papers' tables, "hpsv2.1 x 100". Files hold raw ones.

The scale belongs to the reward's name, see `rewards.display_scale`; most have none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from craftune.reporting import wording
from craftune.reporting.comparison import Pair
from craftune.rewards import display_scale

TIMES = "\N{MULTIPLICATION SIGN}"


def named(reward: str) -> str:
    """A reward's name with its unit."""
    scale = display_scale(reward)
    return reward if scale == 1 else f"{reward} {TIMES} {scale:g}"


def in_tables(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The content of report.json with every reward in the unit that its name then says."""
    entries = [_entry(entry) for entry in summary["rewards"]]
    told = [entry for entry in (summary["composite"], *entries) if entry["role"] != "training"]
    rows = [
        row | {"measures": {named(n): _times(cell, n) for n, cell in row["measures"].items()}}
        for row in summary["categories"].get("rows", ())
    ]
    return {
        **summary,
        "rewards": entries,
        "headline": [wording.sentence(entry) for entry in told],
        "categories": {"rows": rows} if rows else summary["categories"],
        "scales": _scales(summary["scales"], told),
    }


def _scales(
    found: Mapping[str, Any] | None, told: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The sweep of the tuning's scale, and its sentences of these entries."""
    if found is None:
        return None
    rows = [
        row | {"measures": {named(n): _times(cell, n) for n, cell in row["measures"].items()}}
        for row in found["rows"]
    ]
    return {**found, "rows": rows, "sentences": [wording.by_scale(entry, rows) for entry in told]}


def pairs_in_tables(found: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same for the images' own numbers, base and tuned."""
    return {
        named(name): (display_scale(name) * base, display_scale(name) * tuned)
        for name, (base, tuned) in found.items()
    }


def pool_in_tables(
    found: Mapping[str, Float[np.ndarray, " n"]],
) -> dict[str, Float[np.ndarray, " n"]]:
    """The same for the candidates' scores."""
    return {named(name): display_scale(name) * values for name, values in found.items()}


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    quantiles = entry["quantiles"]
    at = {k: [display_scale(entry["name"]) * x for x in quantiles[k]] for k in ("base", "tuned")}
    name = named(entry["name"])
    return _times(entry, entry["name"]) | {"name": name, "quantiles": {**quantiles, **at}}


def _times(cell: Mapping[str, Any], reward: str) -> dict[str, Any]:
    """Means and their difference."""
    scale = display_scale(reward)
    difference = {k: None if x is None else scale * x for k, x in cell["difference"].items()}
    means = {key: scale * cell[key] for key in ("base", "tuned", "mean") if key in cell}
    return {**cell, **means, "difference": difference}
