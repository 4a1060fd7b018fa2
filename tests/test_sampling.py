"""The sampler: equal to diffusers' pipeline, exact on exact denoisers, right in its gradients."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from toy import (
    Gaussian,
    ToyDenoiser,
    chain,
    cosine_schedule,
    kept_checkpoint,
    load_sd,
    tensor_watch,
    toy,
    toy_cond,
)
from toy_xl import kept_xl

from craftune.config import ModelConfig
from craftune.diffusion import Grid, Schedule, Target
from craftune.images import to_pil
from craftune.models import EMBEDDED, resolve
from craftune.sampling import guided, initial_noise, sample
from craftune.types import Cond, Model

TARGETS = get_args(Target)
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
PROMPTS = ["two red dogs and a cat", "a green square"]
CHECKPOINTS = {
    f"sd {prediction} {spacing}": functools.partial(kept_checkpoint, prediction, spacing)
    for prediction in ("epsilon", "v_prediction")
    for spacing in ("leading", "linspace")
} | {"sdxl": kept_xl}

# --- equal to diffusers ----------------------------------------------------------------------


def pipeline(path: Any, sampler: str) -> Any:
    diffusers.utils.logging.set_verbosity_error()
    pipe: Any = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(model: Model, sampler: str, steps: int, scale: float, noise: Tensor) -> Tensor:
    return sample(
        model.denoiser,
        noise,
        model.encode_prompts(PROMPTS),
        model.encode_prompts([""] * len(PROMPTS)),
        model.grid(sampler, steps),
        sampler=sampler,
        guidance_scale=scale,
    )


def assert_same_latents(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """<= 1e-4 of the latents' own scale: an untrained network sends them far beyond 1."""
    assert torch.isfinite(wanted).all()
    assert (found - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_latents_equal_the_pipeline_s(checkpoint: str, sampler: str) -> None:
    path = CHECKPOINTS[checkpoint]()
    model, pipe = load_sd(path), pipeline(path, sampler)
    noise = initial_noise([1, 2], model.latent_shape)
    for steps, scale in ((1, 3.0), (2, 1.0), (2, 7.5), (5, 3.0), (20, 1.0), (20, 7.5)):
        wanted = pipe(
            PROMPTS,
            latents=noise.clone(),
            num_inference_steps=steps,
            guidance_scale=scale,
            output_type="latent",
        ).images
        assert_same_latents(drawn(model, sampler, steps, scale, noise), wanted)


def test_the_image_is_the_pipeline_s() -> None:
    path = kept_checkpoint()
    model, pipe = load_sd(path), pipeline(path, "ddim")
    noise = initial_noise([1, 2], model.latent_shape)
    wanted = pipe(PROMPTS, latents=noise.clone(), num_inference_steps=5, guidance_scale=3.0).images
    with torch.no_grad():
        found = to_pil(model.decode(drawn(model, "ddim", 5, 3.0, noise)))
    for ours, theirs in zip(found, wanted, strict=True):
        difference = np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)
        assert np.abs(difference).max() <= 1
        assert (difference == 0).mean() > 0.99


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_embedded_model_draws_as_the_pipeline_does(sampler: str) -> None:
    path = resolve(ModelConfig(path=f"{EMBEDDED}shapes/model").path)
    if not (path / "model_index.json").is_file():
        pytest.skip("the embedded model is not there yet")
    model, pipe = load_sd(path), pipeline(path, sampler)
    noise = initial_noise([1, 2], model.latent_shape)
    wanted = pipe(PROMPTS, latents=noise.clone(), num_inference_steps=5, guidance_scale=3.0).images
    with torch.no_grad():
        found = to_pil(model.decode(drawn(model, sampler, 5, 3.0, noise)))
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_the_prompt_and_guidance_matter() -> None:
    """Else equality with the pipeline would say little."""
    model = load_sd(kept_checkpoint())
    noise = initial_noise([1, 1], model.latent_shape)
    one, other = drawn(model, "ddim", 5, 3.0, noise)
    assert (one - other).abs().max() > 0.05
    assert (one - drawn(model, "ddim", 5, 7.5, noise)[0]).abs().max() > 0.05


# --- exact denoisers -------------------------------------------------------------------------


