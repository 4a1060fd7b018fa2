"""P-GRAFT on a line, where everything is known: what each option learns, and what it draws.

The data are two Gaussians; the base denoiser is exact; the sampler is its ODE (DDIM). The perfect
tuned denoiser of each option is computed from the accepted draws themselves, by Bayes' rule over
them, so nothing here depends on a network's fit.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from toy import chain, cosine_schedule

from craftune.batches import Draws, Examples, Level
from craftune.diffusion import Schedule, Target
from craftune.methods.graft import GRAFT
from craftune.methods.pgraft import PGRAFT, above, noised_up
from craftune.methods.sft import SFT
from craftune.sampling import Stitched, sample
from craftune.seeds import stream
from craftune.types import Cond

MEANS, SPREAD, DRAWS = (-1.0, 1.0), 0.35, 1000
LEVELS = list(range(99, -1, -1))
AFTER = 50


@dataclass(frozen=True)
class Points:
    """The exact denoiser of x_s dealt out evenly over these points, each blurred by `spread`.

    Attributes:
        points: `[n]`.
        level: of the points; clean by default.
    """

    schedule: Schedule
    points: Tensor
    level: Level = field(default_factory=Level)
    spread: float = 0.0
    network: nn.Module = field(default_factory=nn.Identity)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        del cond
        alpha, sigma = (scale[0, 0].double() for scale in self.schedule.scales(t, x_t))
        rho = alpha / self.level.alpha
        variance = sigma**2 - (rho * self.level.sigma) ** 2 + (rho * self.spread) ** 2
        away = x_t.double() - rho * self.points[None]
        share = torch.softmax(-away.square() / (2 * variance), 1)
        # epsilon is minus sigma times the score, whatever the law of x_t
        epsilon = sigma * (share * away).sum(1, keepdim=True) / variance
        x_0 = (x_t - sigma * epsilon) / alpha
        return self.schedule.training_target(x_0, epsilon, t).float()


@dataclass(frozen=True)
class Shifted:
    """A denoiser whose prediction is off by so many times x_t."""

    exact: Points
    shift: float

    @property
    def schedule(self) -> Schedule:
        return self.exact.schedule

    @property
    def network(self) -> nn.Module:
        return self.exact.network

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.exact(x_t, t, cond) + self.shift * x_t


SCHEDULE = cosine_schedule("v")
GRID = chain(SCHEDULE, LEVELS)
BASE = Points(SCHEDULE, torch.tensor(MEANS).double(), spread=SPREAD)
NOTHING = Cond({"tokens": torch.zeros(DRAWS, 1, 1)})


def draw(denoiser: object, seed: int, n: int = DRAWS) -> tuple[Tensor, Tensor]:
    """Final latents and the state after `AFTER` steps."""
    passed: dict[int, Tensor] = {}
    noise = torch.randn(n, 1, generator=stream("line", seed))
    x_0 = sample(
        denoiser,  # type: ignore[arg-type]
        noise,
        NOTHING.rows(slice(0, n)),
        None,
        GRID,
        sampler="ddim",
        after=passed.__setitem__,
    )
    return x_0, passed[AFTER]


@pytest.fixture(scope="module")
def accepted() -> tuple[Tensor, Tensor]:
    """Draws of the base whose image is above 0.5: a threshold reward."""
    x_0, x_s = draw(BASE, 0)
    good = x_0[:, 0] > 0.5
    return x_0[good, 0].double(), x_s[good, 0].double()


def level() -> Level:
    alpha, sigma = float(GRID.alphas[AFTER - 1, 1]), float(GRID.sigmas[AFTER - 1, 1])
    return Level(alpha, sigma, LEVELS[AFTER] + 1)


def stitched(points: Tensor, at: Level) -> Stitched:
    return Stitched(Points(SCHEDULE, points, at), BASE, float(LEVELS[AFTER]))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Kolmogorov's: the largest difference of the two distribution functions."""
    everything = torch.cat([found, wanted]).sort().values
    shares = [
        torch.searchsorted(x.sort().values, everything, right=True) / len(x)
        for x in (found, wanted)
    ]
    return float((shares[0] - shares[1]).abs().max())


def test_the_stitched_chain_draws_the_tilted_law(accepted: tuple[Tensor, Tensor]) -> None:
    """States at t* follow p_s * kappa, and the images are the accepted ones' law."""
    x_0, x_s = draw(stitched(accepted[1], level()), 1)
    bound = 1.95 * math.sqrt(1 / DRAWS + 1 / len(accepted[0]))  # 0.001 quantile of two samples
    assert distance(x_s[:, 0].double(), accepted[1]) < bound
    assert distance(x_0[:, 0].double(), accepted[0]) < bound
    assert (x_0[:, 0] < 0.45).double().mean() < 0.05


