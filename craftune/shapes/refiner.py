"""Rewrites prompts as a language model would: richer, in style, and sometimes wrong.

A rewrite is a long caption of a sharp, vivid, bright picture. With probability `DRIFT_RATE` a
detail goes wrong on the way.
"""

import random

from craftune.shapes.captions import corrupt, long_caption, parse
from craftune.shapes.world import BACKGROUNDS, Style

DRIFT_RATE = 0.08
"""Share of rewrites that ask for something other than the prompt does."""

_MAX_REPEATS = 200
"""Give up after so many rewrites in a row that were there already."""


def refine(prompt: str, n: int, rng: random.Random) -> list[str]:
    """Write `n` distinct rewrites of `prompt`.

    Raises:
        ValueError: the prompt is not of this world, or has fewer than `n` rewrites.
    """
    spec = parse(prompt)
    rewrites: dict[str, None] = {}
    repeats = 0
    while len(rewrites) < n and repeats < _MAX_REPEATS:
        meant = corrupt(spec, rng) if rng.random() < DRIFT_RATE else spec
        style = Style(background=rng.choice(list(BACKGROUNDS)))
        text = long_caption(meant, style, rng)
        repeats = repeats + 1 if text in rewrites else 0
        rewrites[text] = None
    if len(rewrites) < n:
        raise ValueError(f"found only {len(rewrites)} of {n} rewrites of {prompt!r}; ask for fewer")
    return list(rewrites)
