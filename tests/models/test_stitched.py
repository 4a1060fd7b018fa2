"""Stitched drawing: the tuned network down to t*, the base from there, by diffusers and by ours."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from toy import kept_checkpoint, load_sd, random_checkpoint

import craftune
from craftune.adapters import add_lora
from craftune.config import GenerateConfig, LoraConfig
from craftune.errors import UserError
from craftune.models.stitched import StitchedPipeline, load_stitched
from craftune.sampling import Stitched
from craftune.stages.generate import Request, draw_latents

STEPS, SCALE, PROMPT = 6, 3.0, ["a red dog"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another UNet beside the base's text encoder and VAE, as training leaves it."""
    folder = tmp_path_factory.mktemp("tuned")
    other = random_checkpoint(folder / "other", seed=5)
    shutil.copytree(kept_checkpoint(), folder / "model")
    shutil.rmtree(folder / "model" / "unet")
    shutil.copytree(other / "unet", folder / "model" / "unet")
    return folder / "model"


def start() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def latents(pipe: Any, **more: Any) -> Tensor:
    drawn = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=start(),
        output_type="latent",
        **more,
    )
    return drawn.images


def two_segments(first: Any, second: Any, after: int) -> Tensor:
    """By two plain pipelines: what the first has after some steps, the second goes on from."""
    passed = {}

    def leave(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        passed[step + 1] = tensors["latents"]
        return tensors

    def enter(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": passed[after]} if step + 1 == after else tensors

    latents(first, callback_on_step_end=leave)
    return latents(second, callback_on_step_end=enter)


def timestep(pipe: Any, after: int) -> float:
    pipe.scheduler.set_timesteps(STEPS)
    return float(pipe.scheduler.timesteps[after])


def alone(folder: Path, scheduler: Any) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("after", [1, 3, 5])
def test_it_equals_the_two_segments_exactly(tuned: Path, after: int) -> None:
    stitched = load_stitched(tuned, kept_checkpoint(), 0.0, sampler="ddim")
    at = timestep(stitched.pipe, after)
    stitched = load_stitched(tuned, kept_checkpoint(), at, sampler="ddim")
    first, second = (alone(x, stitched.pipe.scheduler) for x in (tuned, kept_checkpoint()))
    drawn = latents(stitched)
    assert torch.equal(drawn, two_segments(first, second, after))
    assert not torch.allclose(drawn, latents(second), atol=1e-3)
    assert not torch.allclose(drawn, latents(first), atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "unipc"])
def test_it_draws_what_our_sampler_draws(tuned: Path, sampler: str) -> None:
    """Several steps' memory is dropped at t* by both."""
    base, other = load_sd(kept_checkpoint()), load_sd(tuned)
    config = GenerateConfig(sampler=sampler, num_steps=STEPS, guidance_scale=SCALE)  # type: ignore[arg-type]
    at = float(base.grid(sampler, STEPS).timesteps[3])
    ours = draw_latents(
        config,
        base,
        Stitched(other.denoiser, base.denoiser, at),
        [Request(PROMPT[0], 3)],
        base.encode_prompts([""]),
    )
    stitched = load_stitched(tuned, kept_checkpoint(), at, sampler=sampler)
    torch.testing.assert_close(latents(stitched), ours, atol=2e-4, rtol=1e-3)


def test_adapters_are_on_above_t_star_and_off_below(tmp_path: Path) -> None:
    model = load_sd(kept_checkpoint())
    add_lora(model.denoiser.network, LoraConfig(rank=2), model.lora_targets, seed=0)
    with torch.no_grad():
        for name, weight in model.denoiser.network.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    model.save_lora(tmp_path, model.denoiser.network)
    stitched = load_stitched(tmp_path, kept_checkpoint(), 1.0, sampler="ddim")
    at = timestep(stitched.pipe, 3)
    stitched = StitchedPipeline(stitched.pipe, at, stitched.tune, stitched.untune)
    first, second = (alone(kept_checkpoint(), stitched.pipe.scheduler) for _ in range(2))
    first.load_lora_weights(tmp_path)
    drawn = latents(stitched)
    torch.testing.assert_close(drawn, two_segments(first, second, 3), atol=1e-6, rtol=0)
    assert not torch.allclose(drawn, latents(second), atol=1e-3)
    torch.testing.assert_close(latents(stitched), drawn)  # and the same the next time


def test_it_is_called_as_a_pipeline_and_gives_images(tuned: Path) -> None:
    stitched = craftune.load_stitched(tuned, kept_checkpoint(), 501.0, sampler="ddim")
    seen: list[int] = []

    def watch(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return tensors

    at = timestep(stitched.pipe, 2)
    stitched = craftune.load_stitched(tuned, kept_checkpoint(), at, sampler="ddim")
    images = stitched(PROMPT, num_inference_steps=STEPS, callback_on_step_end=watch).images
    assert images[0].size == (16, 16)
    assert seen == list(range(STEPS))


def test_a_timestep_off_the_grid_is_refused(tuned: Path) -> None:
    stitched = load_stitched(tuned, kept_checkpoint(), 500.5, sampler="ddim")
    with pytest.raises(UserError, match=r"500.5 is no timestep of 6 steps after the first \(\d+"):
        latents(stitched)


def test_what_cannot_be_stitched_is_refused(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be stitched"):
        load_stitched(tmp_path, kept_checkpoint(), 501.0)
    with pytest.raises(UserError, match="'nosuch' is not for this checkpoint"):
        load_stitched(tuned, kept_checkpoint(), 501.0, sampler="nosuch")
    plain = StableDiffusionPipeline.from_pretrained(kept_checkpoint())
    stitched = StitchedPipeline(plain, 501.0, lambda: None, lambda: None)
    with pytest.raises(UserError, match="PNDMScheduler: not known how to hand over"):
        latents(stitched)
