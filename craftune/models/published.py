"""Configurations of published checkpoints: enough to count them without downloading anything.

Hub id -> part -> the config.json that the repository holds, less what changes no count.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from craftune.assumed import Figures
from craftune.config import LoraConfig
from craftune.records import write_json

Parts = dict[str, dict[str, Any]]

_CLIP_L = {
    "_class_name": "CLIPTextModel",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "projection_dim": 768,
}
_CLIP_H = _CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
_CLIP_BIGG = {
    "_class_name": "CLIPTextModelWithProjection",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "vocab_size": 49408,
    "projection_dim": 1280,
}
_T5_XXL = {
    "_class_name": "T5EncoderModel",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_VAE_16 = _VAE | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD1_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD2_UNET = _SD1_UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3_TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = _SD3_TRANSFORMER | {
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
}
_SD35_LARGE = _SD3_TRANSFORMER | {
    "qk_norm": "rms_norm",
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
}
_FLUX_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
_FLUX: Parts = {"vae": _VAE_16, "text_encoder": _CLIP_L, "text_encoder_2": _T5_XXL}
_SD1: Parts = {"unet": _SD1_UNET, "vae": _VAE, "text_encoder": _CLIP_L}
_SD3: Parts = {
    "vae": _VAE_16,
    "text_encoder": _CLIP_L | {"_class_name": "CLIPTextModelWithProjection"},
    "text_encoder_2": _CLIP_BIGG,
    "text_encoder_3": _T5_XXL,
}

PUBLISHED: dict[str, Parts] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1,
    "runwayml/stable-diffusion-v1-5": _SD1,
    "CompVis/stable-diffusion-v1-4": _SD1,
    "stabilityai/stable-diffusion-2-1": {
        "unet": _SD2_UNET | {"sample_size": 96},
        "vae": _VAE,
        "text_encoder": _CLIP_H,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": _SDXL_UNET,
        "vae": _VAE,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_BIGG,
    },
    "stabilityai/stable-diffusion-3-medium-diffusers": {"transformer": _SD3_TRANSFORMER, **_SD3},
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": _SD35_MEDIUM, **_SD3},
    "stabilityai/stable-diffusion-3.5-large": {"transformer": _SD35_LARGE, **_SD3},
    "black-forest-labs/FLUX.1-dev": {"transformer": _FLUX_TRANSFORMER, **_FLUX},
    "black-forest-labs/FLUX.1-schnell": {
        "transformer": _FLUX_TRANSFORMER | {"guidance_embeds": False},
        "scheduler": {"use_dynamic_shifting": False},
        **_FLUX,
    },
}
"""Hub ids whose networks are known here."""

COUNTED = Path(__file__).with_name("published.json")
"""Their figures: id -> "drawing" and, by mode of training, "training"; LoRA at `LORA_RANK`."""
LORA_RANK = 16


def published(name: str, lora: LoraConfig, checkpointing: bool) -> Figures | None:
    """The counted figures of a hub id; None where it, or its LoRA targets, were not counted."""
    counted = json.loads(COUNTED.read_text(encoding="utf-8")).get(name)
    if counted is None or lora.targets:
        return None
    figures = counted["training"][mode(lora, checkpointing)]
    if lora.rank:
        figures = figures | {"trained": figures["trained"] // LORA_RANK * lora.rank}
    return Figures(**counted["drawing"], **figures)


def mode(lora: LoraConfig, checkpointing: bool) -> str:
    """A name for a way to train."""
    return ("lora" if lora.rank else "full") + (" checkpointed" if checkpointing else "")


def write() -> None:
    """Count all of `PUBLISHED` anew: python -m craftune.models.published (minutes)."""
    from craftune.models.counting import drawing, training

    found: dict[str, Any] = {}
    for name, parts in PUBLISHED.items():
        twin = next((found[other] for other in found if PUBLISHED[other] is parts), None)
        found[name] = twin or {
            "drawing": asdict(drawing(parts), dict_factory=_without_training),
            "training": {
                mode(lora, checkpointing): training(parts, lora, checkpointing)
                for lora in (LoraConfig(), LoraConfig(rank=LORA_RANK))
                for checkpointing in (False, True)
            },
        }
        print(name, found[name], flush=True)
    write_json(COUNTED, found)


def _without_training(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key not in ("trained", "kept_bytes")}


if __name__ == "__main__":
    write()
