"""MPS, overall: human preference under a condition (Zhang et al. 2024, CVPR, arXiv:2405.14705).

CLIP ViT-H/14; then the picture's tokens read the prompt's, but only those that have to do with the
condition, a list of words such as "light, color, clarity". The score is the cosine of the prompt
and the picture's first token, times the model's own scale (about 100): 9 to 15 for most pictures.

As upstream (Kwai-Kolors/MPS): the picture's tokens are taken before CLIP's last layer norm, and all
77 places of the prompt take part, padding too. Its two evaluation scripts read a word above 0.3 of
the best one's fit to the condition; its README's example reads one above 0.01, which gives other
scores. Upstream takes that best fit over the whole batch; here each prompt has its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.config import STRICT, Share
from craftune.rewards.clip import bytes_per_image, config_of, tower_name
from craftune.rewards.cross import CrossModel, counted, cross_of
from craftune.rewards.network import network_reward
from craftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, MiddleSquare, normalized
from craftune.rewards.published import Dtype, Published, dtype_of
from craftune.rewards.shells import read_network
from craftune.rewards.text import clip_tokenizer, remembered
from craftune.rewards.weights import digest, find, load_strictly, read
from craftune.types import Reward

KEY = "reward.mps"
FILES = ("MPS_overall_checkpoint.pth", "model.safetensors")
ACTIVATION, VISION_HEAD, TEXT_HEAD = "gelu", 80, 64
"""Of ViT-H/14: what the shapes of its weights do not tell."""

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
"""Of the overall preference, as published."""

CACHED = 512
"""Prompts whose tokens are kept; 164 MB at 78 x 1,024 floats each."""


@dataclass(frozen=True, config=STRICT)
class MPSSettings:
    """Keys of [reward.mps]."""

    path: str = "RE-N-Y/mpsv1"
    """Hub id, folder or file: the published MPS_overall_checkpoint.pth, or its safetensors port."""
    threshold: Share = 0.3
    """A word counts above this share of the best word's fit to the condition, 0 to below 1."""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Hub id or folder of CLIP's tokenizer; it pads with <|endoftext|>."""
    dtype: Dtype = "auto"
    """Of the network; "auto" is float16 on CUDA and float32 elsewhere."""


def load_mps(
    held: Mapping[str, Tensor], source: str, device: torch.device, dtype: torch.dtype
) -> tuple[Any, CrossModel]:
    """CLIP and the cross module from published keys, with or without the port's first "mps.".

    Raises:
        UserError: these are other weights.
    """
    from transformers import CLIPModel

    named = {name.removeprefix("mps."): tensor for name, tensor in held.items()}
    clip = {
        name.removeprefix("model."): tensor
        for name, tensor in named.items()
        if name.startswith("model.") and not name.endswith("position_ids")
    }
    cross = {
        name.removeprefix("cross_model."): tensor
        for name, tensor in named.items()
        if name.startswith("cross_model.") and not name.endswith("inv_freq")
    }
    config = config_of(clip, ACTIVATION, VISION_HEAD, TEXT_HEAD, source)
    model = load_strictly(lambda: CLIPModel(config), clip, source, device, dtype)
    make = cross_of(named, source)
    return model, load_strictly(make, cross, source, device, dtype)


def _files(settings: MPSSettings) -> dict[str, Path]:
    return {"checkpoint": find(settings.path, FILES, f"{KEY}.path")}


def _load(settings: MPSSettings, device: torch.device) -> Reward:
    found, dtype = _files(settings), dtype_of(settings.dtype, device)
    file, key = found["checkpoint"], f"{KEY}.path"
    held = read(file, key) if file.suffix == ".safetensors" else read_network(file, key)
    model, cross = load_mps(held, f"{key}: {file}", device, dtype)
    scale = model.logit_scale.exp()
    tokenizer = clip_tokenizer(settings.tokenizer, f"{KEY}.tokenizer")

    def encode(texts: list[str]) -> Float[Tensor, "b places width"]:
        """Every token's embedding, then the whole prompt's."""
        read = model.text_model(tokenizer(texts).to(device))
        states = torch.cat((read.last_hidden_state, read.pooler_output[:, None]), dim=1)
        return model.text_projection(states)

    embeddings = remembered(encode, CACHED)
    with torch.no_grad():
        condition = encode([CONDITION])[0, :-1]

    def judge(inputs: Tensor, prompts: list[str]) -> Tensor:
        read = embeddings(prompts)
        words, whole = read[:, :-1], read[:, -1].float()
        pixels = normalized(inputs, CLIP_MEAN, CLIP_STD).to(read.dtype)
        seen = model.visual_projection(model.vision_model(pixels).last_hidden_state)
        first = cross(seen, words, counted(words, condition, settings.threshold))[:, 0]
        return scale * F.cosine_similarity(first.float(), whole)

    identity = {
        "name": "mps",
        "version": "1",
        "sha256": digest(found),
        "tower": tower_name(model),
        "tokenizer": tokenizer.digest(),
        "threshold": str(settings.threshold),
    }
    return network_reward(
        judge,
        MiddleSquare(model.config.vision_config.image_size, middle="floor"),
        identity,
        device,
        dtype,
        bytes_per_image=2 * bytes_per_image(model),
        limit=tokenizer.limit(),
    )


MPS = Published(
    "MPS (overall): human preference, CLIP ViT-H/14 and cross attention; 100 x cosine",
    MPSSettings,
    _files,
    _load,
    source="RE-N-Y/mpsv1; the original is on Google Drive (docs/rewards.md)",
    licence="MIT (of the code)",
    download="4.4 GB",
)
