"""What every method on the denoising error shares: the draws of (t, noise), and the error."""

import torch
from jaxtyping import Float
from torch import Tensor

from craftune.diffusion import Schedule
from craftune.types import Denoiser, Draws, Examples


def draw(schedule: Schedule, batch: Examples, rng: torch.Generator) -> Draws:
    """A timestep from the family's pre-training law and fresh noise, per example."""
    x_0 = batch.latents
    t = schedule.random_timesteps(len(x_0), rng)
    noise = torch.randn(x_0.shape, generator=rng, device=rng.device)
    return Draws(t.to(x_0.device), noise.to(x_0.device))


def predict(
    denoiser: Denoiser, batch: Examples, draws: Draws
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """The denoiser's prediction at (x_t, t) and its target, float32."""
    schedule, x_0 = denoiser.schedule, batch.latents
    x_t = schedule.add_noise(x_0, draws.noise, draws.t)
    target = schedule.training_target(x_0, draws.noise, draws.t)
    return denoiser(x_t, draws.t, batch.cond).float(), target.float()


def squared_error(
    prediction: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]
) -> Float[Tensor, " b"]:
    """Mean over the latent's entries, one number per example, >= 0."""
    return (prediction - target).square().flatten(1).mean(1)
