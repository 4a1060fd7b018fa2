"""The corrector: nothing learnt is nothing changed; on normal laws it mends a flow that is off."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from craftune.config import TrainConfig
from craftune.diffusion import Schedule
from craftune.noise import InvertedNoise, NoiseCorrection, correct, invert, trigonometric
from craftune.rows import RowDenoiser, RowNetwork
from craftune.sampling import sample
from craftune.seeds import stream
from craftune.studies.flow import euler_grid, flow_schedule, nothing
from craftune.training import train
from craftune.types import Cond

DATA = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
"""Covariance of the data."""
STEPS = 6


class WrongFlow(nn.Module):
    """The exact velocity for normal data of another covariance."""

    covariance = torch.tensor([[0.6, 0.1], [0.1, 1.2]])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - x_0 | x] = (sigma I - (1 - sigma) C) (sigma^2 I + (1 - sigma)^2 C)^-1 x."""
        s, eye = sigma[:, None, None], torch.eye(2)
        total = s**2 * eye + (1 - s) ** 2 * self.covariance
        towards = s * eye - (1 - s) * self.covariance
        return (towards @ torch.linalg.solve(total, x[..., None]))[..., 0]


class Waves(nn.Module):
    """A matrix of the time, a trigonometric polynomial, times x: enough for normal laws."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = nn.Linear(2 * 7, 2, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.arange(1, 4) * math.pi
        basis = torch.cat([torch.ones(len(x), 1), angles.sin(), angles.cos()], 1)
        return self.leave((basis[:, :, None] * x[:, None]).flatten(1))


@dataclass(frozen=True)
class Plain:
    network: nn.Module
    schedule: Schedule

    def __call__(self, x_t: Float[Tensor, "b d"], t: Tensor, cond: Cond) -> Float[Tensor, "b d"]:
        return self.network(x_t, t / (len(self.schedule) - 1))


def covariance(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def corrector_of(noises: Tensor, out: Path) -> Plain:
    corrector = Plain(Waves(), trigonometric())

    def feed(step: int) -> InvertedNoise:
        index = torch.randint(len(noises), (512,), generator=stream("feed", step))
        return InvertedNoise(noises[index], nothing(512))

    config = TrainConfig(
        steps=400,
        batch_size=512,
        micro_batch=512,
        learning_rate=0.02,
        lr_schedule="linear",
        weight_decay=0.0,
        gradient_checkpointing=False,
    )
    train(NoiseCorrection(), corrector, None, feed, config, 0, out)
    return corrector


def test_corrected_sampling_restores_the_covariance_of_the_data(tmp_path: Path) -> None:
    flow, grid = Plain(WrongFlow(), flow_schedule()), euler_grid(STEPS)
    data = torch.randn(8000, 2) @ torch.linalg.cholesky(DATA).T
    noises = invert(flow, data, nothing(8000), None, grid).noise
    corrector = corrector_of(noises, tmp_path)

    fresh = torch.randn(8000, 2)
    cond = nothing(8000)
    plain = sample(flow, fresh, cond, None, grid, sampler="euler")
    started = correct(corrector, fresh, cond, 16)
    mended = sample(flow, started, cond, None, grid, sampler="euler")
    assert (covariance(plain) - DATA).abs().max() > 0.3
    torch.testing.assert_close(covariance(mended), DATA, atol=0.08, rtol=0)
    torch.testing.assert_close(covariance(started), covariance(noises), atol=0.15, rtol=0)


def test_a_corrector_that_has_learnt_nothing_returns_the_noise() -> None:
    """At any number of steps; on the straight path Euler would shrink it."""
    corrector = RowDenoiser(RowNetwork((4, 6), 16, 1), trigonometric())
    noise = torch.randn(3, 4, 6)
    for num_steps in (1, 5):
        assert torch.equal(correct(corrector, noise, nothing(3), num_steps), noise)


def test_normal_noise_asks_for_no_correction() -> None:
    """The best velocity between two standard normal laws is zero: E[v | x] = 0 on the path."""
    schedule, n = trigonometric(), 200_000
    t = torch.full((n,), 300)
    z, noise = torch.randn(n, 1), torch.randn(n, 1)
    x = schedule.add_noise(z, noise, t)
    v = schedule.training_target(z, noise, t)
    assert abs(float((v * x).mean())) < 0.01
    assert abs(float(x.square().mean()) - 1) < 0.02


def test_the_path_runs_over_a_quarter_turn() -> None:
    schedule = trigonometric(3)
    root = math.sqrt(0.5)
    torch.testing.assert_close(schedule.alphas, torch.tensor([1.0, root, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.sigmas, torch.tensor([0.0, root, 1.0]), atol=1e-6, rtol=0)


def test_correction_moves_with_the_velocity_over_the_whole_quarter_turn() -> None:
    """v = 1 everywhere moves noise by -pi / 2, whatever the number of steps."""
    network = RowNetwork((2, 3), 16, 1)
    nn.init.ones_(network.leave.bias)
    corrector, noise = RowDenoiser(network, trigonometric()), torch.randn(2, 2, 3)
    for num_steps in (1, 4):
        moved = correct(corrector, noise, nothing(2), num_steps)
        torch.testing.assert_close(moved, noise - math.pi / 2)


def test_draws_and_loss_of_a_micro_batch_are_part_of_the_whole() -> None:
    method, corrector = NoiseCorrection(), RowDenoiser(RowNetwork((2, 3), 16, 1), trigonometric())
    batch = InvertedNoise(torch.randn(4, 2, 3), nothing(4))
    draws = method.draw(corrector.schedule, batch, stream("draws"))
    whole, metrics = method.loss(corrector, None, batch, draws)
    parts = [
        method.loss(corrector, None, batch.rows(r), draws.rows(r))[0]
        for r in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    assert metrics == {"loss": whole.item()}


def test_the_corrector_is_asked_from_pure_noise_downwards() -> None:
    asked: list[float] = []

    class Listening(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            asked.append(float(time[0]))
            return torch.zeros_like(x)

    correct(Plain(Listening(), trigonometric()), torch.randn(2, 3), nothing(2), 4)
    assert asked == [1.0, 0.75, 0.5, 0.25]
