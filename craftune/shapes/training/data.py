"""Stage `data` and `latents`: scenes to pictures, pictures to latents."""

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from craftune.shapes.world import (
    Scene,
    Spec,
    random_scene,
    random_spec,
    random_style,
    render,
    specs_by_category,
)

CHUNK = 1000
"""Scenes per chunk; chunk k is drawn with seed k, whatever the number of workers."""


def draw_chunk(seed: int) -> tuple[NDArray[np.uint8], list[tuple[Spec, Scene]]]:
    """`CHUNK` pictures, uint8 `[n, 64, 64, 3]`, with what they show."""
    rng, noise, groups = random.Random(seed), np.random.default_rng(seed), specs_by_category()
    images, labels = [], []
    for _ in range(CHUNK):
        spec = random_spec(groups, rng)
        scene = random_scene(spec, random_style(rng), rng)
        images.append(render(scene, noise))
        labels.append((spec, scene))
    return np.stack(images), labels


def draw(
    chunks: range, workers: int = 2
) -> Iterator[tuple[NDArray[np.uint8], list[tuple[Spec, Scene]]]]:
    """`draw_chunk` over `chunks`, in order, by `workers` processes."""
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(draw_chunk, chunks)


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 `[n, h, w, 3]` to float `[n, 3, h, w]` in [-1, 1], channels last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_scenes(vae: AutoencoderTiny, chunks: range, out: Path) -> None:
    """Write `out`: fp16 latents (unscaled, `[n, 16, 8, 8]`), and the spec and scene of each."""
    latents, labels = [], []
    for images, chunk_labels in draw(chunks, workers=1):
        x = to_tensor(images)
        latents += [vae.encode(part).latents.half() for part in x.split(100)]
        labels += chunk_labels
    torch.save({"latents": torch.cat(latents), "labels": labels}, out)
