"""The verifier on clean pictures and on near misses."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from craftune.shapes.captions import corrupt, parse
from craftune.shapes.verifier import detect, verify
from craftune.shapes.world import (
    COLORS,
    SHAPES,
    Placed,
    Scene,
    Style,
    random_scene,
    random_spec,
    random_style,
    render,
    specs_by_category,
)

RED, BLUE = COLORS["red"], COLORS["blue"]
SUPER = 8
"""Near misses are drawn this much larger and shrunk, so that edges are smooth."""


def thing(shape: str, color: str, x: float, y: float, radius: float) -> Placed:
    return Placed(shape, color, float(x), float(y), float(radius))


def picture(*placed: Placed, style: Style | None = None) -> Image.Image:
    return Image.fromarray(render(Scene(placed, style or Style()), np.random.default_rng(0)))


def passes(prompt: str, image: Image.Image) -> bool:
    return verify(parse(prompt), detect(image)).correct


def drawn(draw_on: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    canvas = Image.new("RGB", (64 * SUPER, 64 * SUPER), (245, 245, 245))
    draw_on(ImageDraw.Draw(canvas))
    return canvas.resize((64, 64), Image.Resampling.BOX)


def box(*corners: float) -> list[float]:
    return [corner * SUPER for corner in corners]


def test_scenes_pass_and_wrong_prompts_fail() -> None:
    rng, noise, groups = random.Random(5), np.random.default_rng(5), specs_by_category()
    right, wrong = [], []
    for _ in range(500):
        spec = random_spec(groups, rng)
        image = Image.fromarray(render(random_scene(spec, random_style(rng), rng), noise))
        found = detect(image)
        right.append(verify(spec, found).correct)
        wrong.append(verify(corrupt(spec, rng), found).correct)
    assert np.mean(right) >= 0.97
    assert np.mean(wrong) <= 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_every_thing_is_found_where_it_is(shape: str, color: str) -> None:
    (found,) = detect(picture(thing(shape, color, 30, 34, 13)))
    assert (found.shape, found.color) == (shape, color)
    assert found.x == pytest.approx(30, abs=1)
    assert found.y == pytest.approx(34, abs=4)


@pytest.mark.parametrize("radius", [6, 8, 10])
def test_rounded_square_is_neither_square_nor_circle(radius: int) -> None:
    image = drawn(lambda d: d.rounded_rectangle(box(18, 18, 46, 46), radius * SUPER, RED))
    assert not passes("a red circle", image)
    assert radius < 8 or not passes("a red square", image)


def test_cut_off_square_is_no_triangle() -> None:
    image = drawn(lambda d: d.polygon(box(14, 50, 14, 24, 26, 14, 50, 14, 50, 50), RED))
    assert not passes("a red triangle", image)
    half = drawn(lambda d: d.polygon(box(14, 50, 14, 14, 50, 50), RED))
    assert not passes("a red triangle", half)
    trapezoid = drawn(lambda d: d.polygon(box(14, 50, 24, 18, 42, 18, 52, 50), RED))
    assert not passes("a red triangle", trapezoid)


def test_oblong_and_tilted_shapes_are_unclear() -> None:
    assert not passes("a red square", drawn(lambda d: d.rectangle(box(12, 22, 52, 42), RED)))
    assert not passes("a red circle", drawn(lambda d: d.ellipse(box(10, 20, 54, 44), RED)))
    diamond = drawn(lambda d: d.polygon(box(32, 10, 54, 32, 32, 54, 10, 32), RED))
    assert not any(passes(f"a red {shape}", diamond) for shape in SHAPES)


def test_ring_and_bar_are_unclear() -> None:
    ring = drawn(lambda d: d.ellipse(box(12, 12, 52, 52), outline=RED, width=6 * SUPER))
    assert not any(passes(f"a red {shape}", ring) for shape in SHAPES)
    bar = drawn(lambda d: d.rectangle(box(28, 8, 36, 56), RED))
    assert not any(passes(f"a red {shape}", bar) for shape in SHAPES)


def test_touching_things_of_one_colour_do_not_count_as_two() -> None:
    image = picture(thing("circle", "red", 22, 32, 11), thing("circle", "red", 41, 32, 11))
    assert not passes("two red circles", image)
    assert not passes("one red circle", image)


def test_touching_things_of_two_colours_are_told_apart() -> None:
    image = picture(thing("square", "red", 20, 32, 12), thing("square", "blue", 41.2, 32, 12))
    assert sorted(str(found.color) for found in detect(image)) == ["blue", "red"]


def test_count_off_by_one() -> None:
    three = picture(*(thing("cross", "blue", x, y, 9) for x, y in ((14, 14), (48, 16), (32, 48))))
    assert passes("three blue crosses", three)
    assert not passes("two blue crosses", three)
    assert not passes("four blue crosses", three)


def test_swapped_colours_and_reversed_relation() -> None:
    image = picture(thing("circle", "red", 16, 32, 11), thing("square", "blue", 48, 30, 11))
    assert passes("a red circle left of a blue square", image)
    assert passes("a red circle and a blue square", image)
    assert not passes("a blue circle and a red square", image)
    assert not passes("a red circle right of a blue square", image)
    assert not passes("a red circle above a blue square", image)


def test_extra_or_missing_thing() -> None:
    one = thing("circle", "red", 16, 32, 11)
    two = picture(one, thing("square", "blue", 48, 30, 11))
    assert not passes("a red circle", two)
    assert not passes("a circle and a square", picture(one))


def test_specks() -> None:
    assert not passes("a red circle", picture(thing("circle", "red", 32, 32, 3)))
    crumb = picture(thing("circle", "red", 32, 32, 14), thing("circle", "blue", 6, 6, 3))
    assert not passes("a red circle", crumb)
    dust = picture(thing("circle", "red", 32, 32, 14), thing("circle", "blue", 6, 6, 1.2))
    assert passes("a red circle", dust)


def test_colours_between_two_colours_are_unclear() -> None:
    orange = drawn(lambda d: d.ellipse(box(16, 16, 48, 48), (235, 120, 30)))
    assert not passes("a red circle", orange)
    assert not passes("a yellow circle", orange)
    assert passes("a circle", orange)

    def halves(d: ImageDraw.ImageDraw) -> None:
        d.pieslice(box(16, 16, 48, 48), 0, 180, RED)
        d.pieslice(box(16, 16, 48, 48), 180, 360, BLUE)

    assert not passes("a circle", drawn(halves))


@pytest.mark.parametrize("color", ["white", "black", "gray", "red"])
def test_plain_pictures_show_nothing(color: str) -> None:
    image = Image.new("RGB", (64, 64), color)
    assert not any(passes(f"a {shape}", image) for shape in SHAPES)
    assert not passes("a red square", image) or color == "red"


def test_any_mode_and_size() -> None:
    large = picture(thing("circle", "red", 32, 32, 15)).resize((256, 256))
    assert passes("a red circle", large)
    assert passes("a red circle", large.convert("RGBA"))
    assert detect(Image.new("L", (1, 1))) == []
