"""Intervals that hold what they promise, and numbers worked out by hand."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craftune import statistics
from craftune.statistics import Comparison, bootstrap, compare, compare_by_category, prompt_means


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(seed: int, prompts: int = 20, images: int = 3) -> tuple[np.ndarray, ...]:
    """Scores that share most of their luck within a prompt; the true difference is 0.2."""
    r = rng(seed)
    prompt = np.repeat(np.arange(prompts), images)
    base = r.normal(size=prompts)[prompt] + 0.3 * r.normal(size=len(prompt))
    tuned = base + 0.2 + r.normal(size=prompts)[prompt] + 0.3 * r.normal(size=len(prompt))
    return base, tuned, prompt


def bounds(found: Comparison) -> list[float]:
    parts = [found.difference, found.win_rate]
    return [found.base, found.tuned, *(x for p in parts for x in (p.mean, p.low, p.high))]


def test_a_case_worked_out_by_hand() -> None:
    # Prompt 0 has two pairs, +1 and 0, prompt 1 has one, -4. The prompt is the unit, not the image:
    # base (0.5 + 6) / 2, tuned (1 + 2) / 2, wins (0.75 + 0) / 2 with the tie as a half.
    base, tuned = np.array([0.0, 1.0, 6.0]), np.array([1.0, 1.0, 2.0])
    found = compare(base, tuned, np.array([0, 0, 1]), rng(), 1000)
    assert (found.base, found.tuned) == (3.25, 1.5)
    assert found.difference.mean == -1.75
    assert found.win_rate.mean == 0.375
    # Two prompts can be drawn as 00, 01, 10 or 11: the interval ends at the two prompts' means.
    assert (found.difference.low, found.difference.high) == (-4.0, 0.5)
    assert found.effect is not None
    assert found.effect.mean == pytest.approx(-1.75 / base.std())
    assert found.relative is not None
    assert found.relative.mean == pytest.approx(1.5 / 3.25 - 1)
    assert found.difference.n == 2


@given(st.integers(0, 10_000))
def test_swapping_the_models_mirrors_everything(seed: int) -> None:
    base, tuned, prompt = drawn(seed)
    tuned[::4] = base[::4]  # some ties
    there = compare(base, tuned, prompt, rng(), 200)
    back = compare(tuned, base, prompt, rng(), 200)
    assert back.difference.mean == pytest.approx(-there.difference.mean)
    assert back.difference.low == pytest.approx(-there.difference.high)
    assert back.win_rate.mean == pytest.approx(1 - there.win_rate.mean)
    assert back.win_rate.high == pytest.approx(1 - there.win_rate.low)


def test_equal_models_differ_by_nothing_and_win_half() -> None:
    base, _, prompt = drawn(1)
    found = compare(base, base.copy(), prompt, rng(), 500)
    assert bounds(found)[2:] == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    assert not found.difference.is_up
    assert not found.difference.is_down


@given(st.integers(0, 10_000))
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    base, tuned, prompt = drawn(seed)
    order = rng(seed).permutation(len(base))
    moved = compare(base[order], tuned[order], prompt[order], rng(), 100)
    assert bounds(moved) == pytest.approx(bounds(compare(base, tuned, prompt, rng(), 100)))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    found = [
        compare(base, tuned, prompt, rng(seed), 400).difference
        for seed in range(400)
        for base, tuned, prompt in [drawn(seed, 50)]
    ]
    covered = np.mean([e.low <= 0.2 <= e.high for e in found])
    assert 0.915 <= covered <= 0.975  # 0.95 within three standard errors
    assert np.mean([e.is_up for e in found]) < 0.5  # 0.2 is little beside a spread of 1


def test_images_of_one_prompt_are_not_independent() -> None:
    """Taking each image for a prompt of its own would promise far too much."""
    base, tuned, prompt = drawn(3, prompts=40, images=8)
    honest = compare(base, tuned, prompt, rng(), 500).difference
    naive = compare(base, tuned, np.arange(len(base)), rng(), 500).difference
    assert honest.high - honest.low > 2 * (naive.high - naive.low)


def test_the_interval_is_the_normal_one_where_that_holds() -> None:
    values = rng(2).normal(size=(400, 1))
    draws = bootstrap(values, rng(), 5000)
    assert draws.mean() == pytest.approx(values.mean(), abs=3e-3)
    assert draws.std() == pytest.approx(values.std() / math.sqrt(400), rel=0.05)
    found = statistics.estimate(float(values.mean()), draws[:, 0], 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * draws.std(), rel=0.05)


def test_columns_are_resampled_together() -> None:
    first = rng(4).normal(size=30)
    draws = bootstrap(np.stack([first, 2 * first], 1), rng(), 50)
    np.testing.assert_allclose(draws[:, 1], 2 * draws[:, 0])


def test_the_memory_limit_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = rng(5).normal(size=(30, 2))
    whole = bootstrap(columns, rng(), 101)
    monkeypatch.setattr(statistics, "CHUNK", 100)
    np.testing.assert_allclose(bootstrap(columns, rng(), 101), whole)


def test_one_prompt_has_no_interval() -> None:
    found = compare(np.array([1.0, 2.0]), np.array([2.0, 4.0]), np.array([0, 0]), rng(), 50)
    assert found.difference.mean == 1.5
    assert math.isnan(found.difference.low)
    assert not found.difference.is_up


def test_relative_change_needs_a_base_clearly_above_zero() -> None:
    base, tuned, prompt = drawn(6, prompts=100)
    assert compare(base, tuned, prompt, rng(), 200).relative is None
    found = compare(base + 10, tuned + 10, prompt, rng(), 500).relative
    assert found is not None
    assert found.mean == pytest.approx((tuned.mean() - base.mean()) / (base.mean() + 10))
    assert found.low < found.mean < found.high


def test_a_constant_base_has_no_effect_size() -> None:
    _, tuned, prompt = drawn(7)
    assert compare(np.zeros_like(tuned), tuned, prompt, rng(), 50).effect is None


def test_prompt_means_weigh_images_within_their_prompt() -> None:
    means = prompt_means(np.array([1.0, 5.0, 3.0]), np.array([1, 0, 1]))
    assert means.tolist() == [5.0, 2.0]


def test_a_category_is_what_it_would_be_alone() -> None:
    base, tuned, prompt = drawn(8)
    labels = ["even" if p % 2 == 0 else "odd" for p in prompt]
    found = compare_by_category(base, tuned, prompt, labels, seed=3, resamples=100)
    odd = prompt % 2 == 1
    alone = compare(base[odd], tuned[odd], (prompt[odd] - 1) // 2, rng(3), 100)
    assert list(found) == ["even", "odd"]
    assert bounds(found["odd"]) == bounds(alone)


def test_the_composite_by_hand() -> None:
    scores = {"h": np.array([0.3, 0.1]), "a": np.array([5.0, 7.0]), "x": np.array([1.0, 1.0])}
    weights, scales = {"h": 0.5, "a": 2.0, "x": 9.0}, {"h": (0.2, 0.1), "a": (5.0, 4.0)}
    total = statistics.composite(scores, weights, scales | {"x": (1.0, 0.0)})
    np.testing.assert_allclose(total, [0.5 * 1 + 0, 0.5 * -1 + 2 * 0.5])


def test_diversity_is_the_mean_distance_over_pairs() -> None:
    black, white = np.zeros(12), np.ones(12)
    pixels = np.stack([black, white, black, black, white, black])
    prompt = np.array([1, 0, 1, 0, 0, 1])
    # Prompt 0: white, black, white -> (1 + 0 + 1) / 3; prompt 1: three times black.
    np.testing.assert_allclose(statistics.diversity(pixels, prompt), [2 / 3, 0])
    same = statistics.diversity(np.stack([white, white]), np.array([0, 0]))
    assert same.tolist() == [0.0]


def test_the_ratio_resamples_both_models_together() -> None:
    base = 1 + rng(9).random(50)
    found = statistics.ratio(0.9 * base, base, rng(), 200)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))
    assert statistics.ratio(base, np.zeros(50), rng(), 20) is None


def test_ten_thousand_resamples_of_a_thousand_prompts_are_fast() -> None:
    base, tuned, prompt = drawn(0, prompts=1000, images=4)
    start = time.process_time()
    compare(base, tuned, prompt, rng())
    assert time.process_time() - start < 1.5
