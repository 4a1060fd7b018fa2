"""The methods side by side on the embedded model: docs/results/methods.md.

    OMP_NUM_THREADS=1 python bench/methods.py --seeds 0 1 2 --out docs/results/methods.json
    OMP_NUM_THREADS=1 python bench/methods.py --seeds 10 --validation --arms DRaFT-LV \\
        --rates 1e-4 3e-4

Every arm starts from the same weights, trains all of them with the same optimizer, schedule and
average for the same number of updates, aims at the same composite of three rewards, learns from
2,000 images that it draws, and is compared on the same held-out prompts with the same noise. Those
with a pool learn from 8,000 noised examples; DRaFT-K (K = 2) and DRaFT-LV (n = 2) differentiate
8,000 calls of the network, guidance's branches counted each; DRaFT-1 and ReFL 4,000. "DRaFT-LV
half" draws half the images, so that it takes as many reward gradients as DRaFT-1. CRAFT rewrites
its prompts; the other pools are of the plain ones. Two rewards are held out.

Finished arms are skipped: it can be killed and started again. An arm's time is of its own folder,
the pool's included.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from line_charts import Panel, picture
from study import differences, means, per_prompt, run_arm

from craftune.records import read_json, write_json, write_text
from craftune.runs import stage_folder

WEIGHTS = {"shapes-h": 0.4, "shapes-p": 0.4, "shapes-a": 0.2}
SCALES = {"shapes-h": (9.855, 0.906), "shapes-p": (5.253, 0.838), "shapes-a": (0.708, 0.111)}
"""Center and spread of each over a pool of CRAFT's: one objective for all methods."""

COMMON = [
    "prompts.limit=400",
    "generate.sampler=ddim",  # P-GRAFT's hand-over is exact with it
    "train.steps=125",
    "train.save_every=125",
    "train.save_dtype=float32",
]
"""Differs from recipes/demo.toml in all arms."""
PLAIN = ["refine.by=none", "generate.keep_states=[2, 5, 8]", "select.filter=none"]
BEST = [*PLAIN, "select.accept={ rule = 'top-k', k = 1 }"]
GRADIENT = ["train.batch_size=16", "select.filter=none"]


def _objective(**settings: object) -> str:
    """method.settings of a method on the reward's gradient, as TOML."""
    weights = ", ".join(f'"{name}" = {weight}' for name, weight in WEIGHTS.items())
    scales = ", ".join(f'"{name}" = [{c}, {s}]' for name, (c, s) in SCALES.items())
    more = "".join(f", {key} = {json.dumps(value)}" for key, value in settings.items())
    return f"method.settings={{ rewards = {{ {weights} }}, scales = {{ {scales} }}{more} }}"


ARMS: dict[str, tuple[str, list[str]]] = {
    "CRAFT": ("pool", []),
    "CRAFT 3e-4": ("pool", []),  # the rate of recipes/demo.toml; on validation the two were even
    "GRAFT": ("plain", [*BEST, "method.name=graft", "method.settings={}"]),
    "P-GRAFT 2": ("plain", [*BEST, "method.name=pgraft", "method.settings={ after = 2 }"]),
    "P-GRAFT 5": ("plain", [*BEST, "method.name=pgraft", "method.settings={ after = 5 }"]),
    "P-GRAFT 8": ("plain", [*BEST, "method.name=pgraft", "method.settings={ after = 8 }"]),
    "DRaFT-1": ("prompts", [*GRADIENT, "method.name=draft", _objective()]),
    "DRaFT-LV": ("prompts", [*GRADIENT, "method.name=draft", _objective(repeats=2)]),
    "DRaFT-LV half": (
        "prompts",
        [*GRADIENT, "train.batch_size=8", "method.name=draft", _objective(repeats=2)],
    ),
    "DRaFT-K": ("prompts", [*GRADIENT, "method.name=draft", _objective(grad_steps=2)]),
    "ReFL": ("prompts", [*GRADIENT, "method.name=refl", _objective(guided=True)]),
}
"""Name -> whose pool it learns from, and what differs from the recipe."""
RATES = {"CRAFT": "1e-3", "GRAFT": "1e-3"} | {f"P-GRAFT {after}": "1e-3" for after in (2, 5, 8)}
"""Arm -> learning rate, 3e-4 where left out: of 1e-4, 3e-4 and 1e-3 the one with the highest
training reward on 120 validation prompts with run seed 10. P-GRAFT has GRAFT's, -K and -LV have
DRaFT-1's; CRAFT's 1e-4 was not tried."""


