"""BLIP on transformers: the original's keys, architecture from the weights, features with gradient.

transformers' BLIP gives the original's numbers with two cares: the image tower's layer norms have
an epsilon of 1e-6 (its own default is 1e-5, which moves features by 4e-4), and its cross attention
ignores masks, which does no harm where every image token is read.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from craftune.errors import UserError
from craftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalized
from craftune.rewards.weights import load_strictly

VISION_HEAD = 64
"""Width of an attention head of the image tower, which no shape tells."""

_VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("norm.", "post_layernorm."),
)
_BLOCK = (
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.qkv.", "self_attn.qkv."),
    ("attn.proj.", "self_attn.projection."),
)
_TEXT_KEYS = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "vocab_size",
)


def vision_key(key: str) -> str:
    """The original's key, without its prefix, as `transformers.BlipVisionModel` has it."""
    number, _, rest = key.removeprefix("blocks.").partition(".")
    if key.startswith("blocks."):
        return f"encoder.layers.{number}.{_begun(rest, _BLOCK)}"
    return _begun(key, _VISION)


def _begun(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for old, new in names:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it, and without numbered positions (0, 1, 2, ...)."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }


def load_vision(
    weights: Mapping[str, Tensor],
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    head: int = VISION_HEAD,
) -> Any:
    """A `BlipVisionModel` with the original's weights.

    Raises:
        UserError: these are other weights.
    """
    from transformers import BlipVisionConfig, BlipVisionModel

    try:
        patches, places = weights["patch_embed.proj.weight"], weights["pos_embed"]
        hidden = weights["blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        raise UserError(f"{source}: not this network's weights: lacks {error}") from None
    width, patch = len(patches), patches.shape[-1]
    if width % head:
        raise UserError(
            f"{source}: another network: the image tower is {width} wide, which is no multiple "
            f"of its heads' {head}"
        )
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(hidden),
        num_hidden_layers=len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        num_attention_heads=width // head,
        image_size=patch * round((places.shape[1] - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    converted = {vision_key(key): tensor for key, tensor in weights.items()}
    return load_strictly(lambda: BlipVisionModel(config), converted, source, device, dtype)


def load_text(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    image_width: int,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """A `BlipTextModel` with cross attention in every layer, from the original's weights.

    Args:
        config: med_config.json.
        image_width: of the image tower; what cross attention reads.

    Raises:
        UserError: these are other weights, or the config lacks a key.
    """
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    missing = sorted(set(_TEXT_KEYS) - config.keys())
    if missing:
        raise UserError(f"{source}: med_config.json lacks {missing[0]!r}")
    # is_decoder makes the cross attention; without it in the call, attention goes both ways.
    parsed = BlipTextConfig(
        **{key: config[key] for key in _TEXT_KEYS},
        encoder_hidden_size=image_width,
        is_decoder=True,
        bos_token_id=None,
        sep_token_id=None,
    )
    return load_strictly(
        lambda: BlipTextModel(parsed, add_pooling_layer=False), weights, source, device, dtype
    )


def first_tokens(
    vision: Any, text: Any, inputs: Tensor, read: Int[Tensor, "b 2 tokens"]
) -> Float[Tensor, "b width"]:
    """What the text encoder makes of its first token while it looks at the pictures.

    Args:
        inputs: prepared pictures, uint8 or float in [0, 1].
        read: token numbers, and 1 where there is one.
    """
    pixels = normalized(inputs, CLIP_MEAN, CLIP_STD).to(vision.post_layernorm.weight.dtype)
    seen = vision(pixel_values=pixels).last_hidden_state
    ids, mask = read.to(pixels.device).unbind(1)
    states = text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
    return states.last_hidden_state[:, 0]
