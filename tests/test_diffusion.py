"""The forward process: identities that hold for every target, and the two laws of t."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import cosine_schedule

from craftune.diffusion import Grid, Schedule, Target

TARGETS = get_args(Target)


def draws(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 4, 2, 2), torch.randn(n, 4, 2, 2)


@pytest.mark.parametrize("target", TARGETS)
def test_split_undoes_add_noise(target: Target) -> None:
    schedule = cosine_schedule(target)
    x_0, noise = draws(len(schedule))
    t = torch.arange(len(schedule))
    x_t = schedule.add_noise(x_0, noise, t)
    found_x_0, found_noise = schedule.split(schedule.training_target(x_0, noise, t), x_t, t)
    torch.testing.assert_close(found_x_0, x_0, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found_noise, noise, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_split_mixes_to_x_t_again_whatever_the_prediction(target: Target) -> None:
    """x_0 and noise of a wrong prediction are consistent: alpha x_0 + sigma noise = x_t."""
    schedule = cosine_schedule(target)
    x_t, prediction = draws(len(schedule))
    t = torch.arange(len(schedule))
    x_0, noise = schedule.split(prediction, x_t, t)
    torch.testing.assert_close(schedule.add_noise(x_0, noise, t), x_t, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(alpha=st.floats(0.1, 1.0), sigma=st.floats(0.05, 1.0), seed=st.integers(0, 1000))
@pytest.mark.parametrize("target", TARGETS)
def test_split_holds_at_any_level(target: Target, alpha: float, sigma: float, seed: int) -> None:
    """Also off the unit circle, where v's normaliser alpha^2 + sigma^2 is not 1."""
    schedule = Schedule(torch.tensor([alpha]), torch.tensor([sigma]), target)
    x_0, noise = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed))
    t = torch.zeros(1).long()
    x_t = schedule.add_noise(x_0, noise, t)
    prediction = schedule.training_target(x_0, noise, t)
    found = torch.stack(schedule.split(prediction, x_t, t))
    torch.testing.assert_close(found, torch.stack([x_0, noise]), atol=1e-4, rtol=1e-4)


def test_by_hand() -> None:
    """alpha 0.6, sigma 0.8, x_0 2, noise -1: x_t = 0.4, v = -0.6 - 1.6, velocity = -3."""
    level = torch.tensor([0.9, 0.6]), torch.tensor([0.1, 0.8])
    x_0, noise, t = torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor([1])
    assert Schedule(*level, "v").add_noise(x_0, noise, t).item() == pytest.approx(0.4)
    wanted = {"epsilon": -1.0, "v": -2.2, "velocity": -3.0}
    for target in TARGETS:
        found = Schedule(*level, target).training_target(x_0, noise, t).item()
        assert found == pytest.approx(wanted[target])


def test_errors_of_the_network_reach_x_0_as_derived() -> None:
    """methods.md 2.1: x_0's error is -(sigma/alpha), -sigma, -t times the network's."""
    for target in TARGETS:
        schedule = cosine_schedule(target)
        t = torch.tensor([10, 50, 90])
        x_t, prediction = torch.randn(2, 3, 2)
        wrong = schedule.split(prediction + 1, x_t, t)[0] - schedule.split(prediction, x_t, t)[0]
        alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
        factor = {"epsilon": sigma / alpha, "v": sigma, "velocity": sigma}[target]
        torch.testing.assert_close(wrong, -factor[:, None].expand(3, 2), atol=1e-3, rtol=1e-4)


def test_each_sample_has_its_own_level() -> None:
    schedule = cosine_schedule()
    x_0, noise = draws(3)
    t = torch.tensor([5, 50, 95])
    together = schedule.add_noise(x_0, noise, t)
    for i in range(3):
        alone = schedule.add_noise(x_0[i : i + 1], noise[i : i + 1], t[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_zero_terminal_snr_is_refused_for_epsilon_alone() -> None:
    alphas, sigmas = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.5**0.5, 1.0])
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Schedule(alphas, sigmas, "epsilon")
    schedule = Schedule(alphas, sigmas, "v")
    x_0, noise = draws(1)
    t = torch.tensor([2])
    x_t = schedule.add_noise(x_0, noise, t)
    found, _ = schedule.split(schedule.training_target(x_0, noise, t), x_t, t)
    torch.testing.assert_close(found, x_0)


def test_bad_schedules_are_refused() -> None:
    with pytest.raises((ValueError, TypeError)):  # TypeError by the shape checks of the tests
        Schedule(torch.ones(2), torch.ones(3), "v")


def test_uniform_timesteps_cover_every_level_evenly() -> None:
    """100 levels, 100,000 draws: counts of 1,000 with a deviation of 31.5, so 5 sigma is 158."""
    schedule = cosine_schedule(steps=100)
    t = schedule.random_timesteps(100_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=100)
    assert len(counts) == 100
    assert (counts - 1000).abs().max() < 158
    assert t.min() == 0
    assert t.max() == 99


def test_logit_normal_timesteps_have_their_law() -> None:
    """P(t <= quantile) by the normal law of logit(t), at nine levels, and both tails."""
    plain = cosine_schedule("velocity", steps=1000)
    schedule = Schedule(plain.alphas, plain.sigmas, "velocity", "logit-normal")
    n = 100_000
    t = schedule.random_timesteps(n, torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() < 1000
    normal = torch.distributions.Normal(0.0, 1.0)
    for level in (0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.98):
        wanted = normal.cdf(torch.tensor(math.log(level / (1 - level)))).item()
        found = (t < level * 1000).float().mean().item()
        assert found == pytest.approx(wanted, abs=5 * 0.5 / math.sqrt(n))


def test_the_generator_decides_the_timesteps() -> None:
    for law in ("uniform", "logit-normal"):
        plain = cosine_schedule("velocity")
        schedule = Schedule(plain.alphas, plain.sigmas, "velocity", law)
        one, same, other = (
            schedule.random_timesteps(50, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_a_chain_starts_each_step_where_the_last_ended() -> None:
    grid = Grid.chain(
        torch.tensor([9, 4]), torch.tensor([0.1, 0.6, 1.0]), torch.tensor([0.9, 0.5, 0.0])
    )
    torch.testing.assert_close(grid.alphas, torch.tensor([[0.1, 0.6], [0.6, 1.0]]))
    torch.testing.assert_close(grid.sigmas, torch.tensor([[0.9, 0.5], [0.5, 0.0]]))
    with pytest.raises((ValueError, TypeError)):
        Grid(torch.tensor([9, 4, 2]), grid.alphas, grid.sigmas)
