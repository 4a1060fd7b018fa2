"""Selection: which candidates become training examples, and with which advantage.

Sun et al., "CRAFT: Aligning Diffusion Models with Fine-Tuning Is Easier Than You Think", CVPR 2026,
arXiv:2603.18991. Eq. 4 is `wins`, `joint` and `FILTERS`; r_total (sections 3.3, 4.1) is the
composite; Algorithm 1, step 3 is `advantages`; Table 5 is `SelectConfig.strategy`.

A pool is one dense array `scores[rewards, groups, columns]`, columns = 1 + N: column 0 is the plain
prompt's image, the baseline, never selected; columns 1..N are its refined variants. All scores are
against the original prompt (Eq. 3). Where a group has fewer images, `present` says so.

With `SelectConfig.accept`, GRAFT's rejection sampling (see `acceptance`) takes the place of filter
and k: every image competes by its composite, the plain prompt's too.

Groups are worked on in blocks and in float64, whatever the scores' dtype: temporaries stay small,
and a group of equal images gets advantage 0, not rounding noise divided by epsilon.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from craftune.acceptance import Accepted, accept
from craftune.scales import (
    Block,
    Map,
    Mask,
    advantages,
    blocks,
    require_variance,
    require_variance_within,
    spread,
    to_scale,
)
from craftune.select_config import SelectConfig, by_row, filter_rows, joined, sub_filters

Scores: TypeAlias = Float[np.ndarray, "rewards groups columns"]


class NothingSelected(ValueError):  # noqa: N818  as StopIteration: an outcome
    """No candidate passes the filter; the message says what each part of the filter would keep."""


class Status(IntEnum):
    """What became of a cell of the pool; a candidate (all but ABSENT) ends in exactly one."""

    ABSENT = 0
    DROPPED_NO_BASELINE = 1
    DROPPED_NAN = 2
    BASELINE = 3
    REMOVED_BY_FILTER = 4
    NOT_A_WINNER = 5
    CUT_BY_CAP = 6
    CUT_BY_K = 7
    NOT_ACCEPTED = 8
    SELECTED = 9


@dataclass(frozen=True)
class Selection:
    """What `select` found. Arrays are [groups, columns]; numbers keep the scores' dtype."""

    names: tuple[str, ...]
    scores: Scores
    """As given, not copied."""
    composite: Block
    """R, the weighted sum of scaled scores; NaN for absent images and in dropped groups."""
    gain: Block
    """R minus the baseline's R."""
    advantage: Block
    """Signed, of all images before selection; NaN for the baseline unless it is counted."""
    wins: Bool[np.ndarray, "rewards groups columns"]
    """Score > the baseline's, for each reward; False for the baseline itself."""
    passes: Bool[np.ndarray, " groups"]
    """The filter's verdict on the group."""
    rank: Int[np.ndarray, "groups columns"]
    """1 = highest by `rank_by` among the eligible; among equals the earlier (group, column) is
    higher; -1 where not eligible."""
    status: UInt8[np.ndarray, "groups columns"]
    """A `Status` per cell."""
    funnel: dict[str, int]
    """"candidates", which is the sum over the `Status` names in lower case; "eligible"; "groups",
    which is the sum over the other "groups_..."."""
    keeps: dict[str, int]
    """Groups kept by each reward of the filter alone, by the filter without one of its rewards, and
    by the filter; keys are names joined by "+"."""
    scales: dict[str, tuple[float, float]]
    """Reward -> (center, spread), to be stored with the run; empty for scales group and rank."""
    log_kappa: Block
    """The reshaped reward under `SelectConfig.accept`; NaN without it and in dropped groups."""
    accept: dict[str, float] = field(default_factory=dict)
    """"effective_size" and "divergence" of the accepted law; empty where none is."""

    @property
    def eligible(self) -> Mask:
        """Passed the filter: what the strategy chose from."""
        return self.status >= Status.CUT_BY_CAP.value

    @property
    def selected(self) -> Mask:
        """The training set."""
        return self.status == Status.SELECTED.value