WINDOW = 20
"""Updates whose mean training reward is one point of a curve."""


def main() -> None:
    """Run the arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="run seeds")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rates", nargs="+", default=[], help="learning rates to choose from")
    parser.add_argument("--set", nargs="+", default=[], help="for every arm")
    parser.add_argument("--validation", action="store_true", help="the validation prompts")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--out", type=Path, default=Path("runs/methods.json"))
    options = parser.parse_args()
    kind, common = "test", [*COMMON, *options.set]
    if options.validation:
        kind = "validation"
        common.append("evaluate.source=craftune:shapes/prompts/validation.jsonl")
    folders: dict[str, list[Path]] = {}
    for seed in options.seeds:
        given = [*common, f"run.seed={seed}", f"select.seed={seed}"]
        for arm in options.arms:
            pool, overrides = ARMS[arm]
            for rate in options.rates or [RATES.get(arm, "3e-4")]:
                name = f"{arm} {rate}" if options.rates else arm
                rated = [*given, *overrides, f"train.learning_rate={rate}"]
                out = f"{options.runs}/{kind}-{seed}"
                folder = run_arm(Path("recipes/demo.toml"), out, pool, name, rated)
                folders.setdefault(name, []).append(folder)
    result: dict[str, Any] = {
        "prompts": kind,
        "seeds": options.seeds,
        "common": common,
        "arms": {name: summary(paths) for name, paths in folders.items()},
    }
    draft = [arm for arm in result["arms"] if arm.startswith("DRaFT")]
    if "DRaFT-1" in draft:
        result["reaches DRaFT-1's last training reward"] = {a: reached(result, a) for a in draft}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    write_text(options.out.with_suffix(".md"), markdown(result))
    for name, panels in (("draft", draft_panels(result)), ("graft", graft_panels(result))):
        if panels[0].series:
            write_text(options.out.with_name(f"{name}-curve.svg"), picture(panels))
    print(markdown(result))


def summary(folders: list[Path]) -> dict[str, Any]:
    """Means over seeds and prompts, differences to the base with intervals, curve and costs."""
    base = [per_prompt(folder, "base", WEIGHTS, SCALES) for folder in folders]
    tuned = [per_prompt(folder, "tuned", WEIGHTS, SCALES) for folder in folders]
    reports = [read_json(stage_folder(folder, "report") / "report.json") for folder in folders]
    ratios = [report["diversity"]["ratio"]["mean"] for report in reports]
    logs = [(stage_folder(f, "train") / "metrics.jsonl").read_text().splitlines() for f in folders]
    rows = [[json.loads(line) for line in log] for log in logs]
    found = {
        "base": means(base),
        "tuned": means(tuned),
        "over base": differences(tuned, base),
        "per seed": {name: [float(seed[name].mean()) for seed in tuned] for name in tuned[0]},
        "diversity": {"mean": float(np.mean(ratios)), "per seed": ratios},
        "seconds": float(np.mean([_seconds(folder) for folder in folders])),
        "budget": budget(folders[0]),
    }
    if "reward" in rows[0][0]:
        found["training reward by update"] = [[row["reward"] for row in log] for log in rows]
    return found


def budget(folder: Path) -> dict[str, int]:
    """Images drawn to learn from, network calls and reward calls with a gradient."""
    recipe = read_json(folder / "run.json")
    examples = recipe["train"]["steps"] * recipe["train"]["batch_size"]
    pool = stage_folder(folder, "generate") / "done.json"
    if pool.is_file():
        drawn = read_json(pool)["counts"]["candidates"]
        return {"images": drawn, "network gradients": examples, "reward gradients": 0}
    settings = recipe["method"]["settings"]
    again = settings.get("repeats") or 1
    calls = 2 * examples * again * settings.get("grad_steps", 1)  # two branches of guidance
    return {"images": examples, "network gradients": calls, "reward gradients": examples * again}


def _seconds(folder: Path) -> float:
    """What this arm alone would have taken up to its tuned model."""
    stages = ("prompts", "refine", "generate", "score", "select", "train")
    marks = [stage_folder(folder, name) / "done.json" for name in stages]
    return sum(read_json(mark)["seconds"] for mark in marks if mark.is_file())


COLUMNS = {
    "composite": ("training reward", 1.0),
    "shapes-i": ("held-out reward", 1.0),
    "shapes-verifier": ("strict accuracy, %", 100.0),
}
"""Measure -> its heading, and what it is shown times."""


def markdown(result: dict[str, Any]) -> str:
    """One row per arm: mean and difference to the base with its interval."""
    heads = [head for head, _ in COLUMNS.values()]
    lines = [
        f"Means over {len(result['seeds'])} run seeds and the {result['prompts']} prompts, "
        "and the difference to the base [95 % interval over seeds and prompts].",
        "",
        "| method | " + " | ".join(heads) + " | diversity over base | images drawn "
        "| network gradients | reward gradients | seconds |",
        "|---" * (len(heads) + 6) + "|",
    ]
    base = next(iter(result["arms"].values()))["base"]
    cells = [f"{base[name] * times:.2f}" for name, (_, times) in COLUMNS.items()]
    lines.append("| base | " + " | ".join(cells) + " | 1 | 0 | 0 | 0 | 0 |")
    for arm, found in result["arms"].items():
        cells = [
            f"{found['tuned'][name] * times:.2f} ({_interval(found['over base'][name], times)})"
            for name, (_, times) in COLUMNS.items()
        ]
        low, high = min(found["diversity"]["per seed"]), max(found["diversity"]["per seed"])
        cells.append(f"{found['diversity']['mean']:.2f} ({low:.2f} to {high:.2f})")
        cells += [f"{count:,}" for count in found["budget"].values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {found['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def draft_panels(result: dict[str, Any]) -> list[Panel]:
    """Training reward of the images drawn while training, by images and by reward gradients."""
    panels = {"images": "images drawn", "reward gradients": "reward gradients"}
    series: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for key in panels:
        for arm, found in result["arms"].items():
            curves = found.get("training reward by update")
            if curves and arm != "ReFL":  # its reward is of predictions from an earlier step
                each = found["budget"][key] / len(curves[0])
                smooth = smoothed(np.mean(curves, axis=0))
                line = [((i + WINDOW) * each, y, y, y) for i, y in enumerate(smooth)]
                series.setdefault(key, {})[arm] = line
    title = f"training reward, mean of {WINDOW} updates"
    return [Panel(title, label, series.get(key, {})) for key, label in panels.items()]


def smoothed(curve: np.ndarray) -> list[float]:
    """Mean of each update and those before it, `WINDOW` in all; the first ones have none."""
    return np.convolve(curve, np.ones(WINDOW) / WINDOW, mode="valid").tolist()


def reached(result: dict[str, Any], arm: str, other: str = "DRaFT-1") -> dict[str, Any]:
    """Where an arm first has the training reward that `other` ends with, by seed.

    Both arms see the same prompts from the same noise as far as their batches agree.

    Returns:
        updates of `arm` by seed, None where it never gets there, and what they cost.
    """
    theirs = result["arms"][other]["training reward by update"]
    found = result["arms"][arm]
    updates = []
    for curve, target in zip(found["training reward by update"], theirs, strict=True):
        there = [i for i, y in enumerate(smoothed(curve)) if y >= smoothed(target)[-1]]
        updates.append(there[0] + WINDOW if there else None)
    steps = len(theirs[0])
    return {
        "updates": updates,
        **{key: [u and u * n / steps for u in updates] for key, n in found["budget"].items()},
    }


def graft_panels(result: dict[str, Any]) -> list[Panel]:
    """What was won, by the share of the chain that the tuned network draws."""
    after = {"P-GRAFT 2": 2, "P-GRAFT 5": 5, "P-GRAFT 8": 8, "GRAFT": 10}
    arms = {k: v for k, v in result["arms"].items() if k in after}
    return [
        Panel(
            f"{head}, over the base",
            "steps of 10 by the tuned network",
            {head: [_point(after[a], f["over base"][name], times) for a, f in _by(after, arms)]}
            if len(arms) == len(after)
            else {},
        )
        for name, (head, times) in COLUMNS.items()
    ]


def _by(order: dict[str, int], arms: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(arm, arms[arm]) for arm in order]


def _point(x: float, values: list[float], times: float) -> tuple[float, float, float, float]:
    mean, low, high = (value * times for value in values)
    return x, mean, low, high


def _interval(values: list[float], times: float) -> str:
    mean, low, high = (value * times for value in values)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    main()
