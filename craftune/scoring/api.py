"""`craftune.score`: images and prompts to numbers, in Python."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from craftune import rewards as table
from craftune.errors import UserError
from craftune.scoring.batches import Batch, Item, score_batches
from craftune.scoring.command import device_named
from craftune.scoring.scores import prompts_cut
from craftune.types import Reward

Picture = Image.Image | str | Path | bytes | np.ndarray
"""A PIL image, a file, a file's bytes, or uint8 `[h, w, 3]`."""


def score(
    images: Sequence[Picture],
    prompts: Sequence[str] | str | None = None,
    *,
    rewards: Sequence[str | Reward],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    device: str = "auto",
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Score images with rewards; each is loaded once per process.

        craftune.score(["a.png"], ["a red cube"], rewards=["hpsv2.1", "aesthetic"])

    Args:
        images: opened when they are scored, so files need no memory.
        prompts: one per image, or one for all; None where no reward reads it.
        rewards: names of `craftune list rewards`, "package.module:function", an HTTP address, or
            a `craftune.Reward`.
        settings: reward -> what a recipe has in [reward."NAME"], e.g. {"hpsv2.1": {"path": ...}}.
        device: "auto" (CUDA, else CPU), or a torch device.
        batch_size: images that are opened at once; changes no number.

    Returns:
        Reward name -> float32 `[n]`, raw units, in the order of the images. A warning says how
        many prompts are longer than what a reward reads.

    Raises:
        UserError: an unknown reward; an image that cannot be read or scored, named by its place;
            a prompt that is missing.
    """
    settings = settings or {}
    names = [name for name in rewards if isinstance(name, str)]
    table.check_names(names, "rewards")
    table.check_settings(settings)
    where = device_named(device)
    loaded = [r if isinstance(r, Reward) else table.load(r, where, settings) for r in rewards]
    if not loaded or len({reward.name for reward in loaded}) < len(loaded):
        raise UserError("rewards: name at least one, and none twice")
    texts = [prompts] * len(images) if prompts is None or isinstance(prompts, str) else prompts
    if len(texts) != len(images):
        raise UserError(f"prompts: {len(texts)} for {len(images)} images")
    items = [
        Item(
            f"{number}: {image}" if isinstance(image, (str, Path)) else str(number),
            text,
            _data(image),
        )
        for number, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    starts = range(0, len(items), batch_size)
    batches = (Batch(None, items[start : start + batch_size]) for start in starts)
    found: dict[str, list[torch.Tensor]] = {r.name: [torch.zeros(0)] for r in loaded}
    for _, scored in score_batches(loaded, batches, reject=False):
        for name, values in scored.values.items():
            found[name].append(values)
    for name, count in prompts_cut(loaded, texts).items():
        text = f"prompts cut by {name}: {count:,} of {len(items):,} images"
        warnings.warn(text, UserWarning, stacklevel=2)
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def _data(image: Picture) -> Path | bytes | Image.Image:
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return Path(image) if isinstance(image, str) else image