def select(
    config: SelectConfig,
    names: Sequence[str],
    scores: Scores,
    present: Mask | None = None,
    keys: Int[np.ndarray, "groups columns"] | None = None,
) -> Selection:
    """Filter the pool, rank what is left and take the training set from it.

    Args:
        config: the recipe's [select] section.
        names: of the rewards, one per `scores[i]`; one that is in neither filter nor weights is
            only carried along for `explain`.
        scores: higher is better, any unit, float32 or float64. A NaN or infinite score of a present
            image drops its whole group, as a missing baseline does; both are counted.
        present: which images exist; None = all of them.
        keys: equal for duplicates, where `accept.rule` is "distinct".

    Raises:
        NothingSelected: no candidate passes the filter, or none is accepted.
        ValueError: a name in the config is no reward; a used reward is constant over the pool; `k`
            holds no whole group; shapes disagree.

    Source: sections 3.2-3.3. The paper is silent on the scale, the deviation (population), whether
        Eq. 4 keeps groups or images (groups), images per prompt (one) and NaN (group dropped).
    """
    names, present = tuple(names), _check_pool(names, scores, present)
    accepting = config.accept.rule != "off"
    if accepting:  # where the plain prompt's image is a candidate like any other
        config = replace(config, advantage_over="all", mode="image")
    variants = scores.shape[2] - 1
    if config.mode == "group" and config.k < variants:
        raise ValueError(f"select.k must hold one whole group of {variants} images, got {config.k}")
    rows = filter_rows(config, names)
    weights = {r: w for r, w in by_row(config, names, "weights", config.weights).items() if w}

    status = _screen(scores, present)
    usable = status >= Status.BASELINE.value
    if not usable.any():
        raise NothingSelected(
            "select: no group has a baseline and finite scores for all its images"
        )
    for row in {*rows, *weights}:
        require_variance(names[row], scores[row], usable)
    for row in weights if config.scale == "group" else ():
        require_variance_within(names[row], scores[row], usable)
    scales = _statistics(config, names, scores, usable, weights)
    maps = {
        row: to_scale(config.scale, scores[row], usable, scales.get(names[row]), config.epsilon)
        for row in weights
    }

    found = Selection(
        names=names,
        scores=scores,
        composite=np.empty_like(scores[0]),
        gain=np.empty_like(scores[0]),
        advantage=np.empty_like(scores[0]),
        wins=np.empty(scores.shape, bool),
        passes=np.empty(len(status), bool),
        rank=np.full(status.shape, -1, np.int32),
        status=status,
        funnel={},
        keeps={joined(names, part): 0 for part in sub_filters(rows)},
        scales=scales,
        log_kappa=np.full_like(scores[0], np.nan),
    )
    for part in blocks(len(status), 8192):
        _judge(config, found, part, rows, [(weights[row], row, maps[row]) for row in weights])
    if accepting:
        found.status[usable] = Status.NOT_ACCEPTED
    if not found.eligible.any():
        raise NothingSelected(_nothing(config, found))
    _rank(config, found)
    if accepting:
        _accept(config, found, keys)
    else:
        _take(config, found)
    if config.placebo:
        rng = np.random.default_rng([config.seed, 1])
        found.advantage[found.selected] = rng.permutation(found.advantage[found.selected])
    found.funnel.update(_funnel(found))
    return found


def wins(scores: Scores, usable: Mask) -> Bool[np.ndarray, "rewards groups columns"]:
    """Where a usable image scores higher (>) than its group's baseline (Eq. 4)."""
    return (scores > scores[..., :1]) & usable


def joint(won: Sequence[Mask], usable: Mask) -> Mask:
    """Refined images that win on each of these rewards (Eq. 4's product); all of them for none."""
    every = usable.copy(order="K")
    for win in won:
        every &= win
    every[:, 0] = False
    return every


