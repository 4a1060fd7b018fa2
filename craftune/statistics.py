"""What changed between two models, and how sure that is: paired bootstrap over prompts.

Two models draw the same prompts with the same seeds, so image i of one stands beside image i of
the other. Images of one prompt resemble each other, hence the prompt is the unit: values are
averaged per prompt first, and the bootstrap (Efron 1979; percentile interval) resamples prompts,
each with all its images of both models. Pure numpy; all randomness comes in by `rng`.

Axes: n images (or pairs of images); p prompts; m columns; d pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1 << 22
"""Drawn indices held in memory at once: 64 MB."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % bootstrap interval.

    Attributes:
        n: prompts it rests on. With one prompt there is no interval: low and high are NaN.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_up(self) -> bool:
        """The whole interval lies above zero."""
        return self.low > 0

    @property
    def is_down(self) -> bool:
        """The whole interval lies below zero."""
        return self.high < 0


@dataclass(frozen=True)
class Comparison:
    """One reward on two models, images paired by prompt and seed.

    Attributes:
        base: mean over prompts.
        tuned: mean over prompts.
        difference: tuned minus base, in the reward's units.
        effect: the difference in standard deviations of the base's images (which are taken as
            given, not resampled); None where they are all equal.
        relative: tuned / base - 1; None where the base's own interval reaches zero.
        win_rate: share of image pairs that the tuned model wins, ties counting half; 0.5 is even.
    """

    base: float
    tuned: float
    difference: Estimate
    effect: Estimate | None
    relative: Estimate | None
    win_rate: Estimate


def prompt_means(
    values: Float[np.ndarray, " n"], prompts: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " p"]:
    """Mean value of each prompt's images.

    Args:
        prompts: which prompt each image belongs to, numbered 0..p-1, none missing.
    """
    return np.bincount(prompts, weights=values) / np.bincount(prompts)


