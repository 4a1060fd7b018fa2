"""Reads pictures of the world back: what is there, and is it what the prompt asked for?

The exact counterpart of GenEval's detector. Coloured regions are found, their outlines compared
with the ideal shapes of the same area and place, their hues with the six colours. Strict: what is
neither clearly one shape nor clearly another is unknown, and anything unknown or unasked for makes
the picture wrong.
"""

import colorsys
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from craftune.shapes.world import (
    COLORS,
    SHAPES,
    SIZE,
    Spec,
    Thing,
    relation_holds,
    signed_distance,
)

MIN_CHROMA = 26
"""Least chroma (largest minus smallest channel, of 255) of a coloured pixel."""
MIN_AREA = 16
"""Coloured regions below this many pixels are dust and not reported."""
MIN_OBJECT_AREA = 60
"""Regions below this many pixels are specks: reported, but of unknown shape."""
MAX_OBJECT_AREA = 2200
"""Regions above this many pixels, half the picture, are ground: of unknown shape as well."""
MIN_IOU = 0.84
"""Least overlap of a region with the ideal outline of its shape."""
MIN_MARGIN = 0.035
"""By how much that overlap must exceed the overlap with any other shape."""
MAX_HUE_ERROR = 0.055
"""Largest distance from a colour's hue, as a share of the colour circle."""
MIN_PURITY = 0.85
"""Least share of a region's pixels that have its colour."""

_FINE = 3
"""Outlines are compared on a grid this many times finer than the pixels."""


