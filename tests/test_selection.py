"""Selection against a reference in plain Python loops, by hand, and by its invariants.

Mistakes planted in the module, 55; each makes a test here fail:
a win at >=; rewards joined by or; any image per reward, not the same one; images filtered, not
groups; image_level ignored; j = 0 can be a winner; j = 0 eligible; sample deviation; epsilon
forgotten; advantage over 0..N always; advantage over 1..N always; mean over N though images are
missing; groups with NaN kept; infinite scores kept; NaN of an absent image drops the group;
groups without baseline kept; statistics over dropped groups too; statistics without baselines;
variance E[x^2] - E[x]^2; MAD without its factor; min-max without min; rank scale counts ties to
one side; weights by position; weights ignored; role letters ignored; gain against the group's
mean; rank_by ignored; lowest ranks first; unstable ties; rank from 0; cap after k; cap one too
many; cap off; cap not under random; low takes the top; all stops at k; k one short; random from
before the filter; random without seed; seed ignored; k counts groups; k divided by N + 1; groups
by their worst image; whole groups with their baseline; placebo does nothing; placebo among all
images; placebo draws new numbers; float32 inside; a block of groups skipped; keeps counts images;
constant rewards pass; scores changed in place; cut by k reported as cut by cap; dropped groups
miscounted; explain shows another candidate's wins.
"""

import math
import re
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from craftune.explain import explain, reason
from craftune.select_config import FILTERS, SelectConfig, filter_keys
from craftune.selection import NothingSelected, Status, _check_pool, select

HPA = ("h", "p", "a")
EXACT = {"h": (1.0, 2.0), "p": (0.0, 4.0), "a": (-2.0, 0.5)}
"""Powers of two: with scores and weights on a binary grid all sums are exact, and so are ties."""
WEIGHTS = {"a": 0.25, "p": 0.25, "h": 0.5}


# The reference: one image at a time, written from the paper, sharing nothing with the module.


@dataclass
class Reference:
    composite: dict = field(default_factory=dict)
    gain: dict = field(default_factory=dict)
    advantage: dict = field(default_factory=dict)
    passes: set = field(default_factory=set)
    order: list = field(default_factory=list)
    selected: set = field(default_factory=set)
    ends: dict = field(default_factory=dict)


def reference(config, names, scores, present):
    letters = filter_keys(config.filter)
    required = [names.index(config.roles.get(x, x)) for x in letters]
    groups, columns = present.shape
    ref, table = Reference(), {}
    for i in range(groups):
        cells = [j for j in range(columns) if present[i][j]]
        row = {j: [float(scores[r][i][j]) for r in range(len(names))] for j in cells}
        if 0 not in cells:
            ref.ends |= {(i, j): "dropped_no_baseline" for j in cells}
        elif not all(math.isfinite(v) for j in cells for v in row[j]):
            ref.ends |= {(i, j): "dropped_nan" for j in cells}
        else:
            table[i] = row
    scaled = {}
    for key, weight in config.weights.items():
        r = names.index(config.roles.get(key, key))
        pool = [row[j][r] for row in table.values() for j in row]
        for i, row in table.items():
            own = [row[j][r] for j in row]
            for j in row:
                scaled[i, j, r] = weight * to_scale(config, key, row[j][r], pool, own)
    for i, row in table.items():
        for j in row:
            parts = [scaled[i, j, r] for r in range(len(names)) if (i, j, r) in scaled]
            ref.composite[i, j] = sum(parts)
        counted = [j for j in row if j > 0 or config.advantage_over == "all"]
        values = [ref.composite[i, j] for j in counted]
        for j in row:
            ref.gain[i, j] = ref.composite[i, j] - ref.composite[i, 0]
        for j in counted:
            mean = sum(values) / len(values)
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
            ref.advantage[i, j] = (ref.composite[i, j] - mean) / (std + config.epsilon)
        winners = [j for j in row if j > 0 and all(row[j][r] > row[0][r] for r in required)]
        for j in row:
            ref.ends[i, j] = "baseline" if j == 0 else "removed_by_filter"
            if j > 0 and winners:
                out = config.image_level and j not in winners
                ref.ends[i, j] = "not_a_winner" if out else "cut_by_k"
        if winners:
            ref.passes.add(i)
    value = getattr(ref, config.rank_by)
    eligible = [cell for cell, end in sorted(ref.ends.items()) if end == "cut_by_k"]
    ref.order = sorted(eligible, key=lambda cell: -value[cell])
    take(config, ref, columns - 1)
    return ref


