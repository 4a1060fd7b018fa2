"""CLIPScore: how well a picture fits its prompt (Hessel et al. 2021, arXiv:2104.08718).

The raw cosine of one CLIP's image and text, by default OpenAI's ViT-L/14. Many variants go by this
name: other towers, times 100, or 2.5 max(cos, 0) with the prefix "A photo depicts". The tower is
part of the score's identity; nothing is clipped, scaled or put before the prompt.
"""

from pathlib import Path

import torch
from pydantic.dataclasses import dataclass

from craftune.config import STRICT
from craftune.rewards.clip import clip_files, load_clip
from craftune.rewards.cosine import cosine_reward
from craftune.rewards.preprocess import MiddleSquare
from craftune.rewards.published import Dtype, Published, dtype_of
from craftune.rewards.text import clip_tokenizer
from craftune.types import Reward

KEY = "reward.clipscore"


@dataclass(frozen=True, config=STRICT)
class CLIPScoreSettings:
    """Keys of [reward.clipscore]."""

    path: str = "openai/clip-vit-large-patch14"
    """Hub id or folder of any CLIP of transformers."""
    tokenizer: str = ""
    """Hub id or folder of its tokenizer; empty takes the one in `path`."""
    dtype: Dtype = "auto"
    """Of the network; "auto" is float16 on CUDA and float32 elsewhere."""


def _files(settings: CLIPScoreSettings) -> dict[str, Path]:
    return clip_files(settings.path, f"{KEY}.path")


def _load(settings: CLIPScoreSettings, device: torch.device) -> Reward:
    found, dtype = _files(settings), dtype_of(settings.dtype, device)
    model = load_clip(found, f"{KEY}.path", device, dtype)
    tokenizer = clip_tokenizer(settings.tokenizer or settings.path, f"{KEY}.tokenizer")
    inputs = MiddleSquare(model.config.vision_config.image_size)
    return cosine_reward("clipscore", model, tokenizer, inputs, found, device, dtype)


CLIPSCORE = Published(
    "CLIPScore: fit of picture and prompt, CLIP ViT-L/14 or another tower; raw cosine",
    CLIPScoreSettings,
    _files,
    _load,
    source="openai/clip-vit-large-patch14",
    licence="MIT",
    download="1.7 GB",
)
