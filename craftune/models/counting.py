"""Parameters, FLOPs and memory of a checkpoint, counted on torch's meta device: no weights.

A FLOP is half a multiply-add; bytes are of 16-bit numbers; all per image or per prompt.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from craftune.adapters import add_lora
from craftune.assumed import Figures
from craftune.config import LoraConfig
from craftune.errors import UserError
from craftune.models.common import ATTENTION, quiet
from craftune.models.flow import FEED_FORWARD, JOINT_ATTENTION
from craftune.models.measure import measure
from craftune.models.published import Parts
from craftune.records import read_json

LORA_TARGETS = {
    "UNet2DConditionModel": ATTENTION,
    "SD3Transformer2DModel": JOINT_ATTENTION,
    "FluxTransformer2DModel": JOINT_ATTENTION + FEED_FORWARD,
}
"""Denoiser -> what its family adapts by default."""
VAES = ("AutoencoderKL", "AutoencoderTiny")
TEXT_ENCODERS = {
    "CLIPTextModel": "CLIPTextConfig",
    "CLIPTextModelWithProjection": "CLIPTextConfig",
    "T5EncoderModel": "T5Config",
}
CLIP_TOKENS = 77
T5_TOKENS = {"SD3Transformer2DModel": 256, "FluxTransformer2DModel": 512}
SCHNELL_TOKENS = 256
SCHEDULER = "scheduler"
"""No network, but where FLUX.1's schnell and a de-distilled dev differ."""
FLUX_SIDE = 128
"""Of FLUX.1's latents, which its config.json does not hold: images of 1024 pixels."""


def count(parts: Parts, lora: LoraConfig, checkpointing: bool) -> Figures:
    """Count a checkpoint from its parts' configurations, in seconds.

    Args:
        parts: part -> config, as in `published.PUBLISHED`.
        lora: what is trained; rank 0 is everything.
        checkpointing: whether activations are recomputed in the backward pass.

    Raises:
        UserError: a part is of a class that no family has, or lora.targets match nothing.
    """
    return dataclasses.replace(drawing(parts), **training(parts, lora, checkpointing))


def drawing(parts: Parts) -> Figures:
    """All that drawing images needs; what training needs stays 0."""
    quiet()
    networks = {name: _build(name, config) for name, config in parts.items() if name != SCHEDULER}
    name, t5_tokens = _denoiser(parts), _t5_tokens(parts)
    network, vae, kind = networks[name], networks["vae"], parts[name]["_class_name"]
    shape = _latent_shape(parts)
    inputs = _inputs(kind, network.config, shape, t5_tokens)
    drawn = measure(network, lambda: network(**inputs), gradient=False)
    decoded = measure(vae, lambda: vae.decode(_empty(1, *shape)), gradient=False)
    tuned = _empty(1, *shape).requires_grad_(True)
    kept = measure(vae, lambda: vae.decode(tuned), gradient=True).kept
    return Figures(
        denoiser=name,
        parameters={key: _size(part.parameters()) for key, part in networks.items()},
        latent_numbers=math.prod(shape),
        side=decoded.side,
        guidance_embedded=bool(network.config.get("guidance_embeds", False)),
        forward_flops=drawn.flops,
        decode_flops=decoded.flops,
        text_flops=sum(
            _text_flops(networks[key], parts[key], t5_tokens)
            for key in parts
            if key.startswith("text_encoder")
        ),
        forward_bytes=drawn.peak,
        decode_bytes=decoded.peak,
        decode_kept_bytes=kept,
    )


def training(parts: Parts, lora: LoraConfig, checkpointing: bool) -> dict[str, int]:
    """What training adds: `Figures.trained` and `Figures.kept_bytes`."""
    quiet()
    name = _denoiser(parts)
    network = _build(name, parts[name]).train().requires_grad_(True)
    if lora.rank:
        add_lora(network, lora, LORA_TARGETS[parts[name]["_class_name"]], seed=0)
        network.to(torch.bfloat16)  # as under autocast: the adapters' inputs are of 16 bit too
    if checkpointing:
        network.enable_gradient_checkpointing()
    kind, shape = parts[name]["_class_name"], _latent_shape(parts)
    inputs = _inputs(kind, network.config, shape, _t5_tokens(parts))
    kept = measure(network, lambda: network(**inputs), gradient=True).kept
    return {
        "trained": _size(p for p in network.parameters() if p.requires_grad),
        "kept_bytes": kept,
    }


