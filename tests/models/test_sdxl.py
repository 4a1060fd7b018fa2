"""Stable Diffusion XL: encoded, drawn and saved as diffusers does; float16 without overflow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from toy import load_sd, write_json
from toy_xl import kept_xl, random_xl

from craftune.adapters import add_lora
from craftune.config import LoraConfig
from craftune.errors import UserError
from craftune.images import to_pil
from craftune.records import read_json
from craftune.sampling import initial_noise, sample
from craftune.types import Model

PROMPTS = ["two red dogs and a cat", "a dog", "a cat " * 40]
CPU = torch.device("cpu")


def plain_pipeline(path: Path) -> Any:
    """As a user loads it: the path, nothing else."""
    pipe: Any = DiffusionPipeline.from_pretrained(path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_images(pipe: Any, noise: torch.Tensor) -> list[Image.Image]:
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
    return pipe(PROMPTS[:2], latents=noise.clone(), **settings).images


def our_images(model: Model, noise: torch.Tensor) -> list[Image.Image]:
    cond, empty = model.encode_prompts(PROMPTS[:2]), model.encode_prompts(["", ""])
    grid = model.grid("ddim", 3)
    latents = sample(model.denoiser, noise, cond, empty, grid, sampler="ddim", guidance_scale=4.0)
    with torch.no_grad():
        return to_pil(model.decode(latents))


def assert_same(found: list[Image.Image], wanted: list[Image.Image], levels: int) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        one, other = (np.asarray(image).astype(int) for image in (ours, theirs))
        assert np.abs(one - other).max() <= levels
        assert other.std() > 1


# --- prompts and images ----------------------------------------------------------------------


@pytest.mark.parametrize("force_zeros", [True, False])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(
    tmp_path: Path, force_zeros: bool
) -> None:
    path = kept_xl() if force_zeros else random_xl(tmp_path, force_zeros=False)
    tokens, no_tokens, pooled, no_pooled = plain_pipeline(path).encode_prompt(PROMPTS)
    model = load_sd(path)
    found, empty = model.encode_prompts(PROMPTS).tensors, model.encode_prompts([""]).tensors
    torch.testing.assert_close(found["tokens"], tokens)
    torch.testing.assert_close(found["pooled"], pooled)
    torch.testing.assert_close(empty["tokens"], no_tokens[:1])
    torch.testing.assert_close(empty["pooled"], no_pooled[:1])
    assert (empty["tokens"].abs().max() == 0) == force_zeros
    mixed = model.encode_prompts(["a dog", ""]).tensors["tokens"]
    torch.testing.assert_close(mixed[1:], empty["tokens"])
    assert mixed[0].abs().max() > 0


def test_the_unet_is_told_the_size_of_the_picture() -> None:
    """8x8 latents of a VAE that halves once: 16 pixels, not cropped, for every prompt."""
    for texts in ([""], PROMPTS):
        time_ids = load_sd(kept_xl()).encode_prompts(texts).tensors["time_ids"]
        assert time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * len(texts)


@pytest.mark.parametrize("name", ["tokens", "pooled", "time_ids"])
def test_every_part_of_the_condition_reaches_the_network(name: str) -> None:
    model = load_sd(kept_xl())
    cond = model.encode_prompts(PROMPTS[:1])
    x_t, t = torch.randn(1, *model.latent_shape), torch.tensor([500])
    with torch.no_grad():
        before = model.denoiser(x_t, t, cond)
        cond.tensors[name].add_(1.0)
        assert not torch.allclose(before, model.denoiser(x_t, t, cond), atol=1e-4)


def test_decode_scales_by_sdxl_s_factor() -> None:
    model, pipe = load_sd(kept_xl()), plain_pipeline(kept_xl())
    latents, images = torch.randn(2, *model.latent_shape), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        raw = pipe.vae.decode(latents / 0.13025).sample
        own = pipe.vae.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(model.decode(latents), (raw / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(model.encode_images(images).mean, own * 0.13025)


# --- float16 ---------------------------------------------------------------------------------


def overflowing(folder: Path, force_upcast: bool) -> Path:
    """A VAE whose values inside go beyond float16's 65504 and come back."""
    path = random_xl(folder, force_upcast=force_upcast)
    file = path / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for end in ("weight", "bias"):
        weights[f"decoder.conv_in.{end}"] = weights[f"decoder.conv_in.{end}"] * 1e6
    save_file({k: v.clamp(-6e4, 6e4) for k, v in weights.items()}, file, {"format": "pt"})
    return path


def test_an_overflowing_vae_is_kept_in_float32(tmp_path: Path) -> None:
    path = overflowing(tmp_path, force_upcast=True)
    model = load_sd(path, dtype="float16")
    assert next(model.denoiser.network.parameters()).dtype == torch.float16
    latents = torch.randn(1, *model.latent_shape)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(latents), load_sd(path).decode(latents))


def test_an_overflow_is_said_in_one_line(tmp_path: Path) -> None:
    model = load_sd(overflowing(tmp_path, force_upcast=False), dtype="float16")
    latents = torch.randn(1, *model.latent_shape)
    with pytest.raises(UserError) as caught:
        model.decode(latents)
    assert "model.dtype: the VAE gives values that are not finite" in str(caught.value)
    assert "(the VAE is in float16); use 'bfloat16' or 'float32'" in str(caught.value)
    with pytest.raises(UserError, match="the denoiser gives values that are not finite"):
        load_sd(kept_xl()).decode(latents * torch.inf)


