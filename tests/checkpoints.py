"""Tiny checkpoints in the formats in which rewards are published, for the real loaders.

`CHECKPOINTS` is the table: a reward of `craftune.rewards.REWARDS` that needs weights -> a function
that writes such files into a folder and returns the reward's settings. Another reward is one more
entry; the contract tests then run on it.
"""

import atexit
import functools
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from craftune import rewards
from craftune.types import Reward


def weight(name: str, shape: tuple[int, ...], std: float = 0.08) -> Tensor:
    """What the golden numbers were made with: every value follows from the upstream key."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    values = rng.standard_normal(shape) * std
    gain = name.endswith("weight") and len(shape) == 1
    return torch.from_numpy(np.asarray(values + gain, np.float32)).reshape(shape)


def open_clip_shapes(
    *,
    embedding: int,
    vision: tuple[int, int],
    text: tuple[int, int],
    patch: int = 14,
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an open_clip ViT; `vision` and `text` are (width, depth)."""
    (wide, deep), (text_wide, text_deep) = vision, text
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, text_wide),
        "text_projection": (text_wide, embedding),
        "logit_scale": (),
        "token_embedding.weight": (49408, text_wide),
        "visual.class_embedding": (wide,),
        "visual.positional_embedding": (1 + (224 // patch) ** 2, wide),
        "visual.proj": (wide, embedding),
        "visual.conv1.weight": (wide, 3, patch, patch),
    }
    norms = {"ln_final": text_wide, "visual.ln_pre": wide, "visual.ln_post": wide}
    for tower, width, depth in (
        ("visual.transformer", wide, deep),
        ("transformer", text_wide, text_deep),
    ):
        for block in (f"{tower}.resblocks.{i}." for i in range(depth)):
            for name, inner, outer in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 4 * width, width),
                ("mlp.c_proj.", width, 4 * width),
            ):
                shapes |= {f"{block}{name}weight": (inner, outer), f"{block}{name}bias": (inner,)}
            norms |= {f"{block}ln_1": width, f"{block}ln_2": width}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def open_clip_weights(shapes: dict[str, Any], logit_scale: float) -> dict[str, Tensor]:
    """Values for these keys, by the rule of the golden numbers."""
    weights = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
    return weights | {"logit_scale": torch.tensor(logit_scale)}


def write_tokenizer(folder: Path) -> str:
    """CLIP's tokenizer with a byte vocabulary and no merges, in the published files."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir(exist_ok=True)
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder)


def write_hps(folder: Path, file: str) -> dict[str, str]:
    """As published: {"state_dict": ...} in float16 in one torch file, open_clip's keys."""
    shapes = open_clip_shapes(embedding=32, vision=(160, 2), text=(64, 2), patch=28)
    weights = {k: v.half() for k, v in open_clip_weights(shapes, 4.0).items()}
    folder.mkdir(exist_ok=True)
    torch.save({"epoch": 3, "name": "tiny", "state_dict": weights}, folder / file)
    return {"path": str(folder), "tokenizer": write_tokenizer(folder)}


def tiny_clip(act: str = "quick_gelu", size: int = 224) -> Any:
    """A `CLIPModel` with random weights that tells pictures and prompts apart."""
    from transformers import CLIPConfig, CLIPModel

    both = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    text = {"hidden_size": 48, "intermediate_size": 96, "eos_token_id": 49407}
    vision = {"hidden_size": 64, "intermediate_size": 128, "patch_size": 28, "image_size": size}
    config = CLIPConfig(
        text_config=both | text | {"projection_dim": 32},
        vision_config=both | vision | {"projection_dim": 32},
        projection_dim=32,
    )
    model = CLIPModel(config).eval()
    state = {
        name: weight(name, tuple(tensor.shape)) if tensor.ndim else torch.tensor(4.6)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def write_clip(folder: Path, act: str = "quick_gelu") -> dict[str, str]:
    """A transformers folder: config.json, model.safetensors and the tokenizer."""
    folder.mkdir(exist_ok=True)
    tiny_clip(act).save_pretrained(folder)
    return {"path": str(folder), "tokenizer": write_tokenizer(folder)}


def write_pickscore(folder: Path) -> dict[str, str]:
    """As published in 2022: with position_ids, and the config's old end token."""
    settings = write_clip(folder, "gelu")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(65)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return settings


def head_weights(width: int = 32) -> dict[str, Tensor]:
    """The aesthetic head's published keys; the numbers count the dropouts between the layers."""
    widths = (width, 1024, 128, 64, 16, 1)
    weights: dict[str, Tensor] = {}
    for place, number in enumerate((0, 2, 4, 6, 7)):
        shape = (widths[place + 1], widths[place])
        name = f"layers.{number}"
        weights[f"{name}.weight"] = weight(f"{name}.weight", shape, shape[1] ** -0.5 * 2)
        weights[f"{name}.bias"] = weight(f"{name}.bias", shape[:1])
    return weights


def write_aesthetic(folder: Path) -> dict[str, str]:
    """A tower of transformers, and the head in a torch file of its own."""
    settings = write_clip(folder)
    torch.save(head_weights(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return {"path": settings["path"], "head": str(folder)}


CHECKPOINTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "hpsv2.1": lambda folder: write_hps(folder, "HPS_v2.1_compressed.pt"),
    "hpsv2.0": lambda folder: write_hps(folder, "HPS_v2_compressed.pt"),
    "pickscore": write_pickscore,
    "aesthetic": write_aesthetic,
    "clipscore": lambda folder: write_clip(folder) | {"tokenizer": ""},
}


@functools.cache
def settings_of(name: str) -> dict[str, Any]:
    """The settings of a reward with tiny weights, written once per process; {} without weights."""
    if name not in CHECKPOINTS:
        return {}
    folder = Path(tempfile.mkdtemp(prefix="craftune-checkpoint-"))
    atexit.register(shutil.rmtree, folder)
    return CHECKPOINTS[name](folder)


def loaded(name: str) -> Reward:
    """Any reward of the table, with tiny weights where it needs some."""
    return rewards.load(name, settings={name: settings_of(name)})