def configs(folder: Path) -> Parts:
    """The parts of a diffusers folder, from its .json files alone.

    Raises:
        UserError: a part that is counted is missing, or its config.json is damaged.
    """
    found: Parts = {}
    for path in sorted(folder.glob("*/config.json")):
        name, config = path.parent.name, read_json(path)
        if name in ("unet", "transformer", "vae") or name.startswith("text_encoder"):
            kind = config.get("_class_name") or next(iter(config.get("architectures") or []), "")
            found[name] = config | {"_class_name": kind}
    scheduler = folder / SCHEDULER / "scheduler_config.json"
    if scheduler.is_file():
        found[SCHEDULER] = read_json(scheduler)
    for needed in ("vae", "text_encoder"):
        if needed not in found:
            raise UserError(f"{folder / needed / 'config.json'}: missing; it is counted from")
    if not found.keys() & {"unet", "transformer"}:
        raise UserError(f"{folder}: neither unet/config.json nor transformer/config.json in it")
    return found


def _denoiser(parts: Parts) -> str:
    return "unet" if "unet" in parts else "transformer"


def _t5_tokens(parts: Parts) -> int:
    """To which T5's prompts are padded; 0 where the family has no T5."""
    network = parts[_denoiser(parts)]
    kind, scheduler = network["_class_name"], parts.get(SCHEDULER, {})
    if kind == "FluxTransformer2DModel" and not network.get("guidance_embeds", False):
        # As `flux._guidance` tells them apart.
        return T5_TOKENS[kind] if scheduler.get("use_dynamic_shifting") else SCHNELL_TOKENS
    return T5_TOKENS.get(kind, 0)


def _text_flops(encoder: nn.Module, config: dict[str, Any], t5_tokens: int) -> int:
    """Of one prompt, padded as the family pads it."""
    if config["_class_name"] == "T5EncoderModel":
        length = t5_tokens
    else:
        length = config.get("max_position_embeddings", CLIP_TOKENS)
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    return measure(encoder, lambda: encoder(input_ids=ids), gradient=False).flops


def _build(name: str, config: dict[str, Any]) -> Any:
    """A network without weights, in 16 bit."""
    kind = config["_class_name"]
    settings = {k: v for k, v in config.items() if not k.startswith("_")}
    with torch.device("meta"):
        if kind in (*LORA_TARGETS, *VAES):
            network = getattr(diffusers, kind).from_config(settings)
        elif kind in TEXT_ENCODERS:
            text_config = getattr(transformers, TEXT_ENCODERS[kind])(**settings)
            network = getattr(transformers, kind)(text_config)
        else:
            known = ", ".join([*LORA_TARGETS, *VAES, *TEXT_ENCODERS])
            raise UserError(f"{name}: a {kind!r} cannot be counted (known: {known})")
    return network.to(torch.bfloat16).requires_grad_(False).eval()


def _latent_shape(parts: Parts) -> tuple[int, int, int]:
    side = parts[_denoiser(parts)].get("sample_size", FLUX_SIDE)
    return (parts["vae"]["latent_channels"], side, side)


def _inputs(kind: str, config: Any, shape: tuple[int, int, int], t5_tokens: int) -> dict[str, Any]:
    """What the denoiser is called with, one image."""
    t = torch.zeros(1, device="meta")
    if kind == "UNet2DConditionModel":
        inputs: dict[str, Any] = {
            "sample": _empty(1, *shape),
            "timestep": t,
            "encoder_hidden_states": _empty(1, CLIP_TOKENS, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":
            times = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - times
            inputs["added_cond_kwargs"] = {
                "text_embeds": _empty(1, pooled),
                "time_ids": _empty(1, 6),
            }
        return inputs
    length = t5_tokens + (CLIP_TOKENS if kind == "SD3Transformer2DModel" else 0)
    inputs = {
        "timestep": t,
        "encoder_hidden_states": _empty(1, length, config.joint_attention_dim),
        "pooled_projections": _empty(1, config.pooled_projection_dim),
    }
    if kind == "SD3Transformer2DModel":
        return inputs | {"hidden_states": _empty(1, *shape)}
    patches = shape[1] * shape[2] // 4
    return inputs | {
        "hidden_states": _empty(1, patches, config.in_channels),
        "img_ids": _empty(patches, 3),
        "txt_ids": _empty(length, 3),
        "guidance": t if config.guidance_embeds else None,
    }


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