def test_restricted_t_is_biased_under_an_ode(accepted: tuple[Tensor, Tensor]) -> None:
    """Re-noised accepted images are smooth where the accepted states end: the base's tail leaks."""
    x_0, x_s = draw(stitched(accepted[0], Level()), 1)
    bound = 1.95 * math.sqrt(1 / DRAWS + 1 / len(accepted[0]))
    assert distance(x_s[:, 0].double(), accepted[1]) > 1.5 * bound
    assert (x_0[:, 0] < 0.45).double().mean() > 0.12


def test_restricted_t_is_right_where_the_joint_law_is_the_forward_one() -> None:
    """x_s drawn from x_0 by noising: the accepted states are the re-noised accepted images."""
    at, rng = level(), stream("forward")
    which = torch.randint(2, (40_000,), generator=rng)
    x_0 = torch.tensor(MEANS)[which] + SPREAD * torch.randn(40_000, generator=rng)
    x_0 = x_0[x_0 > 0.5]
    x_s = at.alpha * x_0 + at.sigma * torch.randn(len(x_0), generator=rng)
    t = torch.full((1,), 90)
    for x in (-1.0, 0.0, 1.0):
        x_t = torch.full((1, 1), x)
        direct = Points(SCHEDULE, x_0.double())(x_t, t, NOTHING)
        by_state = Points(SCHEDULE, x_s.double(), at)(x_t, t, NOTHING)
        torch.testing.assert_close(direct, by_state, atol=0.03, rtol=0)


@pytest.mark.parametrize("target", ["epsilon", "v", "velocity"])
def test_the_loss_is_least_at_the_tilted_denoiser(target: Target) -> None:
    """For points at t*, the exact denoiser of their noised-up law beats every shift of itself."""
    schedule = cosine_schedule(target)
    at = Level(float(schedule.alphas[40]), float(schedule.sigmas[40]), 41)
    points = torch.tensor([-0.4, 0.3, 0.9]).double()
    rng = stream("loss")
    x_s = points.float()[torch.randint(3, (20_000,), generator=rng)][:, None]
    cond = Cond({"tokens": torch.zeros(20_000, 1, 1)})
    batch = Examples(x_s, cond, torch.ones(20_000), level=at)
    method = PGRAFT(after=3)
    t = torch.full((20_000,), 70)
    draws = Draws(t, torch.randn(20_000, 1, generator=rng))
    exact = Points(schedule, points, at)

    def loss(shift: float) -> float:
        policy = Shifted(exact, shift)
        return method.loss(policy, None, batch, draws)[0].item()

    assert loss(0.0) < min(loss(0.05), loss(-0.05))


def test_noising_up_is_the_forward_process() -> None:
    """From x_s = alpha_s x_0 + sigma_s noise, x_t has the scales of t."""
    at, n, rng = level(), 200_000, stream("up")
    x_s = at.alpha * 2.0 + at.sigma * torch.randn(n, 1, generator=rng)
    draws = Draws(torch.full((n,), 80), torch.randn(n, 1, generator=rng))
    x_t, tau, sigma = noised_up(SCHEDULE, x_s, at, draws)
    assert x_t.mean().item() == pytest.approx(2 * SCHEDULE.alphas[80].item(), abs=0.01)
    assert x_t.std().item() == pytest.approx(SCHEDULE.sigmas[80].item(), abs=0.01)
    assert (tau < sigma).all()


def test_clean_latents_are_noised_as_ever() -> None:
    draws = Draws(torch.tensor([3, 80]), torch.tensor([[1.0], [-1.0]]))
    x_0 = torch.tensor([[0.5], [2.0]])
    x_t, tau, sigma = noised_up(SCHEDULE, x_0, Level(least=3), draws)
    torch.testing.assert_close(x_t, SCHEDULE.add_noise(x_0, draws.noise, draws.t))
    torch.testing.assert_close(tau, sigma)


def test_timesteps_lie_above_t_star_and_reach_both_ends() -> None:
    t = above(SCHEDULE, 60, 4000, stream("above"))
    assert (int(t.min()), int(t.max()), len(t)) == (60, 99, 4000)
    law = PGRAFT(after=3)
    examples = Examples(
        torch.zeros(500, 1), NOTHING.rows(slice(0, 500)), torch.ones(500), level=Level(0.5, 0.8, 60)
    )
    assert int(law.draw(SCHEDULE, examples, stream("draw")).t.min()) >= 60


def test_graft_s_step_is_supervised_fine_tuning() -> None:
    """Every accepted example counts 1, whatever its advantage; the loss is SFT's."""
    graft, sft = GRAFT(), SFT()
    assert graft.weigh(torch.tensor([3.0, -1.0, math.nan])).tolist() == [1, 1, 1]
    batch = Examples(
        torch.randn(6, 1, generator=stream(0)), NOTHING.rows(slice(0, 6)), torch.ones(6)
    )
    draws = graft.draw(SCHEDULE, batch, stream(1))
    assert graft.loss(BASE, None, batch, draws)[0] == sft.loss(BASE, None, batch, draws)[0]
