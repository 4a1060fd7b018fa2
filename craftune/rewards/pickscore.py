"""PickScore v1: preferences of the users of Pick-a-Pic (Kirstain et al. 2023, arXiv:2305.01569).

CLIP ViT-H/14, fine-tuned; the score is the cosine of image and text times the model's own scale
(about 100), so 18 to 24 for most pictures. The chance that one of several pictures of a prompt is
preferred is the softmax of their scores. Others report the bare cosine, or the score over 26.

As upstream (yuvalkirstain/PickScore): the prompt is not cleaned; pictures are resized by
transformers' own processor.
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

KEY = "reward.pickscore"


@dataclass(frozen=True, config=STRICT)
class PickScoreSettings:
    """Keys of [reward.pickscore]."""

    path: str = "yuvalkirstain/PickScore_v1"
    """Hub id or folder (config.json and model.safetensors, or pytorch_model.bin)."""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Hub id or folder of CLIP's tokenizer."""
    dtype: Dtype = "auto"
    """Of the network; "auto" is float16 on CUDA and float32 elsewhere."""


def _files(settings: PickScoreSettings) -> dict[str, Path]:
    return clip_files(settings.path, f"{KEY}.path")


def _load(settings: PickScoreSettings, device: torch.device) -> Reward:
    found, dtype = _files(settings), dtype_of(settings.dtype, device)
    model = load_clip(found, f"{KEY}.path", device, dtype)
    tokenizer = clip_tokenizer(settings.tokenizer, f"{KEY}.tokenizer")
    inputs = MiddleSquare(model.config.vision_config.image_size, middle="floor")
    scale = model.logit_scale.exp()
    return cosine_reward("pickscore", model, tokenizer, inputs, found, device, dtype, scale)


PICKSCORE = Published(
    "PickScore v1: human preference, CLIP ViT-H/14; 100 x cosine",
    PickScoreSettings,
    _files,
    _load,
    source="yuvalkirstain/PickScore_v1",
    licence="MIT (of the code)",
    download="3.9 GB",
)
