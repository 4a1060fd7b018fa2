"""Stable Diffusion 1.x/2.x: what is loaded is what diffusers loads, what is saved loads there."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file
from toy import (
    LINSPACE_SCHEDULER,
    SD15_SCHEDULER,
    edit_weights,
    kept_checkpoint,
    load_sd,
    random_checkpoint,
)

from craftune.config import ModelConfig
from craftune.errors import UserError
from craftune.images import to_pil
from craftune.models import identity
from craftune.sampling import initial_noise, sample
from craftune.types import Model

PROMPTS = ["two red dogs and a cat", "a dog", "", "a cat " * 40]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def plain_pipeline(path: Path, **settings: Any) -> Any:
    """As a user loads it: the path, nothing else."""
    diffusers.utils.logging.set_verbosity_error()
    pipe: Any = StableDiffusionPipeline.from_pretrained(path, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_images(pipe: Any, prompts: list[str], noise: torch.Tensor) -> list[Image.Image]:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe(prompts, latents=noise.clone(), num_inference_steps=3, guidance_scale=4.0).images


def our_images(model: Model, prompts: list[str], noise: torch.Tensor) -> list[Image.Image]:
    latents = sample(
        model.denoiser,
        noise,
        model.encode_prompts(prompts),
        model.encode_prompts([""] * len(prompts)),
        model.grid("ddim", 3),
        sampler="ddim",
        guidance_scale=4.0,
    )
    with torch.no_grad():
        return to_pil(model.decode(latents))


def assert_same_images(
    found: list[Image.Image], wanted: list[Image.Image], levels: int = 1
) -> None:
    """Within so many of 255 levels everywhere, and the pictures are no flat field."""
    for ours, theirs in zip(found, wanted, strict=True):
        one, other = (np.asarray(image).astype(int) for image in (ours, theirs))
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= levels
        assert other.std() > 1


def tune(model: Model) -> None:
    """Change the network as training would, by a lot."""
    with torch.no_grad():
        for i, weight in enumerate(model.denoiser.network.parameters()):
            weight.mul_(1 + 0.3 * torch.sin(torch.tensor(float(i))))


# --- prompts and images ----------------------------------------------------------------------


def test_prompts_are_encoded_as_the_pipeline_encodes_them() -> None:
    path = kept_checkpoint()
    wanted, empty = plain_pipeline(path).encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    model = load_sd(path)
    torch.testing.assert_close(model.encode_prompts(PROMPTS).tensors["tokens"], wanted)
    torch.testing.assert_close(model.encode_prompts([""]).tensors["tokens"], empty[:1])
    assert (wanted[0] - wanted[1]).abs().max() > 0.1


def test_many_prompts_are_encoded_as_few_are() -> None:
    model = load_sd(kept_checkpoint())
    texts = [f"a dog and {n} cats" for n in range(150)]
    whole = model.encode_prompts(texts).tensors["tokens"]
    assert len(whole) == 150
    for i in (0, 63, 64, 149):
        alone = model.encode_prompts([texts[i]]).tensors["tokens"][0]
        torch.testing.assert_close(whole[i], alone, atol=1e-5, rtol=1e-5)


def test_decode_is_the_pipeline_s_and_scales_once(tmp_path: Path) -> None:
    for vae in ("kl", "tiny"):
        path = random_checkpoint(tmp_path / vae, vae=vae)
        model, pipe = load_sd(path), plain_pipeline(path)
        latents = torch.randn(2, *model.latent_shape)
        raw = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        wanted = pipe.image_processor.postprocess(raw.detach(), output_type="pt")
        torch.testing.assert_close(model.decode(latents), wanted)


def test_encode_images_undoes_what_the_vae_s_scale_does(tmp_path: Path) -> None:
    """Latents are scaling_factor times the VAE's own, images 2x - 1."""
    for vae in ("kl", "tiny"):
        path = random_checkpoint(tmp_path / vae, vae=vae)
        model, pipe = load_sd(path), plain_pipeline(path)
        images = torch.rand(2, 3, 16, 16)
        found = model.encode_images(images)
        raw = pipe.vae.encode(images * 2 - 1)
        own = raw.latents if vae == "tiny" else raw.latent_dist.mean
        scale = pipe.vae.config.scaling_factor
        torch.testing.assert_close(found.mean, (own * scale).detach())
        assert found.mean.shape == (2, *model.latent_shape)
        if vae == "tiny":
            assert found.std is None
        else:
            torch.testing.assert_close(found.std, (raw.latent_dist.std * scale).detach())


