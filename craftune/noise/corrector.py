"""The corrector: a small flow from N(0, I) to the law of the inverted noises, and its use.

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
from jaxtyping import Float, Num
from torch import Tensor, nn

from craftune.diffusion import Schedule
from craftune.types import Cond, Denoiser


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


def summary(cond: Cond) -> Cond:
    """What a corrector reads of a prompt: "prompt" `[b, width]`, the mean of its tokens."""
    return Cond({"prompt": cond.tensors["tokens"].float().mean(1)})


@dataclass(frozen=True)
class Corrected:
    """A model's denoiser with a corrector of the noise that sampling starts from.

    Attributes:
        corrector: reads `summary` of the condition.
        num_steps: of the corrector.
    """

    denoiser: Denoiser
    corrector: Denoiser
    num_steps: int

    @property
    def schedule(self) -> Schedule:
        """The denoiser's."""
        return self.denoiser.schedule

    @property
    def network(self) -> nn.Module:
        """The denoiser's."""
        return self.denoiser.network

    def __call__(
        self, x_t: Float[Tensor, "b ..."], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b ..."]:
        """The denoiser's prediction."""
        return self.denoiser(x_t, t, cond)

    def start(self, noise: Float[Tensor, "b ..."], cond: Cond) -> Float[Tensor, "b ..."]:
        """Standard normal noise to the noise that `sample` is to be given."""
        return correct(self.corrector, noise, summary(cond), self.num_steps)
