"""report.json: every number of the report.

It depends on nothing but the recipe and what the stages made: no time, date, device or absolute
path, so a run that was killed and went on gives the same bytes as one that was not.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Float

from craftune.reporting import comparison, scales, wording
from craftune.reporting.comparison import Bootstrap
from craftune.reporting.read import Run
from craftune.selection import Status

UNTIMED = ("second", "time", "memory")
"""A metric whose name holds one of these says how fast the machine was, not what was learnt."""


def summarise(run: Run, resamples: int, seed: int) -> dict[str, Any]:
    """The content of report.json.

    Args:
        resamples: bootstrap resamples over prompts.
        seed: of the bootstrap.
    """
    boot, evaluation = Bootstrap(resamples, seed), run.evaluation
    pairs = comparison.measures(run)
    entries = [comparison.entry(run, name, pair, boot) for name, pair in pairs.items()]
    headline = [entry for entry in entries if entry["role"] != "training"]
    result = {
        "title": run.recipe["report"]["title"],
        "conclusion": wording.conclusion(headline),
        "headline": [wording.sentence(entry) for entry in headline],
        "prompts": len(evaluation.ids),
        "images_per_prompt": comparison.images_per_prompt(evaluation),
        "bootstrap": {"resamples": resamples, "seed": seed, "interval": 0.95, "unit": "prompt"},
        "composite": entries[0],
        "rewards": entries[1:],
        "diversity": comparison.diversity(run, boot),
        "scales": scales.summary(run, entries, boot),
        "categories": comparison.categories(run, pairs, boot),
        "prompt_counts": run.stages["prompts"]["counts"],
        "selection": _selection(run) if run.pool else None,
        "training": _training(run),
        "settings": settings(run.recipe),
        "versions": _versions(run),
        "identities": evaluation.identities,
    }
    return _plain(result)


def _selection(run: Run) -> dict[str, Any]:
    selected = np.asarray(run.verdicts["selected"].to_pylist(), dtype=bool)
    baseline = np.asarray(run.verdicts["variant"].to_pylist()) == 0
    composite = np.asarray(run.verdicts["composite"].to_pylist(), dtype=np.float64)
    advantage = np.asarray(run.verdicts["advantage"].to_pylist(), dtype=np.float64)
    prompts = run.verdicts["prompt_id"].to_pylist()
    return {
        "candidates": run.verdicts.num_rows,
        "selected": int(selected.sum()),
        "prompts_selected": len({p for p, s in zip(prompts, selected, strict=True) if s}),
        "status": _status(run),
        "funnel": run.selection["funnel"],
        "keeps": run.selection["keeps"],
        "weights": run.selection["weights"],
        "scales": {name: list(scale) for name, scale in comparison.composite_scales(run).items()},
        "composite_mean": {
            "plain_prompts": _mean(composite[baseline]),
            "refined": _mean(composite[~baseline]),
            "selected": _mean(composite[selected]),
        },
        "advantage_of_selected": {
            "mean": _mean(advantage[selected]),
            "negative_share": _mean((advantage[selected] < 0).astype(float)),
        },
    }


def _status(run: Run) -> dict[str, int]:
    """Candidates by what became of them, in the order in which the selection lets them go."""
    found = Counter(run.verdicts["status"].to_pylist())
    names = [status.name.lower() for status in Status]
    return {name: found[name] for name in [*names, *sorted(found.keys() - names)] if found[name]}


def _mean(values: Float[np.ndarray, " n"]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _training(run: Run) -> dict[str, Any]:
    """Each metric over the first and the last tenth of the steps."""
    steps = len(run.metrics["step"])
    tenth = max(1, steps // 10)
    curves = {
        name: {"first": _mean(values[:tenth]), "last": _mean(values[-tenth:])}
        for name, values in run.metrics.items()
        if name != "step" and not any(part in name for part in UNTIMED)
    }
    outputs = run.stages["train"]["outputs"]
    weights = {name: outputs[name] for name in sorted(outputs) if name.endswith(".safetensors")}
    return {"steps": steps, "averaged_over": tenth, "metrics": curves, "weights_sha256": weights}


def settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what says where it ran: name, folder and device of the run."""
    kept = {section: dict(values) for section, values in recipe.items()}
    kept["run"] = {k: v for k, v in kept["run"].items() if k not in ("name", "out", "device")}
    return _relative_paths(kept)


def _relative_paths(value: Any) -> Any:
    """Absolute paths by their last part alone."""
    if isinstance(value, Mapping):
        return {k: _relative_paths(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_relative_paths(v) for v in value]
    if isinstance(value, str) and len(value) < 4096 and PurePath(value).is_absolute():
        return Path(value).name
    return value


def _versions(run: Run) -> dict[str, str]:
    """Of every package; several where stages ran with different ones."""
    found: dict[str, list[str]] = {}
    for record in run.stages.values():
        for package, version in record["versions"].items():
            known = found.setdefault(package, [])
            known += [version] if version not in known else []
    return {package: ", ".join(found[package]) for package in sorted(found)}


def _plain(value: Any) -> Any:
    """What JSON holds, floats at six significant digits, identities without absolute paths."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return _relative_paths(value)
