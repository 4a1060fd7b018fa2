"""What people write under pictures of the world: short and vague, or long and nearly right.

Prompts are short captions. As on the web, the picture above a short caption often shows something
close but wrong (`confuse`), and nothing is said about its style; long captions are phrased
differently, are nearly always right and name the style. A model trained on both knows more than a
short prompt brings out. `parse` inverts every short caption.
"""

import itertools
import random
import re
from dataclasses import replace

from craftune.shapes.world import (
    COLORS,
    COUNTS,
    RELATIONS,
    SHAPES,
    Spec,
    Style,
    Thing,
)

CONFUSION_RATE = {
    "single": 0.08,
    "color": 0.08,
    "count": 0.42,
    "two": 0.40,
    "position": 0.44,
    "binding": 0.44,
    "position_binding": 0.52,
}
"""How often the picture above a short caption shows `confuse(spec)` instead, per category."""

LONG_CONFUSION_RATE = 0.03

_FRAMES = (
    "{}",
    "a picture of {}",
    "an image of {}",
    "a photo of {}",
    "a drawing of {}",
    "an illustration of {}",
    "a simple picture of {}",
    "a scene with {}",
    "there is {}",
    "here is {}",
    "this shows {}",
    "we see {}",
    "look at {}",
    "just {}",
)
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_INVERSE = {"left of": "right of", "above": "below"}
_SIDES = {"left of": ("left", "right"), "above": ("top", "bottom")}


def short_captions(spec: Spec) -> list[str]:
    """Every short way to ask for `spec`, in a fixed order, without repeats."""
    cores = _short_cores(spec)
    plural = spec.count > 1
    frames = [frame.replace("is {}", "are {}") if plural else frame for frame in _FRAMES]
    return [frame.format(core) for frame, core in itertools.product(frames, cores)]


def short_caption(spec: Spec, rng: random.Random) -> str:
    """One of `short_captions`; the bare frame is the most frequent."""
    frame = "{}" if rng.random() < 0.25 else rng.choice(_FRAMES)
    frame = frame.replace("is {}", "are {}") if spec.count > 1 else frame
    return frame.format(rng.choice(_short_cores(spec)))


def long_caption(spec: Spec, style: Style, rng: random.Random) -> str:
    """A detailed caption: two or three words on the style, and the background."""
    words = [
        "blurry" if style.blurry else "sharp",
        "dull" if style.dull else "vivid",
        "shadowy" if style.shadowy else "bright",
    ]
    rng.shuffle(words)
    look = " ".join(words[: rng.choice((2, 3, 3))])
    core = rng.choice(_long_cores(spec))
    form = rng.choice(
        (
            "a {look} picture of {core}, {background} background",
            "{core}, {look}, {background} background",
            "{core} on a {background} background, {look}",
        )
    )
    return form.format(look=look, core=core, background=style.background)


def confuse(spec: Spec, rng: random.Random) -> Spec:
    """What a picture captioned `spec` shows when the caption is wrong.

    Every category has one or two favourite errors, near even odds with the truth, because
    guidance would wash out errors that are spread over many alternatives.
    """
    if spec.category == "count":
        return replace(spec, count=3 if spec.count in (2, 4) else 4)
    if spec.category == "two":
        return Spec("single", (rng.choice(spec.things),))
    if spec.category == "position":
        return replace(spec, things=spec.things[::-1])
    if spec.category == "position_binding" and rng.random() < 0.5:
        return replace(spec, things=spec.things[::-1])
    if spec.category in ("binding", "position_binding"):
        return _swapped_colors(spec)
    (thing,) = spec.things
    if spec.category == "color":
        return Spec("color", (Thing(thing.shape, _next(thing.color, list(COLORS))),))
    return Spec("single", (Thing(_next(thing.shape, list(SHAPES))),))


def corrupt(spec: Spec, rng: random.Random) -> Spec:
    """A near miss of any kind: one colour, shape, number, relation or binding goes wrong."""
    changes = [_wrong_shape]
    if spec.things[0].color:
        changes.append(_wrong_color)
    if spec.category not in ("single", "color"):
        changes += [confuse, confuse]
    return rng.choice(changes)(spec, rng)


def parse(prompt: str) -> Spec:
    """The spec that a short caption asks for.

    Raises:
        ValueError: the text is no short caption of this world.
    """
    text = " ".join(prompt.lower().split()).removesuffix(".")
    for frame in _FRAMES:
        prefix = frame.removesuffix("{}")
        for start in {prefix, prefix.replace("is ", "are ")}:
            spec = _parse_core(text.removeprefix(start)) if text.startswith(start) else None
            if spec:
                return spec
    raise ValueError(f"not a prompt of the shapes world: {prompt!r}; e.g. 'a red circle'")


def _phrase(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}" if thing.color else thing.shape


