"""One-file checkpoints: names as published, and every weight found again by diffusers' reader.

The networks have their published shapes but no numbers (torch's meta device).
"""

import re
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from craftune.errors import UserError
from craftune.exporting import ldm
from craftune.exporting.kohya import to_kohya

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED = {  # name in the layout -> shape, from the published checkpoints
    "sd": {
        "time_embed.0.weight": (1280, 320),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.10.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "middle_block.2.emb_layers.1.weight": (1280, 1280),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "out.2.weight": (4, 320, 3, 3),
    },
    "sdxl": {
        "label_emb.0.0.weight": (1280, 2816),
        "label_emb.0.2.weight": (1280, 1280),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        "middle_block.1.proj_out.weight": (1280, 1280),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    },
}
COUNTS = {"sd": 686, "sdxl": 1680}
"""Tensors in the published UNets."""


def unet(settings: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every name, and the very tensor under it."""
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] is not expected[name]] == []


@pytest.mark.parametrize(("family", "settings"), [("sd", SD15), ("sdxl", SDXL)])
def test_a_unet_has_its_published_names_and_is_found_again(
    family: str, settings: dict[str, Any]
) -> None:
    network = unet(settings)
    weights = network.state_dict()
    written = ldm.unet_weights(weights, network.config)
    assert len(written) == len(weights) == COUNTS[family]
    for name, shape in PUBLISHED[family].items():
        assert tuple(written[f"model.diffusion_model.{name}"].shape) == shape
    same(convert_ldm_unet_checkpoint(dict(written), network.config), weights)


def test_a_vae_has_its_published_names_and_is_found_again() -> None:
    blocks: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        vae = AutoencoderKL(**blocks)
    weights = vae.state_dict()
    written = ldm.vae_weights(weights, vae.config)
    assert len(written) == len(weights) == 248
    shapes = {
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.mid.attn_1.proj_out.bias": (512,),
        "decoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.3.block.0.conv1.weight": (512, 512, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "decoder.norm_out.weight": (128,),
        "quant_conv.weight": (8, 8, 1, 1),
    }
    for name, shape in shapes.items():
        assert tuple(written[f"first_stage_model.{name}"].shape) == shape
    back = convert_ldm_vae_checkpoint(dict(written), vae.config)
    assert {k: w.shape for k, w in back.items()} == {k: w.shape for k, w in weights.items()}
    matrix = re.compile(r".*\.attentions\.0\.to_.*weight")  # was a 1x1 kernel in between
    assert all(back[k] is w for k, w in weights.items() if not matrix.fullmatch(k))


def open_clip() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=5,
            projection_dim=6,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def test_the_second_text_encoder_has_openclips_names_and_is_found_again() -> None:
    encoder = open_clip()
    weights = encoder.state_dict()
    written = ldm.open_clip_weights(weights)
    names = {name.removeprefix("conditioner.embedders.1.model.") for name in written}
    assert names == {
        "positional_embedding",
        "token_embedding.weight",
        "text_projection",
        *(f"ln_final.{kind}" for kind in ("weight", "bias")),
        *(
            f"transformer.resblocks.{layer}.{module}{kind}"
            for layer in (0, 1)
            for kind in ("weight", "bias")
            for module in ("ln_1.", "ln_2.", "mlp.c_fc.", "mlp.c_proj.", "attn.out_proj.")
        ),
        *(
            f"transformer.resblocks.{layer}.attn.in_proj_{kind}"
            for layer in (0, 1)
            for kind in ("weight", "bias")
        ),
    }
    assert written["conditioner.embedders.1.model.text_projection"].shape == (8, 6)
    back = convert_open_clip_checkpoint(encoder, written, "conditioner.embedders.1.model.")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_readers_know_sdxl_by_its_names() -> None:
    """As ComfyUI and diffusers tell the families apart: by one key each."""
    network = unet(SDXL)
    weights = ldm.unet_weights(network.state_dict(), network.config)
    layer = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    assert infer_diffusers_model_type(weights | {layer: torch.zeros(1)}) == "xl_base"
    network = unet(SD15)
    assert (
        infer_diffusers_model_type(ldm.unet_weights(network.state_dict(), network.config)) == "v1"
    )


def lora_of(settings: dict[str, Any]) -> tuple[UNet2DConditionModel, dict[str, Tensor]]:
    """Rank-2 adapters on every attention matrix, in diffusers' keys."""
    network = unet(settings)
    layers = {}
    for name, module in network.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")) and "attn" in name:
            rows, columns = module.weight.shape
            layers[f"unet.{name}.lora_A.weight"] = torch.empty(2, columns, device="meta")
            layers[f"unet.{name}.lora_B.weight"] = torch.empty(rows, 2, device="meta")
    return network, layers


@pytest.mark.parametrize(
    ("family", "settings", "known"),
    [
        ("sd", SD15, "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"),
        ("sdxl", SDXL, "input_blocks_4_1_transformer_blocks_0_attn2_to_k"),
        ("sdxl", SDXL, "middle_block_1_transformer_blocks_9_attn1_to_out_0"),
        ("sdxl", SDXL, "output_blocks_5_1_transformer_blocks_1_attn1_to_q"),
    ],
)
def test_adapters_have_kohyas_names_and_are_found_again(
    family: str, settings: dict[str, Any], known: str
) -> None:
    network, layers = lora_of(settings)
    written = to_kohya(layers, 3.0, network.config, family)
    assert written[f"lora_unet_{known}.lora_down.weight"].shape[0] == 2
    assert written[f"lora_unet_{known}.alpha"].item() == 3
    assert len(written) == len(layers) // 2 * 3
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(written), network.config)
    back, alphas = _convert_non_diffusers_lora_to_diffusers(mapped)
    found = convert_unet_state_dict_to_peft(back)
    assert {k: w.shape for k, w in found.items()} == {k: w.shape for k, w in layers.items()}
    assert set(alphas.values()) == {3.0}


def test_adapters_of_another_kind_are_refused() -> None:
    name = "unet.mid_block.attentions.0.proj_in.lora_magnitude_vector.weight"
    with pytest.raises(UserError, match="--to lora"):
        to_kohya({name: torch.zeros(1)}, 1.0, {}, "sd")


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clips_names_are_the_published_ones(prefix: str) -> None:
    weights = {f"{prefix}final_layer_norm.bias": torch.zeros(1)}
    assert list(ldm.clip_weights(weights, "sd")) == [
        "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    ]
    assert list(ldm.clip_weights(weights, "sdxl")) == [
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"
    ]


def test_what_has_no_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place"):
        ldm.unet_module("class_embedding.linear_1", SD15)
