"""P-GRAFT: tune the noisy part of the chain alone, towards accepted intermediate states.

Anil et al. 2025, arXiv:2510.02692. A final image's reward decides on the state x_s that the same
chain passed at timestep s = t*. Accepted states have the law p_s(x) * E[A | x_s = x] / Z. The tuned
network learns the timesteps above s alone; images are drawn by it down to s and by the starting
network from there (`craftune.load_stitched`). Nearer to noise the reward says less about a state,
and the shaped law is easier to learn: the best s lies between and is found by trying.

The paper's loss could not be read; these two are derived.

"noise-up" takes x_s further up the forward process, from level s to a noisier t:

    x_t = rho x_s + tau noise,   rho = alpha_t / alpha_s,   tau^2 = sigma_t^2 - rho^2 sigma_s^2

A perfect epsilon at (x_t, t) is E[(sigma_t / tau) noise | x_t]. That target grows without bound as
t -> s, so the error is that of (tau / sigma_t) epsilon - noise: the same minimiser, unit target.

"restricted-t" is the ordinary loss on the accepted image x_0, at timesteps above s: the same with
level 0 for s, so that rho = alpha_t and tau = sigma_t. It is right where the sampler's joint law of
(x_0, x_s) is the forward process', which DDIM, Euler and every other deterministic sampler break.

Fed with `Examples` at their `level`. No reference; one forward and backward pass per example.
"""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.batches import Draws, Examples, Level
from craftune.config import STRICT
from craftune.diffusion import Schedule
from craftune.methods.denoising import squared_error
from craftune.types import Denoiser, Metrics


@dataclass(frozen=True, config=STRICT)
class PGRAFT:
    """Hyper-parameters and training step of P-GRAFT."""

    fed_with: ClassVar[Literal["examples"]] = "examples"

    after: Annotated[int, Field(ge=1)]
    """t* as the number of sampling steps that the tuned network takes before the starting one; one
    of generate.keep_states. A quarter, half and three quarters of the steps are worth trying."""
    option: Literal["noise-up", "restricted-t"] = "noise-up"
    """Train on stored states, noised up; or on final images at timesteps above t*, which is biased
    for every deterministic sampler."""

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def weigh(self, advantage: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """1 for every accepted example."""
        return torch.ones_like(advantage)

    def draw(self, schedule: Schedule, batch: Examples, rng: torch.Generator) -> Draws:
        """A timestep above t* and fresh noise per example."""
        x_s = batch.latents
        t = above(schedule, batch.level.least, len(x_s), rng)
        noise = torch.randn(x_s.shape, generator=rng, device=rng.device)
        return Draws(t.to(x_s.device), noise.to(x_s.device))

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Examples, draws: Draws
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """E || (tau / sigma_t) epsilon - noise ||^2 under the accepted law."""
        del reference
        x_t, tau, sigma = noised_up(policy.schedule, batch.latents, batch.level, draws)
        prediction = policy(x_t, draws.t, batch.cond).float()
        _, epsilon = policy.schedule.split(prediction, x_t.float(), draws.t)
        error = squared_error(tau / sigma * epsilon, draws.noise.float())
        loss = (batch.weight * error).mean()
        return loss, {"loss": loss.item(), "error": error.mean().item()}

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""


def noised_up(
    schedule: Schedule, x_s: Float[Tensor, "b ..."], level: Level, draws: Draws
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """x_t from x_s by the forward process; with it tau and sigma_t, which broadcast against it."""
    alpha, sigma = schedule.scales(draws.t, x_s)
    rho = alpha / level.alpha
    tau = (sigma.square() - (rho * level.sigma).square()).clamp(min=0).sqrt()
    return rho * x_s + tau * draws.noise, tau, sigma


def above(schedule: Schedule, least: int, n: int, rng: torch.Generator) -> Int[Tensor, " n"]:
    """Timesteps from the family's pre-training law, given that they are >= least."""
    kept = torch.empty(0, dtype=torch.long, device=rng.device)
    while len(kept) < n:
        t = schedule.random_timesteps(n, rng)
        kept = torch.cat([kept, t[t >= least]])
    return kept[:n]