def to_scale(config, key, x, pool, own):
    low, high, middle = min(pool), max(pool), median(pool)
    return {
        "zscore": lambda: (x - fmean(pool)) / pstdev(pool),
        "minmax": lambda: (x - low) / (high - low),
        "mad": lambda: (x - middle) / (1.4826 * median(abs(v - middle) for v in pool)),
        "fixed": lambda: (x - config.fixed[key][0]) / config.fixed[key][1],
        "group": lambda: (x - fmean(own)) / (pstdev(own) + config.epsilon),
        "rank": lambda: (sum(v < x for v in pool) + sum(v == x for v in pool) / 2) / len(pool),
    }[config.scale]()


def take(config, ref, variants):
    queue = list(reversed(ref.order)) if config.strategy == "low" else list(ref.order)
    k = len(queue) if config.strategy == "all" else config.k
    if config.mode == "group":
        best = list(dict.fromkeys(i for i, _ in ref.order))
        best = list(reversed(best)) if config.strategy == "low" else best
        chosen = best if config.strategy == "all" else best[: k // variants]
        ref.selected = {cell for cell in queue if cell[0] in chosen}
    else:
        seen = {}
        for cell in queue:
            seen[cell[0]] = seen.get(cell[0], 0) + 1
            if config.per_prompt_cap and seen[cell[0]] > config.per_prompt_cap:
                ref.ends[cell] = "cut_by_cap"
            elif len(ref.selected) < k:
                ref.selected.add(cell)
    ref.ends |= dict.fromkeys(ref.selected, "selected")


def cells(mask):
    return {(int(i), int(j)) for i, j in np.argwhere(mask)}


GRID = st.integers(-4, 4).map(lambda x: x / 2)


@st.composite
def pools(draw, values=GRID, holes=True):
    groups, columns = draw(st.integers(1, 7)), draw(st.integers(2, 5))
    count = 3 * groups * columns
    flat = draw(st.lists(values, min_size=count, max_size=count))
    scores = np.array(flat, np.float64).reshape(3, groups, columns)
    present = np.ones((groups, columns), bool)
    if holes:
        size = groups * columns
        gone = draw(st.lists(st.integers(0, size - 1), max_size=4))
        present.ravel()[gone] = False
        scores[:, ~present] = draw(st.sampled_from([0.0, 99.0, math.nan, math.inf]))
        bad = draw(st.lists(st.integers(0, count - 1), max_size=2))
        scores.ravel()[bad] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return scores, present


def options(**fixed):
    """Keyword arguments of SelectConfig (beartype draws random numbers, strategies may not)."""
    choices = {
        "filter": st.sampled_from([*FILTERS, "none", ("a", "h")]),
        "image_level": st.booleans(),
        "advantage_over": st.sampled_from(["refined", "all"]),
        "strategy": st.sampled_from(["top", "low", "all", "random"]),
        "mode": st.sampled_from(["image", "group"]),
        "rank_by": st.sampled_from(["composite", "gain", "advantage"]),
        "k": st.integers(4, 9),
        "per_prompt_cap": st.integers(0, 4),
        "epsilon": st.sampled_from([1e-6, 0.5]),
        "seed": st.integers(0, 3),
        "scale": st.just("fixed"),
        "fixed": st.just(EXACT),
        "weights": st.just(WEIGHTS),
    }
    given_ones = {key: st.just(value) for key, value in fixed.items()}
    return st.fixed_dictionaries({**choices, **given_ones})


def selected_or_skip(config, pool):
    """`select`; skips the pools from which it rightly takes nothing."""
    scores, present = pool
    sound = present[:, 0] & (np.isfinite(scores).all(axis=0) | ~present).all(axis=1)
    used = scores[:, sound][:, present[sound]]
    assume(used.size and (np.ptp(used, axis=1) > 0).all())
    if not reference(config, HPA, scores, present).order:
        with pytest.raises(NothingSelected):
            select(config, HPA, scores, present)
        assume(False)
    return select(config, HPA, scores, present)


@settings(max_examples=400, deadline=None)
@given(options=options(), pool=pools())
def test_equals_the_brute_force_reference(options, pool):
    config = SelectConfig(**options)
    scores, present = pool
    before = scores.copy()
    found, ref = selected_or_skip(config, pool), reference(config, HPA, scores, present)
    assert np.array_equal(scores, before, equal_nan=True)
    for name in ("composite", "gain", "advantage"):
        values, expected = getattr(found, name), getattr(ref, name)
        assert cells(np.isfinite(values)) == set(expected)
        for cell, value in expected.items():
            assert values[cell] == pytest.approx(value, rel=1e-12, abs=1e-12), (name, cell)
    assert set(np.flatnonzero(found.passes)) == ref.passes
    assert cells(found.eligible) == set(ref.order)
    assert [found.rank[cell] for cell in ref.order] == list(range(1, len(ref.order) + 1))
    assert (found.rank[~found.eligible] == -1).all()
    if config.strategy != "random":
        assert cells(found.selected) == ref.selected
        ends = {c: Status(found.status[c]).name.lower() for c in cells(present)}
        assert ends == ref.ends


@settings(max_examples=150, deadline=None)
@given(
    scale=st.sampled_from(["zscore", "minmax", "mad", "group", "rank"]),
    pool=pools(values=st.floats(-3, 3, width=32)),
    roles=st.permutations(HPA),
)
def test_every_scale_equals_its_textbook_formula(scale, pool, roles):
    names = ("x", "y", "z")
    config = SelectConfig(
        roles=dict(zip(roles, names, strict=True)), filter="none", scale=scale, weights=WEIGHTS
    )
    try:
        found = select(config, names, *pool)
        ref = reference(config, names, *pool)
    except (ValueError, ZeroDivisionError) as error:
        assume(re.search("variance|spread|no group|keeps none", str(error)))
        assume(False)
        raise
    spreads = [spread for _, spread in found.scales.values()]
    assume(not spreads or min(spreads) > 1e-3)
    for cell, value in ref.composite.items():
        assert found.composite[cell] == pytest.approx(value, rel=1e-6, abs=1e-6)
    assert set(found.scales) == (set() if scale in ("group", "rank") else set(names))


@settings(max_examples=150, deadline=None)
@given(options=options(), pool=pools())
def test_the_funnel_adds_up(options, pool):
    config = SelectConfig(**options)
    found = selected_or_skip(config, pool)
    funnel = found.funnel
    ends = [status.name.lower() for status in Status if status is not Status.ABSENT]
    assert funnel["candidates"] == pool[1].sum() == sum(funnel[end] for end in ends)
    assert funnel["selected"] == found.selected.sum()
    assert funnel["eligible"] == found.eligible.sum() >= funnel["selected"] > 0
    kinds = ("dropped_no_baseline", "dropped_nan", "removed_by_filter", "kept")
    assert funnel["groups"] == len(pool[1]) == sum(funnel[f"groups_{kind}"] for kind in kinds)
    assert funnel["groups_kept"] == found.passes.sum() == list(found.keeps.values())[-1]
    sound = funnel["groups_kept"] + funnel["groups_removed_by_filter"]
    assert funnel["baseline"] == sound >= max(found.keeps.values())


@settings(max_examples=150, deadline=None)
@given(options=options(strategy="random"), pool=pools())
def test_random_draws_the_right_number_from_the_filtered(options, pool):
    config = SelectConfig(**options)
    found = selected_or_skip(config, pool)
    per_group, taken = found.eligible.sum(axis=1), found.selected.sum(axis=1)
    if config.mode == "group":
        whole = (taken == per_group) | (taken == 0)
        count = min((per_group > 0).sum(), config.k // (pool[1].shape[1] - 1))
        assert whole.all()
        assert (taken > 0).sum() == count
        return
    capped = np.minimum(per_group, config.per_prompt_cap or 99)
    assert (taken <= capped).all()
    assert taken.sum() == min(config.k, capped.sum())


@settings(max_examples=100, deadline=None)
@given(options=options(), pool=pools())
def test_the_filter_ignores_strictly_increasing_maps_per_reward(options, pool):
    config = SelectConfig(**options)
    found = selected_or_skip(config, pool)
    scores, present = pool
    mapped = np.stack([np.exp(scores[0]), scores[1] ** 3 + 7, np.arctan(scores[2])])
    mapped[~np.isfinite(scores)] = np.nan
    other = select(config, HPA, mapped, present)
    assert (other.passes == found.passes).all()
    assert (other.wins == found.wins).all()
    assert (other.eligible == found.eligible).all()
    assert other.keeps == found.keeps


@settings(max_examples=100, deadline=None)
@given(pool=pools())
def test_the_filters_nest(pool):
    kept = {}
    for name in FILTERS:
        config = SelectConfig(filter=name, scale="fixed", fixed=EXACT)
        try:
            kept[name] = set(np.flatnonzero(select(config, HPA, *pool).passes))
        except NothingSelected:
            kept[name] = set()
        except ValueError:  # a constant reward
            assume(False)
    assert kept["I_hpa"] <= kept["I_ha"] <= kept["I_h"] & kept["I_a"]
    assert kept["I_hpa"] <= kept["I_pa"] <= kept["I_p"] & kept["I_a"]
    assert kept["I_hpa"] <= kept["I_hp"] <= kept["I_h"] & kept["I_p"]


@settings(max_examples=100, deadline=None)
@given(options=options(filter="none"), pool=pools(values=st.floats(-1e3, 1e3, width=32)))
def test_advantages_sum_to_zero_and_are_bounded(options, pool):
    config = SelectConfig(**options)
    found = selected_or_skip(config, pool)
    size = np.isfinite(found.advantage).sum(axis=1)
    total = np.nansum(found.advantage, axis=1)
    assert np.allclose(total, 0, atol=1e-6)
    biggest = np.nan_to_num(np.abs(found.advantage)).max(axis=1)
    assert (biggest <= np.sqrt(np.maximum(size - 1, 0)) + 1e-6).all()


# By hand.


def one(scores, *, names=("r",), present=None, **changes):
    """Select with fixed scales that change nothing (center 0, spread 1) and weight 1."""
    settled = {
        "filter": "none",
        "weights": dict.fromkeys(names, 1.0),
        "scale": "fixed",
        "fixed": dict.fromkeys(names, (0.0, 1.0)),
        "per_prompt_cap": 0,
    }
    config = SelectConfig(**{**settled, **changes})
    return select(config, names, np.array(scores, np.float64), present), config


def test_advantage_worked_out_by_hand():
    refined, _ = one([[[0, 1, 2, 3]]])
    # mean 2, population std sqrt(2/3) = 0.8165 (a sample std would give +-1)
    root = math.sqrt(1.5)
    assert refined.advantage[0, 1:] == pytest.approx([-root, 0, root], abs=1e-5)
    assert math.isnan(refined.advantage[0, 0])
    every, _ = one([[[0, 1, 2, 3]]], advantage_over="all")
    # mean 1.5, std sqrt(5)/2 = 1.1180
    assert every.advantage[0] == pytest.approx([-1.34164, -0.44721, 0.44721, 1.34164], abs=1e-5)
    damped, _ = one([[[0, 1, 3]]], epsilon=1.0)
    assert damped.advantage[0, 1:] == pytest.approx([-0.5, 0.5])


def test_equal_images_have_advantage_zero_also_in_float32():
    # three equal float32 numbers have a mean that may differ in the last bit; 1e-7 / epsilon = 0.1
    scores = np.repeat(normal_pool(500, dtype=np.float32)[..., :1], 4, axis=2)
    found = select(SelectConfig(filter="none"), HPA, scores)
    assert np.abs(found.advantage[:, 1:]).max() < 1e-6
    assert found.advantage.dtype == np.float32


def test_zscore_worked_out_by_hand_and_without_the_dropped_group():
    scores = [[[1, 3], [5, 7], [math.nan, 1000], [999, 5]]]
    present = np.array([[1, 1], [1, 1], [1, 1], [0, 1]], bool)
    found, _ = one(scores, scale="zscore", present=present)
    # 1 3 5 7: mean 4, population variance (9 + 1 + 1 + 9) / 4 = 5
    assert found.scales == {"r": (4.0, pytest.approx(math.sqrt(5)))}
    assert found.composite[0] == pytest.approx([-1.341641, -0.447214], abs=1e-6)
    assert np.isnan(found.composite[2:]).all()
    assert found.funnel["dropped_nan"] == 2
    assert found.funnel["dropped_no_baseline"] == 1


def test_zscore_does_not_cancel_far_from_zero():
    small = np.random.default_rng(0).standard_normal((1, 1000, 5))
    near, _ = one(small, scale="zscore")
    far, _ = one(small + 1e8, scale="zscore")
    assert far.scales["r"][1] == pytest.approx(near.scales["r"][1], rel=1e-6)


def test_the_same_image_must_win_every_reward():
    # image 1 wins h only, image 2 wins a only: in I_h and in I_a, not in I_ha
    scores = [[[1, 2, 0], [1, 2, 0]], [[1, 0, 2], [1, 2, 0]]]
    found, _ = one(scores, names=("h", "a"), filter="I_ha")
    assert found.passes.tolist() == [False, True]
    assert found.keeps == {"h": 2, "a": 2, "h+a": 1}
    assert cells(found.selected) == {(1, 1), (1, 2)}
    strict, _ = one(scores, names=("h", "a"), filter="I_ha", image_level=True)
    assert cells(strict.selected) == {(1, 1)}
    assert strict.funnel["not_a_winner"] == 1


def test_an_equal_score_is_no_win():
    found, _ = one([[[1, 1, 1], [1, 1, 2]]], filter=("r",))
    assert found.passes.tolist() == [False, True]


def test_the_baseline_is_never_taken_even_if_it_is_the_best():
    for changes in ({}, {"mode": "group", "k": 2}, {"advantage_over": "all"}):
        found, _ = one([[[9, 1, 2]]], **changes)
        assert cells(found.selected) == {(0, 1), (0, 2)}
        assert found.rank.tolist() == [[-1, 2, 1]]


def test_a_baseline_alone_is_no_group():
    found, _ = one([[[1, 2], [3, 4]]], present=np.array([[1, 0], [1, 1]], bool))
    assert found.passes.tolist() == [False, True]
    assert found.funnel["groups_kept"] == found.keeps["none"] == 1


def test_the_cap_is_applied_before_k():
    scores = [[[0, 9, 8, 7], [0, 3, 2, 1], [0, 5, 6, 4]]]
    assert cells(one(scores, k=2)[0].selected) == {(0, 1), (0, 2)}
    capped, _ = one(scores, k=2, per_prompt_cap=1)
    assert cells(capped.selected) == {(0, 1), (2, 2)}
    assert capped.funnel["cut_by_cap"] == 6
    assert capped.funnel["cut_by_k"] == 1
    low, _ = one(scores, k=2, per_prompt_cap=1, strategy="low")
    assert cells(low.selected) == {(1, 3), (2, 3)}
    every, _ = one(scores, k=2, per_prompt_cap=2, strategy="all")
    assert cells(every.selected) == {(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)}


def test_ties_go_to_the_earlier_group_and_column():
    found, _ = one([[[0, 1, 1], [0, 1, 2], [0, 1, 1]]], k=3)
    assert found.rank[:, 1:].tolist() == [[2, 3], [4, 1], [5, 6]]
    assert cells(found.selected) == {(1, 2), (0, 1), (0, 2)}


def test_rank_by_gain_and_by_advantage_prefer_other_prompts():
    scores = [[[9, 10, 9], [0, 4, 0], [4, 6, 5.9]]]
    tops = {by: cells(one(scores, k=1, rank_by=by)[0].selected) for by in ("composite", "gain")}
    assert tops == {"composite": {(0, 1)}, "gain": {(1, 1)}}
    sharp, _ = one([[[9, 10, 9, 9], [0, 4, 0, 4]]], k=1, rank_by="advantage")
    assert cells(sharp.selected) == {(0, 1)}


def test_whole_groups_keep_their_losers_and_their_negative_advantages():
    scores = [[[0, 1, 8], [0, 5, 5.5], [0, 9, -9]]]
    found, _ = one(scores, mode="group", k=5, filter=("r",), per_prompt_cap=1)
    # 5 // 2 = 2 groups, those with the best images: 9 and 8
    assert cells(found.selected) == {(0, 1), (0, 2), (2, 1), (2, 2)}
    assert found.advantage[2, 2] == pytest.approx(-1)
    low, _ = one(scores, mode="group", k=2, strategy="low")
    assert cells(low.selected) == {(1, 1), (1, 2)}


def test_fewer_eligible_than_k_is_no_error():
    found, _ = one([[[0, 1, 2], [0, 3, 4]]], k=100)
    assert found.funnel["selected"] == found.funnel["eligible"] == 4


def normal_pool(groups, dtype: type = np.float64):
    return np.random.default_rng(0).standard_normal((3, groups, 5)).astype(dtype)


def test_random_depends_on_the_seed_alone_and_reaches_everyone():
    scores = normal_pool(40)
    picks = [
        cells(select(SelectConfig(strategy="random", k=5, seed=s), HPA, scores).selected)
        for s in range(60)
    ]
    again = select(SelectConfig(strategy="random", k=5, seed=0), HPA, scores)
    assert cells(again.selected) == picks[0] != picks[1]
    assert set().union(*picks) >= {cell for cell in cells(again.eligible) if cell[0] < 3}


def test_placebo_shuffles_only_the_selected_advantages():
    scores = normal_pool(400)
    plain = select(SelectConfig(), HPA, scores)
    placebo = select(SelectConfig(placebo=True), HPA, scores)
    assert (plain.status == placebo.status).all()
    chosen = plain.selected
    assert np.array_equal(plain.advantage[~chosen], placebo.advantage[~chosen], equal_nan=True)
    assert sorted(plain.advantage[chosen]) == sorted(placebo.advantage[chosen])
    assert (plain.advantage[chosen] != placebo.advantage[chosen]).mean() > 0.9


def test_the_order_of_rewards_does_not_matter():
    scores = normal_pool(200)
    found = select(SelectConfig(), HPA, scores)
    other = select(SelectConfig(), ("a", "h", "p"), scores[[2, 0, 1]])
    assert (found.status == other.status).all()
    assert np.allclose(found.composite, other.composite)
    renamed = SelectConfig(
        roles={"h": "hps", "p": "pick", "a": "aes"}, weights={"aes": 0.2, "pick": 0.4, "h": 0.4}
    )
    assert (select(renamed, ("hps", "pick", "aes"), scores).status == found.status).all()


def test_a_reward_outside_filter_and_weights_changes_nothing():
    scores = normal_pool(200)
    held_out = np.concatenate([scores, np.full((1, 200, 5), 3.0)])
    found = select(SelectConfig(), (*HPA, "imagereward"), held_out)
    assert (found.status == select(SelectConfig(), HPA, scores).status).all()
    assert found.wins.shape == (4, 200, 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pools_of_many_blocks_equal_the_formulas_on_the_whole(dtype):
    scores = normal_pool(20_000, dtype=dtype)
    scores[1, 9000, 3] = np.nan
    found = select(SelectConfig(k=500), HPA, scores)
    sound = np.delete(scores.astype(np.float64), 9000, axis=1)
    z = (sound - sound.mean(axis=(1, 2), keepdims=True)) / sound.std(axis=(1, 2), keepdims=True)
    composite = np.tensordot([0.4, 0.4, 0.2], z, 1)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    assert np.allclose(np.delete(found.composite, 9000, axis=0), composite, atol=tolerance)
    refined = composite[:, 1:]
    expected = (refined - refined.mean(1, keepdims=True)) / (refined.std(1, keepdims=True) + 1e-6)
    assert np.allclose(np.delete(found.advantage, 9000, 0)[:, 1:], expected, atol=10 * tolerance)
    passes = np.any(np.all(sound[:, :, 1:] > sound[:, :, :1], axis=0), axis=1)
    assert (np.delete(found.passes, 9000) == passes).all()
    best = np.sort(refined.max(axis=1)[passes])[-500:]
    assert np.allclose(np.sort(found.composite[found.selected]), best, atol=tolerance)
    assert found.selected.sum(axis=1).max() == 1


# What goes wrong, and what is said then.


def test_nothing_selected_names_each_part_and_what_to_relax():
    scores = [[[1, 2, 0], [1, 2, 0], [1, 0, 0]], [[1, 0, 2], [1, 0, 0], [1, 2, 0]]]
    with pytest.raises(NothingSelected, match=r"keeps none of 3 groups.*h 2, a 2, h\+a 0") as error:
        one(scores, names=("h", "a"), filter="I_ha")
    assert "relax it to ['h'] (2 groups)" in str(error.value)
    with pytest.raises(NothingSelected, match="no group has a baseline"):
        one([[[math.nan, 1], [2, math.nan]]])


def test_a_constant_reward_is_an_error_that_says_so():
    scores = normal_pool(10)
    scores[1] = 0.5
    scores[1, 3, 2] = np.nan  # a dropped group does not count as variance
    only_h = SelectConfig(weights={"h": 1.0})
    for config in (SelectConfig(), only_h, SelectConfig(scale="rank", filter="none")):
        with pytest.raises(ValueError, match=r"'p' has zero variance over the pool .*0\.5"):
            select(config, HPA, scores)
    select(SelectConfig(filter="I_ha", weights={"h": 1.0, "a": 1.0, "p": 0.0}), HPA, scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": "I_hx"}, "select.filter: no reward 'x', there are h, p, a"),
        ({"filter": ("hh",)}, "select.filter: no reward 'hh'.*did you mean 'h'"),
        ({"roles": {"h": "hps"}}, r"select.filter: no reward 'hps' \(role 'h'\)"),
        ({"weights": {"q": 1.0}}, "select.weights: no reward 'q'"),
        ({"roles": {"x": "h"}, "weights": {"x": 1.0, "h": 1.0}}, "select.weights names .* twice"),
        ({"scale": "fixed", "fixed": {"h": (0, 1)}}, "select.fixed must give .* of 'p'"),
        ({"mode": "group", "k": 3}, "select.k must hold one whole group of 4 images, got 3"),
    ],
)
def test_errors_name_the_key_when_the_pool_is_known(changes, message):
    with pytest.raises(ValueError, match=message):
        select(SelectConfig(**changes), HPA, normal_pool(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": "I_"}, "select.filter must be"),
        ({"filter": "ihpa"}, "select.filter must be .*did you mean 'I_hpa'"),
        ({"k": 0}, "select.k must be >= 1, got 0"),
        ({"per_prompt_cap": -1}, "select.per_prompt_cap must be >= 0, got -1"),
        ({"seed": -1}, "select.seed must be >= 0"),
        ({"epsilon": 0.0}, "select.epsilon must be > 0"),
        ({"weights": {"h": -1.0}}, "select.weights must be >= 0"),
        ({"weights": {"h": 0.0}}, "select.weights must be >= 0 and not all 0"),
        ({"weights": {"h": math.nan}}, "select.weights must be >= 0"),
        ({"fixed": {"h": (0.0, 0.0)}}, "select.fixed.h: spread must be > 0"),
        ({"strategy": "best"}, "strategy"),
        ({"topk": 5}, "topk"),
    ],
)
def test_errors_name_the_key_when_the_recipe_is_read(changes, message):
    with pytest.raises(ValidationError, match=message):
        SelectConfig(**changes)


def test_mad_of_a_mostly_constant_reward_is_an_error():
    scores = np.zeros((1, 10, 3))
    scores[0, 0, 1] = 5
    with pytest.raises(ValueError, match=r"select\.scale 'mad': most scores of reward 'r'"):
        one(scores, scale="mad")


@pytest.mark.parametrize(
    ("names", "shape", "present", "message"),
    [
        (HPA, (3, 4), None, "scores must be"),
        (HPA, (3, 4, 1), None, "scores must be"),
        (HPA, (2, 4, 3), None, "names must be 2 different rewards"),
        (("h", "h", "a"), (3, 4, 3), None, "names must be 3 different rewards"),
        (HPA, (3, 4, 3), (4, 2), "present must be"),
    ],
)
def test_shapes_that_disagree_are_errors(names, shape, present, message):
    # not through `select`: in tests jaxtyping objects first
    mask = None if present is None else np.ones(present, bool)
    with pytest.raises(ValueError, match=message):
        _check_pool(names, np.zeros(shape), mask)


def test_scores_of_other_types_are_errors():
    with pytest.raises(ValueError, match="got int64"):
        _check_pool(HPA, np.zeros((3, 4, 3), np.int64), None)


def test_the_filters_and_the_config_are_documented():
    assert list(FILTERS)[:6] == ["I_h", "I_p", "I_a", "I_ha", "I_pa", "I_hpa"]
    assert all(filter_keys(name) == keys for name, keys in FILTERS.items())
    fields = TypeAdapter(SelectConfig).json_schema()["properties"]
    assert all(len(entry.get("description", "")) > 20 for entry in fields.values())
    assert fields["weights"].get("default", SelectConfig().weights) == {
        "h": 0.4,
        "p": 0.4,
        "a": 0.2,
    }
    read = TypeAdapter(SelectConfig).validate_python({"filter": ["h", "a"], "fixed": {"h": [0, 1]}})
    assert read.filter == ("h", "a")


# Explaining.


def test_explain_tells_each_candidate_its_one_reason():
    nan = math.nan
    scores = [
        [[1, 5, 4, 0], [1, 2, 3, 9], [1, 0, 0, 0], [nan, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 5, 4, 0], [1, 2, 3, 0], [1, 2, 0, 0], [0.0, 1, 1, 1], [1, 1, 1, 1]],
    ]
    present = np.ones((5, 4), bool)
    present[0, 3] = present[4, 0] = False
    found, config = one(
        scores,
        names=("h", "a"),
        present=present,
        filter="I_ha",
        image_level=True,
        k=1,
        per_prompt_cap=1,
    )

    def told(group, column):
        return reason(found, config, group, column)

    assert told(0, 1).startswith("selected: rank 1 of 4 by composite, among the top 1")
    assert told(0, 2).startswith(
        "not selected: rank 2 of 4 by composite, behind others of its prompt"
    )
    assert "per_prompt_cap 1" in told(0, 2)
    assert told(0, 0).startswith("never selected")
    assert told(0, 3).startswith("not there")
    assert told(1, 2).startswith("not selected: rank 3 of 4 by composite, not among the top 1")
    assert "image_level" in told(1, 3)
    assert told(2, 1) == "not selected: filter I_ha removed its group"
    assert "NaN" in told(3, 1)
    assert "no baseline" in told(4, 2)


def test_explain_shows_scores_beside_the_baseline():
    scores = [[[0.25, 0.5, 0.125], [0, 1, 2]], [[3, 4, 5], [0, 1, 2]]]
    found, config = one(scores, names=("h", "long-reward-name"), filter=("h", "long-reward-name"))
    lines = explain(found, config, 0, 1).splitlines()
    assert "kept" in lines[0]
    assert "winners of 2: h 1, long-reward-name 2, h+long-reward-name 1" in lines[0]
    assert lines[1].split()[:6] == ["j", "h", "long-reward-name", "composite", "gain", "advantage"]
    assert lines[2].split() == ["0", "0.25", "3", "+3.2500", "+0.0000", "-"]
    assert lines[3].split() == ["1", ">", "0.5", ">", "4", "+4.5000", "+1.2500", "-1.0000"]
    assert lines[4].split()[:2] == ["1", "selected:"]
    whole = explain(found, config, 0).splitlines()
    assert [line.split()[0] for line in whole[2:]] == ["0", "1", "2"] * 2
    assert whole[4].split()[1:4] == ["0.125", ">", "5"]
    with pytest.raises(ValueError, match=r"no candidate \(2, None\) in a pool of 2 x 3"):
        explain(found, config, 2)
    with pytest.raises(ValueError, match="no candidate"):
        explain(found, config, 0, 3)


def test_a_reward_that_tells_only_prompts_apart_is_refused_by_group_scale():
    """Its z-score within each group is 0: it would be in the weights and say nothing."""
    scores = np.random.default_rng(0).normal(size=(2, 6, 4))
    scores[1] = np.arange(6)[:, None]
    options = {"filter": ("h",), "weights": {"h": 0.5, "p": 0.5}}
    with pytest.raises(ValueError, match=r"'p' has zero variance within every group, .*'group'"):
        select(SelectConfig(**options, scale="group"), ("h", "p"), scores)
    assert select(SelectConfig(**options), ("h", "p"), scores).scales["p"][1] > 0
    scores[1, 5, 3] += 1
    assert select(SelectConfig(**options, scale="group"), ("h", "p"), scores).funnel["groups"] == 6
    hole = np.ones((6, 4), bool)
    hole[5, 3] = False
    with pytest.raises(ValueError, match="within every group"):
        select(SelectConfig(**options, scale="group"), ("h", "p"), scores, hole)
