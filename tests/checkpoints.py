"""Tiny checkpoints in the formats in which rewards are published, for the real loaders.

`CHECKPOINTS` is the table: a reward of `craftune.rewards.REWARDS` that needs weights -> a function
that writes such files into a folder and returns the reward's settings. Another reward is one more
entry; the contract tests then run on it.
"""

import atexit
import functools
import itertools
import json
import shutil
import sys
import tempfile
import types
import unittest.mock
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


def head_weights(width: int = 32, prefix: str = "") -> dict[str, Tensor]:
    """The aesthetic head's published keys; the numbers count the dropouts between the layers."""
    widths = (width, 1024, 128, 64, 16, 1)
    weights: dict[str, Tensor] = {}
    for place, number in enumerate((0, 2, 4, 6, 7)):
        shape = (widths[place + 1], widths[place])
        name = f"{prefix}layers.{number}"
        weights[f"{name}.weight"] = weight(f"{name}.weight", shape, shape[1] ** -0.5 * 2)
        weights[f"{name}.bias"] = weight(f"{name}.bias", shape[:1])
    return weights


def write_aesthetic(folder: Path) -> dict[str, str]:
    """A tower of transformers, and the head in a torch file of its own."""
    settings = write_clip(folder)
    torch.save(head_weights(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return {"path": settings["path"], "head": str(folder)}


def imagereward_shapes(
    *, vision: tuple[int, int], text: tuple[int, int], words: int, patch: int, places: int
) -> dict[str, tuple[int, ...]]:
    """ImageReward.pt's keys, without the head's; `vision` and `text` are (width, depth)."""
    (wide, deep), (text_wide, text_deep) = vision, text
    eye, reader = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{eye}cls_token": (1, 1, wide),
        f"{eye}pos_embed": (1, 1 + (224 // patch) ** 2, wide),
        f"{eye}patch_embed.proj.weight": (wide, 3, patch, patch),
        f"{eye}patch_embed.proj.bias": (wide,),
        f"{reader}embeddings.position_ids": (1, places),
        f"{reader}embeddings.word_embeddings.weight": (words, text_wide),
        f"{reader}embeddings.position_embeddings.weight": (places, text_wide),
        "blip.vision_proj.weight": (256, wide),
        "blip.vision_proj.bias": (256,),
        "blip.text_proj.weight": (256, text_wide),
        "blip.text_proj.bias": (256,),
    }
    norms = {f"{eye}norm": wide, f"{reader}embeddings.LayerNorm": text_wide}
    linear: dict[str, tuple[int, int]] = {}
    for block in (f"{eye}blocks.{i}." for i in range(deep)):
        norms |= {f"{block}norm1": wide, f"{block}norm2": wide}
        linear |= {
            f"{block}attn.qkv": (3 * wide, wide),
            f"{block}attn.proj": (wide, wide),
            f"{block}mlp.fc1": (4 * wide, wide),
            f"{block}mlp.fc2": (wide, 4 * wide),
        }
    for block in (f"{reader}encoder.layer.{i}." for i in range(text_deep)):
        for attention, seen in (("attention", text_wide), ("crossattention", wide)):
            linear |= {
                f"{block}{attention}.self.query": (text_wide, text_wide),
                f"{block}{attention}.self.key": (text_wide, seen),
                f"{block}{attention}.self.value": (text_wide, seen),
                f"{block}{attention}.output.dense": (text_wide, text_wide),
            }
            norms[f"{block}{attention}.output.LayerNorm"] = text_wide
        linear |= {
            f"{block}intermediate.dense": (4 * text_wide, text_wide),
            f"{block}output.dense": (text_wide, 4 * text_wide),
        }
        norms[f"{block}output.LayerNorm"] = text_wide
    for name, (inner, outer) in linear.items():
        shapes |= {f"{name}.weight": (inner, outer), f"{name}.bias": (inner,)}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
"""As published beside ImageReward.pt."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_bert_tokenizer(folder: Path) -> int:
    """BERT's published vocab.txt, of single letters; returns its size with BLIP's two marks."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*marks, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join([*words, ""]))
    return len(words) + 2


def imagereward_weights(words: int) -> dict[str, Tensor]:
    """Tiny ones, by the published names."""
    sizes = {"vision": (64, 2), "text": (24, 2), "patch": 32, "places": 40}
    shapes = imagereward_shapes(words=words, **sizes)  # type: ignore[arg-type]
    head = head_weights(24, "mlp.")
    return {name: weight(name, shape) for name, shape in shapes.items()} | head


def write_imagereward(folder: Path) -> dict[str, str]:
    """As published: one torch file with leftovers of BLIP's training, and med_config.json."""
    folder.mkdir(exist_ok=True)
    words = write_bert_tokenizer(folder)
    torch.save(imagereward_weights(words), folder / "ImageReward.pt")
    small = {"hidden_size": 24, "intermediate_size": 96, "max_position_embeddings": 40}
    layers = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": words}
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG | small | layers))
    return {"path": str(folder), "tokenizer": str(folder)}


def mps_cross_shapes(width: int, inner: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of MPS's cross module."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (f"cross_model.layers.{i}." for i in range(depth)):
        cross, own, hidden = f"{layer}0.fn.", f"{layer}1.fn.", 4 * width
        shapes |= {
            f"{cross}norm.weight": (width,),
            f"{cross}norm.bias": (width,),
            f"{cross}to_q.weight": (inner, width),
            f"{cross}to_kv.weight": (128, width),
            f"{cross}to_out.weight": (width, inner),
            f"{cross}ff.0.weight": (2 * hidden, width),
            f"{cross}ff.2.weight": (width, hidden),
            f"{own}norm.weight": (width,),
            f"{own}norm.bias": (width,),
            f"{own}rotary_emb.inv_freq": (32,),
            f"{own}fused_attn_ff_proj.weight": (inner + 128 + 2 * hidden, width),
            f"{own}attn_out.weight": (width, inner),
            f"{own}ff_out.1.weight": (width, hidden),
        }
    return shapes


def mps_weights() -> dict[str, Tensor]:
    """Tiny ones in float16, by the names of the published module."""
    from craftune.rewards.clip import from_open_clip

    shapes = open_clip_shapes(embedding=32, vision=(160, 2), text=(64, 2), patch=28)
    clip = from_open_clip(open_clip_weights(shapes, 4.6), "")
    cross = {name: weight(name, s, 0.15) for name, s in mps_cross_shapes(32, 128, 2).items()}
    for name in cross:
        if name.endswith("norm.bias"):
            cross[name] = torch.zeros(32)
        elif name.endswith("inv_freq"):
            cross[name] = 10_000 ** -(torch.arange(0, 64, 2) / 64)
    named = {f"model.{name}": tensor for name, tensor in clip.items()} | cross
    places = {"model.text_model": 77, "model.vision_model": 65}
    return {name: tensor.half() for name, tensor in named.items()} | {
        f"{tower}.embeddings.position_ids": torch.arange(n)[None] for tower, n in places.items()
    }


def pickled_network(weights: dict[str, Tensor], classes: dict[str, str], file: Path) -> None:
    """torch.save of a module as a whole, of classes that exist nowhere when it is read.

    Args:
        classes: path of a submodule -> "package.module.Class"; others are plain modules.
    """
    from torch import nn

    made: dict[str, types.ModuleType] = {}

    def new(path: str) -> nn.Module:
        if path not in classes:
            return nn.Module()
        place, _, name = classes[path].rpartition(".")
        for parent in itertools.accumulate(place.split("."), lambda a, b: f"{a}.{b}"):
            made.setdefault(parent, types.ModuleType(parent))
        kind = type(name, (nn.Module,), {"__module__": place})
        vars(made[place])[name] = kind
        return kind()

    root = new("")
    nodes = {"": root}
    for key, tensor in weights.items():
        path, _, last = key.rpartition(".")
        steps = path.split(".") if path else []
        for i, step in enumerate(steps):
            here = ".".join(steps[: i + 1])
            if here not in nodes:
                nodes[here] = new(here)
                nodes[".".join(steps[:i])].add_module(step, nodes[here])
        if last in ("position_ids", "inv_freq") or key.endswith("norm.bias"):
            nodes[path].register_buffer(last, tensor)
        else:
            nodes[path].register_parameter(last, nn.Parameter(tensor))
        if last == "inv_freq":
            parent = nodes[path.rpartition(".")[0]]
            parent.register_buffer("pos_emb", torch.ones(65, 64), persistent=False)
    vars(root)["config"] = {"dtype": torch.float16, "act": torch.nn.functional.gelu}
    with unittest.mock.patch.dict(sys.modules, made):
        torch.save(root, file)


MPS_CLASSES = {
    "": "trainer.models.clip_model.CLIPModel",
    "model": "trainer.models.clip_model.XCLIPModel",
    "model.text_model": "transformers.models.clip.modeling_clip.CLIPTextTransformer",
    "model.vision_model": "transformers.models.clip.modeling_clip.CLIPVisionTransformer",
    "cross_model": "trainer.models.cross_modeling.Cross_model",
    "cross_model.layers.0.0": "trainer.models.cross_modeling.Residual",
    "cross_model.layers.0.0.fn": "trainer.models.cross_modeling.CrossAttention",
}


def write_mps(folder: Path) -> dict[str, str]:
    """As published: a pickled module in float16 whose classes no longer exist."""
    folder.mkdir(exist_ok=True)
    pickled_network(mps_weights(), MPS_CLASSES, folder / "MPS_overall_checkpoint.pth")
    return {"path": str(folder), "tokenizer": write_tokenizer(folder)}


T5_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPT5ForConditionalGeneration"],
    "model_type": "clip_t5",
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 1024,
}
"""Flan-T5 XXL's, with what CLIP-FlanT5 adds."""

TINY_T5: dict[str, Any] = {
    "d_ff": 64,
    "d_kv": 8,
    "d_model": 32,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 64,
    "mm_hidden_size": 64,
}


def vqascore_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """T5's state of transformers 4 and the projector, by their names."""
    from transformers import T5Config, T5ForConditionalGeneration

    given = {k: v for k, v in config.items() if not k.startswith(("mm_", "model_"))}
    state = T5ForConditionalGeneration(T5Config(**given)).state_dict()
    width, seen = config["d_model"], config["mm_hidden_size"]
    projector = {"0.weight": (width, seen), "0.bias": (width,)}
    projector |= {"2.weight": (width, width), "2.bias": (width,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes |= {f"mm_projector.{name}": shape for name, shape in projector.items()}
    weights = {name: weight(name, shape, 0.12) for name, shape in shapes.items()}
    for coder in ("encoder.", "decoder.", ""):
        weights[f"{coder}embed_tokens.weight"] = weights["shared.weight"]
    return weights


def write_t5_tokenizer(folder: Path) -> None:
    """Flan-T5's tokenizer.json, of single letters."""
    from transformers import T5Tokenizer

    pieces = ["▁", *LETTERS, *"AJTUSERNDY?.,:'\"-!"]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    words += [(piece, -3.0) for piece in dict.fromkeys(pieces)]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(folder)


def write_vqascore(folder: Path) -> dict[str, str]:
    """As published: shards of torch files with an index; the image tower in a folder of its own."""
    (folder / "vision").mkdir(parents=True, exist_ok=True)
    tiny_clip(size=112).save_pretrained(folder / "vision")
    write_t5_tokenizer(folder)
    config = T5_CONFIG | TINY_T5
    (folder / "config.json").write_text(json.dumps(config))
    weights = list(vqascore_weights(config).items())
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    halves = dict(zip(files, (dict(weights[::2]), dict(weights[1::2])), strict=True))
    for file, half in halves.items():
        torch.save({name: tensor.clone() for name, tensor in half.items()}, folder / file)
    index = {name: file for file, half in halves.items() for name in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return {"path": str(folder), "vision": str(folder / "vision"), "tokenizer": str(folder)}


CHECKPOINTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "hpsv2.1": lambda folder: write_hps(folder, "HPS_v2.1_compressed.pt"),
    "hpsv2.0": lambda folder: write_hps(folder, "HPS_v2_compressed.pt"),
    "pickscore": write_pickscore,
    "aesthetic": write_aesthetic,
    "clipscore": lambda folder: write_clip(folder) | {"tokenizer": ""},
    "imagereward": write_imagereward,
    "mps": write_mps,
    "vqascore": write_vqascore,
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