@pytest.mark.parametrize(("vae", "last"), [("kl", "quant_conv"), ("tiny", "encoder.layers.4")])
def test_a_vae_that_overflows_while_it_encodes_is_named(
    tmp_path: Path, vae: str, last: str
) -> None:
    """Weights that float16 holds, and sums that it does not."""
    path = random_checkpoint(tmp_path, vae=vae)
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    shape = load_file(file)[f"{last}.weight"].shape
    edit_weights(file, f"{last}.weight", torch.full(shape, 60_000.0))
    images = torch.rand(1, 3, 16, 16)
    assert torch.isfinite(load_sd(path).encode_images(images).mean).all()
    with pytest.raises(UserError, match=r"model.dtype: the VAE's encoder gives .* not finite"):
        load_sd(path, dtype="float16").encode_images(images)


def test_decode_passes_gradients_to_the_latents() -> None:
    model = load_sd(kept_checkpoint())
    latents = (0.1 * torch.randn(1, *model.latent_shape)).requires_grad_(True)
    model.decode(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


# --- saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("vae", "stored"), [("kl", torch.float32), ("tiny", torch.float16)])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_what_is_saved_draws_the_same_image_in_a_plain_pipeline(
    tmp_path: Path, vae: str, stored: torch.dtype, saved: torch.dtype
) -> None:
    model = load_sd(random_checkpoint(tmp_path / "base", vae=vae, dtype=stored))
    noise = initial_noise([1, 2], model.latent_shape)
    before = our_images(model, PROMPTS[:2], noise)
    tune(model)
    tuned = our_images(model, PROMPTS[:2], noise)
    changes = [np.asarray(a) - np.asarray(b, int) for a, b in zip(before, tuned, strict=True)]
    assert np.abs(changes).max() > 9

    model.save(tmp_path / "tuned", model.denoiser.network, saved)
    levels = 1 if saved == torch.float32 else 3
    pipe = plain_pipeline(tmp_path / "tuned")
    assert_same_images(pipeline_images(pipe, PROMPTS[:2], noise), tuned, levels)
    again = our_images(load_sd(tmp_path / "tuned"), PROMPTS[:2], noise)
    assert_same_images(again, tuned, levels)


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = load_sd(kept_checkpoint())
    before = {k: v.clone() for k, v in model.denoiser.network.state_dict().items()}
    model.save(tmp_path / "tuned", model.denoiser.network, torch.float16)
    after = model.denoiser.network.state_dict()
    assert all(torch.equal(v, after[k]) and v.dtype == torch.float32 for k, v in before.items())


def test_the_saved_folder_has_the_checkpoint_s_scheduler_and_tokenizer(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "base", prediction_type="v_prediction")
    model = load_sd(path)
    model.save(tmp_path / "tuned", model.denoiser.network, torch.float32)
    settings = json.loads((tmp_path / "tuned/scheduler/scheduler_config.json").read_text())
    assert settings["_class_name"] == "PNDMScheduler"
    assert settings["prediction_type"] == "v_prediction"
    assert settings["steps_offset"] == 1
    again = load_sd(tmp_path / "tuned")
    for name, tensor in model.encode_prompts(PROMPTS).tensors.items():
        torch.testing.assert_close(again.encode_prompts(PROMPTS).tensors[name], tensor)
    assert again.denoiser.schedule.target == "v"


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("infinite", [False, True])
def test_what_is_saved_is_drawn_at_the_checkpoint_s_timesteps(
    tmp_path: Path, sampler: str, infinite: bool
) -> None:
    """SD1.5 names no spacing of its PNDM; written out it would be DPM-Solver++'s spacing, too."""
    assert "timestep_spacing" not in SD15_SCHEDULER
    settings = {**SD15_SCHEDULER}
    if infinite:  # as diffusers writes its own default, which is not JSON
        solver = {"_class_name": "DPMSolverMultistepScheduler", "steps_offset": 1}
        settings = {**solver, "lambda_min_clipped": -math.inf}
    base = load_sd(random_checkpoint(tmp_path / "base", scheduler=settings))
    base.save(tmp_path / "tuned", base.denoiser.network, torch.float32)
    tuned = load_sd(tmp_path / "tuned")
    for steps in (3, 20):
        assert torch.equal(base.grid(sampler, steps).sigmas, tuned.grid(sampler, steps).sigmas)
        wanted = base.grid(sampler, steps).timesteps
        assert torch.equal(tuned.grid(sampler, steps).timesteps, wanted)


