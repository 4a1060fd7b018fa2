"""The levers on the noise levels: min-SNR weights and timestep bias, both off by default."""

from typing import Any

import pytest
import torch
from toy import cosine_schedule, toy, toy_examples

from craftune.diffusion import Schedule
from craftune.errors import UserError
from craftune.methods import CRAFT, SFT, build
from craftune.methods.denoising import NoiseLevels, predict, squared_error
from craftune.seeds import stream

T = torch.arange(100)
TARGETS = ("epsilon", "v", "velocity")


def snr(schedule: Schedule) -> torch.Tensor:
    return (schedule.alphas / schedule.sigmas).double().square()


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_paper_s_for_epsilon_and_v(gamma: float) -> None:
    """Section 3.4: min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1)."""
    levels = NoiseLevels(snr_gamma=gamma)
    for target, wanted in (
        ("epsilon", lambda ratio: ratio.clamp(max=gamma) / ratio),
        ("v", lambda ratio: ratio.clamp(max=gamma) / (ratio + 1)),
    ):
        schedule = cosine_schedule(target)  # type: ignore[arg-type]
        found = levels.weight(schedule, T)
        torch.testing.assert_close(found, wanted(snr(schedule)).float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_min_snr_counts_the_error_in_x_0_whatever_is_predicted(target: str) -> None:
    """weight * |prediction - y|^2 = min(SNR, gamma) * |x_0 hat - x_0|^2."""
    policy, batch = toy(target), toy_examples(50)  # type: ignore[arg-type]
    schedule, levels = policy.schedule, NoiseLevels(snr_gamma=5.0)
    draws = levels.draw(schedule, batch, stream(0))
    prediction, y = predict(policy, batch, draws)
    x_t = schedule.add_noise(batch.latents, draws.noise, draws.t)
    x_0, _ = schedule.split(prediction, x_t, draws.t)
    found = levels.weight(schedule, draws.t) * squared_error(prediction, y)
    ratio = snr(schedule)[draws.t].clamp(max=5.0).float()
    torch.testing.assert_close(found, ratio * squared_error(x_0, batch.latents), rtol=1e-3, atol=0)


def test_no_signal_and_no_noise_are_finite() -> None:
    """Zero terminal SNR under v counts nothing, as in the paper's formula."""
    schedule = Schedule(torch.tensor([1.0, 0.6, 0.0]), torch.tensor([0.0, 0.8, 1.0]), "v")
    found = NoiseLevels(snr_gamma=5.0).weight(schedule, torch.arange(3))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.36, 0.0]))


def test_off_is_the_paper_s_loss_to_the_bit() -> None:
    assert NoiseLevels().weight(cosine_schedule(), T).eq(1).all()
    rng, same = stream(0), stream(0)
    drawn = NoiseLevels().draw(cosine_schedule(), toy_examples(9), rng)
    assert torch.equal(drawn.t, cosine_schedule().random_timesteps(9, same))
    assert torch.equal(drawn.noise, torch.randn(9, 2, generator=same))


@pytest.mark.parametrize("kind", [SFT, CRAFT])
@pytest.mark.parametrize("negatives", ["drop", "keep", "anchor"])
def test_both_methods_weigh_each_example_by_its_own_level(kind: Any, negatives: str) -> None:
    settings: dict[str, Any] = {"negatives": negatives} if kind is CRAFT else {}
    plain, weighted = kind(**settings), kind(**settings, noise=NoiseLevels(snr_gamma=2.0))
    policy, reference = toy(), toy(seed=3)
    batch = toy_examples(6, weight=torch.tensor([1.0, 0.5, 2.0, 1.5, 0.7, 0.2]))
    draws = plain.draw(policy.schedule, batch, stream(1))
    losses = [
        plain.loss(policy, reference, batch.rows(rows), draws.rows(rows))[0]
        for rows in (slice(i, i + 1) for i in range(6))
    ]
    counts = weighted.noise.weight(policy.schedule, draws.t)
    assert counts.unique().numel() > 2
    found, metrics = weighted.loss(policy, reference, batch, draws)
    torch.testing.assert_close(found, (counts * torch.stack(losses)).mean())
    assert metrics["error"] == plain.loss(policy, reference, batch, draws)[1]["error"]


# --- which timesteps -------------------------------------------------------------------------


def shares(levels: NoiseLevels, schedule: Schedule, n: int = 40_000) -> torch.Tensor:
    t = levels.timesteps(schedule, n, stream("t"))
    assert t.shape == (n,)
    return torch.bincount(t, minlength=len(schedule)).float() / n


@pytest.mark.parametrize(
    ("settings", "inside"),
    [
        ({"timestep_bias": "earlier"}, slice(0, 25)),
        ({"timestep_bias": "later"}, slice(75, 100)),
        ({"timestep_bias": "later", "portion": 0.4}, slice(60, 100)),
        ({"timestep_bias": "range", "begin": 20, "end": 50}, slice(20, 50)),
        ({"timestep_bias": "range", "begin": 90}, slice(90, 100)),
    ],
    ids=str,
)
@pytest.mark.parametrize("multiplier", [3.0, 0.25])
def test_the_bias_is_on_its_timesteps(settings: Any, inside: slice, multiplier: float) -> None:
    """The share of k of 100 timesteps at m times is m k / (m k + 100 - k); deviation 0.0025."""
    found = shares(NoiseLevels(**settings, multiplier=multiplier), cosine_schedule())
    many = len(range(*inside.indices(100))) * multiplier
    rest = 100 - len(range(*inside.indices(100)))
    assert found[inside].sum().item() == pytest.approx(many / (many + rest), abs=0.0125)
    assert found.min() > 0


def test_the_range_has_its_beginning_and_not_its_end() -> None:
    levels = NoiseLevels(timestep_bias="range", begin=20, end=50)
    assert levels._bias(torch.tensor([19, 20, 49, 50]), 100).tolist() == [1, 2, 2, 1]


def test_the_bias_multiplies_the_family_s_own_law() -> None:
    plain = cosine_schedule("velocity")
    schedule = Schedule(plain.alphas, plain.sigmas, "velocity", law="logit-normal")
    law = shares(NoiseLevels(), schedule)
    found = shares(NoiseLevels(timestep_bias="later", multiplier=3.0), schedule)
    wanted = law * torch.where(T < 75, 1.0, 3.0)
    torch.testing.assert_close(found, wanted / wanted.sum(), atol=0.006, rtol=0)


def test_the_draws_are_the_generator_s() -> None:
    levels = NoiseLevels(timestep_bias="earlier", multiplier=5.0)
    one, same, other = (levels.timesteps(cosine_schedule(), 50, stream(i)) for i in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "craft"])
def test_a_recipe_sets_them_for_every_method(name: str) -> None:
    found = build(name, {"noise": {"snr_gamma": 5.0, "timestep_bias": "later"}})
    assert isinstance(found, CRAFT | SFT)
    assert found.noise == NoiseLevels(snr_gamma=5.0, timestep_bias="later")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"snr_gama": 5.0}, r"method.settings.noise.snr_gama: .*did you mean 'snr_gamma'"),
        ({"timestep_bias": "late"}, r"method.settings.noise.timestep_bias: .*got 'late'"),
        ({"multiplier": 0}, r"method.settings.noise.multiplier: .*greater than 0"),
        ({"begin": 5, "end": 5}, r"method.settings.noise: .*begin must be below end, got 5 and 5"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build("sft", {"noise": settings})