@dataclass(frozen=True)
class Detection:
    """A coloured region: what it is (None: unclear), and where."""

    shape: str | None
    color: str | None
    x: float
    y: float
    area: int
    """In pixels."""
    iou: float
    """Overlap with the best shape, 0 to 1."""
    margin: float
    """`iou` minus the overlap with the second best shape."""


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what was asked for, and if not, why."""

    correct: bool
    reason: str


def detect(image: Image.Image) -> list[Detection]:
    """Every coloured region of `image` (any mode and size; resized to 64x64), largest first."""
    pixels = _pixels(image)
    chroma = pixels.max(-1) - pixels.min(-1)
    nearest, error = _hues(pixels, chroma)
    found = []
    for region in _regions(chroma > MIN_CHROMA, nearest):
        if region.sum() >= MIN_AREA:
            found.append(_describe(region, chroma, nearest, error))
    return sorted(found, key=lambda detection: -detection.area)


def verify(spec: Spec, detections: list[Detection]) -> Verdict:
    """Judge what was found: the things asked for, no more, in their colours and places."""
    required = spec.required()
    if len(detections) != len(required):
        return Verdict(False, f"{len(detections)} objects, not {len(required)}")
    for detection in detections:
        if detection.shape is None:
            return Verdict(False, f"unclear shape at ({detection.x:.0f}, {detection.y:.0f})")
    orders = [
        order
        for order in itertools.permutations(detections)
        if all(_is(found, thing) for found, thing in zip(order, required, strict=True))
    ]
    if not orders:
        seen = ", ".join(f"{found.color or 'unclear'} {found.shape}" for found in detections)
        return Verdict(False, f"found {seen}")
    if spec.relation is None:
        return Verdict(True, "as asked")
    for first, second in orders:
        if relation_holds(spec.relation, second.x - first.x, second.y - first.y, slack=1.0):
            return Verdict(True, "as asked")
    return Verdict(False, f"the {required[0].shape} is not {spec.relation} the {required[1].shape}")


def _is(found: Detection, thing: Thing) -> bool:
    return found.shape == thing.shape and thing.color in (None, found.color)


def _pixels(image: Image.Image) -> NDArray[np.float64]:
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64)


_HUES = np.array([colorsys.rgb_to_hsv(*rgb)[0] for rgb in COLORS.values()])


def _hues(
    pixels: NDArray[np.float64], chroma: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Index of the nearest colour of each pixel, and the distance of their hues, 0 to 0.5."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    top, span = pixels.max(-1), np.maximum(chroma, 1)
    hue = np.select(
        [top == red, top == green],
        [((green - blue) / span) % 6, (blue - red) / span + 2],
        (red - green) / span + 4,
    )
    distance = np.abs(hue[..., None] / 6 - _HUES)
    distance = np.minimum(distance, 1 - distance)
    return distance.argmin(-1), distance.min(-1)


def _regions(colored: NDArray[np.bool_], nearest: NDArray[np.intp]) -> Iterator[NDArray[np.bool_]]:
    """Connected coloured regions; those of several colours are taken apart by colour."""
    labels, count = _parts(colored)
    for index in range(1, count + 1):
        region = labels == index
        shares = np.bincount(nearest[region], minlength=len(COLORS))
        if shares.max() >= MIN_PURITY * shares.sum():
            yield region
            continue
        for color in range(len(COLORS)):
            parts, part_count = _parts(region & (nearest == color))
            for part in (parts == number for number in range(1, part_count + 1)):
                # Where two colours touch, a seam one or two pixels wide looks like a third.
                if ndimage.binary_erosion(part).any():
                    yield part


def _describe(
    region: NDArray[np.bool_],
    chroma: NDArray[np.float64],
    nearest: NDArray[np.intp],
    error: NDArray[np.float64],
) -> Detection:
    strength = np.where(region, chroma, 0) / np.percentile(chroma[region], 85)
    core = strength > 0.6
    mask, left, top = _outline(strength, region)
    ys, xs = np.nonzero(mask)
    # Areas and places in pixels; a fine cell's centre lies at (index + 0.5) / _FINE.
    area = len(xs) / _FINE**2
    x, y = left + (xs.mean() + 0.5) / _FINE, top + (ys.mean() + 0.5) / _FINE
    overlaps = _overlaps(mask, x - left, y - top, area)
    second, best = sorted(overlaps.values())[-2:]
    sized = MIN_OBJECT_AREA <= area <= MAX_OBJECT_AREA
    clear = sized and best >= MIN_IOU and best - second >= MIN_MARGIN
    return Detection(
        shape=max(overlaps, key=overlaps.__getitem__) if clear else None,
        color=_color(nearest[core], error[core]),
        x=float(x),
        y=float(y),
        area=round(area),
        iou=float(best),
        margin=float(best - second),
    )


def _parts(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], int]:
    """Connected parts of a mask, numbered from 1, and how many there are."""
    labels, count = cast(tuple[NDArray[np.int32], int], ndimage.label(mask))
    return labels.astype(np.intp), count


def _outline(
    strength: NDArray[np.float64], region: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], int, int]:
    """Where a region is at least half as strong as its core, on the fine grid.

    Returns:
        The mask of the region's surroundings, and the pixel column and row where they begin.
    """
    ys, xs = np.nonzero(region)
    top, left = max(0, ys.min() - 1), max(0, xs.min() - 1)
    part = strength[top : ys.max() + 2, left : xs.max() + 2]
    fine = np.asarray(ndimage.zoom(part, _FINE, order=1, grid_mode=True, mode="grid-constant"))
    mask = fine > 0.5
    return (mask if mask.any() else fine >= fine.max()), int(left), int(top)


def _overlaps(mask: NDArray[np.bool_], x: float, y: float, area: float) -> dict[str, float]:
    """Intersection over union with each ideal shape of the same area and centroid."""
    height, width = mask.shape
    grid_x = ((np.arange(width) + 0.5) / _FINE - x)[None, :]
    grid_y = ((np.arange(height) + 0.5) / _FINE - y)[:, None]
    overlaps = {}
    for shape in SHAPES:
        unit_area, drop = _unit(shape)
        radius = (area / unit_area) ** 0.5
        ideal = signed_distance(shape, grid_x / radius, grid_y / radius + drop) <= 0
        # Parts of the ideal shape outside the window count through its area.
        shared = (ideal & mask).sum() / _FINE**2
        overlaps[shape] = float(shared / (2 * area - shared))
    return overlaps


def _color(nearest: NDArray[np.intp], error: NDArray[np.float64]) -> str | None:
    """The colour of a region's core, or None where it is mixed or between two colours."""
    shares = np.bincount(nearest, minlength=len(COLORS))
    color = int(shares.argmax())
    pure = shares[color] >= MIN_PURITY * shares.sum()
    return list(COLORS)[color] if pure and np.median(error) <= MAX_HUE_ERROR else None


@cache
def _unit(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centroid lies below its centre."""
    axis = np.linspace(-1.2, 1.2, 961)
    u, v = np.meshgrid(axis, axis)
    inside = signed_distance(shape, u, v) <= 0
    return float(inside.sum() * (axis[1] - axis[0]) ** 2), float(v[inside].mean())