# --- what is loaded --------------------------------------------------------------------------


def test_a_half_precision_variant_loads(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    model = load_sd(path, variant="fp16")
    assert all(p.dtype == torch.float32 for p in model.denoiser.network.parameters())
    assert model.encode_prompts(["a dog"]).tensors["tokens"].dtype == torch.float32
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_sd(path)
    assert len(str(caught.value).splitlines()) == 1


def test_low_precision_networks_take_and_give_float32() -> None:
    model = load_sd(kept_checkpoint(), dtype="bfloat16")
    assert next(model.denoiser.network.parameters()).dtype == torch.bfloat16
    x_t, cond = torch.randn(2, *model.latent_shape), model.encode_prompts(PROMPTS[:2])
    out = model.denoiser(x_t, torch.tensor([10, 900]), cond)
    assert out.dtype == cond.tensors["tokens"].dtype == torch.float32
    assert model.decode(x_t).dtype == model.encode_images(torch.rand(1, 3, 16, 16)).mean.dtype
    exact = load_sd(kept_checkpoint()).denoiser(x_t, torch.tensor([10, 900]), cond)
    torch.testing.assert_close(out, exact, atol=0.1, rtol=0.1)


def test_loaded_networks_are_frozen_and_carry_no_dropout() -> None:
    network = load_sd(kept_checkpoint()).denoiser.network
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


def test_the_schedule_is_the_checkpoint_s() -> None:
    wanted: Any = DDIMScheduler.from_config(SD15_SCHEDULER)
    schedule = load_sd(kept_checkpoint()).denoiser.schedule
    assert len(schedule) == 1000
    torch.testing.assert_close(schedule.alphas.square(), wanted.alphas_cumprod)
    torch.testing.assert_close(
        schedule.alphas.square() + schedule.sigmas.square(), torch.ones(1000)
    )
    x_0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.add_noise(x_0, noise, t), wanted.add_noise(x_0, noise, t))
    v = load_sd(kept_checkpoint("v_prediction")).denoiser.schedule
    target = v.training_target(x_0, noise, t)
    torch.testing.assert_close(target, wanted.get_velocity(x_0, noise, t))


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_grid_is_diffusers_own(tmp_path: Path, sampler: str, spacing: str) -> None:
    settings = {**SD15_SCHEDULER, "timestep_spacing": spacing}
    model = load_sd(random_checkpoint(tmp_path, scheduler=settings))
    kind: Any = SCHEDULERS[sampler]
    for steps in (1, 2, 7, 30):
        wanted = kind.from_config(settings)
        wanted.set_timesteps(steps)
        grid = model.grid(sampler, steps)
        assert grid.timesteps.tolist() == wanted.timesteps.tolist()
        torch.testing.assert_close(grid.alphas**2 + grid.sigmas**2, torch.ones(steps, 2))
        assert grid.sigmas[-1, 1] == (pytest.approx(0.0292, abs=1e-3) if sampler == "ddim" else 0)


