"""SD3 and FLUX.1: what is drawn is what diffusers draws, what is saved loads there."""

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from toy import edit_weights, load_sd
from toy_flow import KINDS, SIZE, flow_checkpoint, kept_flow

from craftune.adapters import add_lora
from craftune.config import GenerateConfig, LoraConfig
from craftune.errors import UserError
from craftune.images import to_pil
from craftune.models.flow import flow_grid
from craftune.sampling import initial_noise, sample
from craftune.stages.generate import Request, draw_latents
from craftune.types import Model

PROMPTS = ["two red dogs", "a cat"]
SCALES = {"sd3": 4.0, "sd3-no-t5": 4.0, "flux-dev": 3.0, "flux-schnell": 1.0}
TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"


def plain_pipeline(path: Path, kind: str) -> Any:
    """As a user loads it; without T5, diffusers wants to be told so."""
    diffusers.utils.logging.set_verbosity_error()
    without = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3-no-t5" else {}
    pipe: Any = DiffusionPipeline.from_pretrained(path, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, noise: Tensor, steps: int, scale: float, **settings: Any) -> Tensor:
    """The pipeline's final latents, unpacked."""
    packed = hasattr(pipe, "_pack_latents")
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[-2:])
    if packed:
        noise = pipe._pack_latents(noise, *noise.shape)
        if not pipe.transformer.config.guidance_embeds:
            settings = {"max_sequence_length": 256, **settings}
    drawn = pipe(
        PROMPTS,
        latents=noise.clone(),
        num_inference_steps=steps,
        guidance_scale=scale,
        height=height,
        width=width,
        output_type="latent",
        **settings,
    ).images
    return pipe._unpack_latents(drawn, height, width, pipe.vae_scale_factor) if packed else drawn


def ours(model: Model, steps: int, scale: float, texts: list[str] | None = None) -> Tensor:
    """The stage's final latents; seeds 1, 2 ... in order."""
    config = GenerateConfig(num_steps=steps, guidance_scale=scale)
    requests = [Request(text, seed + 1) for seed, text in enumerate(texts or PROMPTS)]
    return draw_latents(config, model, model.denoiser, requests, model.encode_prompts([""]))


