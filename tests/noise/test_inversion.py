"""The Picard inverse against the matrix inverse, the sampler, and fields too steep for it."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from toy_flow import kept_flow

from craftune.config import ModelConfig
from craftune.diffusion import Grid, Schedule, Target
from craftune.errors import UserError
from craftune.models import load
from craftune.noise import call_flops, invert
from craftune.rows import RowDenoiser, RowNetwork
from craftune.sampling import initial_noise, sample
from craftune.studies.flow import euler_grid, flow_schedule, nothing
from craftune.types import Cond


@dataclass(frozen=True)
class Linear:
    """prediction = matrix x, whatever the time."""

    network: nn.Linear
    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.network(x_t)


def linear(matrix: Tensor, target: Target = "velocity") -> Linear:
    network = nn.Linear(len(matrix), len(matrix), bias=False)
    network.weight.data = matrix
    if target == "velocity":
        return Linear(network, flow_schedule())
    angles = torch.linspace(0, 1.5, 1001)
    return Linear(network, Schedule(angles.cos(), angles.sin(), target))


def grid_of(denoiser: Linear, num_steps: int) -> Grid:
    if denoiser.schedule.target == "velocity":
        return euler_grid(num_steps)
    angles = torch.linspace(1.5, 0, num_steps + 1)
    return Grid.chain(angles[:-1] / 1.5 * 1000, angles.cos(), angles.sin())


MATRIX = torch.tensor([[0.9, 0.4, 0.0], [-0.3, 0.5, 0.2], [0.1, 0.0, -0.8]])


@pytest.mark.parametrize("num_steps", [1, 4])
def test_on_a_linear_field_it_is_the_matrix_inverse(num_steps: int) -> None:
    """Euler with step h maps by (I - h M)^steps."""
    denoiser, latents = linear(MATRIX), torch.randn(5, 3)
    matrix = 0.9 * MATRIX if num_steps == 1 else MATRIX
    denoiser.network.weight.data = matrix
    step = torch.eye(3, dtype=torch.double) - matrix.double() / num_steps
    inverse = torch.linalg.inv(torch.linalg.matrix_power(step, num_steps))
    found = invert(denoiser, latents, nothing(5), None, euler_grid(num_steps), tolerance=1e-6)
    exact = (latents.double() @ inverse.T).float()
    torch.testing.assert_close(found.noise, exact, atol=1e-4, rtol=1e-4)


def test_the_factor_is_step_size_times_the_spectral_radius() -> None:
    """The iteration matrix is h M: its largest eigenvalue rules once the others have died out."""
    matrix = torch.tensor([[2.4, 1.0], [0.0, 0.3]])
    found = invert(linear(matrix), torch.randn(4, 2), nothing(4), None, euler_grid(4))
    torch.testing.assert_close(found.factors, torch.full((4,), 0.6), atol=0.03, rtol=0)
    assert (found.iterations > 15).all()
    assert found.calls <= found.iterations.sum()


def test_it_refuses_where_it_does_not_contract_and_says_where_and_how_much() -> None:
    """h L = 6 / 4: the last step is the first to be undone."""
    with pytest.raises(UserError) as error:
        invert(linear(6 * torch.eye(2)), torch.randn(3, 2), nothing(3), None, euler_grid(4))
    assert "\n" not in str(error.value)
    assert "step 4 of 4 (sigma 0.250 to 0.000)" in str(error.value)
    assert "3 of 3 examples" in str(error.value)
    assert "changes 1.50 times" in str(error.value)
    advised = re.search(r"more sampling steps, about (\d+)", str(error.value))
    assert advised is not None
    steps = int(advised[1])
    invert(linear(6 * torch.eye(2)), torch.randn(3, 2), nothing(3), None, euler_grid(steps))


def test_a_step_that_contracts_slowly_needs_iterations_not_steps() -> None:
    field = linear(3.8 * torch.eye(2))
    with pytest.raises(UserError, match=r"changes 0\.95 times.*allow more iterations"):
        invert(field, torch.randn(3, 2), nothing(3), None, euler_grid(4))
    invert(field, torch.randn(3, 2), nothing(3), None, euler_grid(4), most_iterations=1000)


@pytest.mark.parametrize("target", ["velocity", "v", "epsilon"])
def test_it_undoes_the_sampler_for_every_target(target: Target) -> None:
    denoiser, noise = linear(0.4 * MATRIX, target), torch.randn(6, 3)
    grid, cond = grid_of(denoiser, 6), nothing(6)
    latents = sample(denoiser, noise, cond, None, grid, sampler="ddim")
    found = invert(denoiser, latents, cond, None, grid, sampler="ddim")
    torch.testing.assert_close(found.noise, noise, atol=1e-4, rtol=1e-4)


def test_each_example_is_its_own_problem() -> None:
    """One that is done early is not moved again by those that are not."""
    network = RowNetwork((4, 6), 16, 1)
    nn.init.normal_(network.leave.weight, std=0.1)
    denoiser = RowDenoiser(network, flow_schedule())
    scale = torch.tensor([0.1, 1.0, 8.0])[:, None, None]
    latents, grid = torch.randn(3, 4, 6) * scale, euler_grid(5)
    together = invert(denoiser, latents, nothing(3), None, grid).noise
    apart = [invert(denoiser, x[None], nothing(1), None, grid).noise for x in latents]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_conditional_checkpoint_is_inverted_with_its_guidance(guidance_scale: float) -> None:
    model = load(ModelConfig(path=str(kept_flow("sd3"))), torch.device("cpu"))
    cond, empty = model.encode_prompts(["a red circle", "a cat"]), model.encode_prompts([""] * 2)
    grid, noise = model.grid("euler", 6), initial_noise([1, 2], model.latent_shape)
    drawn = sample(
        model.denoiser, noise, cond, empty, grid, sampler="euler", guidance_scale=guidance_scale
    )
    found = invert(model.denoiser, drawn, cond, empty, grid, guidance_scale=guidance_scale)
    torch.testing.assert_close(found.noise, noise, atol=2e-4, rtol=2e-4)
    if guidance_scale > 1:
        without = invert(model.denoiser, drawn, cond, None, grid).noise
        assert (without - noise).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["dpm++2m", "unipc"])
def test_samplers_that_look_back_are_refused(sampler: str) -> None:
    with pytest.raises(UserError, match="looks back over several steps"):
        invert(linear(MATRIX), torch.randn(1, 3), nothing(1), None, euler_grid(3), sampler=sampler)


def test_flops_are_counted_as_by_hand() -> None:
    """Linear layers of rows and of the time, and attention; 2 FLOPs per multiply-add."""
    n, d, width = 4, 6, 16
    denoiser = RowDenoiser(RowNetwork((n, d), width, 1), flow_schedule())
    rows = n * (2 * d * width + (3 + 1 + 6) * width**2)
    attention, time = 2 * n * n * width, (2 + 6) * width**2
    counted = call_flops(denoiser, torch.zeros(1, n, d), nothing(1))
    assert counted == 2 * (rows + attention + time)
