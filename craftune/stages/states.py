"""Intermediate states in the pool: written while it is drawn, read to train P-GRAFT on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from craftune.batches import Level
from craftune.diffusion import Grid, Schedule
from craftune.errors import UserError
from craftune.methods import PGRAFT
from craftune.records import read_table
from craftune.types import Encoded


def kept_states(grid: Grid, passed: Mapping[int, Tensor], row: int) -> list[dict[str, Any]]:
    """One image's `states` of `records.CANDIDATE`.

    Args:
        passed: latents of the batch `[b, ...]`, by the number of steps after which they were.
    """
    return [
        {
            "after": after,
            "timestep": float(grid.timesteps[after]),
            "alpha": float(grid.alphas[after - 1, 1]),
            "sigma": float(grid.sigmas[after - 1, 1]),
            "latents": passed[after][row].cpu().flatten().numpy(),
        }
        for after in sorted(passed)
    ]


def at_level(
    method: PGRAFT,
    schedule: Schedule,
    pool: Path,
    names: Sequence[str],
    images: Encoded,
) -> tuple[Encoded, Level]:
    """What P-GRAFT trains on of these candidates, and from which noise level on.

    Args:
        pool: folder of the stage `generate`.
        images: their final latents, which "restricted-t" trains on.

    Raises:
        UserError: the pool has no states after so many steps.
    """
    states = dict(_read(pool, names, method.after))
    order = [states[name] for name in names]
    alpha, sigma = order[0]["alpha"], order[0]["sigma"]
    noisier = schedule.sigmas.double() * alpha > schedule.alphas.double() * sigma * (1 + 1e-6)
    least = int(torch.nonzero(noisier)[0])
    if method.option == "restricted-t":
        return images, Level(least=least)
    found = np.stack([np.asarray(state["latents"], np.float32) for state in order])
    mean = torch.from_numpy(found).reshape(images.mean.shape)
    return Encoded(mean, None), Level(alpha, sigma, least)


def _read(pool: Path, names: Sequence[str], after: int) -> list[tuple[str, dict[str, Any]]]:
    """Candidate and its state after so many steps, one shard at a time."""
    found = []
    for shard in sorted(pool.glob("part-*.parquet")):
        table = read_table(shard, ["id", "states"])
        wanted = pc.is_in(table["id"], value_set=pa.array(names, pa.string()))  # type: ignore[attr-defined]
        for row in table.filter(wanted).to_pylist():
            kept = [state for state in row["states"] or () if state["after"] == after]
            if not kept:
                raise UserError(
                    f"{shard}: {row['id']} has no state after {after} steps (method.settings.after)"
                    "; add it to generate.keep_states and run with --redo generate"
                )
            found.append((row["id"], kept[0]))
    return found
