"""What the studies share: the loop's settings, and means over seeds with their intervals."""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from craftune.config import TrainConfig
from craftune.records import write_json


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its 95 % interval by Student's t; NaN with one seed."""

    mean: float
    low: float
    high: float
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of one number per seed."""
        from scipy.stats import t

        mean, n = statistics.fmean(values), len(values)
        if n == 1:
            return Spread(mean, float("nan"), float("nan"), 1)
        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
        return Spread(mean, mean - half, mean + half, n)


def spreads(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """One row per seed, name -> number, to name -> `Spread` as a dict; JSON's null for NaN."""
    found = {name: asdict(Spread.of([row[name] for row in rows])) for name in rows[0]}
    return {
        name: {key: None if math.isnan(value) else value for key, value in spread.items()}
        for name, spread in found.items()
    }


def against_base(rows: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Means with intervals of "base" and every arm, and of each arm's difference to the base.

    Args:
        rows: arm, with "base" among them -> one row per seed.
    """
    over = {
        name: [
            {key: row[key] - start[key] for key in row}
            for row, start in zip(found, rows["base"], strict=True)
        ]
        for name, found in rows.items()
        if name != "base"
    }
    return {
        "arms": {name: spreads(found) for name, found in rows.items()},
        "over base": {name: spreads(found) for name, found in over.items()},
    }


def loop(steps: int, learning_rate: float, batch_size: int = 64) -> TrainConfig:
    """The loop's settings for a network that fits anywhere: linear decay, averaged weights."""
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        micro_batch=batch_size,
        learning_rate=learning_rate,
        lr_schedule="linear",
        warmup_steps=min(50, steps // 4),
        weight_decay=0.0,
        ema_decay=0.99,
        save_every=steps,
        gradient_checkpointing=False,
    )


def command(name: str, study: Callable[[int], dict[str, Any]]) -> None:
    """The command line of a study: run it over seeds, write its table, print the means."""
    parser = argparse.ArgumentParser(description=f"GRAFT on {name}: a study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(f"runs/{name}.json"))
    options = parser.parse_args()
    result = study(options.seeds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    for arm, found in result["arms"].items():
        shown = "  ".join(f"{key} {value['mean']:.3f}" for key, value in found.items())
        print(f"{arm:10s} {shown}")
