"""The noise from which a sampler, with the steps it really takes, draws given latents.

Inverse noise correction (Anil et al. 2025, arXiv:2510.02692, Algorithm 6) learns the law of these
noises. A first-order sampler is a chain of maps x' = A x + B prediction(x, t); each is undone by
Picard iteration, x <- (x' - B prediction(x, t)) / A, at the t of the forward step. That finds
the one inverse if B / A times the prediction's Lipschitz constant in x is below 1, which for Euler
on a flow is (step size) x (Lipschitz constant of the velocity) < 1. Integrating the ODE backwards
would be another map, not this one's inverse.

Axes: b batch; ... latent axes; s steps of the grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from craftune.diffusion import Grid, Schedule
from craftune.errors import UserError
from craftune.sampling import FIRST_ORDER, guided
from craftune.types import Cond, Denoiser


@dataclass(frozen=True)
class Inversion:
    """Noises, and how the iteration went.

    Attributes:
        noise: `sample` draws the latents from it.
        iterations: of each step, in the order of sampling; the slowest example's.
        factors: how much less each iteration changed than the one before, the worst example's;
            below 1 in every step, and the smaller the faster. It estimates (step size) x
            (Lipschitz constant) where the data are.
        calls: denoiser calls per example, all steps together; a mean.
    """

    noise: Float[Tensor, "b ..."]
    iterations: Int[Tensor, " s"]
    factors: Float[Tensor, " s"]
    calls: float


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    latents: Float[Tensor, "b ..."],
    cond: Cond,
    empty: Cond | None,
    grid: Grid,
    *,
    sampler: str = "euler",
    guidance_scale: float = 1.0,
    tolerance: float = 1e-5,
    most_iterations: int = 64,
) -> Inversion:
    """Undo `craftune.sampling.sample` with the same arguments.

    Args:
        tolerance: an example's step is done when an iteration moves it by less than this share
            of its own root mean square.
        most_iterations: of one step.

    Raises:
        UserError: the sampler looks back over several steps; or a step does not contract: says
            which and by which factor.
    """
    if sampler not in FIRST_ORDER:
        raise UserError(
            f"noise correction: {sampler!r} looks back over several steps and has no step-wise "
            f"inverse; use one of {', '.join(FIRST_ORDER)}"
        )
    x, steps = latents.float(), len(grid.timesteps)
    iterations, factors, calls = torch.zeros(steps, dtype=torch.long), torch.zeros(steps), 0.0
    for k in reversed(range(steps)):
        keep, weight = coefficients(denoiser.schedule, grid, k)

        def before(
            guess: Tensor,
            rows: Tensor,
            end: Tensor = x,
            t: Tensor = grid.timesteps[k],
            keep: float = keep,
            weight: float = weight,
        ) -> Tensor:
            some = None if empty is None else empty.rows(rows)
            moment = t.to(guess.device).expand(len(guess))
            found = guided(denoiser, guess, moment, cond.rows(rows), some, guidance_scale)
            return (end[rows] - weight * found.float()) / keep

        x, counts, factors[k], stuck = _picard(before, x, tolerance, most_iterations)
        if stuck:
            _refuse(grid, k, float(factors[k]), stuck, len(x))
        iterations[k], calls = counts.max(), calls + float(counts.float().mean())
    return Inversion(x, iterations, factors, calls)


def coefficients(schedule: Schedule, grid: Grid, k: int) -> tuple[float, float]:
    """A and B of step k of a first-order sampler: x' = A x + B prediction."""
    (alpha, alpha_end), (sigma, sigma_end) = grid.alphas[k].double(), grid.sigmas[k].double()
    zero, one = torch.zeros(1, dtype=torch.double), torch.ones(1, dtype=torch.double)
    of_x, _ = schedule.split_at(zero, one, alpha, sigma)
    of_prediction, _ = schedule.split_at(one, zero, alpha, sigma)
    data = alpha_end - sigma_end * alpha / sigma
    return float(sigma_end / sigma + data * of_x), float(data * of_prediction)


def _picard(
    before: Callable[[Tensor, Tensor], Tensor],
    end: Float[Tensor, "b ..."],
    tolerance: float,
    most: int,
) -> tuple[Float[Tensor, "b ..."], Int[Tensor, " b"], float, int]:
    """The fixed point of each example; an example that is done is not called for again.

    Returns:
        The points, iterations per example, the worst factor, and how many are not done.
    """
    x, size = end.clone(), _size(end)
    counts = torch.zeros(len(x), dtype=torch.long)
    rows = torch.arange(len(x), device=x.device)
    change = torch.full((len(x),), math.inf, device=x.device)
    factors = torch.zeros(len(x), device=x.device)
    for _ in range(most):
        new = before(x[rows], rows)
        moved = _size(new - x[rows]) / size[rows]
        x[rows], counts[rows.cpu()] = new, counts[rows.cpu()] + 1
        # The floor is what float32 rounds away: below it a factor says nothing.
        known = change[rows].isfinite() & (moved > 1e-6)
        factors[rows] = torch.where(known, moved / change[rows], factors[rows])
        change[rows] = moved
        if not bool(moved.isfinite().all()) or bool((moved > 1e6).any()):
            break
        rows = rows[moved > tolerance]
        if not len(rows):
            break
    worst = factors[rows] if len(rows) else factors
    return x, counts, float(worst.max()), len(rows)


def _size(x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    return x.flatten(1).square().mean(1).sqrt()


def _refuse(grid: Grid, k: int, factor: float, stuck: int, count: int) -> None:
    steps, (start, end) = len(grid.timesteps), grid.sigmas[k].tolist()
    remedy = "allow more iterations"
    if not factor < 0.97:  # also where it neither shrinks nor grows: it goes in circles
        remedy = f"take more sampling steps, about {math.ceil(1.3 * steps * min(factor, 99))}"
    raise UserError(
        f"noise correction: step {k + 1} of {steps} (sigma {start:.3f} to {end:.3f}) is not "
        f"inverted for {stuck} of {count} examples: each iteration changes {factor:.2f} times "
        f"what the one before did, and only below 1 it contracts; {remedy}"
    )
