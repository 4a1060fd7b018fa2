"""The [select] section of a recipe, and the rewards that its letters and names mean.

Sun et al., arXiv:2603.18991: Eq. 4 is `FILTERS`; Table 5 is `SelectConfig.strategy`.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Literal, TypeVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from craftune.acceptance import AcceptConfig

FILTERS: dict[str, tuple[str, ...]] = {
    "I_h": ("h",),
    "I_p": ("p",),
    "I_a": ("a",),
    "I_ha": ("h", "a"),
    "I_pa": ("p", "a"),
    "I_hpa": ("h", "p", "a"),
    "I_hp": ("h", "p"),  # not in the paper
}
"""Eq. 4: the rewards on which one and the same refined image must beat its group's baseline."""
Value = TypeVar("Value")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class SelectConfig:
    """The [select] section of a recipe. Rewards go by their names or by their role letters."""

    roles: dict[str, str] = field(default_factory=dict)
    """Letter of a filter -> reward name, e.g. {"h": "hpsv2.1"}; a letter without a role stands
    for the reward of that very name."""
    filter: str | tuple[str, ...] = "I_hpa"
    """I_ and role letters (I_hpa is the paper's), "none", or a list of rewards: a group is kept if
    one of its images scores higher (>) than the baseline on all. More rewards keep fewer groups."""
    image_level: bool = False
    """Also require of the image itself, not just of one in its group, to win on all of them."""
    weights: dict[str, float] = field(default_factory=lambda: {"h": 0.4, "p": 0.4, "a": 0.2})
    """Reward -> importance in the composite, >= 0 (default: section 4.1). Not normalised."""
    scale: Literal["zscore", "minmax", "mad", "fixed", "group", "rank"] = "zscore"
    """How scores become comparable before they are weighted: (score - center) / spread over the
    whole pool with its baselines (zscore; minmax; mad = median and 1.4826 MAD) or by `fixed`;
    z-score within each group; mid-rank in the pool, 0 to 1 (rank: seconds per million images)."""
    fixed: dict[str, tuple[float, float]] = field(default_factory=dict)
    """For scale = "fixed": reward -> (center, spread > 0), in the reward's unit."""
    advantage_over: Literal["refined", "all"] = "refined"
    """Images that the mean and deviation of the advantage run over: j = 1..N (Algorithm 1), or
    0..N, which raises the winners' advantages, as the baseline is a loser by construction."""
    epsilon: float = 1e-6
    """Added to the (population) deviation, > 0; larger damps groups of nearly equal images."""
    strategy: Literal["top", "random", "low", "all"] = "top"
    """Which of the eligible to take: highest, random, lowest, or every one (k unused). As in
    Table 5, whose four strategies all draw from the filtered set."""
    mode: Literal["image", "group"] = "image"
    """Take single images; or whole groups, k // N of them, by their best eligible image."""
    rank_by: Literal["composite", "gain", "advantage"] = "composite"
    """What makes an image high: R, R minus its baseline's R, or the advantage. R favours easy
    prompts."""
    k: int = 100
    """Images to take, >= 1; fewer if fewer are eligible."""
    per_prompt_cap: int = 1
    """Most images of one group, applied before k, for every strategy; 0 = no cap. Unused for
    whole groups."""
    placebo: bool = False
    """Control arm: shuffle the advantages among the selected, so that they say nothing."""
    seed: int = 0
    """Of the random strategy and, separately, of the placebo and of [select.accept], >= 0."""
    accept: AcceptConfig = field(default_factory=AcceptConfig)
    """GRAFT's rejection sampling in place of filter, strategy, k and caps."""

    def __post_init__(self) -> None:
        filter_keys(self.filter)
        if self.accept.rule != "off" and self.filter != "none":
            raise ValueError(
                f"select.filter must be 'none' where select.accept.rule is {self.accept.rule!r}, "
                f"got {self.filter!r}"
            )
        least = {"k": (self.k, 1), "per_prompt_cap": (self.per_prompt_cap, 0)}
        for key, (value, low) in {**least, "seed": (self.seed, 0)}.items():
            if value < low:
                raise ValueError(f"select.{key} must be >= {low}, got {value}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"select.epsilon must be > 0, got {self.epsilon}")
        weights = self.weights.values()
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"select.weights must be >= 0 and not all 0, got {self.weights}")
        for name, (center, width) in self.fixed.items():
            if not (math.isfinite(center) and 0 < width < math.inf):
                raise ValueError(f"select.fixed.{name}: spread must be > 0, got {width}")


def filter_keys(rule: str | tuple[str, ...]) -> tuple[str, ...]:
    """Role letters or reward names in a `select.filter`; none for "none".

    Raises:
        ValueError: it is neither I_ and letters, nor "none", nor a list.
    """
    if not isinstance(rule, str) or rule == "none":
        return () if isinstance(rule, str) else rule
    if rule.startswith("I_") and len(rule) > 2:
        return tuple(rule[2:])
    raise ValueError(
        f"select.filter must be I_ and role letters, 'none' or a list of rewards, got {rule!r}"
        f"{_closest(rule, [*FILTERS, 'none'])}"
    )


def filter_rows(config: SelectConfig, names: Sequence[str]) -> list[int]:
    """Rows of the scores that the filter looks at."""
    return list(by_row(config, names, "filter", dict.fromkeys(filter_keys(config.filter), True)))


def by_row(
    config: SelectConfig, names: Sequence[str], key: str, values: Mapping[str, Value]
) -> dict[int, Value]:
    """The values of `select.<key>` by the position of the reward that a letter or name means."""
    rows: dict[int, Value] = {}
    for given, value in values.items():
        name = config.roles.get(given, given)
        if name not in names:
            role = "" if name == given else f" (role {given!r})"
            raise ValueError(
                f"select.{key}: no reward {name!r}{role}, there are {', '.join(names)}"
                f"{_closest(name, names)}"
            )
        if names.index(name) in rows:
            raise ValueError(f"select.{key} names reward {name!r} twice, got {', '.join(values)}")
        rows[names.index(name)] = value
    return rows


def sub_filters(rows: Sequence[int]) -> list[tuple[int, ...]]:
    """Each reward alone, all but one, all; without repetition."""
    but_one = [tuple(r for r in rows if r != row) for row in rows if len(rows) > 1]
    return list(dict.fromkeys([*((row,) for row in rows), *but_one, tuple(rows)]))


def joined(names: Sequence[str], rows: Sequence[int]) -> str:
    """Name of a part of the filter, as in `Selection.keeps`."""
    return "+".join(names[row] for row in rows) or "none"


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
