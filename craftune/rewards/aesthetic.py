"""LAION's improved aesthetic predictor, "AES" (Schuhmann 2022): looks at the picture alone.

The unit embedding of OpenAI's CLIP ViT-L/14, then five linear layers without activations between
them; about 1 to 10, and 5 to 6 for most pictures. The published head is
sac+logos+ava1-l14-linearMSE.pth; heads of the same shape beside it are other models.

As upstream (christophschuhmann/improved-aesthetic-predictor), in evaluation mode: its dropouts do
nothing, so none are here. Only the image tower is loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from craftune.config import STRICT
from craftune.rewards.clip import (
    bytes_per_image,
    clip_files,
    embed_images,
    load_clip,
    tower_name,
)
from craftune.rewards.network import network_reward
from craftune.rewards.preprocess import MiddleSquare
from craftune.rewards.published import Dtype, Published, dtype_of
from craftune.rewards.weights import digest, find, load_strictly, read
from craftune.types import Reward

KEY = "reward.aesthetic"
HEADS = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")
WIDTHS = (1024, 128, 64, 16, 1)
NUMBERS = (0, 2, 4, 6, 7)
"""Of the layers in the published file, which counts the dropouts between them."""


@dataclass(frozen=True, config=STRICT)
class AestheticSettings:
    """Keys of [reward.aesthetic]."""

    path: str = "openai/clip-vit-large-patch14"
    """Hub id or folder of the tower, a CLIP of transformers."""
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    """Hub id, folder or file (.pth) of the linear head."""
    dtype: Dtype = "auto"
    """Of the tower; "auto" is float16 on CUDA and float32 elsewhere. The head is float32."""


def load_head(file: Path, width: int, device: torch.device) -> nn.Sequential:
    """The head for embeddings of this width, in float32.

    Raises:
        UserError: the file is damaged or of another network.
    """
    key = f"{KEY}.head"
    return head_of(read(file, key), width, f"{key}: {file}", device)


def head_of(
    held: Mapping[str, Tensor], width: int, source: str, device: torch.device
) -> nn.Sequential:
    """The head with these weights, by their published names; ImageReward has the same one.

    Raises:
        UserError: these are other weights.
    """
    numbers = {f"layers.{number}": str(place) for place, number in enumerate(NUMBERS)}
    weights = {_renamed(name, numbers): tensor for name, tensor in held.items()}

    def make() -> nn.Sequential:
        pairs = zip((width, *WIDTHS), WIDTHS, strict=False)
        return nn.Sequential(*(nn.Linear(before, after) for before, after in pairs))

    return load_strictly(make, weights, source, device, torch.float32)


def _renamed(name: str, numbers: Mapping[str, str]) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{numbers.get(layer, layer)}.{kind}"


def _files(settings: AestheticSettings) -> dict[str, Path]:
    return clip_files(settings.path, f"{KEY}.path") | {
        "head": find(settings.head, HEADS, f"{KEY}.head")
    }


def _load(settings: AestheticSettings, device: torch.device) -> Reward:
    found, dtype = _files(settings), dtype_of(settings.dtype, device)
    tower = {role: file for role, file in found.items() if role != "head"}
    model: Any = load_clip(tower, f"{KEY}.path", device, dtype, vision_only=True)
    head = load_head(found["head"], model.config.projection_dim, device)

    def judge(inputs: Tensor, prompts: list[str]) -> Tensor:
        del prompts
        return head(embed_images(model, inputs)).squeeze(-1)

    identity = {
        "name": "aesthetic",
        "version": "1",
        "sha256": digest(found),
        "tower": tower_name(model),
    }
    return network_reward(
        judge,
        MiddleSquare(model.config.image_size),
        identity,
        device,
        dtype,
        bytes_per_image=bytes_per_image(model),
        uses_prompt=False,
    )


AESTHETIC = Published(
    "LAION aesthetic predictor (AES): CLIP ViT-L/14 and a linear head; ignores the prompt",
    AestheticSettings,
    _files,
    _load,
    source="openai/clip-vit-large-patch14, trl-lib/ddpo-aesthetic-predictor",
    licence="MIT, Apache-2.0",
    download="1.7 GB",
)
