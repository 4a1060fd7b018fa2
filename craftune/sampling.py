"""Drawing images: guidance, DDIM, Euler, DPM-Solver++ and UniPC over any family's denoiser.

Latents are x_t = alpha_t * x_0 + sigma_t * noise in every family, so one sampler serves all.
The noise of a candidate comes from its own seed: the same image from any batch or order, up to
the float summation order of the batch size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from craftune.diffusion import Grid, Schedule
from craftune.types import Cond, Denoiser

FIRST_ORDER = ("ddim", "euler")


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "b ..."]:
    """Standard normal latents, one generator per image, on the CPU in float32."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, empty: Cond | None, scale: float
) -> Float[Tensor, "b ..."]:
    """Classifier-free guidance (arXiv:2207.12598): empty + scale * (cond - empty).

    One conditional call when scale is 1 or there is no empty branch; else both in one batch.
    """
    if scale == 1.0 or empty is None:
        return denoiser(x_t, t, cond)
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat([empty, cond]))
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class Stitched:
    """Two denoisers as one: the tuned above timestep t*, the starting one from t* down (P-GRAFT).

    Attributes:
        tuned: called at t > t_star.
        base: called at t <= t_star.
        t_star: where a sampler hands over; must be one of its grid's timesteps.
    """

    tuned: Denoiser
    base: Denoiser
    t_star: float

    @property
    def schedule(self) -> Schedule:
        """Of both."""
        return self.tuned.schedule

    @property
    def network(self) -> nn.Module:
        """The tuned one's."""
        return self.tuned.network

    def hands_over_at(self, t: Num[Tensor, ""]) -> bool:
        """Whether this is the first timestep of the starting network; samplers start anew there."""
        return bool(torch.isclose(t.double(), torch.tensor(self.t_star).double()))

    def __call__(
        self, x_t: Float[Tensor, "b ..."], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b ..."]:
        """The prediction of the one whose turn it is; all rows are at one timestep."""
        above = bool(t[0] > self.t_star) and not self.hands_over_at(t[0])
        return (self.tuned if above else self.base)(x_t, t, cond)


def sample(
    denoiser: Denoiser,
    noise: Float[Tensor, "b ..."],
    cond: Cond,
    empty: Cond | None,
    grid: Grid,
    *,
    sampler: str = "dpm++2m",
    guidance_scale: float = 1.0,
    grad_steps: int = 0,
    checkpoint: bool = False,
    after: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "b ..."]:
    """Latents drawn from the model, deterministic given the noise.

    "ddim" is DDIM with eta = 0 (Song et al. 2021, arXiv:2010.02502, Eq. 12), "euler" the same
    step by its name in flow matching: there alpha = 1 - sigma, and the update below is
    x + (sigma' - sigma) * velocity, Euler's on the flow's ODE. "dpm++2m" is
    DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, Algorithm 2), whose first and last steps
    are of first order, as in diffusers. Both are one update in the data prediction:
    x' = sigma'/sigma * x + alpha' * (1 - e^-h) * D,  h = log(alpha'/sigma') - log(alpha/sigma),
    with D the predicted x_0 for DDIM and Euler, its linear extrapolation for 2M.

    Args:
        noise: standard normal, at the level of the grid's first timestep.
        empty: the unconditional branch; unused at guidance_scale 1.
        grad_steps: the last steps that keep a gradient, from 0; more than the grid has are all.
        checkpoint: keep no activations of these steps; each call of the network is made again in
            the backward pass. What is kept then grows with the latents alone.
        after: called with the number of steps taken and the latents there.
    """
    steps = len(grid.timesteps)
    x = start = noise if grad_steps >= steps else noise.detach()
    previous: list[Tensor] = []
    log_snr = (torch.log(grid.alphas) - torch.log(grid.sigmas)).double()
    for i, t in enumerate(grid.timesteps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= steps - grad_steps):
            (alpha, alpha_end), (sigma, sigma_end) = grid.alphas[i], grid.sigmas[i]
            if isinstance(denoiser, Stitched) and denoiser.hands_over_at(t):
                previous = []  # what the tuned network saw says nothing about this one's course
            batch_t = t.to(x.device).expand(len(x))
            call = (denoiser, x, batch_t, cond, empty, guidance_scale)
            if checkpoint and torch.is_grad_enabled():
                # The network draws no random numbers whose state would have to be restored.
                prediction = recomputed(
                    guided, *call, use_reentrant=False, preserve_rng_state=False
                )
            else:
                prediction = guided(*call)
            x_0, _ = denoiser.schedule.split_at(prediction.to(noise.dtype), x, alpha, sigma)
            if sampler == "unipc" and previous:
                x = _corrected(start, [*previous, x_0], grid, log_snr, i)
            data, h = x_0, log_snr[i, 1] - log_snr[i, 0]
            if sampler not in FIRST_ORDER and previous and i < steps - 1:
                ratio = h / (log_snr[i, 0] - log_snr[i - 1, 0])
                data = x_0 + 0.5 * ratio * (x_0 - previous[-1])
            start = x
            x = sigma_end / sigma * x - alpha_end * torch.expm1(-h) * data
            previous = [*previous[-1:], x_0]
        if after is not None:
            after(i + 1, x)
    return x


def _corrected(
    start: Tensor, data: list[Tensor], grid: Grid, log_snr: Tensor, i: int
) -> Float[Tensor, "b ..."]:
    """UniC: the step that ended where step i starts, taken again with x_0 known at its end.

    Args:
        start: latents at the start of step i - 1.
        data: x_0 predicted at the starts of steps (i - 2,) i - 1 and i; of two alone, the
            corrector is of first order.
        log_snr: log(alpha / sigma) at both ends of each step.
    """
    (alpha, sigma), sigma_start = (grid.alphas[i, 0], grid.sigmas[i, 0]), grid.sigmas[i - 1, 0]
    before, now = data[-2], data[-1]
    h = log_snr[i, 0] - log_snr[i - 1, 0]
    slope = 0.5 * (now - before)
    if len(data) == 3:
        # The weights that make the step exact for x_0 linear and quadratic in log SNR (Eq. 8).
        r = (log_snr[i - 2, 0] - log_snr[i - 1, 0]) / h
        linear = (torch.expm1(-h) / -h - 1) / torch.expm1(-h)
        quadratic = 2 * ((torch.expm1(-h) / -h - 1) / -h - 0.5) / torch.expm1(-h)
        weight = (linear - quadratic) / (1 - r)
        slope = weight / r * (data[0] - before) + (linear - weight) * (now - before)
    return sigma / sigma_start * start - alpha * torch.expm1(-h) * (before + slope)
