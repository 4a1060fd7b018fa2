"""VQAScore: how sure a model is that the picture shows the prompt (Lin et al. 2024,
arXiv:2404.01291, section 3).

CLIP-FlanT5: the patches of CLIP ViT-L/14 at 336 stand in the middle of a question that Flan-T5
reads. The score is the geometric mean of the chances of "Yes" and of the answer's end, 0 to 1.
Scores of other question-answering models do not compare.

As upstream (linzhiqiu/t2v_metrics 3.0): pictures are padded to a square with CLIP's mean colour;
the texts before and after the picture are tokenised apart, each with an end mark of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.config import STRICT
from craftune.records import read_json
from craftune.rewards.clip import clip_files, load_clip
from craftune.rewards.flant5 import VISION, Answering, load_t5, question_limit
from craftune.rewards.network import network_reward
from craftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, PaddedSquare, normalized
from craftune.rewards.published import Published, dtype_of
from craftune.rewards.text import t5_tokenizer
from craftune.rewards.weights import digest, read
from craftune.types import Reward

KEY = "reward.vqascore"


@dataclass(frozen=True, config=STRICT)
class VQAScoreSettings:
    """Keys of [reward.vqascore]."""

    path: str = "zhiqiulin/clip-flant5-xxl"
    """Hub id or folder; zhiqiulin/clip-flant5-xl is smaller and another model."""
    vision: str = "openai/clip-vit-large-patch14-336"
    """Hub id or folder of its image tower, a CLIP of transformers."""
    tokenizer: str = "google/flan-t5-xxl"
    """Hub id or folder of Flan-T5's tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network; "auto" is bfloat16 on CUDA and float32 elsewhere. T5 overflows in float16."""


def load_answering(
    found: Mapping[str, Path], device: torch.device, dtype: torch.dtype
) -> Answering:
    """The network from its files; a copy of the image tower among its weights is preferred.

    Raises:
        UserError: other models, or weights that are not whole.
    """
    key = f"{KEY}.path"
    held = {
        name: tensor
        for role, file in found.items()
        if role.startswith("weights")
        for name, tensor in read(file, key).items()
    }
    source = f"{key}: {found['config'].parent}"
    projector, t5 = load_t5(held, read_json(found["config"]), source, device, dtype)
    files = {
        role.removeprefix("vision "): file
        for role, file in found.items()
        if role.startswith("vision ")
    }
    own = {name.removeprefix(VISION): held[name] for name in held if name.startswith(VISION)}
    tower = load_clip(files, f"{KEY}.vision", device, dtype, vision_only=True, instead=own)
    return Answering(tower.vision_model, projector, t5)


def _files(settings: VQAScoreSettings) -> dict[str, Path]:
    tower = clip_files(settings.vision, f"{KEY}.vision")
    return clip_files(settings.path, f"{KEY}.path") | {
        f"vision {role}": file for role, file in tower.items()
    }


def _load(settings: VQAScoreSettings, device: torch.device) -> Reward:
    found = _files(settings)
    cuda = settings.dtype == "auto" and device.type == "cuda"
    dtype = torch.bfloat16 if cuda else dtype_of(settings.dtype, device)
    model = load_answering(found, device, dtype)
    tokenizer = t5_tokenizer(settings.tokenizer, f"{KEY}.tokenizer")

    def judge(inputs: Tensor, prompts: list[str]) -> Float[Tensor, " b"]:
        pixels = normalized(inputs, CLIP_MEAN, CLIP_STD).to(dtype)
        return model.sureness(pixels, prompts, tokenizer)

    identity = {
        "name": "vqascore",
        "version": "1",
        "sha256": digest(found),
        "tower": f"Flan-T5 {model.t5.config.d_model} x {model.t5.config.num_layers}",
        "tokenizer": tokenizer.digest(),
    }
    return network_reward(
        judge,
        PaddedSquare(model.vision.config.image_size),
        identity,
        device,
        dtype,
        bytes_per_image=model.bytes_per_image,
        limit=question_limit(tokenizer),
    )


VQASCORE = Published(
    "VQAScore: chance of yes to 'does this figure show ...?', CLIP-FlanT5; 0 to 1",
    VQAScoreSettings,
    _files,
    _load,
    source="zhiqiulin/clip-flant5-xxl, openai/clip-vit-large-patch14-336",
    licence="Apache-2.0 (of the code)",
    download="45 GB",
)
