"""Refiners: one prompt -> several richer rewrites. `REFINERS` is the table of names.

A refiner is a function (prompt, n, rng) -> n distinct rewrites, drawn with a `random.Random`.
Out of tree, write "package.module:name". The rewrites only diversify what the model draws:
rewards and training see the original prompt (CRAFT, section 3.2).
"""

import random
from collections.abc import Callable

from craftune.errors import UserError, unknown_name
from craftune.plugins import imported
from craftune.refiners.template import template
from craftune.shapes.refiner import refine as shapes

Refiner = Callable[[str, int, random.Random], list[str]]


def none(prompt: str, n: int, rng: random.Random) -> list[str]:
    """The prompt itself, n times: variants then differ by their noise alone."""
    del rng
    return [prompt] * n


REFINERS: dict[str, Refiner] = {"template": template, "none": none, "shapes": shapes}

FROM_FILE = "file"
"""The refiner that reads `refine.source` instead of writing anything."""


def load(name: str) -> Refiner:
    """The refiner of this name or import path.

    Raises:
        UserError: unknown name, or nothing callable at the import path.
    """
    if name in REFINERS:
        return REFINERS[name]
    if ":" in name:
        return imported(name, "refine.by")[0]
    known = [*REFINERS, FROM_FILE]
    raise UserError(f"refine.by: {unknown_name('refiner', name, known)}")