def _judge(
    config: SelectConfig,
    found: Selection,
    part: slice,
    rows: Sequence[int],
    terms: Sequence[tuple[float, int, Map]],
) -> None:
    """Fill in a block of groups, all but the rank; the eligible are CUT_BY_K until `_take`."""
    status = _by_column(found.status[part])
    usable = status >= Status.BASELINE.value
    x = np.where(usable, _by_column(found.scores[:, part].astype(np.float64)), np.nan)

    weighted = (weight * to_scale(x[row], usable) for weight, row, to_scale in terms)
    composite: Block = np.where(usable, sum(weighted, start=np.zeros_like(x[0])), np.nan)
    counted = usable.copy(order="K")
    counted[:, 0] &= config.advantage_over == "all"
    found.composite[part] = composite
    found.gain[part] = composite - composite[:, :1]
    found.advantage[part] = advantages(composite, counted, config.epsilon)

    won = wins(x, usable)
    winner = joint([won[row] for row in rows], usable)
    passes = np.any(winner, axis=-1)
    kept = (status == Status.REMOVED_BY_FILTER.value) & passes[:, None]
    status[kept] = Status.CUT_BY_K
    if config.image_level:
        status[kept & ~winner] = Status.NOT_A_WINNER
    found.wins[:, part], found.passes[part], found.status[part] = won, passes, status
    for name, rewards in zip(found.keeps, sub_filters(rows), strict=True):
        best = joint([won[row] for row in rewards], usable).any(axis=-1)
        found.keeps[name] += int(best.sum())


