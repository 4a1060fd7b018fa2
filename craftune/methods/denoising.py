"""What every method on the denoising error shares: the draws of (t, noise), and the error.

Two levers on the noise levels, both off by default, as the paper's loss has uniform t and drops
w(t): min-SNR weights (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting
Strategy", arXiv:2303.09556) and the timestep bias of diffusers' training scripts, under the names
used there.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.batches import Draws, Examples
from craftune.config import STRICT
from craftune.diffusion import Schedule
from craftune.types import Denoiser, Metrics


@dataclass(frozen=True, config=STRICT)
class NoiseLevels:
    """Which noise levels are trained on, and how much each counts."""

    snr_gamma: Annotated[float, Field(ge=0)] = 0.0
    """Min-SNR: the error in x_0 counts min(SNR, gamma) times; 5 in the paper, 0 is off."""
    timestep_bias: Literal["none", "earlier", "later", "range"] = "none"
    """Draw some timesteps more often: "earlier" the least noisy, "later" the noisiest, or a
    range."""
    multiplier: Annotated[float, Field(gt=0)] = 2.0
    """How many times as often."""
    portion: Annotated[float, Field(gt=0, le=1)] = 0.25
    """For "earlier" and "later": the share of all timesteps."""
    begin: Annotated[int, Field(ge=0)] = 0
    """For "range": the first timestep."""
    end: Annotated[int, Field(ge=1)] = 1000
    """For "range": the timestep after the last."""

    def __post_init__(self) -> None:
        if self.begin >= self.end:
            raise ValueError(f"begin must be below end, got {self.begin} and {self.end}")

    def draw(self, schedule: Schedule, batch: Examples, rng: torch.Generator) -> Draws:
        """A timestep and fresh noise per example."""
        x_0 = batch.latents
        t = self.timesteps(schedule, len(x_0), rng)
        noise = torch.randn(x_0.shape, generator=rng, device=rng.device)
        return Draws(t.to(x_0.device), noise.to(x_0.device))

    def timesteps(self, schedule: Schedule, n: int, rng: torch.Generator) -> Int[Tensor, " n"]:
        """From the family's pre-training law times the bias.

        By rejection, so it holds for any law: t is kept with probability bias(t) / max(bias).
        """
        if self.timestep_bias == "none":
            return schedule.random_timesteps(n, rng)
        kept = torch.empty(0, dtype=torch.long, device=rng.device)
        while len(kept) < n:
            t = schedule.random_timesteps(n, rng)
            chance = torch.rand(n, generator=rng, device=rng.device) * max(1.0, self.multiplier)
            kept = torch.cat([kept, t[chance < self._bias(t, len(schedule))]])
        return kept[:n]

    def weight(self, schedule: Schedule, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Factor of each example's error, whatever the network predicts; 1 where it is off.

        min(SNR, gamma) times the square of how an error of the prediction shows in x_0. That is
        min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v, as in the paper, and
        min(SNR, gamma) * t^2 for velocity on the straight path.
        """
        if not self.snr_gamma:
            return torch.ones(len(t), device=t.device)
        alpha, sigma = schedule.alphas.to(t.device)[t], schedule.sigmas.to(t.device)[t]
        # x_0 of a unit prediction at x_t = 0 is minus that gain
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        gain, _ = schedule.split_at(one, zero, alpha, sigma)
        return (alpha / sigma).square().clamp(max=self.snr_gamma) * gain.square()

    def _bias(self, t: Int[Tensor, " n"], count: int) -> Float[Tensor, " n"]:
        many = int(self.portion * count)
        first, end = {
            "earlier": (0, many),
            "later": (count - many, count),
            "range": (self.begin, self.end),
        }[self.timestep_bias]
        inside = (first <= t) & (t < end)
        return torch.where(inside, self.multiplier, 1.0)


def predict(
    denoiser: Denoiser, batch: Examples, draws: Draws
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """The denoiser's prediction at (x_t, t) and its target, float32."""
    schedule, x_0 = denoiser.schedule, batch.latents
    x_t = schedule.add_noise(x_0, draws.noise, draws.t)
    target = schedule.training_target(x_0, draws.noise, draws.t)
    return denoiser(x_t, draws.t, batch.cond).float(), target.float()


def plain_loss(
    noise: NoiseLevels, policy: Denoiser, batch: Examples, draws: Draws
) -> tuple[Float[Tensor, ""], Metrics]:
    """Mean weighted squared error of the prediction, and scalars to log, for SFT and GRAFT."""
    error = squared_error(*predict(policy, batch, draws))
    loss = (noise.weight(policy.schedule, draws.t) * batch.weight * error).mean()
    return loss, {"loss": loss.item(), "error": error.mean().item()}


def squared_error(
    prediction: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]
) -> Float[Tensor, " b"]:
    """Mean over the latent's entries, one number per example, >= 0."""
    return (prediction - target).square().flatten(1).mean(1)
