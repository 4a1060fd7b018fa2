"""SD3 and FLUX.1 checkpoints in the published layout at toy size, with random weights.

`kept_flow(kind)` writes one of `KINDS` in under a second, once per session:
    "sd3"           SD3-medium's layout with all three text encoders
    "sd3-no-t5"     SD3.5-medium's: dual attention and normed queries; published without T5
    "flux-dev"      guidance embedding, shift by the image's size
    "flux-schnell"  neither
"""

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.utils import logging as diffusers_log
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from toy import MERGES, kept_folder, write_json, write_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

KINDS = ("sd3", "sd3-no-t5", "flux-dev", "flux-schnell")
WIDTH, JOINT, SIZE = 8, 24, 8
"""Of CLIP, of T5 and the denoiser (wider than both of SD3's CLIPs, as published), of latents."""
"""Of a CLIP encoder, of T5 and the joint attention, and of the latents."""

SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd3": {"shift": 3.0},
    "sd3-no-t5": {"shift": 3.0},
    "flux-dev": {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "flux-schnell": {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "shift": 1.0,
        "use_dynamic_shifting": False,
    },
}
"""scheduler/scheduler_config.json as stabilityai and black-forest-labs publish them."""


def flow_checkpoint(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """Write one of `KINDS` into a folder; returns it."""
    diffusers_log.set_verbosity_error()
    vocabulary = write_tokenizer(folder / "tokenizer")
    parts: dict[str, list[str | None]] = {"tokenizer": ["transformers", "CLIPTokenizer"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {"vae": _vae(), **_networks(kind, vocabulary)}
    for name, network in networks.items():
        _louder(network)
        network.save_pretrained(folder / name)  # type: ignore[operator]
        library = "transformers" if name.startswith("text") else "diffusers"
        parts[name] = [library, type(network).__name__]
    if kind.startswith("sd3"):
        write_tokenizer(folder / "tokenizer_2")
        parts["tokenizer_2"] = parts["tokenizer"]
    if kind == "sd3-no-t5":
        parts |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    else:
        third = "tokenizer_3" if kind == "sd3" else "tokenizer_2"
        _write_t5_tokenizer(folder / third)
        parts[third] = ["transformers", "T5TokenizerFast"]
    scheduler = "FlowMatchEulerDiscreteScheduler"
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": scheduler, "num_train_timesteps": 1000, **SCHEDULERS[kind]},
    )
    pipeline = "StableDiffusion3Pipeline" if kind.startswith("sd3") else "FluxPipeline"
    index = {"_class_name": pipeline, "_diffusers_version": "0.30.0"}
    write_json(
        folder / "model_index.json", {**index, **parts, "scheduler": ["diffusers", scheduler]}
    )
    return folder


@functools.cache
def kept_flow(kind: str) -> Path:
    """One read-only checkpoint of a kind for the whole session."""
    return flow_checkpoint(kept_folder() / kind, kind)


def _networks(kind: str, vocabulary: dict[str, int]) -> dict[str, nn.Module]:
    if kind == "sd3":
        return {
            "text_encoder": CLIPTextModelWithProjection(_clip(vocabulary)),
            "text_encoder_2": CLIPTextModelWithProjection(_clip(vocabulary)),
            "text_encoder_3": _t5(),
            "transformer": _sd3(),
        }
    if kind == "sd3-no-t5":
        return {
            "text_encoder": CLIPTextModelWithProjection(_clip(vocabulary)),
            "text_encoder_2": CLIPTextModelWithProjection(_clip(vocabulary)),
            "transformer": _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        }
    return {
        "text_encoder": CLIPTextModel(_clip(vocabulary)),
        "text_encoder_2": _t5(),
        "transformer": _flux(guidance_embeds=kind == "flux-dev"),
    }


def _louder(network: nn.Module) -> None:
    """Biases and fresh norms start at 0 or 1; so that prompt, time and guidance show."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "transformer_blocks" in name and "norm1" in name and name.endswith("weight"):
                weight.mul_(3)


def _clip(vocabulary: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_vocabulary()),
            d_model=JOINT,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",  # T5 v1.1
        )
    )


def _sd3(**settings: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIZE,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIZE,
        **settings,
    )


def _flux(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )


def _vae() -> AutoencoderKL:
    settings: dict[str, Any] = {  # diffusers annotates these as tuples of one
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(
        **settings,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=2 * SIZE,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _t5_vocabulary() -> list[tuple[str, float]]:
    """T5's first three, the letters, and the words of the CLIP tokenizer's merges."""
    words = ["".join(merge.split()).removesuffix("</w>") for merge in MERGES]
    letters = list("▁abcdefghijklmnopqrstuvwxyz0123456789.,")
    pieces = dict.fromkeys([*letters, *words, *(f"▁{word}" for word in words)])
    scores = [(piece, -10.0 if len(piece) == 1 else -2.0) for piece in pieces]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores]


def _write_t5_tokenizer(folder: Path) -> None:
    """A unigram model in tokenizer.json, as the published folders hold beside spiece.model."""
    tokenizer = Tokenizer(models.Unigram(_t5_vocabulary(), unk_id=2, byte_fallback=False))
    space: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {**special, "extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"},
    )
