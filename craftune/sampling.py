"""Drawing images: guidance, DDIM and DPM-Solver++ over any family's denoiser.

Latents are x_t = alpha_t * x_0 + sigma_t * noise in every family, so one sampler serves all.
The noise of a candidate comes from its own seed: the same image from any batch or order, up to
the float summation order of the batch size.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from craftune.diffusion import Grid
from craftune.types import Cond, Denoiser


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
) -> Float[Tensor, "b ..."]:
    """Latents drawn from the model, deterministic given the noise.

    "ddim" is DDIM with eta = 0 (Song et al. 2021, arXiv:2010.02502, Eq. 12); "dpm++2m" is
    DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, Algorithm 2), whose first and last steps
    are of first order, as in diffusers. Both are one update in the data prediction:
    x' = sigma'/sigma * x + alpha' * (1 - e^-h) * D,  h = log(alpha'/sigma') - log(alpha/sigma),
    with D the predicted x_0 for DDIM and its linear extrapolation for 2M.

    Args:
        noise: standard normal, at the level of the grid's first timestep.
        empty: the unconditional branch; unused at guidance_scale 1.
        grad_steps: the last steps that keep a gradient, 0 to the grid's length.
    """
    steps = len(grid.timesteps)
    x, previous = noise, None
    log_snr = torch.log(grid.alphas) - torch.log(grid.sigmas)
    for i, t in enumerate(grid.timesteps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= steps - grad_steps):
            (alpha, alpha_end), (sigma, sigma_end) = grid.alphas[i], grid.sigmas[i]
            batch_t = t.to(x.device).expand(len(x))
            prediction = guided(denoiser, x, batch_t, cond, empty, guidance_scale)
            x_0, _ = denoiser.schedule.split_at(prediction.float(), x, alpha, sigma)
            data, h = x_0, log_snr[i, 1] - log_snr[i, 0]
            if sampler == "dpm++2m" and previous is not None and i < steps - 1:
                ratio = h / (log_snr[i, 0] - log_snr[i - 1, 0])
                data = x_0 + 0.5 * ratio * (x_0 - previous)
            x = sigma_end / sigma * x - alpha_end * torch.expm1(-h) * data
            previous = x_0
    return x