def _plural(thing: Thing) -> str:
    return _phrase(thing) + ("es" if thing.shape == "cross" else "s")


def _short_cores(spec: Spec) -> list[str]:
    names = [_phrase(thing) for thing in spec.things]
    if spec.category == "count":
        number = f"{_NUMBERS[spec.count]} {_plural(spec.things[0])}"
        return [number, f"exactly {number}"]
    if len(names) == 1:
        return [f"a {names[0]}", f"one {names[0]}", names[0]]
    if spec.relation is None:
        return [
            joined.format(first, second)
            for joined in ("a {} and a {}", "{} and {}", "a {} with a {}")
            for first, second in (names, names[::-1])
        ]
    a, b = names
    relation, inverse = spec.relation, _INVERSE[spec.relation]
    return [
        f"a {a} {relation} a {b}",
        f"{a} {relation} {b}",
        f"a {b} {inverse} a {a}",
        f"{b} {inverse} {a}",
    ]


def _long_cores(spec: Spec) -> list[str]:
    names = [_phrase(thing) for thing in spec.things]
    if spec.category == "count":
        number, plural = _NUMBERS[spec.count], _plural(spec.things[0])
        return [f"a group of {number} {plural}", f"{number} separate {plural} in total"]
    if len(names) == 1:
        return [f"a single {names[0]} in the middle", f"a lone {names[0]} and nothing else"]
    if spec.relation is None:
        pairs = (names, names[::-1])
        return [
            form.format(first, second)
            for form in ("one {} together with one {}", "two objects: a {} next to a {}")
            for first, second in pairs
        ]
    (a, b), (here, there) = names, _SIDES[spec.relation]
    return [
        f"a {a} on the {here} side and a {b} on the {there} side",
        f"{here} side: a {a}, {there} side: a {b}",
    ]


_COLOR, _SHAPE = "|".join(COLORS), "|".join(SHAPES)
_NAME = rf"(?:a |one )?(?:({_COLOR}) )?({_SHAPE})"
_ONE = re.compile(_NAME)
_MANY = re.compile(rf"(?:exactly )?({'|'.join(_NUMBERS.values())}) (?:({_COLOR}) )?({_SHAPE})e?s")
_LINKS = ("and", "with", *RELATIONS, *_INVERSE.values())
_PAIR = re.compile(rf"{_NAME} ({'|'.join(_LINKS)}) {_NAME}")


def _parse_core(core: str) -> Spec | None:
    if match := _ONE.fullmatch(core):
        color, shape = match.groups()
        return Spec("color" if color else "single", (Thing(shape, color),))
    if match := _MANY.fullmatch(core):
        number, color, shape = match.groups()
        count = next(n for n in COUNTS if _NUMBERS[n] == number)
        return Spec("count", (Thing(shape, color),), count)
    match = _PAIR.fullmatch(core)
    return _parse_pair(match.groups()) if match else None


def _parse_pair(groups: tuple[str | None, ...]) -> Spec | None:
    color_a, shape_a, link, color_b, shape_b = groups
    a, b = Thing(str(shape_a), color_a), Thing(str(shape_b), color_b)
    if a.shape == b.shape or (a.color is None) != (b.color is None):
        return None
    if a.color is not None and a.color == b.color:
        return None
    kind = "binding" if a.color else "two"
    if link in ("and", "with"):
        return Spec(kind, tuple(sorted((a, b), key=lambda thing: thing.shape)))
    category = "position_binding" if a.color else "position"
    if link in _INVERSE.values():
        a, b = b, a
        link = next(relation for relation in RELATIONS if _INVERSE[relation] == link)
    return Spec(category, (a, b), relation=link)


def _swapped_colors(spec: Spec) -> Spec:
    a, b = spec.things
    return replace(spec, things=(Thing(a.shape, b.color), Thing(b.shape, a.color)))


def _next(value: str | None, values: list[str]) -> str:
    return values[(values.index(str(value)) + 1) % len(values)]


def _wrong_shape(spec: Spec, rng: random.Random) -> Spec:
    index = rng.randrange(len(spec.things))
    free = [shape for shape in SHAPES if shape not in {thing.shape for thing in spec.things}]
    return _with(spec, index, Thing(rng.choice(free), spec.things[index].color))


def _wrong_color(spec: Spec, rng: random.Random) -> Spec:
    index = rng.randrange(len(spec.things))
    free = [color for color in COLORS if color not in {thing.color for thing in spec.things}]
    return _with(spec, index, Thing(spec.things[index].shape, rng.choice(free)))


def _with(spec: Spec, index: int, thing: Thing) -> Spec:
    things = [*spec.things[:index], thing, *spec.things[index + 1 :]]
    if spec.relation is None:
        things.sort(key=lambda each: each.shape)
    return replace(spec, things=tuple(things))
