"""Rejection sampling against its closed forms: what is accepted, in which law, and what is said."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from craftune.acceptance import AcceptConfig, Accepted, accept, log_kappa_of_distinct
from craftune.explain import explain
from craftune.select_config import SelectConfig
from craftune.selection import NothingSelected, Selection, Status, select

GROUPS, M = 2000, 6
CHI_SQUARE_9 = 27.9  # the 0.999 quantile of 9 degrees of freedom


def drawn(seed: int = 0, groups: int = GROUPS, m: int = M) -> tuple[np.ndarray, np.ndarray]:
    """Rewards uniform on [0, 1], so that F(r) = r, and their groups."""
    rewards = np.random.default_rng(seed).random(groups * m)
    return rewards, np.repeat(np.arange(groups), m)


def run(config: AcceptConfig, rewards: np.ndarray, groups: np.ndarray, **more: object) -> Accepted:
    return accept(config, rewards, groups, np.random.default_rng(1), **more)  # type: ignore[arg-type]


def top_k(k: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda r: sum(  # type: ignore[return-value]
        math.comb(M - 1, j) * (1 - r) ** j * r ** (M - 1 - j) for j in range(k)
    )


LAWS: dict[str, tuple[AcceptConfig, Callable[[np.ndarray], np.ndarray]]] = {
    "tilt": (AcceptConfig("tilt", alpha=0.4, ceiling=1.0), lambda r: np.exp((r - 1) / 0.4)),
    "threshold": (AcceptConfig("threshold", tau=0.35), lambda r: (r >= 0.35).astype(float)),
    "best-of": (AcceptConfig("best-of"), lambda r: r ** (M - 1)),
    "best-of 3": (AcceptConfig("best-of", m=3), lambda r: r**2),
    "top-k": (AcceptConfig("top-k", k=3), top_k(3)),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_accepted_law_is_the_closed_form(name: str) -> None:
    """Chi-square over ten bins: accepted ones are dealt as p * kappa, with p uniform."""
    config, kappa = LAWS[name]
    rewards, groups = drawn()
    taken = rewards[run(config, rewards, groups).taken]
    fine = (np.arange(10_000) + 0.5) / 10_000
    share = kappa(fine).reshape(10, -1).sum(1)
    share /= share.sum()
    found = np.histogram(taken, 10, (0, 1))[0]
    assert found[share == 0].sum() == 0
    want = len(taken) * share[share > 0]
    assert (np.square(found[share > 0] - want) / want).sum() < CHI_SQUARE_9


@pytest.mark.parametrize("name", LAWS)
def test_the_acceptance_rate_is_the_mean_of_kappa(name: str) -> None:
    config, kappa = LAWS[name]
    rewards, groups = drawn(seed=2)
    rate = run(config, rewards, groups).taken.mean()
    want = kappa((np.arange(10_000) + 0.5) / 10_000).mean()
    assert abs(rate - want) < 4 * math.sqrt(want * (1 - want) / len(rewards))


@pytest.mark.parametrize("name", LAWS)
def test_the_reported_log_kappa_is_the_closed_form(name: str) -> None:
    """Estimated in one large group, where the empirical F is close to F."""
    config, kappa = LAWS[name]
    rewards, groups = drawn(groups=1, m=20_000)
    if config.rule in ("best-of", "top-k"):
        config = AcceptConfig(config.rule, m=config.m or M, k=config.k)
    found = run(config, rewards, groups).log_kappa
    sure = kappa(rewards) > 0.02
    np.testing.assert_allclose(np.exp(found[sure]), kappa(rewards)[sure], atol=0.015)
    assert (found[kappa(rewards) == 0] == -np.inf).all()


def test_a_binary_reward_accepts_what_has_it() -> None:
    found = run(AcceptConfig("binary"), np.array([1.0, 0.0, 1.0]), np.zeros(3, int))
    assert found.taken.tolist() == [True, False, True]
    assert found.log_kappa.tolist() == [0, -np.inf, 0]


def test_distinct_keeps_one_per_key_and_prompt() -> None:
    rewards = np.array([1.0, 1, 1, 0, 1, 1, 1])
    groups = np.array([0, 0, 0, 0, 1, 1, 1])
    keys = np.array([7, 7, 8, 9, 7, 7, 7])
    found = run(AcceptConfig("distinct", key="m:f"), rewards, groups, key=keys)
    taken = sorted(zip(groups[found.taken].tolist(), keys[found.taken].tolist(), strict=True))
    assert taken == [(0, 7), (0, 8), (1, 7)]
    want = [0.5, 0.5, 1, 0, 1 / 3, 1 / 3, 1 / 3]
    np.testing.assert_allclose(np.exp(found.log_kappa), want)


def test_distinct_gives_rare_keys_the_closed_form_s_bonus() -> None:
    """Share of a key among the accepted: p kappa = 1 - (1 - p)^M, up to a constant."""
    shares = np.array([0.6, 0.3, 0.08, 0.02])
    keys = np.random.default_rng(0).choice(4, GROUPS * M, p=shares)
    groups = np.repeat(np.arange(GROUPS), M)
    found = run(AcceptConfig("distinct", key="m:f"), np.ones(len(keys)), groups, key=keys)
    counts = np.bincount(keys[found.taken], minlength=4)
    chance = 1 - (1 - shares) ** M  # that a prompt has the key at all
    assert (np.abs(counts - GROUPS * chance) < 4 * np.sqrt(GROUPS * chance * (1 - chance))).all()
    np.testing.assert_allclose(
        log_kappa_of_distinct(shares, M), np.log(chance / (M * shares)), rtol=1e-12
    )
    mean = [np.exp(found.log_kappa[keys == key]).mean() for key in range(4)]
    np.testing.assert_allclose(mean, chance / (M * shares), rtol=0.03)


def test_every_copy_has_the_same_chance() -> None:
    keys, groups = np.zeros(4 * 2000, int), np.repeat(np.arange(2000), 4)
    found = run(AcceptConfig("distinct", key="m:f"), np.ones(8000), groups, key=keys)
    places = np.bincount(np.flatnonzero(found.taken) % 4, minlength=4)
    assert (np.abs(places - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)).all()


@pytest.mark.parametrize("rule", ["best-of", "top-k"])
def test_only_the_order_of_rewards_counts(rule: str) -> None:
    rewards, groups = drawn(groups=50)
    config = AcceptConfig(rule, k=2)  # type: ignore[arg-type]
    plain, mapped = run(config, rewards, groups), run(config, np.exp(3 * rewards) - 7, groups)
    assert (plain.taken == mapped.taken).all()
    np.testing.assert_array_equal(plain.log_kappa, mapped.log_kappa)


def test_ties_are_broken_at_random() -> None:
    groups = np.repeat(np.arange(2000), 4)
    found = run(AcceptConfig("best-of"), np.ones(8000), groups)
    places = np.bincount(np.flatnonzero(found.taken) % 4, minlength=4)
    assert places.sum() == 2000
    assert (np.abs(places - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)).all()
    assert np.ptp(found.log_kappa) == 0  # what chance decides earns no reward
    assert found.effective_size == pytest.approx(8000)


def test_ranks_are_of_one_prompt_alone() -> None:
    rewards = np.array([1.0, 9.0, 2.0, 8.0])
    found = run(AcceptConfig("best-of"), rewards, np.array([0, 1, 0, 1]))
    assert found.taken.tolist() == [False, True, True, False]


def test_blocks_of_m_and_a_rest_left_out() -> None:
    rewards = np.array([1.0, 2.0, 5.0, 4.0, 9.0])
    found = run(AcceptConfig("best-of", m=2), rewards, np.zeros(5, int))
    assert found.taken.tolist() == [False, True, True, False, False]


def test_the_effective_size_by_hand() -> None:
    """kappa 1 and 1/2: 1.5^2 / 1.25 = 1.8; two of four alike: 2; groups add up."""
    tilt = AcceptConfig("tilt", alpha=1.0)
    rewards = np.array([0.0, -math.log(2)])
    assert run(tilt, rewards, np.zeros(2, int)).effective_size == pytest.approx(1.8)
    twice = run(tilt, np.tile(rewards, 2), np.array([0, 0, 1, 1]))
    assert twice.effective_size == pytest.approx(3.6)
    half = run(AcceptConfig("threshold", tau=2.0), np.arange(4.0), np.zeros(4, int))
    assert half.effective_size == pytest.approx(2)
    assert half.divergence == pytest.approx(math.log(2))
    none = run(AcceptConfig("threshold", tau=9.0), np.arange(4.0), np.zeros(4, int))
    assert (none.effective_size, none.divergence) == (0, 0)


def test_the_divergence_of_best_of_m_is_the_classical_one() -> None:
    rewards, groups = drawn(groups=1, m=20_000)
    found = run(AcceptConfig("best-of", m=4), rewards, groups)
    assert found.divergence == pytest.approx(math.log(4) - 3 / 4, abs=1e-3)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (AcceptConfig("tilt", ceiling=0.5), "ceiling must be >= 0.9"),
        (AcceptConfig("binary"), "needs rewards of 0 or 1, got 0.9"),
        (AcceptConfig("best-of", m=3), "no prompt has 3 candidates"),
    ],
)
def test_what_does_not_fit_is_refused(config: AcceptConfig, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        run(
            config,
            np.array([0.9, 1.0]) if config.rule == "binary" else np.array([0.9, 0.1]),
            np.zeros(2, int),
        )


@pytest.mark.parametrize(
    "settings",
    [{"rule": "top-k", "m": 2, "k": 3}, {"rule": "distinct"}, {"alpha": 0}, {"rule": "best"}],
)
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValidationError):
        AcceptConfig(**settings)


# --- within the selection of a pool ------------------------------------------------------------


def selected(rule: str, scores: np.ndarray, keys: np.ndarray | None = None, **more: object):
    config = SelectConfig(
        filter="none",
        weights={"r": 1.0},
        scale="fixed",
        fixed={"r": (0.0, 1.0)},
        accept=AcceptConfig(rule, **more),  # type: ignore[arg-type]
    )
    return config, select(config, ["r"], scores[None].astype(np.float32), keys=keys)


def test_the_plain_prompt_s_image_is_a_candidate_like_any_other() -> None:
    _, found = selected("best-of", np.array([[3.0, 1, 2], [1, 2, 3]]))
    assert found.selected.tolist() == [[True, False, False], [False, False, True]]
    assert adds_up(found)
    assert found.funnel["selected"] == 2
    assert found.funnel["not_accepted"] == 4
    assert np.isfinite(found.advantage).all()


def adds_up(found: Selection) -> bool:
    parts = sum(found.funnel[status.name.lower()] for status in list(Status)[1:])
    return parts == found.funnel["candidates"] and set(found.accept) == {
        "effective_size",
        "divergence",
    }


def test_keys_reach_the_rule() -> None:
    scores = np.array([[1.0, 1, 0], [0, 1, 1]])
    _, found = selected("distinct", scores, np.array([[5, 5, 6], [5, 6, 7]]), key="m:f")
    assert found.selected.sum(axis=1).tolist() == [1, 2]


def test_what_is_not_finite_drops_its_group() -> None:
    _, found = selected("best-of", np.array([[3.0, np.nan, 2], [1, 2, 3]]))
    assert found.funnel["dropped_nan"] == 3
    assert found.selected.sum() == 1
    assert adds_up(found)


def test_nothing_accepted_is_said() -> None:
    with pytest.raises(NothingSelected, match="accepts none of 6 images; their rewards reach 3"):
        selected("threshold", np.array([[3.0, 1, 2], [1, 2, 3]]), tau=4.0)


def test_the_reason_names_rule_and_log_kappa() -> None:
    config, found = selected("best-of", np.array([[3.0, 1, 2], [1, 2, 3]]))
    text = explain(found, config, 0)
    assert "selected: rank 1 of 6 by composite, log kappa -0.365, among the 2 accepted" in text


def test_a_filter_beside_it_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"select.filter must be 'none' where select.accept"):
        SelectConfig(accept=AcceptConfig("best-of"))


def test_without_it_nothing_of_it_shows() -> None:
    scores = np.random.default_rng(0).random((1, 5, 4))
    found = select(SelectConfig(filter="none", weights={"r": 1.0}), ["r"], scores)
    assert found.accept == {}
    assert np.isnan(found.log_kappa).all()
    assert found.funnel["not_accepted"] == 0
