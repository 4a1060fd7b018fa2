"""Base against tuned on the held-out prompts, measure by measure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from craftune import statistics
from craftune.reporting import wording
from craftune.reporting.pictures import reduced
from craftune.reporting.read import Evaluation, Run
from craftune.runs import stage_folder
from craftune.statistics import Comparison, Estimate

Pair: TypeAlias = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""One measure on the base's images and on the tuned model's, in the same order."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn."""

    resamples: int
    seed: int

    def rng(self) -> np.random.Generator:
        """Anew for every number, so that one more reward changes no other interval."""
        return np.random.default_rng(self.seed)


def measures(run: Run) -> dict[str, Pair]:
    """The composite, on the scale that the selection used, and then every reward."""
    weights, scales = run.selection["weights"], composite_scales(run)
    base, tuned = run.evaluation.base, run.evaluation.tuned
    composite = (
        statistics.composite(base, weights, scales),
        statistics.composite(tuned, weights, scales),
    )
    return {"composite": composite, **{name: (base[name], tuned[name]) for name in base}}


def composite_scales(run: Run) -> dict[str, tuple[float, float]]:
    """Center and spread by reward.

    A selection by rank or within groups has no scale of its own; then each reward counts in
    standard deviations of the base model's images.
    """
    found = run.selection["scales"]
    if found:
        return {name: (center, spread) for name, (center, spread) in found.items()}
    base = run.evaluation.base
    return {
        name: (float(base[name].mean()), float(base[name].std()))
        for name in run.selection["weights"]
    }


def entry(run: Run, name: str, pair: Pair, boot: Bootstrap) -> dict[str, Any]:
    """One measure, compared."""
    base, tuned = pair
    role = "training" if name in run.evaluation.training else "held-out"
    found = statistics.compare(base, tuned, run.evaluation.prompt, boot.rng(), boot.resamples)
    difference = interval(found.difference)
    is_share = set(np.unique(base)) | set(np.unique(tuned)) <= {0.0, 1.0}
    return {
        "name": name,
        "role": role if name in run.evaluation.base else "composite",
        "kind": "share" if is_share else "score",
        "verdict": wording.verdict(difference),
        "base": found.base,
        "tuned": found.tuned,
        "difference": difference,
        "effect": _optional(found.effect),
        "relative": _optional(found.relative),
        "win_rate": interval(found.win_rate),
        "quantiles": {
            "at": list(QUANTILES),
            "base": np.quantile(base, QUANTILES).tolist(),
            "tuned": np.quantile(tuned, QUANTILES).tolist(),
        },
    }


def _optional(found: Estimate | None) -> dict[str, float | None] | None:
    return None if found is None else interval(found)


def interval(found: Estimate) -> dict[str, float | None]:
    """As report.json has it; no ends where there is no interval."""
    low, high = (x if math.isfinite(x) else None for x in (found.low, found.high))
    return {"mean": found.mean, "low": low, "high": high}


def images_per_prompt(evaluation: Evaluation) -> list[int]:
    """Fewest and most."""
    counts = np.bincount(evaluation.prompt)
    return [int(counts.min()), int(counts.max())]


def diversity(run: Run, boot: Bootstrap) -> dict[str, Any]:
    """How far apart a prompt's images lie, tuned over base; or why that is absent."""
    evaluation = run.evaluation
    if images_per_prompt(evaluation)[0] < 2:
        return {"absent": "it needs at least two images per prompt (evaluate.images_per_prompt)"}
    per_prompt = {}
    keys = [
        (evaluation.ids[p], int(s))
        for p, s in zip(evaluation.prompt, evaluation.sample, strict=True)
    ]
    for model in ("base", "tuned"):
        per_prompt[model] = spread(run, model, keys, evaluation.prompt)
    found = statistics.ratio(per_prompt["tuned"], per_prompt["base"], boot.rng(), boot.resamples)
    return {
        "distance": "mean absolute RGB difference in [0, 1] after reduction to 32 x 32 by area",
        "base": per_prompt["base"].mean(),
        "tuned": per_prompt["tuned"].mean(),
        "ratio": _optional(found),
    }


def spread(
    run: Run, arm: str, keys: Sequence[tuple[str, int]], prompt: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " p"]:
    """Mean distance between each prompt's images of one arm of the comparison.

    Args:
        keys: prompt id and number of the images.
        prompt: of each, numbered 0..p-1.
    """
    small = reduced(stage_folder(run.folder, "evaluate").glob(f"images-{arm}-*.parquet"))
    pixels = np.stack([small[key] for key in keys]).astype(np.float32) / 255
    return statistics.diversity(pixels, prompt)


def categories(run: Run, pairs: Mapping[str, Pair], boot: Bootstrap) -> dict[str, Any]:
    """Every measure within every category; or why that is absent."""
    evaluation = run.evaluation
    names = sorted(set(evaluation.categories))
    if len(names) < 2:
        return {"absent": "the evaluation prompts carry no categories"}
    labels = [evaluation.categories[p] for p in evaluation.prompt]
    found: dict[str, dict[str, Comparison]] = {
        name: statistics.compare_by_category(
            pair[0], pair[1], evaluation.prompt, labels, boot.seed, boot.resamples
        )
        for name, pair in pairs.items()
    }
    counts = Counter(evaluation.categories)
    rows = [
        {
            "category": category,
            "prompts": counts[category],
            "measures": {name: _cell(found[name][category]) for name in pairs},
        }
        for category in names
    ]
    return {"rows": rows}


def _cell(found: Comparison) -> dict[str, Any]:
    difference = interval(found.difference)
    return {"base": found.base, "tuned": found.tuned, "difference": difference}