def bootstrap(
    columns: Float[np.ndarray, "p m"], rng: np.random.Generator, resamples: int = 10_000
) -> Float[np.ndarray, "resamples m"]:
    """Column means of `resamples` draws of p prompts with replacement.

    A draw takes the same prompts in all columns, so what is paired stays paired.
    """
    p = len(columns)
    means = np.empty((resamples, columns.shape[1]))
    rows = max(1, CHUNK // p)
    for start in range(0, resamples, rows):
        part = means[start : start + rows]
        index = rng.integers(p, size=(len(part), p))
        index += np.arange(len(part))[:, None] * p
        counts = np.bincount(index.ravel(), minlength=len(part) * p).reshape(len(part), p)
        part[:] = counts @ columns / p
    return means


def estimate(mean: float, draws: Float[np.ndarray, " resamples"], n: int) -> Estimate:
    """The 95 % percentile interval of these bootstrap draws around a mean over n prompts."""
    low, high = np.quantile(draws, [0.025, 0.975]) if n > 1 else (np.nan, np.nan)
    return Estimate(float(mean), float(low), float(high), n)


def compare(
    base: Float[np.ndarray, " n"],
    tuned: Float[np.ndarray, " n"],
    prompts: Int[np.ndarray, " n"],
    rng: np.random.Generator,
    resamples: int = 10_000,
) -> Comparison:
    """Means, difference and win rate of paired images, with intervals.

    Args:
        base: scores of one reward on the base model's images.
        tuned: on the tuned model's images of the same prompts and seeds, in the same order.
        prompts: which prompt each pair belongs to, numbered 0..p-1, none missing.
    """
    wins = (tuned > base) + 0.5 * (tuned == base)
    columns = np.stack([prompt_means(x, prompts) for x in (base, tuned, tuned - base, wins)], 1)
    draws, means, n = bootstrap(columns, rng, resamples), columns.mean(0), len(columns)
    difference = estimate(means[2], draws[:, 2], n)
    return Comparison(
        base=float(means[0]),
        tuned=float(means[1]),
        difference=difference,
        effect=_scaled(difference, float(base.std())),
        relative=_relative(means, draws, n),
        win_rate=estimate(means[3], draws[:, 3], n),
    )


def _scaled(difference: Estimate, spread: float) -> Estimate | None:
    """The difference in units of the spread."""
    if spread == 0:
        return None
    mean, low, high = (x / spread for x in (difference.mean, difference.low, difference.high))
    return Estimate(mean, low, high, difference.n)


def _relative(
    means: Float[np.ndarray, " m"], draws: Float[np.ndarray, "resamples m"], n: int
) -> Estimate | None:
    """Column 1 over column 0, minus one; None where column 0 is not clearly above zero."""
    if means[0] <= 0 or np.quantile(draws[:, 0], 0.025) <= 0:
        return None
    kept = draws[draws[:, 0] > 0]
    return estimate(means[1] / means[0] - 1, kept[:, 1] / kept[:, 0] - 1, n)


def compare_by_category(
    base: Float[np.ndarray, " n"],
    tuned: Float[np.ndarray, " n"],
    prompts: Int[np.ndarray, " n"],
    categories: Sequence[str],
    seed: int,
    resamples: int = 10_000,
) -> dict[str, Comparison]:
    """`compare` within each category, in order of name.

    Args:
        categories: of each image pair; every prompt lies in one category.
        seed: every category starts from it anew, so one does not change another's interval.
    """
    labels, found = np.asarray(categories), {}
    for name in sorted(set(categories)):
        here = labels == name
        local = np.unique(prompts[here], return_inverse=True)[1]
        rng = np.random.default_rng(seed)
        found[name] = compare(base[here], tuned[here], local, rng, resamples)
    return found


def composite(
    scores: Mapping[str, Float[np.ndarray, " n"]],
    weights: Mapping[str, float],
    scales: Mapping[str, Sequence[float]],
) -> Float[np.ndarray, " n"]:
    """Weighted sum of rewards on the comparable scales that the selection used.

    Args:
        scores: raw values, by reward.
        weights: of the rewards that take part.
        scales: center and spread of each, from the pool: one scale for base and tuned alike. A
            reward that was constant in the pool (spread 0) says nothing and adds 0.
    """
    total = np.zeros(len(next(iter(scores.values()))))
    for name, weight in weights.items():
        center, spread = scales[name]
        if spread > 0:
            total += weight * (scores[name] - center) / spread
    return total


def diversity(
    pixels: Float[np.ndarray, "n d"], prompts: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " p"]:
    """Mean distance between a prompt's images of one model, for each prompt.

    The distance of two images is the mean absolute difference of their RGB values in [0, 1],
    after both were reduced to 32 x 32 by area: 0 for equal images, 1 for black against white.

    Args:
        pixels: the reduced images, flattened.
        prompts: which prompt each image belongs to, numbered 0..p-1, each with >= 2 images.
    """
    order = np.argsort(prompts, kind="stable")
    groups = np.split(pixels[order], np.cumsum(np.bincount(prompts))[:-1])
    return np.array([_mean_distance(group) for group in groups])


def _mean_distance(images: Float[np.ndarray, "k d"]) -> float:
    """Over all pairs of these images."""
    first, second = np.triu_indices(len(images), 1)
    return float(np.abs(images[first] - images[second]).mean(1).mean())


def ratio(
    tuned: Float[np.ndarray, " p"],
    base: Float[np.ndarray, " p"],
    rng: np.random.Generator,
    resamples: int = 10_000,
) -> Estimate | None:
    """Mean of tuned over mean of base, resampling prompts; None where base can reach zero."""
    columns = np.stack([base, tuned], 1)
    draws = bootstrap(columns, rng, resamples)
    if (draws[:, 0] <= 0).any():
        return None
    means = columns.mean(0)
    return estimate(means[1] / means[0], draws[:, 1] / draws[:, 0], len(base))
