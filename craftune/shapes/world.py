"""The world of the embedded model: what a prompt can ask for, and pictures that show it.

A `Spec` is what a prompt means: one of seven categories (those of GenEval), the things asked for,
how many, and how they stand to each other. Specs are canonical: two prompts with the same meaning
have equal specs. A `Scene` is one arrangement of placed things in one style; `render` draws it.
"""

import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

SIZE = 64
"""Width and height of a picture, in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "yellow": (240, 215, 20),
    "green": (30, 165, 60),
    "cyan": (25, 200, 215),
    "blue": (35, 70, 225),
    "purple": (160, 40, 200),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"white": 245, "gray": 165, "black": 18}
RELATIONS = ("left of", "above")
COUNTS = (2, 3, 4)
CATEGORIES = ("single", "color", "count", "two", "position", "binding", "position_binding")

_BACKGROUND_ODDS = (0.5, 0.3, 0.2)
_SHARE = {
    "single": 0.06,
    "color": 0.12,
    "count": 0.22,
    "two": 0.08,
    "position": 0.15,
    "binding": 0.17,
    "position_binding": 0.20,
}
_RADII = {1: (14.0, 20.0), 2: (11.0, 14.0), 3: (10.0, 11.5), 4: (9.5, 10.5)}
_GRID = np.arange(SIZE) + 0.5


@dataclass(frozen=True, order=True)
class Thing:
    """A shape, with a colour where the prompt names one."""

    shape: str
    color: str | None = None


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for; canonical, so equal meanings are equal specs.

    Without a relation two things are sorted by shape; with one, the first stands left of or above
    the second.
    """

    category: str
    things: tuple[Thing, ...]
    count: int = 1
    """Copies of the only thing; 1 outside the category "count"."""
    relation: str | None = None

    def required(self) -> tuple[Thing, ...]:
        """Every thing the picture must show, copies written out."""
        return self.things * self.count


@dataclass(frozen=True)
class Style:
    """How a scene is photographed."""

    blurry: bool = False
    dull: bool = False
    shadowy: bool = False
    background: str = "white"


@dataclass(frozen=True)
class Placed:
    """A thing in the picture: centre and radius in pixels, colour decided."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs but the small noise."""

    placed: tuple[Placed, ...]
    style: Style


def all_specs() -> list[Spec]:
    """Every spec of the world, in a fixed order."""
    specs = []
    for shape in SHAPES:
        specs.append(Spec("single", (Thing(shape),)))
        specs += [Spec("color", (Thing(shape, color),)) for color in COLORS]
        for count, color in itertools.product(COUNTS, (None, *COLORS)):
            specs.append(Spec("count", (Thing(shape, color),), count))
    for a, b in itertools.permutations(SHAPES, 2):
        hues = list(itertools.permutations(COLORS, 2))
        if a < b:
            specs.append(Spec("two", (Thing(a), Thing(b))))
            specs += [Spec("binding", (Thing(a, p), Thing(b, q))) for p, q in hues]
        for relation in RELATIONS:
            specs.append(Spec("position", (Thing(a), Thing(b)), relation=relation))
            specs += [
                Spec("position_binding", (Thing(a, p), Thing(b, q)), relation=relation)
                for p, q in hues
            ]
    return specs


def specs_by_category() -> dict[str, list[Spec]]:
    """`all_specs`, grouped; every category is present."""
    groups: dict[str, list[Spec]] = {category: [] for category in CATEGORIES}
    for spec in all_specs():
        groups[spec.category].append(spec)
    return groups


def random_spec(groups: dict[str, list[Spec]], rng: random.Random) -> Spec:
    """A spec as often as the training data has it: hard categories more often."""
    category = rng.choices(CATEGORIES, [_SHARE[name] for name in CATEGORIES])[0]
    return rng.choice(groups[category])


def random_style(rng: random.Random, flaw_rate: float = 0.42) -> Style:
    """Each flaw (blurry, dull, shadowy) independently with probability `flaw_rate`."""
    blurry, dull, shadowy = (rng.random() < flaw_rate for _ in range(3))
    background = rng.choices(list(BACKGROUNDS), _BACKGROUND_ODDS)[0]
    return Style(blurry, dull, shadowy, background)


