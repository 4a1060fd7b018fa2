"""The corrector: a small flow from N(0, I) to the law of the inverted noises, and its training.

Anil et al. 2025, arXiv:2510.02692: with Q the law of the noises that a flow's own steps map to
data, starting from Q instead of N(0, I) gives data. Q is close to N(0, I): a small network does.

Between two nearly normal laws the straight path of rectified flow is a poor one: halfway the
spread shrinks to 0.71, and Euler's few steps shrink the noise for good (by a quarter with 4). On
the trigonometric path x = cos(a) z + sin(a) noise (Albergo & Vanden-Eijnden 2023,
arXiv:2209.15571) two normal laws are joined by standing still: a corrector that has learnt
nothing returns the noise as it is, at any number of steps. Its velocity dx/da is the "v" target.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from craftune.config import STRICT
from craftune.diffusion import Schedule
from craftune.methods.denoising import squared_error
from craftune.types import Cond, Denoiser, Draws, Metrics


@dataclass(frozen=True)
class InvertedNoise:
    """What a corrector learns from: noises as `invert` found them, not standardised anew."""

    noise: Float[Tensor, "b ..."]
    cond: Cond

    def rows(self, index: slice) -> "InvertedNoise":
        """Part of the batch: a micro-batch."""
        return InvertedNoise(self.noise[index], self.cond.rows(index))


@settings(frozen=True, config=STRICT)
class NoiseCorrection:
    """Flow matching from N(0, I) to the inverted noises; the main flow takes no part."""

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def draw(self, schedule: Schedule, batch: InvertedNoise, rng: torch.Generator) -> Draws:
        """A uniform time and fresh normal noise per example."""
        shape, device = batch.noise.shape, batch.noise.device
        t = torch.randint(len(schedule), (shape[0],), generator=rng, device=rng.device)
        start = torch.randn(shape, generator=rng, device=rng.device)
        return Draws(t.to(device), start.to(device))

    def loss(
        self,
        policy: Denoiser,
        reference: Denoiser | None,
        batch: InvertedNoise,
        draws: Draws,
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Mean squared error of the corrector's velocity."""
        del reference
        schedule = policy.schedule
        x_t = schedule.add_noise(batch.noise, draws.noise, draws.t)
        target = schedule.training_target(batch.noise, draws.noise, draws.t)
        error = squared_error(policy(x_t, draws.t, batch.cond).float(), target.float()).mean()
        return error, {"loss": error.item()}

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""


def trigonometric(timesteps: int = 1001) -> Schedule:
    """The corrector's path: timestep i is the angle pi / 2 * i / (timesteps - 1)."""
    angles = torch.linspace(0, math.pi / 2, timesteps, dtype=torch.float64)
    return Schedule(angles.cos().float(), angles.sin().float(), "v")


@torch.no_grad()
def correct(
    corrector: Denoiser, noise: Float[Tensor, "b ..."], cond: Cond, num_steps: int
) -> Float[Tensor, "b ..."]:
    """Standard normal noise to the noise that the main flow is started from.

    Euler in the angle. `corrector.schedule` is `trigonometric`.
    """
    last, step = len(corrector.schedule) - 1, math.pi / 2 / num_steps
    x = noise
    for i in range(num_steps):
        t = torch.full((len(x),), last * (1 - i / num_steps), device=x.device)
        x = x - step * corrector(x, t, cond).float()
    return x
