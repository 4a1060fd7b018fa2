"""Layouts: a small flow over boxes and their classes, and GRAFT with overlap and alignment.

    python -m craftune.studies.layouts --out docs/results/layouts.json

The setting of GRAFT's layout experiment (Anil et al. 2025, arXiv:2510.02692) on synthetic
documents. A page is 8 rows of 10 numbers, box and one-hot class, empty slots included; a
rectified flow draws all of them together, given how many boxes are wanted. Pages that ask for the
same number are a group, as images of one prompt are: the training is the library's own SFT.
"""

import copy
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from craftune.acceptance import AcceptConfig, accept
from craftune.batches import Examples
from craftune.methods.sft import SFT
from craftune.rows import RowDenoiser, RowNetwork
from craftune.sampling import sample
from craftune.seeds import stream, stream_seed
from craftune.studies.common import against_base, command, loop
from craftune.studies.flow import euler_grid, flow_schedule
from craftune.studies.pages import (
    CLASSES,
    COUNTS,
    SLOTS,
    Pages,
    coverage,
    decode,
    draw_pages,
    encode,
    misalignment,
    outside,
    overlap,
    reward,
)
from craftune.training import train
from craftune.types import Cond

PAGES, BASE_STEPS, ROUNDS, ROUND_STEPS, DRAWN, MEASURED = 4000, 800, 3, 60, 960, 960
SAMPLER_STEPS = 16

ARMS: dict[str, AcceptConfig | None] = {
    "top 1 of 4": AcceptConfig(rule="top-k", m=4, k=1),
    "random": None,
}
"""GRAFT, and as many pages drawn by lot."""


def condition(counts: Int[Tensor, " b"]) -> Cond:
    """How many boxes are wanted."""
    return Cond({"count": F.one_hot(counts - COUNTS[0], len(COUNTS)).float()})


def new_model(seed: int) -> RowDenoiser:
    """A flow over pages with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RowNetwork((SLOTS, 4 + len(CLASSES) + 1), 64, 3, cond_width=len(COUNTS))
    return RowDenoiser(network, flow_schedule(), cond="count")


def learn(
    model: RowDenoiser,
    rows: Float[Tensor, "n slots d"],
    counts: Int[Tensor, " n"],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """SFT in place on pages, drawn with replacement, by the one loop."""

    def feed(step: int) -> Examples:
        index = torch.randint(len(rows), (64,), generator=stream("layouts", seed, step))
        return Examples(rows[index], condition(counts[index]), torch.ones(64))

    with tempfile.TemporaryDirectory() as out:
        train(SFT(), model, None, feed, loop(steps, rate), seed, Path(out))


@torch.no_grad()
def draw(
    model: RowDenoiser, count: int, rng: torch.Generator
) -> tuple[Float[Tensor, "b slots d"], Int[Tensor, " b"]]:
    """Rows of new pages, and how many boxes each was asked for: 3 to 8 in blocks, in turn."""
    counts = torch.tensor(COUNTS).repeat_interleave(count // len(COUNTS))
    noise = torch.randn(len(counts), SLOTS, 4 + len(CLASSES) + 1, generator=rng)
    grid = euler_grid(SAMPLER_STEPS)
    return sample(model, noise, condition(counts), None, grid, sampler="euler"), counts


def measure(pages: Pages, counts: Int[Tensor, " b"], data: Pages) -> dict[str, float]:
    """Means over pages; `classes` is the total variation distance of class shares to the data's."""
    shares = [
        torch.bincount(found.classes[found.there], minlength=len(CLASSES)) / found.there.sum()
        for found in (pages, data)
    ]
    parts = {
        "reward": reward(pages),
        "overlap": overlap(pages),
        "misalignment": misalignment(pages),
        "outside": outside(pages),
        "coverage": coverage(pages),
        "right count": (pages.there.sum(1) == counts).float(),
    }
    means = {name: float(values.mean()) for name, values in parts.items()}
    boxes = pages.boxes[pages.there]
    return {
        **means,
        "classes": float((shares[0] - shares[1]).abs().sum() / 2),
        "spread of boxes": float(boxes.std(0).mean()),
    }


def accepted(
    rewards: Float[Tensor, " n"], counts: Int[Tensor, " n"], config: AcceptConfig | None, seed: int
) -> tuple[Int[Tensor, " k"], float]:
    """Places of the pages that a rule takes, and its effective number of candidates."""
    rng = np.random.default_rng(seed)
    if config is None:
        taken = rng.permutation(len(rewards))[: len(rewards) // 4]
        return torch.from_numpy(np.sort(taken)), float(len(rewards))
    verdict = accept(config, rewards.double().numpy(), counts.numpy(), rng)
    return torch.from_numpy(np.flatnonzero(verdict.taken)), verdict.effective_size


def run_arm(
    base: RowDenoiser, config: AcceptConfig | None, seed: int, data: Pages
) -> dict[str, Any]:
    """Some rounds of drawing, accepting and training from the base."""
    model = RowDenoiser(copy.deepcopy(base.network), base.schedule, cond=base.cond)
    rounds: list[dict[str, float]] = []
    for number in range(ROUNDS):
        rows, counts = draw(model, DRAWN, stream("draw", seed, number))
        rewards = reward(decode(rows))
        places, size = accepted(rewards, counts, config, stream_seed("accept", seed, number))
        rounds.append({"drawn": len(rows), "accepted": len(places), "effective": size})
        learn(
            model, rows[places], counts[places], ROUND_STEPS, 5e-4, stream_seed("r", seed, number)
        )
    # The same noise for every arm and for the base.
    rows, counts = draw(model, MEASURED, stream("measure", seed))
    return {**measure(decode(rows), counts, data), "rounds": rounds}


def study(seeds: int) -> dict[str, Any]:
    """Base and arms over seeds: means with intervals, and each arm's difference to the base."""
    data, asked = draw_pages(PAGES, random.Random(0))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("base", *ARMS)}
    rounds: dict[str, list[Any]] = {name: [] for name in ARMS}
    for seed in range(seeds):
        base = new_model(seed)
        learn(base, encode(data), asked, BASE_STEPS, 2e-3, seed)
        drawn, counts = draw(base, MEASURED, stream("measure", seed))
        rows["base"].append(measure(decode(drawn), counts, data))
        for name, config in ARMS.items():
            found = run_arm(base, config, seed, data)
            rounds[name].append(found.pop("rounds"))
            rows[name].append(found)
    return {
        "settings": {
            "pages": PAGES,
            "base steps": BASE_STEPS,
            "rounds": ROUNDS,
            "steps per round": ROUND_STEPS,
            "drawn per round": DRAWN,
            "measured on": MEASURED,
            "sampler steps": SAMPLER_STEPS,
        },
        "data": measure(data, asked, data),
        **against_base(rows),
        "rounds": rounds,
    }


if __name__ == "__main__":
    command("layouts", study)
