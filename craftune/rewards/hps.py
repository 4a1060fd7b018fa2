"""HPS v2.0 and v2.1: human preference scores (Wu et al. 2023, arXiv:2306.09341).

CLIP ViT-H/14, fine-tuned on human choices; the score is the cosine of image and text, about 0.2 to
0.33. Tables show it times 100. Scores of the two versions do not compare.

As upstream (tgxs002/HPSv2): text is cleaned with ftfy and HTML entities are read; pictures are
resized as float tensors with antialiasing, as torchvision >= 0.17 does it (older ones did without,
which moves every score). Upstream computes under autocast and returns float16; here the cosine is
float32. Pictures are scored as they are: the official benchmark images are JPEG files.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass

from craftune.config import STRICT
from craftune.rewards.clip import config_of, from_open_clip
from craftune.rewards.cosine import cosine_reward
from craftune.rewards.preprocess import MiddleSquare
from craftune.rewards.published import Dtype, Published, dtype_of
from craftune.rewards.text import cleaned, clip_tokenizer
from craftune.rewards.weights import find, load_strictly, read
from craftune.types import Reward

FILES = {"hpsv2.1": "HPS_v2.1_compressed.pt", "hpsv2.0": "HPS_v2_compressed.pt"}

ACTIVATION, VISION_HEAD, TEXT_HEAD = "gelu", 80, 64
"""Of ViT-H/14: what the shapes of its weights do not tell."""


@dataclass(frozen=True, config=STRICT)
class HPSSettings:
    """Keys of [reward."hpsv2.1"] and [reward."hpsv2.0"]."""

    path: str = "xswu/HPSv2"
    """Hub id, folder or file of the published checkpoint (open_clip, .pt)."""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Hub id or folder of CLIP's tokenizer."""
    dtype: Dtype = "auto"
    """Of the network; "auto" is float16 on CUDA and float32 elsewhere."""


def hps(name: str) -> Published:
    """HPS of one version, "hpsv2.0" or "hpsv2.1"."""
    key = f'reward."{name}".path'

    def files(settings: HPSSettings) -> dict[str, Path]:
        return {"checkpoint": find(settings.path, (FILES[name],), key)}

    def load(settings: HPSSettings, device: torch.device) -> Reward:
        found = files(settings)
        dtype = dtype_of(settings.dtype, device)
        model = load_hps(found["checkpoint"], key, device, dtype)
        tokenizer = clip_tokenizer(settings.tokenizer, f'reward."{name}".tokenizer', cleaned)
        inputs = MiddleSquare(resize="tensor")
        return cosine_reward(name, model, tokenizer, inputs, found, device, dtype)

    return Published(
        f"HPS v{name.removeprefix('hpsv')}: human preference, CLIP ViT-H/14; raw cosine",
        HPSSettings,
        files,
        load,
        source=f"xswu/HPSv2, {FILES[name]}",
        licence="Apache-2.0",
        download="2.0 GB",
        display_scale=100.0,
    )


def load_hps(file: Path, key: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The published checkpoint as a `CLIPModel`.

    Raises:
        UserError: the file is damaged or of another network.
    """
    from transformers import CLIPModel

    source, held = f"{key}: {file}", read(file, key)
    weights = held.get("state_dict", held)
    converted = from_open_clip(weights, source)
    config = config_of(converted, ACTIVATION, VISION_HEAD, TEXT_HEAD, source)
    return load_strictly(lambda: CLIPModel(config), converted, source, device, dtype)
