"""The layout of the first Stable Diffusion repository (CompVis latent-diffusion, Stability's sgm).

Weights by the names that one-file checkpoints have: `model.diffusion_model.*`,
`first_stage_model.*` and the text encoders. Only names and shapes change, no number does.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = {"sd": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP = "conditioner.embedders.1.model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_module(name: str, config: Mapping[str, Any]) -> str:
    """diffusers' name of a UNet module in the LDM layout.

    Args:
        config: the UNet's config.json.

    >>> unet_module("down_blocks.1.attentions.0.proj_in", {"layers_per_block": 2})
    'input_blocks.4.1.proj_in'
    """
    if name in _ENDS:
        return _ENDS[name]
    if name.startswith("mid_block."):
        _, kind, index, *rest = name.split(".")
        return _joined("middle_block", _MIDDLE[f"{kind}.{index}"], _inner(kind, rest))
    match = _BLOCK.match(name)
    if match is None:
        raise ValueError(f"{name!r} has no place in the LDM layout")
    side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
    rest = name[match.end() + 1 :].split(".")
    first = block * (config["layers_per_block"] + 1)
    if kind == "downsamplers":
        return _joined("input_blocks", first + 1 + config["layers_per_block"], "0.op")
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return _joined("output_blocks", first + config["layers_per_block"], place, "conv")
    blocks, start = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
    place = 0 if kind == "resnets" else 1
    return _joined(blocks, start + first + layer, place, _inner(kind, rest))


def _inner(kind: str, rest: list[str]) -> str:
    return _joined(_RESNET[rest[0]], *rest[1:]) if kind == "resnets" else _joined(*rest)


def _joined(*parts: object) -> str:
    return ".".join(str(part) for part in parts)


def unet_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A UNet's weights by their LDM names."""
    found = {}
    for key, weight in weights.items():
        module, _, kind = key.rpartition(".")
        found[f"{UNET}{unet_module(module, config)}.{kind}"] = weight
    return found


def vae_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An AutoencoderKL's weights by their LDM names; its attention's matrices become 1x1 kernels.

    Args:
        config: the VAE's config.json.
    """
    blocks = len(config["up_block_types"])
    found = {}
    for key, weight in weights.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        up = re.search(r"up_blocks\.(\d+)", name)
        if up:
            name = name.replace(up[0], f"up.{blocks - 1 - int(up[1])}")
            name = name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        attention = re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
        if attention:
            name = f"{attention[1]}.mid.attn_1.{_VAE_ATTENTION[attention[2]]}.{attention[3]}"
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        found[VAE + name] = weight.contiguous()
    return found


def clip_weights(weights: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """CLIP ViT-L's text encoder: transformers' names under the layout's prefix."""
    return {CLIP[family] + key: weight for key, weight in text_model_names(weights).items()}


def text_model_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as published: "text_model.embeddings...".

    transformers 5.6 dropped the prefix from what it saves; every version reads it.
    """
    outside = ("text_model.", "text_projection.")
    return {k if k.startswith(outside) else f"text_model.{k}": w for k, w in weights.items()}


def open_clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SDXL's second text encoder by OpenCLIP's names, with q, k and v as one matrix."""
    named = {k.removeprefix("text_model."): w for k, w in text_model_names(weights).items()}
    found = {
        "positional_embedding": named.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": named.pop("embeddings.token_embedding.weight"),
        "text_projection": named.pop("text_projection.weight").T,
    }
    for key, weight in named.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            found[key.replace("final_layer_norm", "ln_final")] = weight
            continue
        layer, module, kind = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if module in _OPEN_CLIP_LAYER:
            found[f"{layer}.{_OPEN_CLIP_LAYER[module]}.{kind}"] = weight
        elif module == "self_attn.q_proj":
            parts = [named[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[f"{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return {OPEN_CLIP + key: weight.contiguous() for key, weight in found.items()}