def pictures(model: Model, latents: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [np.asarray(image).astype(int) for image in to_pil(model.decode(latents))]


def tune(model: Model) -> None:
    """Change the network as training would, by a lot."""
    with torch.no_grad():
        for i, weight in enumerate(model.denoiser.network.parameters()):
            weight.mul_(1 + 0.3 * math.sin(i))


# --- drawing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_latents_equal_the_pipeline_s(kind: str) -> None:
    model, pipe = load_sd(kept_flow(kind)), plain_pipeline(kept_flow(kind), kind)
    noise = initial_noise([1, 2], model.latent_shape)
    for steps, scale in ((1, SCALES[kind]), (2, 1.0), (9, SCALES[kind])):
        found, wanted = ours(model, steps, scale), theirs(pipe, noise, steps, scale)
        assert (found - wanted).abs().max() <= 1e-4
        assert (found[0] - found[1]).abs().max() > 0.1


def test_a_dev_without_embedded_guidance_is_guided_by_the_empty_prompt(tmp_path: Path) -> None:
    """The pipeline's true_cfg_scale."""
    path = flow_checkpoint(tmp_path, "flux-schnell")
    settings = path / "scheduler" / "scheduler_config.json"
    dev = kept_flow("flux-dev") / "scheduler" / "scheduler_config.json"
    settings.write_text(dev.read_text())
    model, pipe = load_sd(path), plain_pipeline(path, "flux-dev")
    assert model.guidance == "classifier-free"
    noise = initial_noise([1, 2], model.latent_shape)
    guided = {"true_cfg_scale": 3.0, "negative_prompt": ["", ""], "max_sequence_length": 512}
    wanted = theirs(pipe, noise, 4, 1.0, **guided)
    assert (ours(model, 4, 3.0) - wanted).abs().max() <= 1e-4


def test_schnell_refuses_guidance() -> None:
    model = load_sd(kept_flow("flux-schnell"))
    with pytest.raises(UserError, match=r"generate.guidance_scale: .* takes no guidance; use 1"):
        ours(model, 1, 3.5)


def test_images_need_not_be_square() -> None:
    model, pipe = load_sd(kept_flow("flux-schnell")), plain_pipeline(kept_flow("flux-schnell"), "")
    noise, cond = initial_noise([1, 2], (16, 4, 10)), model.encode_prompts(PROMPTS)
    with torch.no_grad():
        found = sample(model.denoiser, noise, cond, None, model.grid("euler", 3), sampler="euler")
    assert (found - theirs(pipe, noise, 3, 1.0)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_does_not_depend_on_the_batch(kind: str) -> None:
    model, scale = load_sd(kept_flow(kind)), SCALES[kind]
    texts = ["a cat", "two red dogs", "a cat", "a dog"]
    whole = ours(model, 3, scale, texts)
    alone = ours(model, 3, scale, texts[:1])
    torch.testing.assert_close(whole[:1], alone, atol=1e-4, rtol=1e-4)
    config = GenerateConfig(num_steps=3, guidance_scale=scale)
    requests = [Request(text, seed + 1) for seed, text in enumerate(texts)][::-1]
    back = draw_latents(config, model, model.denoiser, requests, model.encode_prompts([""]))
    torch.testing.assert_close(back.flip(0), whole, atol=1e-4, rtol=1e-4)


def test_guidance_is_an_input_of_dev_and_usually_3_5() -> None:
    model = load_sd(kept_flow("flux-dev"))
    x_t, t = torch.randn(2, *model.latent_shape), torch.tensor([100, 900])
    cond = model.encode_prompts(PROMPTS)
    with torch.no_grad():
        usual = model.denoiser(x_t, t, cond)
        same = model.denoiser(x_t, t, cond.having("guidance", torch.full((2,), 3.5)))
        mixed = model.denoiser(x_t, t, cond.having("guidance", torch.tensor([3.5, 9.0])))
    assert torch.equal(usual, same)
    torch.testing.assert_close(mixed[0], usual[0])
    assert (mixed[1] - usual[1]).abs().max() > 1e-3


# --- levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_timestep_is_1000_times_its_level(kind: str) -> None:
    schedule = load_sd(kept_flow(kind)).denoiser.schedule
    assert (schedule.target, schedule.law) == ("velocity", "logit-normal")
    torch.testing.assert_close(schedule.sigmas, torch.arange(1001) / 1000)
    torch.testing.assert_close(schedule.alphas + schedule.sigmas, torch.ones(1001))
    x_0, noise, t = torch.randn(3, 16, 2, 2), torch.randn(3, 16, 2, 2), torch.tensor([0, 400, 1000])
    x_t = schedule.add_noise(x_0, noise, t)
    torch.testing.assert_close(x_t[1], 0.6 * x_0[1] + 0.4 * noise[1])
    assert torch.equal(schedule.training_target(x_0, noise, t), noise - x_0)
    back = schedule.split(noise - x_0, x_t, t)
    torch.testing.assert_close(back, (x_0, noise), atol=1e-5, rtol=1e-5)


def test_timesteps_are_drawn_with_the_checkpoint_s_shift() -> None:
    """Half of them lie above shift / (1 + shift): 0.75 at SD3's shift of 3."""
    tokens = (SIZE // 2) ** 2
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
    shifts = {"sd3": 3.0, "sd3-no-t5": 3.0, "flux-dev": math.exp(mu), "flux-schnell": 1.0}
    for kind, shift in shifts.items():
        schedule = load_sd(kept_flow(kind)).denoiser.schedule
        t = schedule.random_timesteps(20_000, torch.Generator().manual_seed(0))
        assert t.float().median().item() / 1000 == pytest.approx(shift / (1 + shift), abs=0.01)


def test_large_images_of_dev_are_drawn_with_more_noise() -> None:
    """1024 x 1024 pixels are 4096 tokens, mu 1.15: half way stands 1 / (1 + e^-1.15) = 0.7595."""
    pipe = plain_pipeline(kept_flow("flux-dev"), "flux-dev")
    large = flow_grid(pipe, "euler", 2, 4096, even=True)
    torch.testing.assert_close(
        large.sigmas, torch.tensor([[1, 0.7595], [0.7595, 0]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(large.timesteps, torch.tensor([1000, 759.5]), atol=0.1, rtol=0)
    small = flow_grid(pipe, "euler", 2, 256, even=True)
    assert small.sigmas[0, 1] == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-4)


# --- prompts and images ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_as_the_pipeline_encodes_them(kind: str) -> None:
    model, pipe = load_sd(kept_flow(kind)), plain_pipeline(kept_flow(kind), kind)
    texts = [*PROMPTS, "", "a cat and a dog " * 200]
    cond = model.encode_prompts(texts).tensors
    if kind.startswith("sd3"):
        tokens, _, pooled, _ = pipe.encode_prompt(texts, texts, texts, torch.device("cpu"))
        assert cond["tokens"].shape[1] == 16 + 256
        assert (cond["tokens"][:, 16:].abs().max() > 0) == (kind == "sd3")
    else:
        length = 512 if kind == "flux-dev" else 256
        tokens, pooled, _ = pipe.encode_prompt(texts, max_sequence_length=length)
    torch.testing.assert_close(cond["tokens"], tokens, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(cond["pooled"], pooled)
    many = model.encode_prompts([f"a dog and {n} cats" for n in range(40)]).tensors
    alone = model.encode_prompts(["a dog and 39 cats"]).tensors
    assert len(many["tokens"]) == len(many["pooled"]) == 40
    for name, tensor in alone.items():
        torch.testing.assert_close(many[name][39], tensor[0], atol=1e-5, rtol=1e-5)


def test_a_recipe_can_leave_t5_out(tmp_path: Path) -> None:
    model = load_sd(kept_flow("sd3"), t5=False)
    pipe: Any = plain_pipeline(kept_flow("sd3"), "sd3-no-t5")
    noise = initial_noise([1, 2], model.latent_shape)
    assert (ours(model, 3, 4.0) - theirs(pipe, noise, 3, 4.0)).abs().max() <= 1e-4
    model.save(tmp_path, model.denoiser.network, torch.float32)
    assert not (tmp_path / "text_encoder_3").exists()
    assert torch.equal(ours(load_sd(tmp_path), 3, 4.0), ours(model, 3, 4.0))
    with pytest.raises(UserError, match=r"model\.t5: a checkpoint of family 'flux'"):
        load_sd(kept_flow("flux-dev"), t5=False)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_latents_are_shifted_and_scaled_as_the_pipeline_has_them(kind: str) -> None:
    model, pipe = load_sd(kept_flow(kind)), plain_pipeline(kept_flow(kind), kind)
    latents, vae = torch.randn(2, *model.latent_shape), pipe.vae.config
    with torch.no_grad():
        raw = pipe.vae.decode(latents / vae.scaling_factor + vae.shift_factor).sample
        wanted = pipe.image_processor.postprocess(raw, output_type="pt")
        torch.testing.assert_close(model.decode(latents), wanted)
        images = torch.rand(2, 3, 2 * SIZE, 2 * SIZE)
        own = pipe.vae.encode(images * 2 - 1).latent_dist
    found = model.encode_images(images)
    torch.testing.assert_close(found.mean, (own.mean - vae.shift_factor) * vae.scaling_factor)
    torch.testing.assert_close(found.std, own.std * vae.scaling_factor)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_low_precision_networks_take_and_give_float32(kind: str) -> None:
    found = ours(load_sd(kept_flow(kind), dtype="bfloat16"), 3, 3.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ours(load_sd(kept_flow(kind)), 3, 3.0), atol=0.3, rtol=0.1)


# --- saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_draws_the_same_image_in_a_plain_pipeline(tmp_path: Path, kind: str) -> None:
    model, scale = load_sd(kept_flow(kind)), SCALES[kind]
    before = ours(model, 3, scale)
    tune(model)
    tuned = ours(model, 3, scale)
    assert (tuned - before).abs().max() > 0.1
    model.save(tmp_path, model.denoiser.network, torch.float32)
    pipe = plain_pipeline(tmp_path, kind)
    noise = initial_noise([1, 2], model.latent_shape)
    assert (theirs(pipe, noise, 3, scale) - tuned).abs().max() <= 1e-4
    again = load_sd(tmp_path)
    for one, other in zip(
        pictures(again, ours(again, 3, scale)), pictures(model, tuned), strict=True
    ):
        assert np.abs(one - other).max() <= 1
        assert other.std() > 1


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_adapters_load_into_the_plain_pipeline(tmp_path: Path, kind: str) -> None:
    model, scale = load_sd(kept_flow(kind)), SCALES[kind]
    before, network = ours(model, 3, scale), model.denoiser.network
    add_lora(network, LoraConfig(rank=2, alpha=4), model.lora_targets, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    tuned = ours(model, 3, scale)
    assert (tuned - before).abs().max() > 0.1
    model.save_lora(tmp_path, network)
    pipe = plain_pipeline(kept_flow(kind), kind)
    pipe.load_lora_weights(tmp_path)
    noise = initial_noise([1, 2], model.latent_shape)
    assert (theirs(pipe, noise, 3, scale) - tuned).abs().max() <= 1e-4


# --- what is refused, in one line ------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_sd(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert str(path) in message
    return message


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, kind: str) -> None:
    t5 = "text_encoder_3" if kind == "sd3" else "text_encoder_2"
    folders = iter(flow_checkpoint(tmp_path / str(i), kind) for i in range(5))
    path = next(folders)
    edit_weights(path / TRANSFORMER, "proj_out.bias", None)
    assert "proj_out.bias" in refusal(path)
    path = next(folders)
    edit_weights(path / TRANSFORMER, "proj_out.bias", torch.full((64,), float("nan")))
    assert "'proj_out.bias' is not finite" in refusal(path)
    path = next(folders)
    edit_weights(path / t5 / "model.safetensors", "encoder.final_layer_norm.weight", None)
    assert f"{t5} lacks the weight 'encoder.final_layer_norm.weight'" in refusal(path)
    path = next(folders)
    weights = path / TRANSFORMER
    weights.write_bytes(weights.read_bytes()[:1000])
    refusal(path)
    path = next(folders)
    (path / t5 / "model.safetensors").unlink()
    refusal(path)
