"""ImageReward v1.0: human preference by a whole BLIP (Xu et al. 2023, arXiv:2304.05977).

BLIP large reads the prompt while it looks at the picture; five linear layers without activations
between them make a number of its first token, about -2.3 to 2 after normalisation. Some tables
show it times 100.

As upstream (zai-org/ImageReward): 35 tokens of the prompt are read, which cuts many prompts; the
first token stays [CLS].
"""

from pathlib import Path

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.config import STRICT
from craftune.records import read_json
from craftune.rewards.aesthetic import head_of
from craftune.rewards.blip import first_tokens, load_text, load_vision, part
from craftune.rewards.network import network_reward
from craftune.rewards.preprocess import MiddleSquare
from craftune.rewards.published import Dtype, Published, dtype_of
from craftune.rewards.text import bert_tokenizer
from craftune.rewards.weights import digest, find, read
from craftune.types import Reward

KEY = "reward.imagereward"
TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw number, as published; the score is (raw - MEAN) / STD."""

UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.pooler.")
"""Left over from BLIP's training."""


@dataclass(frozen=True, config=STRICT)
class ImageRewardSettings:
    """Keys of [reward.imagereward]."""

    path: str = "zai-org/ImageReward"
    """Hub id, folder or file of ImageReward.pt (or of model.safetensors with the same keys)."""
    config: str = ""
    """Hub id, folder or file of med_config.json; empty takes the one beside the weights."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """Hub id or folder of BERT's tokenizer."""
    dtype: Dtype = "auto"
    """Of the network; "auto" is float16 on CUDA and float32 elsewhere. The head is float32."""


def _files(settings: ImageRewardSettings) -> dict[str, Path]:
    checkpoint = find(settings.path, ("ImageReward.pt", "model.safetensors"), f"{KEY}.path")
    beside = str(checkpoint.parent) if Path(settings.path).expanduser().exists() else settings.path
    config = find(settings.config or beside, ("med_config.json",), f"{KEY}.config")
    return {"checkpoint": checkpoint, "config": config}


def _load(settings: ImageRewardSettings, device: torch.device) -> Reward:
    found, dtype = _files(settings), dtype_of(settings.dtype, device)
    source = f"{KEY}.path: {found['checkpoint']}"
    held = read(found["checkpoint"], f"{KEY}.path")
    held = {name: tensor for name, tensor in held.items() if not name.startswith(UNUSED)}
    vision = load_vision(part(held, "blip.visual_encoder."), source, device, dtype)
    med, width = read_json(found["config"]), vision.config.hidden_size
    text = load_text(part(held, "blip.text_encoder."), med, width, source, device, dtype)
    head = head_of(part(held, "mlp."), text.config.hidden_size, source, device)
    tokenizer = bert_tokenizer(settings.tokenizer, f"{KEY}.tokenizer", TOKENS)

    def judge(inputs: Tensor, prompts: list[str]) -> Tensor:
        raw = head(first_tokens(vision, text, inputs, tokenizer.with_mask(prompts)).float())
        return (raw.squeeze(-1) - MEAN) / STD

    tokens = 1 + (vision.config.image_size // vision.config.patch_size) ** 2
    activations = 8 * width + 2 * vision.config.intermediate_size
    identity = {
        "name": "imagereward",
        "version": "1",
        "sha256": digest(found),
        "tokenizer": tokenizer.digest(),
    }
    return network_reward(
        judge,
        MiddleSquare(vision.config.image_size),
        identity,
        device,
        dtype,
        bytes_per_image=2 * tokens * activations * dtype.itemsize,
        limit=tokenizer.limit(),
    )


IMAGEREWARD = Published(
    "ImageReward v1.0: human preference, BLIP large and a linear head; about -2 to 2",
    ImageRewardSettings,
    _files,
    _load,
    source="zai-org/ImageReward",
    licence="Apache-2.0",
    download="1.8 GB",
)
