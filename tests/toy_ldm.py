"""A diffusers folder of the SD1.x layout as one .safetensors file with the original's keys.

CompVis' latent-diffusion names: model.diffusion_model (UNet), first_stage_model (VAE),
cond_stage_model (CLIP). The other way round from what diffusers' `from_single_file` does.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = 1
"""`layers_per_block` of the toy UNet."""

UNET = [
    (r"^time_embedding.linear_1", "time_embed.0"),
    (r"^time_embedding.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block.resnets.0", "middle_block.0"),
    (r"^mid_block.resnets.1", "middle_block.2"),
    (r"norm1(?=.(weight|bias)$)", "in_layers.0"),
    (r"conv1", "in_layers.2"),
    (r"norm2(?=.(weight|bias)$)", "out_layers.0"),
    (r"conv2", "out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
]
VAE = [
    (r"down_blocks.(\d).resnets.(\d)", r"down.\1.block.\2"),
    (r"down_blocks.(\d).downsamplers.0", r"down.\1.downsample"),
    (r"mid_block.resnets.0", "mid.block_1"),
    (r"mid_block.resnets.1", "mid.block_2"),
    (r"mid_block.attentions.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_(q|k|v)", r"\1"),
    (r"to_out.0", "proj_out"),
]


def single_file(folder: Path, file: Path, marks: Iterable[str] = ()) -> Path:
    """Write a toy SD1.x folder as one file; returns the file.

    Args:
        marks: names of empty tensors to add, as some fine-tunes mark v-prediction.
    """
    weights = {mark: torch.zeros(0) for mark in marks}
    for name, tensor in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        weights[f"model.diffusion_model.{_unet_name(name)}"] = tensor
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        weights[f"first_stage_model.{_vae_name(name)}"] = _vae_tensor(name, tensor)
    for name, tensor in load_file(folder / "text_encoder/model.safetensors").items():
        inner = name.removeprefix("text_model.")
        weights[f"cond_stage_model.transformer.text_model.{inner}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    return file


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _unet_name(name: str) -> str:
    if name.startswith("mid_block.attentions.0"):
        return name.replace("mid_block.attentions.0", "middle_block.1")
    inside = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    if inside is None:
        return _renamed(name, UNET)
    side, block, part, layer, rest = inside.groups()
    first = int(block) * (LAYERS + 1)
    if part == "downsamplers":
        return f"input_blocks.{first + LAYERS + 1}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":  # after the resnet, and after the attention where there is one
        return f"output_blocks.{first + LAYERS}.{1 if block == '0' else 2}.{rest}"
    place = first + int(layer)
    where = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
    if part == "attentions":
        return f"{where}.1.{rest}"
    return f"{where}.0.{_renamed(rest, UNET)}"


def _vae_name(name: str) -> str:
    up = re.match(r"decoder\.up_blocks\.(\d)\.(.*)", name)
    if up:
        rest = up[2].replace("resnets", "block").replace("upsamplers.0", "upsample")
        name = f"decoder.up.{1 - int(up[1])}.{rest}"  # two levels, counted from the finest
    return _renamed(name, VAE)


def _vae_tensor(name: str, tensor: Tensor) -> Tensor:
    """The original's attention is a 1x1 convolution."""
    is_linear = ".attentions." in name and tensor.ndim == 2
    return tensor[:, :, None, None] if is_linear else tensor
