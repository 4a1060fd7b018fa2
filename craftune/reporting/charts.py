"""Charts as inline SVG. Colours are CSS classes, so they follow the page's light or dark."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

from craftune.reporting.wording import MINUS, Number

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 10, 24
MOST_BINS = 40
MOST_POINTS = 400
"""Drawn per line; more cannot be told apart at this width."""


@dataclass(frozen=True)
class Axis:
    """A range of numbers and where it lies on the drawing."""

    low: Number
    high: Number
    start: Number
    end: Number

    def at(self, value: Number) -> float:
        """The coordinate of a value, rounded to a tenth of a pixel."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def histogram(base: Float[np.ndarray, " n"], tuned: Float[np.ndarray, " n"], name: str) -> Markup:
    """Both distributions over the same bins, with their means."""
    low, high = _range(np.concatenate([base, tuned]))
    # Rice's rule, so that few images do not look like noise.
    bins = min(MOST_BINS, max(8, math.ceil(2 * len(base) ** (1 / 3))))
    edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(values, edges)[0] / len(values) for values in (base, tuned)]
    x = Axis(low, high, RIGHT, WIDTH - RIGHT)
    y = Axis(0.0, float(max(s.max() for s in shares)) * 1.08, HEIGHT - BOTTOM, TOP)
    parts = [_x_axis(x), f'<line class="axis" {_line(RIGHT, y.start, WIDTH - RIGHT, y.start)}/>']
    for values, share, kind in zip((base, tuned), shares, ("base", "tuned"), strict=True):
        mean = x.at(float(values.mean()))
        parts += [
            f'<path class="area {kind}" d="{_steps(x, y, edges, share)}"/>',
            f'<line class="mean {kind}" {_line(mean, TOP, mean, y.start)}/>',
        ]
    return _svg(parts, f"Distribution of {name} over the images, base against tuned")


def curve(steps: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"], name: str) -> Markup:
    """A metric over training: every step thin, the moving average thick."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    smooth = moving_average(values, max(1, len(values) // 20))
    low, high = _range(values)
    x = Axis(float(steps[0]), max(float(steps[-1]), float(steps[0]) + 1), LEFT, WIDTH - RIGHT)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    stride = max(1, math.ceil(len(values) / MOST_POINTS))
    parts = [_x_axis(x), _y_axis(y)]
    for line, kind in ((values, "raw"), (smooth, "smooth")):
        points = zip(steps[::stride], line[::stride], strict=True)
        drawn = " ".join(f"{x.at(float(a))},{y.at(float(b))}" for a, b in points)
        parts.append(f'<polyline class="{kind}" points="{drawn}"/>')
    return _svg(parts, f"{name} over the training steps")


def sweep(
    scales: Sequence[float], means: Sequence[float], ends: Sequence[tuple[float, float]], name: str
) -> Markup:
    """A measure over the tuning's scale, with the interval of its change from the base.

    Args:
        ends: of each interval, on the measure's own scale; equal where there is none.
    """
    low, high = _range(np.array([*means, *(end for pair in ends for end in pair)]))
    x = Axis(min(scales), max(scales), LEFT, WIDTH - RIGHT - 6)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_x_axis(x), _y_axis(y)]
    drawn = " ".join(f"{x.at(s)},{y.at(m)}" for s, m in zip(scales, means, strict=True))
    parts.append(f'<polyline class="smooth" points="{drawn}"/>')
    for scale, mean, (below, above) in zip(scales, means, ends, strict=True):
        kind, at = "base" if scale == 0 else "tuned", x.at(scale)
        parts.append(f'<line class="error" {_line(at, y.at(below), at, y.at(above))}/>')
        parts.append(f'<circle class="point {kind}" cx="{at}" cy="{y.at(mean)}" r="3.5"/>')
    return _svg(parts, f"{name} over the scale of the tuning, 0 the base and 1 the tuned model")


def moving_average(values: Float[np.ndarray, " n"], reach: int) -> Float[np.ndarray, " n"]:
    """Mean over up to `reach` steps on either side; fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def ticks(low: Number, high: Number, most: int = 6) -> list[Number]:
    """Round numbers within the range, at most so many."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_label(value: Number, all_ticks: Sequence[Number]) -> str:
    """As many digits as tell the ticks apart."""
    step = min((b - a for a, b in itertools.pairwise(all_ticks)), default=1.0)
    size = max(abs(t) for t in all_ticks)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.2g}".replace("-", MINUS)
    digits = min(6, max(0, -math.floor(math.log10(step) + 1e-9)))
    digits += round(step * 10**digits, 6) % 1 > 0  # a step of 2.5
    return f"{value + 0.0:,.{digits}f}".replace("-", MINUS)


def _range(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.02 * (high - low) or abs(low) / 10 or 1.0
    return low - margin, high + margin


def _steps(
    x: Axis, y: Axis, edges: Float[np.ndarray, " m"], share: Float[np.ndarray, " bins"]
) -> str:
    """The outline of the bars."""
    path = [f"M{x.at(float(edges[0]))} {y.start}"]
    for right, height in zip(edges[1:], share, strict=True):
        path.append(f"V{y.at(float(height))}H{x.at(float(right))}")
    return "".join([*path, f"V{y.start}Z"])


def _x_axis(x: Axis) -> str:
    marks = ticks(x.low, x.high)
    return "".join(
        f'<line class="grid" {_line(x.at(t), TOP, x.at(t), HEIGHT - BOTTOM)}/>'
        f'<text x="{x.at(t)}" y="{HEIGHT - 8}" text-anchor="middle">{tick_label(t, marks)}</text>'
        for t in marks
    )


def _y_axis(y: Axis) -> str:
    marks = ticks(y.low, y.high, 5)
    return "".join(
        f'<line class="grid" {_line(LEFT, y.at(t), WIDTH - RIGHT, y.at(t))}/>'
        f'<text x="{LEFT - 6}" y="{y.at(t) + 4}" text-anchor="end">{tick_label(t, marks)}</text>'
        for t in marks
    )


def _line(x1: Number, y1: Number, x2: Number, y2: Number) -> str:
    return f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'


def _svg(parts: Sequence[str], description: str) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(description)}">{body}</svg>'
    )