def _rank(config: SelectConfig, found: Selection) -> None:
    values = {"composite": found.composite, "gain": found.gain, "advantage": found.advantage}
    eligible = found.eligible
    order = np.argsort(-values[config.rank_by][eligible], kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(1, len(order) + 1, dtype=np.int32)
    found.rank[eligible] = rank


def _take(config: SelectConfig, found: Selection) -> None:
    """Give the eligible their final status: cap first, then the strategy's k.

    Whatever the strategy, lower turns are taken first: a turn is a rank, a negative rank or a
    lottery number. Turns are distinct, so the partitions below meet no ties.
    """
    eligible, last = found.eligible, np.int32(np.iinfo(np.int32).max)
    if config.mode == "group":
        best = np.where(eligible, found.rank, last).min(axis=1)
        groups = np.flatnonzero(best < last)
        count = config.k // (eligible.shape[1] - 1)
        taken = groups[_first(config, _turns(config, best[groups]), count)]
        found.status[taken] = np.where(eligible[taken], Status.SELECTED, found.status[taken])
        return
    turn = np.full(eligible.shape, last)
    turn[eligible] = _turns(config, found.rank[eligible])
    if 0 < config.per_prompt_cap < eligible.shape[1]:
        limit = np.partition(turn, config.per_prompt_cap - 1, axis=1)[:, config.per_prompt_cap - 1]
        within = turn <= limit[:, None]
        found.status[eligible & ~within] = Status.CUT_BY_CAP
        eligible &= within
    cells = np.flatnonzero(eligible)
    taken = cells[_first(config, turn.ravel()[cells], config.k)]
    found.status.ravel()[taken] = Status.SELECTED


def _accept(
    config: SelectConfig, found: Selection, keys: Int[np.ndarray, "groups columns"] | None
) -> None:
    """GRAFT: every eligible image is a draw of its prompt, its composite the reward."""
    cells = np.nonzero(found.eligible)
    outcome: Accepted = accept(
        config.accept,
        found.composite[cells].astype(np.float64),
        cells[0],
        np.random.default_rng([config.seed, 2]),
        None if keys is None else keys[cells],
    )
    if not outcome.taken.any():
        raise NothingSelected(
            f"select.accept.rule {config.accept.rule!r} accepts none of {len(outcome.taken)} "
            f"images; their rewards reach {found.composite[cells].max():.4g}"
        )
    found.log_kappa[cells] = outcome.log_kappa
    found.status[tuple(axis[outcome.taken] for axis in cells)] = Status.SELECTED
    found.accept.update(effective_size=outcome.effective_size, divergence=outcome.divergence)


def _turns(config: SelectConfig, rank: np.ndarray) -> np.ndarray:
    if config.strategy == "random":
        return np.random.default_rng([config.seed, 0]).permutation(len(rank)).astype(np.int32)
    return -rank if config.strategy == "low" else rank


def _first(config: SelectConfig, turn: np.ndarray, count: int) -> np.ndarray:
    if config.strategy == "all" or count >= len(turn):
        return np.arange(len(turn))
    return np.argpartition(turn, count - 1)[:count]


def _funnel(found: Selection) -> dict[str, int]:
    cells = np.bincount(found.status.ravel(), minlength=len(Status))
    groups = np.bincount(found.status.max(axis=1), minlength=len(Status))
    return {
        "groups": int(groups.sum()),
        "groups_dropped_no_baseline": int(groups[: Status.DROPPED_NAN].sum()),
        "groups_dropped_nan": int(groups[Status.DROPPED_NAN]),
        "groups_removed_by_filter": int(groups[Status.BASELINE : Status.NOT_A_WINNER].sum()),
        "groups_kept": int(groups[Status.NOT_A_WINNER :].sum()),
        "candidates": int(cells[Status.ABSENT + 1 :].sum()),
        **{status.name.lower(): int(cells[status]) for status in list(Status)[1:]},
        "eligible": int(cells[Status.CUT_BY_CAP :].sum()),
    }


def _statistics(
    config: SelectConfig,
    names: Sequence[str],
    scores: Scores,
    usable: Mask,
    weights: Mapping[int, float],
) -> dict[str, tuple[float, float]]:
    """Center and spread of each weighted reward; nothing for the scales that have none."""
    if config.scale in ("group", "rank"):
        return {}
    if config.scale != "fixed":
        return {names[r]: spread(config.scale, names[r], scores[r], usable) for r in weights}
    fixed = by_row(config, names, "fixed", config.fixed)
    for row in weights:
        if row not in fixed:
            raise ValueError(f"select.fixed must give (center, spread) of {names[row]!r}, got none")
    return {names[row]: fixed[row] for row in weights}


def _screen(scores: Scores, present: Mask) -> UInt8[np.ndarray, "groups columns"]:
    """First status: refined images of sound groups are REMOVED_BY_FILTER until `_judge`."""
    status = np.empty(present.shape, np.uint8)
    for part in blocks(len(present), 8192):
        here = _by_column(present[part])
        unknown = ~np.isfinite(_by_column(scores[:, part])).all(axis=0)
        block = np.full_like(here, Status.REMOVED_BY_FILTER, np.uint8)
        block[:, 0] = Status.BASELINE
        block[(here & unknown).any(axis=-1)] = Status.DROPPED_NAN
        block[~here[:, 0]] = Status.DROPPED_NO_BASELINE
        block[~here] = Status.ABSENT
        status[part] = block
    return status


def _check_pool(names: Sequence[str], scores: np.ndarray, present: np.ndarray | None) -> Mask:
    if scores.ndim != 3 or scores.shape[2] < 2 or scores.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"scores must be float32 or float64 [rewards, groups, 1 + N], N >= 1, "
            f"got {scores.dtype} {scores.shape}"
        )
    if len(set(names)) != len(names) or len(names) != len(scores):
        raise ValueError(f"names must be {len(scores)} different rewards, got {list(names)}")
    if present is not None and present.shape != scores.shape[1:]:
        raise ValueError(f"present must be {scores.shape[1:]} like the scores, got {present.shape}")
    return np.broadcast_to(np.True_, scores.shape[1:]) if present is None else present


def _by_column(block: np.ndarray) -> np.ndarray:
    """A copy with the same axes whose columns are contiguous: inner loops then run over groups."""
    return np.swapaxes(np.swapaxes(block, -1, -2).copy(), -1, -2)


def _nothing(config: SelectConfig, found: Selection) -> str:
    """Why no candidate passed the filter, and what would."""
    keeps = ", ".join(f"{name} {count}" for name, count in found.keeps.items())
    name, count = max(
        found.keeps.items(), key=lambda item: (item[1] > 0, item[0].count("+"), item[1])
    )
    advice = f"relax it to {name.split('+')} ({count} groups)" if count else "check the rewards"
    return (
        f"select.filter {config.filter!r} keeps none of {(found.status == Status.BASELINE).sum()} "
        f"groups (its parts would keep: {keeps}); {advice}, or make more variants per prompt"
    )