def random_scene(spec: Spec, style: Style, rng: random.Random) -> Scene:
    """An arrangement that shows `spec`: nothing overlaps, nothing is cut off.

    Colours that the spec leaves open are drawn; things of different shape differ in colour too.
    """
    things = _colored(spec, rng)
    while True:
        placed = _place(things, rng)
        if placed and _holds(spec.relation, placed):
            return Scene(placed, style)


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a scene: uint8 `[64, 64, 3]`. `rng` moves each colour by at most 8 of 255."""
    style = scene.style
    image = np.full((SIZE, SIZE, 3), float(BACKGROUNDS[style.background]))
    for thing in scene.placed:
        color = np.array(COLORS[thing.color], float) + rng.uniform(-8, 8, 3)
        if style.dull:
            grey = color.mean()
            color = grey + (color - grey) * 0.5 + (128 - grey) * 0.15
        cover = coverage(thing.shape, thing.x, thing.y, thing.radius)[..., None]
        image = image * (1 - cover) + color * cover
    if style.shadowy:
        image *= _shade(rng.uniform(0, 2 * math.pi))
    if style.blurry:
        image = gaussian_filter(image, (1.5, 1.5, 0))
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def coverage(shape: str, x: float, y: float, radius: float) -> NDArray[np.float64]:
    """How much of each pixel a shape covers, 0 to 1, `[64, 64]`; edges are anti-aliased."""
    u = np.asarray((_GRID[None, :] - x) / radius, np.float64)
    v = np.asarray((_GRID[:, None] - y) / radius, np.float64)
    return np.clip(0.5 - signed_distance(shape, u, v) * radius, 0, 1)


def signed_distance(
    shape: str, u: NDArray[np.float64], v: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance to the outline of a shape of radius 1 at the origin, < 0 inside.

    `v` points down. Exact at the edges; corners are mitred, not rounded.
    """
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.88
    if shape == "triangle":
        side = (1.86 * abs(u) - v - 1) / math.hypot(1.86, 1)
        return np.maximum(side, v - 0.85)
    if shape == "cross":
        upright = np.maximum(abs(u) - 0.33, abs(v) - 1)
        return np.minimum(upright, np.maximum(abs(v) - 0.33, abs(u) - 1))
    raise ValueError(f"unknown shape {shape!r}; the world has {', '.join(SHAPES)}")


def relation_holds(relation: str, dx: float, dy: float, slack: float) -> bool:
    """Whether the first thing stands so to the second, at offset (dx, dy) from the first.

    Args:
        slack: the main axis must exceed `slack` times the other one; smaller is more lenient.
    """
    along, across = (dx, dy) if relation == "left of" else (dy, dx)
    return along > 6 and along > slack * abs(across)


def _colored(spec: Spec, rng: random.Random) -> tuple[Thing, ...]:
    if spec.category == "count":
        (thing,) = spec.things
        color = thing.color or rng.choice(list(COLORS))
        return (Thing(thing.shape, color),) * spec.count
    free = [color for color in COLORS if color not in {t.color for t in spec.things}]
    rng.shuffle(free)
    return tuple(Thing(thing.shape, thing.color or free.pop()) for thing in spec.things)


def _place(things: tuple[Thing, ...], rng: random.Random) -> tuple[Placed, ...] | None:
    low, high = _RADII[len(things)]
    scale = rng.uniform(low, high)
    placed: list[Placed] = []
    for thing in things:
        radius = min(high, max(low - 1, scale * rng.uniform(0.85, 1.15)))
        low_xy, high_xy = radius + 1.5, SIZE - radius - 1.5
        if len(things) == 1:
            x, y = (min(high_xy, max(low_xy, rng.gauss(32, 5))) for _ in range(2))
        else:
            x, y = (rng.uniform(low_xy, high_xy) for _ in range(2))
        if any(max(abs(x - o.x), abs(y - o.y)) < radius + o.radius + 3 for o in placed):
            return None
        placed.append(Placed(thing.shape, str(thing.color), x, y, radius))
    return tuple(placed)


def _holds(relation: str | None, placed: tuple[Placed, ...]) -> bool:
    if relation is None:
        return True
    first, second = placed
    return relation_holds(relation, second.x - first.x, second.y - first.y, slack=1.2)


def _shade(angle: float) -> NDArray[np.float64]:
    across = np.arange(SIZE) / (SIZE - 1) - 0.5
    ramp = 0.5 + math.cos(angle) * across[None, :] + math.sin(angle) * across[:, None]
    return (1 - 0.45 * np.clip(ramp, 0, 1.2))[..., None]