def test_karras_spacing_steps_between_timesteps(tmp_path: Path) -> None:
    """As many fine-tunes are published with; equal to the pipeline's latents."""
    settings = {**LINSPACE_SCHEDULER, "use_karras_sigmas": True}
    path = random_checkpoint(tmp_path, scheduler=settings)
    model, pipe = load_sd(path), plain_pipeline(path)
    noise = initial_noise([1], model.latent_shape)
    wanted = pipe(
        "a dog",
        latents=noise.clone(),
        num_inference_steps=8,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    cond = model.encode_prompts(["a dog"])
    found = sample(model.denoiser, noise, cond, None, model.grid("dpm++2m", 8), sampler="dpm++2m")
    assert (found - wanted).abs().max() <= 1e-4 * max(1.0, wanted.abs().max().item())


def test_more_steps_than_timesteps_are_refused() -> None:
    for sampler in SCHEDULERS:
        model = load_sd(kept_checkpoint())
        assert len(model.grid(sampler, 400).timesteps) == 400
        for steps in (1000, 1001):
            with pytest.raises(UserError, match=f"num_steps: {steps} are too many"):
                model.grid(sampler, steps)


def test_zero_terminal_snr_needs_v_prediction(tmp_path: Path) -> None:
    settings = {**LINSPACE_SCHEDULER, "timestep_spacing": "trailing"}
    path = random_checkpoint(tmp_path / "epsilon", scheduler=settings, zero_snr=True)
    with pytest.raises(UserError, match=r"scheduler_config.json: .*zero terminal SNR"):
        load_sd(path)
    path = random_checkpoint(
        tmp_path / "v", scheduler=settings, zero_snr=True, prediction_type="v_prediction"
    )
    model = load_sd(path)
    assert model.denoiser.schedule.alphas[-1] == 0
    noise, cond = initial_noise([1], model.latent_shape), model.encode_prompts(["a dog"])
    for sampler, kind in SCHEDULERS.items():
        pipe = plain_pipeline(path)
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        wanted = pipe(
            "a dog",
            latents=noise.clone(),
            num_inference_steps=4,
            guidance_scale=1.0,
            output_type="latent",
        ).images
        found = sample(model.denoiser, noise, cond, None, model.grid(sampler, 4), sampler=sampler)
        assert (found - wanted).abs().max() <= 1e-4 * max(1.0, wanted.abs().max().item())


# --- what is refused, in one line ------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_sd(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert str(path) in message
    return message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    path = random_checkpoint(tmp_path)
    edit_weights(path / UNET, "conv_in.bias", torch.full((8,), bad))
    message = refusal(path)
    assert "conv_in.bias" in message
    assert "unet" in message


@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
)
def test_a_truncated_file_is_refused(tmp_path: Path, part: str) -> None:
    path = random_checkpoint(tmp_path)
    file = path / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refusal(path)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet/diffusion_pytorch_model", "conv_in.weight"),
        ("vae/diffusion_pytorch_model", "decoder.conv_in.weight"),
        ("text_encoder/model", "text_model.final_layer_norm.weight"),
    ],
)
def test_a_missing_weight_is_refused_not_made_up(tmp_path: Path, part: str, name: str) -> None:
    path = random_checkpoint(tmp_path)
    file = path / f"{part}.safetensors"
    try:
        edit_weights(file, name, None)
    except AssertionError:  # transformers 5 writes the text model without its prefix
        edit_weights(file, name.removeprefix("text_model."), None)
    refusal(path)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path)
    edit_weights(path / UNET, "conv_in.bias", torch.zeros(5))
    refusal(path)


def test_sample_prediction_is_refused(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path, prediction_type="sample")
    assert "prediction_type 'sample' is not supported" in refusal(path)


def test_a_folder_without_its_unet_is_refused(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path)
    (path / UNET).unlink()
    refusal(path)


def test_the_identity_is_that_of_the_files(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "one")
    config = ModelConfig(path=str(path))
    assert identity(config) == identity(config)
    copy = random_checkpoint(tmp_path / "two")
    assert identity(config)["files"] == identity(ModelConfig(path=str(copy)))["files"]
    edit_weights(path / UNET, "conv_in.bias", torch.zeros(8))
    assert identity(config)["files"] != identity(ModelConfig(path=str(copy)))["files"]
