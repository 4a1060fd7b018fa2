"""The world's own pictures of prompts: data for methods that learn from pictures."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from craftune.seeds import stream_seed
from craftune.shapes.captions import parse
from craftune.shapes.world import Spec, random_scene, random_style, render


def world_pictures(prompts: Sequence[str], count: int, seed: int) -> Iterator[Image.Image]:
    """`count` pictures, each of the next prompt in turn, in styles as the world has them.

    Unlike the embedded model's training pictures they all show what their prompt says.

    Raises:
        ValueError: a prompt is no short caption of this world.
    """
    specs = [parse(text) for text in prompts]
    return (_picture(specs[n % len(specs)], seed, n) for n in range(count))


def _picture(spec: Spec, seed: int, number: int) -> Image.Image:
    rng = random.Random(stream_seed("world", seed, number))
    scene = random_scene(spec, random_style(rng), rng)
    return Image.fromarray(render(scene, np.random.default_rng(rng.getrandbits(63))))
