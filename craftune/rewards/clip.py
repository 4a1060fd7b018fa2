"""CLIP on transformers: architecture from the weights, open_clip's keys, embeddings in float32."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from craftune.errors import UserError
from craftune.records import read_json
from craftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalized
from craftune.rewards.weights import SAFETENSORS_OR_BIN, find, load_strictly, parts, read

END = 49407
"""<|endoftext|>; a text's embedding is read at the first one."""

_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_ONE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_LETTERS = {(768, 12): "B", (1024, 24): "L", (1280, 32): "H", (1408, 40): "g", (1664, 48): "bigG"}
_TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}


def from_open_clip(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """open_clip's (and OpenAI's) keys and layout as `transformers.CLIPModel` has them.

    Attention's packed in_proj is split in q, k and v; projections are transposed.

    Raises:
        UserError: a key that belongs to no such model, or a missing one.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        tower, separator, rest = key.partition(".resblocks.")
        if key in _ONE:
            converted[_ONE[key]] = tensor
        elif key == "text_projection":
            converted["text_projection.weight"] = tensor.T.contiguous()
        elif key == "visual.proj":
            converted["visual_projection.weight"] = tensor.T.contiguous()
        elif separator and tower in _TOWERS:
            number, _, name = rest.partition(".")
            place = f"{_TOWERS[tower]}.encoder.layers.{number}."
            converted |= {place + k: v for k, v in _block(name, tensor).items()}
        else:
            raise UserError(f"{source}: not the weights of an open_clip model: has {key!r}")
    return converted


def _block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One entry of a residual block."""
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {
            f"self_attn.{letter}_proj.{kind}": part
            for letter, part in zip("qkv", tensor.chunk(3), strict=True)
        }
    module, _, kind = name.rpartition(".")
    return {f"{_BLOCK.get(module, module)}.{kind}": tensor}


def config_of(
    weights: Mapping[str, Tensor], act: str, vision_head: int, text_head: int, source: str
) -> Any:
    """The `CLIPConfig` of converted weights: widths and depths from shapes.

    Args:
        act: "gelu", or "quick_gelu" for OpenAI's towers.
        vision_head: width of an attention head, which no shape tells.
        text_head: the same for the text tower.

    Raises:
        UserError: these cannot be the weights of such a model.
    """
    from transformers import CLIPConfig

    try:
        patches = weights["vision_model.embeddings.patch_embedding.weight"]
        words = weights["text_model.embeddings.token_embedding.weight"]
        places = weights["vision_model.embeddings.position_embedding.weight"]
        length = weights["text_model.embeddings.position_embedding.weight"]
        embedding = weights["text_projection.weight"]
        hidden = {t: weights[f"{t}.encoder.layers.0.mlp.fc1.weight"] for t in _TOWERS.values()}
    except KeyError as error:
        raise UserError(f"{source}: not this network's weights: lacks {error}") from None
    for tower, width, head in (
        ("vision", len(patches), vision_head),
        ("text", words.shape[1], text_head),
    ):
        if width % head:
            raise UserError(
                f"{source}: another network: the {tower} tower is {width} wide, which is no "
                f"multiple of its heads' {head}"
            )
    patch = patches.shape[-1]
    projection = {"projection_dim": len(embedding), "hidden_act": act}
    text = {
        "vocab_size": len(words),
        "hidden_size": words.shape[1],
        "intermediate_size": len(hidden["text_model"]),
        "num_hidden_layers": _depth(weights, "text_model"),
        "num_attention_heads": words.shape[1] // text_head,
        "max_position_embeddings": len(length),
        "eos_token_id": END,
    }
    vision = {
        "hidden_size": len(patches),
        "intermediate_size": len(hidden["vision_model"]),
        "num_hidden_layers": _depth(weights, "vision_model"),
        "num_attention_heads": len(patches) // vision_head,
        "image_size": patch * round((len(places) - 1) ** 0.5),
        "patch_size": patch,
    }
    return CLIPConfig(
        text_config=text | projection,
        vision_config=vision | projection,
        projection_dim=len(embedding),
    )


def _depth(weights: Mapping[str, Tensor], tower: str) -> int:
    start = f"{tower}.encoder.layers."
    return 1 + max(int(k[len(start) :].split(".")[0]) for k in weights if k.startswith(start))


def clip_files(path: str, key: str) -> dict[str, Path]:
    """config.json and the weights of a transformers folder or hub id."""
    weights = find(path, SAFETENSORS_OR_BIN, key)
    return {"config": find(path, ("config.json",), key)} | {
        f"weights {number}": file for number, file in enumerate(parts(weights, path, key))
    }


def load_clip(
    files: Mapping[str, Path],
    key: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    vision_only: bool = False,
    instead: Mapping[str, Tensor] = MappingProxyType({}),
) -> Any:
    """A `CLIPModel` from a transformers folder; `vision_only`: `CLIPVisionModelWithProjection`.

    Args:
        instead: weights that another file has of the same network; they go first.

    Raises:
        UserError: no CLIP, or weights that are not whole.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

    config, source = read_json(files["config"]), f"{key}: {files['config'].parent}"
    if config.get("model_type") != "clip":
        kind = config.get("model_type")
        raise UserError(f"{source}: config.json says {kind!r}, expected a CLIP model ('clip')")
    weights = {
        name: tensor
        for role, file in files.items()
        if role != "config"
        for name, tensor in read(file, key).items()
        if not name.endswith("position_ids")  # of older transformers: always 0, 1, 2, ...
        and (not vision_only or name.startswith(("vision_model.", "visual_projection.")))
    }
    weights |= {k: tensor for k, tensor in instead.items() if not k.endswith("position_ids")}
    parsed = CLIPConfig(**config)
    if vision_only:
        vision: Any = parsed.vision_config
        return load_strictly(
            lambda: CLIPVisionModelWithProjection(vision), weights, source, device, dtype
        )
    return load_strictly(lambda: CLIPModel(parsed), weights, source, device, dtype)


def embed_images(model: Any, inputs: Tensor) -> Float[Tensor, "b width"]:
    """Prepared pictures, uint8 or float in [0, 1], to unit vectors in float32, with gradient."""
    pixels = normalized(inputs, CLIP_MEAN, CLIP_STD).to(_dtype(model))
    return F.normalize(model.visual_projection(_pooled(model.vision_model, pixels)).float(), dim=-1)


def embed_texts(model: Any, ids: Int[Tensor, "b tokens"]) -> Float[Tensor, "b width"]:
    """Token numbers to unit vectors in float32."""
    pooled = _pooled(model.text_model, ids.to(model.text_projection.weight.device))
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def _pooled(tower: Any, inputs: Tensor) -> Tensor:
    return tower(inputs).pooler_output


def _dtype(model: Any) -> torch.dtype:
    """Of the towers; `model.dtype` would be that of the scale, which stays float32."""
    return model.visual_projection.weight.dtype


def tower_name(model: Any) -> str:
    """For a reward's identity, e.g. "ViT-L/14 at 224"."""
    config = model.vision_model.config
    sizes = (config.hidden_size, config.num_hidden_layers)
    letter = _LETTERS.get(sizes, f" {sizes[0]} x {sizes[1]}")
    return f"ViT-{letter}/{config.patch_size} at {config.image_size}".replace("- ", " ")


def bytes_per_image(model: Any) -> int:
    """Of activations in one pass without gradient, with room to spare."""
    config = model.vision_model.config
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    width = 8 * config.hidden_size + 2 * config.intermediate_size
    return tokens * width * _dtype(model).itemsize