def test_other_precisions_are_the_recipe_s(tmp_path: Path) -> None:
    """bfloat16 has float32's range: its VAE need not stay."""
    for dtype in ("bfloat16", "float32"):
        model = load_sd(kept_xl(), dtype=dtype)
        assert next(model.denoiser.network.parameters()).dtype == getattr(torch, dtype)
        cond = model.encode_prompts(PROMPTS[:1])
        x_t = torch.randn(1, *model.latent_shape)
        out = model.denoiser(x_t, torch.tensor([500]), cond)
        assert out.dtype == cond.tensors["tokens"].dtype == model.decode(x_t).dtype
        assert out.dtype == torch.float32


# --- saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_what_is_saved_draws_the_same_image_in_a_plain_pipeline(
    tmp_path: Path, saved: torch.dtype
) -> None:
    model = load_sd(kept_xl())
    noise = initial_noise([1, 2], model.latent_shape)
    before = our_images(model, noise)
    assert_same(pipeline_images(plain_pipeline(kept_xl()), noise), before, 1)
    with torch.no_grad():
        for i, weight in enumerate(model.denoiser.network.parameters()):
            weight.mul_(1 + 0.3 * torch.sin(torch.tensor(float(i))))
    tuned = our_images(model, noise)
    changes = [np.asarray(a) - np.asarray(b, int) for a, b in zip(before, tuned, strict=True)]
    assert np.abs(changes).max() > 9
    model.save(tmp_path, model.denoiser.network, saved)
    levels = 1 if saved == torch.float32 else 3
    assert_same(pipeline_images(plain_pipeline(tmp_path), noise), tuned, levels)
    assert_same(our_images(load_sd(tmp_path), noise), tuned, levels)
    assert load_sd(tmp_path).encode_prompts([""]).tensors["tokens"].abs().max() == 0


def test_saving_keeps_how_the_empty_prompt_is_made(tmp_path: Path) -> None:
    model = load_sd(random_xl(tmp_path / "base", force_zeros=False))
    model.save(tmp_path / "saved", model.denoiser.network, torch.float32)
    assert load_sd(tmp_path / "saved").encode_prompts([""]).tensors["tokens"].abs().max() > 0


def test_adapters_load_in_a_plain_pipeline(tmp_path: Path) -> None:
    model = load_sd(kept_xl())
    noise = initial_noise([1, 2], model.latent_shape)
    before = our_images(model, noise)
    add_lora(model.denoiser.network, LoraConfig(rank=2), model.lora_targets, seed=0)
    with torch.no_grad():
        for name, weight in model.denoiser.network.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    tuned = our_images(model, noise)
    model.save_lora(tmp_path, model.denoiser.network)
    pipe = plain_pipeline(kept_xl())
    pipe.load_lora_weights(tmp_path)
    assert_same(pipeline_images(pipe, noise), tuned, 1)
    changes = [np.asarray(a) - np.asarray(b, int) for a, b in zip(before, tuned, strict=True)]
    assert np.abs(changes).max() > 9


# --- what is refused, in one line ------------------------------------------------------------


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_sd(path, **settings)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_schedulers_of_another_kind(tmp_path: Path) -> None:
    edm = {"_class_name": "EDMEulerScheduler"}
    path = random_xl(tmp_path / "edm")
    write_json(path / "scheduler/scheduler_config.json", edm)
    index = read_json(path / "model_index.json")
    write_json(path / "model_index.json", index | {"scheduler": ["diffusers", edm["_class_name"]]})
    assert "scheduler 'EDMEulerScheduler' is not of this family" in refusal(path)
    path = random_xl(tmp_path / "snr", scheduler={"rescale_betas_zero_snr": True})
    assert "zero terminal SNR cannot be used with epsilon" in refusal(path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"in_channels": 9}, "reads 9 channels and gives 4 (inpainting or editing)"),
        ({"time_cond_proj_dim": 8}, "takes the guidance scale as an input"),
    ],
)
def test_unets_that_need_more_than_a_prompt(
    tmp_path: Path, settings: dict[str, int], said: str
) -> None:
    path = random_xl(tmp_path)
    config = read_json(path / "unet/config.json")
    write_json(path / "unet/config.json", config | settings)
    file = path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if "in_channels" in settings:
        weights["conv_in.weight"] = torch.zeros(8, 9, 3, 3)
    else:
        weights["time_embedding.cond_proj.weight"] = torch.zeros(8, 8)
    save_file(weights, file, {"format": "pt"})
    assert said in refusal(path)


def test_a_text_encoder_that_lacks_a_weight(tmp_path: Path) -> None:
    path = random_xl(tmp_path)
    file = path / "text_encoder_2/model.safetensors"
    save_file(
        {k: v for k, v in load_file(file).items() if k != "text_projection.weight"},
        file,
        {"format": "pt"},
    )
    assert "text_encoder_2 lacks the weight 'text_projection.weight'" in refusal(path)


def test_a_checkpoint_of_another_family() -> None:
    assert "pipeline 'StableDiffusionXLPipeline' is of family 'sdxl'" in refusal(
        kept_xl(), family="sd"
    )
