"""Generalised rejection sampling: which candidates are accepted, and which law that samples.

Anil et al., "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv:2510.02692
(GRAFT). Of candidates drawn from p(.|c), candidate i is accepted with a probability that does not
decrease in its reward r_i or in its rank. The accepted ones have the law p(x) * kappa(x) / Z with
kappa(x) = E[acceptance | x], and that is what maximises E[log kappa] - KL(. || p): training on them
optimises the reshaped reward log kappa under a KL penalty that is never computed.

Nothing here knows images: a candidate is its reward, its group (the prompt) and a key that
duplicates share; what its state is, is the caller's. Per rule, with F the reward's distribution
function in the group and M candidates per block:

    rule         accepted with probability          log kappa
    tilt         exp((r - ceiling) / alpha)         (r - ceiling) / alpha
    threshold    1[r >= tau]                        log 1[r >= tau]
    best-of      1[the best of M]                   (M - 1) log F
    top-k        1[among the k best of M]           log sum_{j<k} C(M-1, j) (1-F)^j F^(M-1-j)
    binary       r, which is 0 or 1                 log r
    distinct     r / number of its copies           log r + log E[1 / copies]
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

Rewards: TypeAlias = Float[np.ndarray, " n"]
Labels: TypeAlias = Int[np.ndarray, " n"]
Verdict: TypeAlias = Bool[np.ndarray, " n"]

FINITE = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@checked_dataclass(frozen=True, config=FINITE)
class AcceptConfig:
    """The [select.accept] table of a recipe: GRAFT's rejection sampling instead of filter and k."""

    rule: Literal["off", "tilt", "threshold", "best-of", "top-k", "binary", "distinct"] = "off"
    """How candidates of a prompt are accepted by their composite reward: with probability
    exp((R - ceiling) / alpha) (tilt), from tau on (threshold), the best or the k best of every m
    (best-of, top-k), those of reward 1 (binary), and of these one per key (distinct). "off"
    selects by filter, strategy and k."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """For "tilt": temperature in the reward's unit; smaller accepts fewer and moves further."""
    ceiling: float | None = None
    """For "tilt": a number that no reward exceeds. Left out, the pool's highest is taken, which
    accepts most, but makes the accepted law depend a little on the pool."""
    tau: float = 0.0
    """For "threshold": the lowest reward that is accepted."""
    m: Annotated[int, Field(ge=0)] = 0
    """For "best-of" and "top-k": candidates of a prompt that compete, in their order in the pool;
    0 lets all of a prompt's compete. A last block of fewer is left out."""
    k: Annotated[int, Field(ge=1)] = 1
    """For "top-k": accepted of every m."""
    key: str = ""
    """For "distinct": "package.module:function", (images, prompts) -> one text or number per
    image, equal for images that count as copies of each other."""

    def __post_init__(self) -> None:
        if self.rule == "top-k" and 0 < self.m < self.k:
            raise ValueError(f"select.accept.k must be <= m = {self.m}, got {self.k}")
        if self.rule == "distinct" and not self.key:
            raise ValueError("select.accept.key must name a function for 'distinct', got ''")


@dataclass(frozen=True)
class Accepted:
    """What `accept` found; arrays are by candidate."""

    taken: Verdict
    log_kappa: Rewards
    """The reward that training on the taken optimises, in units of its KL penalty, as estimated
    from this pool; <= 0, -inf where a candidate can never be accepted."""
    effective_size: float
    """Candidates that the target law p * kappa rests on: (sum kappa)^2 / sum kappa^2, summed over
    groups. All of them where kappa is constant, one per group where one alone can be accepted."""
    divergence: float
    """KL of the target law from p in nats, estimated in each group and averaged over those where
    anything can be accepted; at most log of the group's size, whatever the rule."""


def accept(
    config: AcceptConfig,
    reward: Rewards,
    group: Labels,
    rng: np.random.Generator,
    key: Labels | None = None,
) -> Accepted:
    """Accept candidates by their rewards.

    Args:
        config: the rule; not "off".
        reward: finite, higher is better; 0 or 1 for the rules "binary" and "distinct".
        group: equal for candidates of one prompt, which alone are ranked against each other.
        rng: of the acceptance itself and of ties, which are broken at random.
        key: equal for duplicates, for the rule "distinct".

    Raises:
        ValueError: a reward exceeds the ceiling or is not 0 or 1; no group has m candidates; there
            are no keys to be distinct by.
    """
    rule = config.rule
    if rule == "tilt":
        log_kappa = _tilt(config, reward)
        taken = rng.random(len(reward)) < np.exp(log_kappa)
    elif rule == "threshold":
        taken = reward >= config.tau
        log_kappa = _log(taken)
    elif rule in ("binary", "distinct"):
        taken, log_kappa = _binary(config, reward, group, rng, key)
    else:
        taken, log_kappa = _ranked(config, reward, group, rng)
    return Accepted(taken, log_kappa, *_spread(log_kappa, group))


