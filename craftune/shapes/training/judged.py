"""Stage `judged`: the base's own pictures, and what a careful eye says of them.

Preference models learn from pictures that models drew, not from photographs. Each tower gets
pictures of its own, of training prompts, plain and refined; how well a picture shows a prompt is
what people would be asked.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from craftune.shapes.captions import confuse, corrupt, parse, short_caption
from craftune.shapes.measure import Sampler, generate
from craftune.shapes.prompts import read
from craftune.shapes.refiner import refine
from craftune.shapes.verifier import detect, verify
from craftune.shapes.world import Spec

BATCH = 40
_CHOICES = {"asked": 0.5, "confused": 0.2, "corrupted": 0.3}
"""Which spec a picture is judged by, and how often."""


def draw_judged(pipeline: StableDiffusionPipeline, count: int, seed: int, out: Path) -> None:
    """Draw `count` pictures of training prompts, half of them refined, and write them to `out`.

    The file holds uint8 `[n, 64, 64, 3]` pictures and the prompts they are of.
    """
    rng = random.Random(seed)
    prompts = [rng.choice(read("train"))[0] for _ in range(count)]
    texts = [prompt if rng.random() < 0.5 else refine(prompt, 1, rng)[0] for prompt in prompts]
    images = generate(Sampler(pipeline), texts, seed)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    torch.save({"images": pixels, "prompts": prompts}, out)


class Judged:
    """Pictures with judgements, drawn in batches; a share of the judgements is wrong."""

    def __init__(self, path: Path, flip_rate: float, rng: random.Random) -> None:
        saved = torch.load(path, weights_only=True)
        self.images: Tensor = saved["images"].permute(0, 3, 1, 2)
        self.specs = [parse(prompt) for prompt in saved["prompts"]]
        self.found = [detect(_image(pixels)) for pixels in saved["images"]]
        self.flip_rate, self.rng = flip_rate, rng

    def draw(self) -> tuple[Tensor, list[str], Tensor]:
        """Pictures `[b, 3, 64, 64]` in [0, 1], prompts, and whether one shows the other."""
        indices = [self.rng.randrange(len(self.specs)) for _ in range(BATCH)]
        specs = [self._spec(self.specs[index]) for index in indices]
        shows = [
            verify(spec, self.found[index]).correct != (self.rng.random() < self.flip_rate)
            for spec, index in zip(specs, indices, strict=True)
        ]
        texts = [short_caption(spec, self.rng) for spec in specs]
        shift = (self.rng.randint(-2, 2), self.rng.randint(-2, 2))
        images = torch.roll(self.images[indices].float() / 255, shift, (2, 3))
        return images, texts, torch.tensor(shows)

    def _spec(self, asked: Spec) -> Spec:
        choice = self.rng.choices(list(_CHOICES), list(_CHOICES.values()))[0]
        change = {"asked": lambda spec, _: spec, "confused": confuse, "corrupted": corrupt}[choice]
        return change(asked, self.rng)


def ranking_loss(scores: Tensor, shows: Tensor) -> Tensor:
    """Bradley-Terry over every pair of a picture that shows its prompt and one that does not."""
    margin = scores[shows][:, None] - scores[~shows][None, :]
    return F.softplus(-margin).mean() if margin.numel() else scores.sum() * 0


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())
