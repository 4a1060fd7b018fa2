"""What towers look at: scenes and near misses, half of them through the autoencoder."""

import math
import random

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from craftune.shapes.captions import confuse, corrupt
from craftune.shapes.training.data import draw, to_tensor
from craftune.shapes.world import COLORS, SHAPES, Scene, Spec, Thing

SEEN = len(SHAPES) * len(COLORS) + 3 * len(SHAPES)
"""Numbers that describe a scene, see `seen_targets`."""


def seen_targets(scene: Scene) -> list[float]:
    """How many of each shape and colour, and how many, how far right and how low, per shape."""
    counts = [
        float(sum((p.shape, p.color) == (shape, color) for p in scene.placed))
        for shape in SHAPES
        for color in COLORS
    ]
    for shape in SHAPES:
        placed = [p for p in scene.placed if p.shape == shape]
        counts.append(float(len(placed)))
        counts.append(sum((p.x / 32 - 1 for p in placed), 0.0))
        counts.append(sum((p.y / 32 - 1 for p in placed), 0.0))
    return counts


def told_targets(spec: Spec) -> list[float]:
    """What a caption says of `seen_targets`; NaN where it leaves it open."""
    required = spec.required()
    named = {thing.shape for thing in required}
    uncolored = {thing.shape for thing in required if thing.color is None}
    told = [
        math.nan if shape in uncolored else float(required.count(Thing(shape, color)))
        for shape in SHAPES
        for color in COLORS
    ]
    for shape in SHAPES:
        told.append(float(sum(thing.shape == shape for thing in required)))
        told += [math.nan, math.nan] if shape in named else [0.0, 0.0]
    if spec.relation is not None:
        axis = 1 if spec.relation == "left of" else 2
        for thing, place in zip(spec.things, (-0.4, 0.4), strict=True):
            told[len(SHAPES) * len(COLORS) + 3 * SHAPES.index(thing.shape) + axis] = place
    return told


class Pictures:
    """Scenes of one tower, with their pictures, half of them through the autoencoder."""

    def __init__(self, vae: AutoencoderTiny, chunks: range, rng: random.Random) -> None:
        drawn = list(draw(chunks, workers=1))
        self.images = np.concatenate([_through(vae, images) for images, _ in drawn])
        self.labels: list[tuple[Spec, Scene]] = [label for _, labels in drawn for label in labels]
        self.rng = rng
        self.by_spec: dict[Spec, list[int]] = {}
        for index, (spec, _) in enumerate(self.labels):
            self.by_spec.setdefault(spec, []).append(index)

    def draw(self) -> tuple[int, int, Spec, Spec]:
        """A scene, another that nearly shows the same, and what they show."""
        while True:
            index = self.rng.randrange(len(self.labels))
            spec = self.labels[index][0]
            other = (confuse if self.rng.random() < 0.4 else corrupt)(spec, self.rng)
            if other != spec and other in self.by_spec:
                return index, self.rng.choice(self.by_spec[other]), spec, other

    def pixels(self, indices: list[int]) -> Tensor:
        """float `[n, 3, 64, 64]` in [0, 1]; with a little noise and shift, as augmentation."""
        x = to_tensor(self.images[indices]) / 2 + 0.5
        shift = (self.rng.randint(-2, 2), self.rng.randint(-2, 2))
        noise = torch.randn_like(x) * 0.04 * torch.rand(len(x), 1, 1, 1)
        return (torch.roll(x, shift, (2, 3)) + noise).clamp(0, 1)


@torch.no_grad()
def _through(vae: AutoencoderTiny, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every second picture through the autoencoder, its latents a little noisy."""
    images = images.copy()
    for start in range(0, len(images), 200):
        latents = vae.encode(to_tensor(images[start : start + 200 : 2])).latents
        strength = 0.25 * latents.std() * torch.rand(len(latents), 1, 1, 1)
        decoded = vae.decode(latents + strength * torch.randn_like(latents)).sample
        pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        images[start : start + 200 : 2] = pixels.numpy()
    return images