def cond_of(n: int) -> Cond:
    return toy_cond(n)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_exact_denoiser_of_a_point_finds_it(sampler: str, target: Target, steps: int) -> None:
    schedule = cosine_schedule(target)
    point = torch.tensor([[0.7, -1.3]])
    places = torch.linspace(99, 5, steps).round().long().tolist()
    found = sample(
        Gaussian(schedule, point),
        initial_noise(range(4), (2,)),
        cond_of(4),
        None,
        chain(schedule, places),
        sampler=sampler,
    )
    torch.testing.assert_close(found, point.expand(4, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_lands_on_the_level_it_aims_for(target: Target) -> None:
    """From x_t of a known image and noise, with the exact denoiser: alpha' x_0 + sigma' noise."""
    schedule = cosine_schedule(target)
    point, noise = torch.tensor([[0.7, -1.3]]), torch.randn(5, 2)
    x_t = schedule.add_noise(point.expand(5, 2), noise, torch.full((5,), 80))
    grid = chain(schedule, [80, 30], end="open")
    wanted = schedule.add_noise(point.expand(5, 2), noise, torch.full((5,), 30))
    found = sample(Gaussian(schedule, point), x_t, cond_of(5), None, grid, sampler="ddim")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_an_exact_denoiser_of_a_gaussian_gives_its_mean_and_deviation(sampler: str) -> None:
    schedule = cosine_schedule("v", steps=400)
    mean = torch.tensor([[1.5, -0.5]])
    places = torch.linspace(399, 0, 200).round().long().tolist()
    found = sample(
        Gaussian(schedule, mean, 0.3),
        initial_noise(range(4000), (2,)),
        cond_of(4000),
        None,
        chain(schedule, places),
        sampler=sampler,
    )
    torch.testing.assert_close(found.mean(0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(found.std(0), torch.full((2,), 0.3), atol=0.02, rtol=0)


def flow_error(sampler: str, steps: int) -> float:
    """Distance to the exact end of the probability flow of N(mean, 0.5^2), in float64.

    There (x - alpha mean) / deviation_t is constant, deviation_t^2 = alpha^2 / 4 + sigma^2. Steps
    are equal in log SNR, from 2.5 to 92 of 100, and end at a level with noise.
    """
    level = torch.linspace(0.92, 0.025, steps + 1, dtype=torch.float64) * torch.pi / 2
    first, last = (torch.log(level.cos()) - torch.log(level.sin()))[[0, -1]]
    log_snr = torch.linspace(first.item(), last.item(), steps + 1, dtype=torch.float64)
    alphas, sigmas = torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt()
    schedule = Schedule(alphas, sigmas, "v")
    mean, deviation = torch.tensor([[1.5, -0.5]], dtype=torch.float64), 0.5
    spread = (alphas**2 * deviation**2 + sigmas**2).sqrt()
    z = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    grid = Grid.chain(torch.arange(steps), alphas, sigmas)
    exact = Gaussian(schedule, mean, deviation)
    start = alphas[0] * mean + spread[0] * z
    end = alphas[-1] * mean + spread[-1] * z
    found = sample(exact, start, cond_of(1), None, grid, sampler=sampler)
    return (found - end).abs().max().item()


def test_ddim_is_of_first_order_2m_of_second_unipc_of_third() -> None:
    """Halving the steps' length divides the error by 2, by about 4 and by 8 or more."""
    ddim, multistep, unipc = (
        [flow_error(sampler, n) for n in (20, 40, 80)] for sampler in SCHEDULERS
    )
    for errors, order in ((ddim, 1.0), (multistep, 2.0)):
        rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
        assert abs(rates[-1] - order) < 0.35, (errors, rates)
    assert multistep[-1] < ddim[-1] / 5
    assert np.diff(np.log2(unipc)).max() < -2.65


# --- noise, batches, guidance ----------------------------------------------------------------


def test_noise_depends_on_its_own_seed_alone() -> None:
    together = initial_noise([3, 1, 2], (4, 8, 8))
    assert torch.equal(together[1:2], initial_noise([1], (4, 8, 8)))
    assert not torch.equal(together[0], together[1])
    assert together.mean().abs() < 0.2
    assert (together.std() - 1).abs() < 0.1


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("checkpoint", [kept_checkpoint, kept_xl])
def test_images_do_not_depend_on_the_batch(checkpoint: Callable[[], Path], sampler: str) -> None:
    """Nor on the order, up to the summation order of float32: 2e-5 of the latents' scale."""
    model = load_sd(checkpoint())
    cond, empty = model.encode_prompts(PROMPTS * 2), model.encode_prompts([""] * 4)
    noise, grid = initial_noise(range(4), model.latent_shape), model.grid(sampler, 5)

    def draw(rows: slice | Tensor) -> Tensor:
        return sample(
            model.denoiser,
            noise[rows],
            cond.rows(rows),
            empty.rows(rows),
            grid,
            sampler=sampler,
            guidance_scale=5.0,
        )

    whole = draw(slice(0, 4))
    for size in (1, 3):
        parts = torch.cat([draw(slice(i, min(i + size, 4))) for i in range(0, 4, size)])
        assert_same_latents(parts, whole, 2e-5)
    order = torch.tensor([2, 0, 3, 1])
    assert_same_latents(draw(order), whole[order], 2e-5)


def test_guidance_by_hand() -> None:
    """With predictions 1 (empty) and 3 (prompt), scale 2.5 gives 1 + 2.5 * 2 = 6."""

    class Fixed:
        schedule = cosine_schedule()
        network = nn.Identity()

        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return cond.tensors["tokens"][:, 0].expand_as(x_t)

    cond, empty = (Cond({"tokens": torch.full((2, 1, 2), value)}) for value in (3.0, 1.0))
    x_t, t = torch.zeros(2, 2), torch.zeros(2).long()
    for scale, wanted in ((1.0, 3.0), (2.5, 6.0), (0.0, 1.0)):
        assert guided(Fixed(), x_t, t, cond, empty, scale).eq(wanted).all()
    assert guided(Fixed(), x_t, t, cond, None, 7.5).eq(3.0).all()


def test_no_guidance_calls_the_network_once_per_step_and_guidance_on_both_at_once() -> None:
    policy = toy()
    grid = chain(policy.schedule, [90, 50, 10])
    noise, cond = initial_noise([0], (2,)), toy_cond(1)
    for scale, rows in ((1.0, 1), (2.0, 2)):
        sizes: list[int] = []
        hook = policy.network.register_forward_hook(
            lambda _, inputs, __, sizes=sizes: sizes.append(len(inputs[0]))
        )
        sample(policy, noise, cond, cond, grid, guidance_scale=scale)
        hook.remove()
        assert sizes == [rows] * 3


# --- gradients -------------------------------------------------------------------------------

PLACES = [95, 70, 45, 20]


class PerStep(nn.Module):
    """The toy network with a number of its own added at every step of the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy().network.requires_grad_(False)
        self.bias = nn.Parameter(torch.tensor([0.1, -0.2, 0.3, 0.05]))

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.inner(x_t, t, tokens) + self.bias[PLACES.index(int(t[0]))]


def end_of_sampling(
    network: nn.Module, sampler: str, grad_steps: int, noise: Tensor | None = None
) -> Tensor:
    schedule = cosine_schedule()
    return sample(
        ToyDenoiser(schedule, network),
        initial_noise(range(3), (2,)) if noise is None else noise,
        toy_cond(3),
        toy_cond(3, seed=1),
        chain(schedule, PLACES),
        sampler=sampler,
        guidance_scale=2.0,
        grad_steps=grad_steps,
    )


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_gradients_are_on_in_the_last_steps_alone(sampler: str) -> None:
    network = toy().network
    for grad_steps in range(5):
        with tensor_watch(network) as seen:
            end_of_sampling(network, sampler, grad_steps)
        assert seen == [i >= 4 - grad_steps for i in range(4)]
    with torch.no_grad(), tensor_watch(network) as seen:
        end_of_sampling(network, sampler, 4)
    assert seen == [False] * 4


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_start_has_a_gradient_only_when_every_step_has(sampler: str) -> None:
    network = toy().network
    for grad_steps in (1, 3, 4):
        noise = initial_noise(range(3), (2,)).requires_grad_(True)
        end = end_of_sampling(network, sampler, grad_steps, noise)
        (gradient,) = torch.autograd.grad(end.square().sum(), noise, allow_unused=True)
        assert (gradient is None) == (grad_steps < 4)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("grad_steps", [1, 2, 4])
def test_the_gradient_of_the_last_steps_is_the_finite_difference(
    sampler: str, grad_steps: int
) -> None:
    """Central differences of the whole sampler, step by step; exactly 0 before the cut."""
    network = PerStep()
    end_of_sampling(network, sampler, grad_steps).square().sum().backward()
    gradient = network.bias.grad
    assert gradient is not None
    assert gradient[: 4 - grad_steps].tolist() == [0.0] * (4 - grad_steps)
    for step in range(4 - grad_steps, 4):
        values = []
        for change in (1e-2, -1e-2):
            moved = PerStep()
            with torch.no_grad():
                moved.bias[step] += change
                values.append(end_of_sampling(moved, sampler, 0).square().sum().item())
        difference = (values[0] - values[1]) / 2e-2
        assert gradient[step].item() == pytest.approx(difference, rel=5e-3, abs=1e-3)
