"""Scores of different rewards made comparable, and advantages: what a score is worth in its pool.

Sun et al., arXiv:2603.18991: section 3.3 asks for "comparable scales" and does not say which;
Algorithm 1, step 3 is `advantages`. Pure numpy on blocks [groups, columns], see `selection`.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float

Block: TypeAlias = Float[np.ndarray, "groups columns"]
Mask: TypeAlias = Bool[np.ndarray, "groups columns"]
Map: TypeAlias = Callable[[Block, Mask], Block]


def advantages(composite: Block, counted: Mask, epsilon: float) -> Block:
    """(R - mean) / (std + epsilon) within each group, over the counted images.

    Returns:
        NaN where not counted. In a group of n: sum 0, |advantage| < sqrt(n - 1), 0 if all equal.

    Source: Algorithm 1, step 3; std is the population's.
    """
    count = np.maximum(counted.sum(axis=-1, keepdims=True), 1)
    mean = np.where(counted, composite, 0.0).sum(axis=-1, keepdims=True) / count
    away = np.where(counted, composite - mean, 0.0)
    std = np.sqrt(np.square(away).sum(axis=-1, keepdims=True) / count)
    return np.where(counted, away / (std + epsilon), np.nan)


def spread(scale: str, name: str, scores: Block, usable: Mask) -> tuple[float, float]:
    """Center and spread of one reward over the usable images, baselines included.

    Raises:
        ValueError: the spread is 0.
    """
    if scale == "mad":
        values = scores[usable]
        center = np.median(values)
        width = 1.4826 * np.median(np.abs(values - center))
    elif scale == "minmax":
        center, high = _range(scores, usable)
        width = high - center
    else:  # two passes: E[x^2] - E[x]^2 cancels for scores far from 0
        count = int(usable.sum())
        center = sum(float(chunk.sum()) for chunk in _chunks(scores, usable)) / count
        squares = (float(np.square(chunk - center).sum()) for chunk in _chunks(scores, usable))
        width = math.sqrt(sum(squares) / count)
    if not width > 0:
        raise ValueError(
            f"select.scale {scale!r}: most scores of reward {name!r} are equal, so that their "
            f"spread is 0; use 'zscore' or 'rank'"
        )
    return float(center), float(width)


def to_scale(
    scale: str, scores: Block, usable: Mask, statistics: tuple[float, float] | None, epsilon: float
) -> Map:
    """The function that brings one reward's scores to the common scale.

    Args:
        scale: a `SelectConfig.scale`.
        scores: of the whole pool.
        statistics: center and spread, for the scales that have them.
        epsilon: for "group", see `advantages`.
    """
    if statistics is not None:
        center, deviation = statistics
        return lambda x, _: (x - center) / deviation
    if scale == "group":
        return lambda x, here: advantages(x, here, epsilon)
    pool = np.sort(scores[usable])

    def mid_rank(x: Block, _: Mask) -> Block:
        x = x.astype(pool.dtype)  # exact, it is where x came from
        return (np.searchsorted(pool, x) + np.searchsorted(pool, x, "right")) / (2 * len(pool))

    return mid_rank


def require_variance(name: str, scores: Block, usable: Mask) -> None:
    """Refuse a reward that gave every image the same score.

    Raises:
        ValueError: names the reward.
    """
    low, high = _range(scores, usable)
    if low == high:
        raise ValueError(
            f"reward {name!r} has zero variance over the pool (every score is {low:g}), so it "
            f"cannot choose: check it, or take it out of select.filter and select.weights"
        )


def require_variance_within(name: str, scores: Block, usable: Mask) -> None:
    """Refuse, for the scale "group", a reward whose scores differ between groups alone.

    Raises:
        ValueError: names the reward.
    """
    for part in blocks(len(scores), 65536):
        here = usable[part]
        high = np.where(here, scores[part], -np.inf).max(axis=-1)
        low = np.where(here, scores[part], np.inf).min(axis=-1)
        if (high > low).any():
            return
    raise ValueError(
        f"reward {name!r} has zero variance within every group, so under select.scale 'group' it "
        f"says nothing: check it, choose another scale, or take it out of select.weights"
    )


def _range(scores: Block, usable: Mask) -> tuple[float, float]:
    ends = [(float(chunk.min()), float(chunk.max())) for chunk in _chunks(scores, usable)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _chunks(scores: Block, usable: Mask) -> Iterator[Float[np.ndarray, " n"]]:
    """The usable scores of one reward, in float64, some at a time."""
    for part in blocks(len(scores), 65536):
        chunk = scores[part][usable[part]].astype(np.float64)
        if chunk.size:
            yield chunk


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `count` places."""
    return (slice(start, start + size) for start in range(0, count, size))