def log_kappa_of_rank(
    below: Float[np.ndarray, " n"], m: int, k: int = 1
) -> Float[np.ndarray, " n"]:
    """log kappa of "the k best of m" where F = `below`: the share of candidates that score less.

    The binomial law of how many of the m - 1 others score higher, up to k - 1 of them.
    """
    above = 1 - below
    kappa = sum(math.comb(m - 1, j) * above**j * below ** (m - 1 - j) for j in range(min(k, m)))
    return _log(np.asarray(kappa, np.float64))


def log_kappa_of_distinct(share: Float[np.ndarray, " n"], m: int) -> Float[np.ndarray, " n"]:
    """log E[1 / copies] of a candidate of reward 1 whose key has this share of p, among m.

    Of the m - 1 others Binomial(m - 1, share) are copies, so E = (1 - (1 - share)^m) / (m share).
    """
    return _log(-np.expm1(m * np.log1p(-share)) / (m * share))


def _tilt(config: AcceptConfig, reward: Rewards) -> Rewards:
    highest = float(reward.max())
    ceiling = highest if config.ceiling is None else config.ceiling
    if highest > ceiling:
        raise ValueError(f"select.accept.ceiling must be >= {highest:g}, a reward; got {ceiling:g}")
    return (reward - ceiling) / config.alpha


def _binary(
    config: AcceptConfig,
    reward: Rewards,
    group: Labels,
    rng: np.random.Generator,
    key: Labels | None,
) -> tuple[Verdict, Rewards]:
    good = reward == 1
    if not np.all(good | (reward == 0)):
        raise ValueError(
            f"select.accept.rule {config.rule!r} needs rewards of 0 or 1, got "
            f"{float(reward[~good & (reward != 0)][0]):g}; use one such reward with select.scale = "
            "'fixed' and select.fixed = { its name = [0, 1] }, or the rule 'threshold'"
        )
    if config.rule == "binary":
        return good, _log(good)
    if key is None:
        raise ValueError("select.accept.rule 'distinct' needs a key per candidate")
    # One of each (group, key) among the good, every copy with the same chance.
    order = rng.permutation(np.flatnonzero(good))
    pairs = np.stack([group, key], axis=1)[order]
    _, first, copy_of, copies = np.unique(
        pairs, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    taken, log_kappa = np.zeros(len(reward), bool), np.full(len(reward), -np.inf)
    taken[order[first]] = True
    log_kappa[order] = -np.log(copies)[copy_of.ravel()]
    return taken, log_kappa


def _ranked(
    config: AcceptConfig, reward: Rewards, group: Labels, rng: np.random.Generator
) -> tuple[Verdict, Rewards]:
    taken, log_kappa = np.zeros(len(reward), bool), np.full(len(reward), -np.inf)
    whole = False
    for here in _members(group):
        m, k = config.m or len(here), config.k if config.rule == "top-k" else 1
        for start in range(0, len(here) - m + 1, m):
            block = rng.permutation(here[start : start + m])  # a stable sort now breaks ties so
            best_first = block[np.argsort(-reward[block], kind="stable")]
            taken[best_first[:k]], whole = True, True
        log_kappa[here] = _of_ranks(reward[here], m, k)
    if not whole:
        raise ValueError(f"select.accept.m: no prompt has {config.m} candidates; lower it")
    return taken, log_kappa


def _of_ranks(reward: Rewards, m: int, k: int) -> Rewards:
    """log kappa with F estimated in one group; equal rewards share the mean of their places."""
    n = len(reward)
    kappa = np.exp(log_kappa_of_rank((np.arange(n) + 0.5) / n, m, k))
    _, place, count = np.unique(reward, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    mean = np.array([kappa[end - c : end].mean() for end, c in zip(ends, count, strict=True)])
    return _log(mean)[place.reshape(n)]


def _spread(log_kappa: Rewards, group: Labels) -> tuple[float, float]:
    """Effective size and mean divergence, see `Accepted`."""
    sizes, divergences = [], []
    for here in _members(group):
        kappa = np.exp(log_kappa[here])
        if kappa.any():
            share = kappa / kappa.sum()
            sizes.append(1 / np.square(share).sum())
            held = share[share > 0]
            divergences.append(float((held * np.log(held * len(share))).sum()))
    return float(np.sum(sizes)), float(np.mean(divergences)) if divergences else 0.0


def _members(group: Labels) -> list[np.ndarray]:
    """Places of each group's candidates, in their order."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _log(kappa: np.ndarray) -> Rewards:
    with np.errstate(divide="ignore"):  # log 0 is what it should be
        return np.log(kappa.astype(np.float64))
