"""Scores in a terminal: a table, and a histogram per reward. Plain text, 80 columns."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from craftune import rewards
from craftune.types import Reward

BINS = 12
BAR = 40
"""Characters of the longest bar."""
HEADS = ("mean", "std", "min", "median", "max")
"""Of the table's columns; medians are over the images, std is the population's."""
NAME = 22
"""Characters of a reward's name in the table; longer ones lose their middle."""


def values_of(scores: Path, reward: str) -> np.ndarray:
    """One reward's numbers in a file of scores, float32; four bytes an image are held."""
    found = [np.zeros(0, np.float32)]
    with pq.ParquetFile(scores) as file:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number, columns=["reward", "value"])
            here = pc.equal(group["reward"].cast("string"), reward)  # type: ignore[attr-defined]
            found.append(group["value"].filter(here).to_numpy())
    return np.concatenate(found)


def summary(scores: Path, loaded: Sequence[Reward]) -> str:
    """Table and histograms of a file of scores, in the units of papers' tables, which it names."""
    values = dict(_shown(scores, reward.name) for reward in loaded)
    lines = [f"{'':{NAME}}{'images':>10}" + "".join(f"{head:>9}" for head in HEADS)]
    lines += [_row(name, found) for name, found in values.items()]
    for name, found in values.items():
        if len(found):
            lines += ["", _shortened(name, 80), *histogram(found)]
    return "\n".join(lines)


def _shown(scores: Path, reward: str) -> tuple[str, np.ndarray]:
    """A reward's name and numbers for people: "hpsv2.1 x100" where the file has raw ones."""
    scale, values = rewards.display_scale(reward), values_of(scores, reward)
    return (reward, values) if scale == 1 else (f"{reward} x{scale:g}", scale * values)


def _row(name: str, values: np.ndarray) -> str:
    first = f"{_shortened(name, NAME):{NAME}}{len(values):>10,}"
    if not len(values):
        return first + f"{'-':>9}" * len(HEADS)
    exact = values.astype(np.float64)
    numbers = (exact.mean(), exact.std(), exact.min(), np.median(exact), exact.max())
    return first + "".join(f" {_text(number, _decimals(values)):>8}" for number in numbers)


def histogram(values: np.ndarray) -> Iterator[str]:
    """A line per bin: its lower edge, a bar and how many are in it; one line where all are equal.

    Each bin holds its lower edge, the last one both.
    """
    low, high, decimals = float(values.min()), float(values.max()), _decimals(values)
    if low == high:
        yield f"  {_text(low, decimals):>9}  {'#' * BAR} {len(values):,} (all equal)"
        return
    counts, edges = np.histogram(values.astype(np.float64), BINS, (low, high))
    for count, edge in zip(counts, edges, strict=False):
        bar = "#" * round(BAR * count / counts.max()) or "." * bool(count)
        yield f"  {_text(edge, decimals):>9}  {bar:<{BAR}} {count:,}"


def _decimals(values: np.ndarray) -> int:
    """Enough to tell two bins apart."""
    width = float(np.ptp(values.astype(np.float64))) / BINS or abs(float(values[0])) / 1000
    return min(6, max(0, 1 - math.floor(math.log10(width)))) if width else 0


def _text(number: float, decimals: int) -> str:
    """At most 8 characters."""
    text = f"{number:.{decimals}f}"
    return text if len(text) <= 8 else f"{number:.1e}"


def _shortened(name: str, width: int) -> str:
    half = (width - 4) // 2
    return name if len(name) < width else f"{name[:half]}..{name[-half:]}"
