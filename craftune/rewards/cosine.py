"""What HPS, PickScore and CLIPScore are: the cosine of a CLIP's picture and text, as a `Reward`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craftune.rewards.clip import bytes_per_image, embed_images, embed_texts, tower_name
from craftune.rewards.network import network_reward
from craftune.rewards.preprocess import MiddleSquare
from craftune.rewards.text import Tokenizer, remembered
from craftune.rewards.weights import digest
from craftune.types import Reward


def cosine_reward(
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    inputs: MiddleSquare,
    files: Mapping[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    scale: Tensor | float = 1.0,
) -> Reward:
    """The reward whose score is `scale` times the cosine; each prompt is encoded once.

    Args:
        model: a `CLIPModel` on the device.
        inputs: how pictures are prepared.
        files: of the weights, whose sha256 is part of the identity.
        dtype: of the towers; the cosine is float32.
    """
    embeddings = remembered(lambda texts: embed_texts(model, tokenizer(texts)))

    def judge(inputs: Tensor, prompts: list[str]) -> Tensor:
        return scale * (embed_images(model, inputs) * embeddings(prompts)).sum(-1)

    identity = {
        "name": name,
        "version": "1",
        "sha256": digest(files),
        "tower": tower_name(model),
        "tokenizer": tokenizer.digest(),
    }
    return network_reward(
        judge,
        inputs,
        identity,
        device,
        dtype,
        bytes_per_image=bytes_per_image(model),
        limit=tokenizer.limit(),
        remember=embeddings,
    )
