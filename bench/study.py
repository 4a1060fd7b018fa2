"""The study behind docs/results/craft-shapes.md: arms at equal cost, over several run seeds.

    python bench/study.py recipes/demo.toml --seeds 5 --out docs/results/craft-shapes.json
    python bench/study.py recipes/demo.toml --seeds 2 --validation --arms craft sft random

For each run seed one pool is drawn and scored; every arm selects from it, trains, and is compared
on the same held-out prompts with the same noise. All arms share the pool and the base's images,
so each differs from its neighbour in what its line in ARMS says and nothing else. Finished arms
are skipped: the study can be killed and started again.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from craftune import pipeline
from craftune.config import Recipe
from craftune.recipes import load_recipe
from craftune.records import read_json, read_table, write_json, write_text
from craftune.runs import stage_folder
from craftune.statistics import composite

ALL = ["select.strategy=all", "select.per_prompt_cap=0"]
ARMS: dict[str, list[str]] = {
    "craft": [],
    "sft": ["method.name=sft", "method.settings={}"],
    "random": ["select.strategy=random"],
    "random, sft": ["select.strategy=random", "method.name=sft", "method.settings={}"],
    # Under "drop" the lowest teach nothing: their advantages are all negative.
    "low, sft": ["select.strategy=low", "method.name=sft", "method.settings={}"],
    "all": ALL,
    "all, sft": [*ALL, "method.name=sft", "method.settings={}"],
    "all, placebo": [*ALL, "select.placebo=true"],
    "all, clip": [*ALL, "method.settings.negatives=clip", "method.settings.guard=1e9"],
    "all, keep": [*ALL, "method.settings.negatives=keep", "method.settings.guard=1e9"],
    "all, anchor": [*ALL, "method.settings.negatives=anchor"],
    "all, anchor 0.3": [
        *ALL,
        "method.settings.negatives=anchor",
        "method.settings.beta=0.3",
    ],
    "all, anchor, placebo": [*ALL, "method.settings.negatives=anchor", "select.placebo=true"],
}
"""Name -> what differs from the recipe."""

SHARED = ("prompts", "refine", "generate", "score")


def main() -> None:
    """Run the arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="run seeds 0..n-1")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help="names of ARMS")
    parser.add_argument("--validation", action="store_true", help="the validation prompts")
    parser.add_argument("--set", action="append", default=[], help="for every arm")
    parser.add_argument(
        "--extra", action="append", default=[], help="another arm: name:key=v,key=v"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study.json"))
    options = parser.parse_args()
    arms = {name: ARMS[name] for name in options.arms}
    for text in options.extra:
        name, _, overrides = text.partition(":")
        arms[name] = overrides.split(";")
    common = list(options.set)
    kind = "test"
    if options.validation:
        kind = "validation"
        common.append("evaluate.source=craftune:shapes/prompts/validation.jsonl")
    folders: dict[str, list[Path]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        for name, overrides in arms.items():
            given = [*common, *overrides, f"run.seed={seed}", f"select.seed={seed}"]
            out = f"runs/study/{kind}-{seed}"
            folders[name].append(run_arm(options.recipe, out, "pool", name, given))
    table = {name: summary(paths, folders.get("random")) for name, paths in folders.items()}
    base = load_recipe(options.recipe, common)
    result = {"prompts": kind, "seeds": options.seeds, "recipe": _settings(base), "arms": table}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    write_text(options.out.with_suffix(".md"), markdown(result))
    print(markdown(result))


def run_arm(recipe: Path, out: str, pool: str, name: str, overrides: list[str]) -> Path:
    """One arm's run folder, made unless it exists; the pool comes from the first arm's of its name.

    Args:
        out: path of the run folders up to and without "-<arm>".
        pool: arms with the same name here share a pool; all share the base's images.
        overrides: of the recipe.
    """
    prefix, slug = Path(out), name.replace(", ", "-").replace(" ", "-").replace("*", "")
    given = [f"run.name={prefix.name}-{slug}", f"run.out={prefix.parent}"]
    arm = load_recipe(recipe, [*overrides, *given])
    folder, drawn, base = pipeline.run_folder(arm), Path(f"{out}-{pool}"), Path(f"{out}-pool")
    if not (stage_folder(folder, "report") / "done.json").is_file():
        _share_pool(drawn, folder)
        _share_base(base, folder)
        print(f"== {folder.name}", flush=True)
        pipeline.run(arm)
        _share_pool(folder, drawn)
        _share_base(folder, base)
    return folder


def _share_pool(source: Path, target: Path) -> None:
    """Hard-link the stages up to the pool's scores from one run folder to another."""
    for name in SHARED:
        here, there = stage_folder(source, name), stage_folder(target, name)
        if (here / "done.json").is_file() and not there.exists():
            shutil.copytree(here, there, copy_function=_link)


def _share_base(source: Path, target: Path) -> None:
    """Hard-link the base's evaluation images from one run folder to another."""
    here, there = stage_folder(source, "evaluate"), stage_folder(target, "evaluate")
    there.mkdir(parents=True, exist_ok=True)
    for file in here.glob("*-base-*.parquet"):
        if not (there / file.name).exists():
            _link(file, there / file.name)


def _link(source: str | Path, target: str | Path) -> None:
    Path(target).hardlink_to(source)


def values(folder: Path, model: str) -> dict[str, np.ndarray]:
    """Reward -> mean per prompt, prompts in order of id; with the composite of the selection."""
    selection = read_json(stage_folder(folder, "select") / "selection.json")
    return per_prompt(folder, model, selection["weights"], selection["scales"])


def per_prompt(
    folder: Path, model: str, weights: dict[str, float], scales: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Reward -> mean per prompt, prompts in order of id; with "composite"."""
    rows = read_table(stage_folder(folder, "evaluate").glob(f"scores-{model}-*.parquet"))
    rows = rows.sort_by([("prompt_id", "ascending"), ("sample", "ascending")])
    names = rows["reward"].to_numpy()
    per_image = {n: rows["value"].to_numpy()[names == n].astype(float) for n in sorted(set(names))}
    ids = rows["prompt_id"].to_numpy()[names == names[0]]
    per_image["composite"] = composite(per_image, weights, scales)
    _, where = np.unique(ids, return_inverse=True)
    return {n: np.bincount(where, v) / np.bincount(where) for n, v in per_image.items()}


def summary(folders: list[Path], random: list[Path] | None) -> dict[str, Any]:
    """Means over seeds and prompts, and differences to base and to random with intervals."""
    tuned = [values(folder, "tuned") for folder in folders]
    found: dict[str, Any] = {"tuned": means(tuned)}
    found["over base"] = differences(tuned, [values(folder, "base") for folder in folders])
    if random is not None and random != folders:
        found["over random"] = differences(tuned, [values(folder, "tuned") for folder in random])
    found["base"] = means([values(folder, "base") for folder in folders])
    found["tuned per seed"] = {n: [float(s[n].mean()) for s in tuned] for n in tuned[0]}
    reports = [read_json(stage_folder(f, "report") / "report.json") for f in folders]
    ratios = [r["diversity"]["ratio"]["mean"] for r in reports if r["diversity"].get("ratio")]
    found["diversity"] = float(np.mean(ratios)) if ratios else None
    costs = [read_json(stage_folder(f, "train") / "done.json")["seconds"] for f in folders]
    found["train seconds"] = float(np.mean(costs))
    return found


def means(seeds: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Mean over seeds and prompts, by measure."""
    return {name: float(np.mean([s[name].mean() for s in seeds])) for name in seeds[0]}


def differences(
    ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]
) -> dict[str, list[float]]:
    """Mean, low and high; the bootstrap resamples run seeds and prompts (10,000 times)."""
    rng = np.random.default_rng(0)
    found = {}
    for name in ours[0]:
        gaps = np.stack([a[name] - b[name] for a, b in zip(ours, theirs, strict=True)])
        seeds, prompts = gaps.shape
        draws = np.empty(10_000)
        for i in range(len(draws)):
            picked = gaps[rng.integers(seeds, size=seeds)].mean(0)
            draws[i] = picked[rng.integers(prompts, size=prompts)].mean()
        low, high = np.quantile(draws, [0.025, 0.975])
        found[name] = [float(gaps.mean()), float(low), float(high)]
    return found


def markdown(result: dict[str, Any]) -> str:
    """The tables as text: every arm over base, and over the arm "random" where there is one."""
    arms, first = result["arms"], next(iter(result["arms"].values()))
    names = list(first["tuned"])
    head = ["| arm | " + " | ".join(names) + " | diversity |", "|---" * (len(names) + 2) + "|"]
    base = "| base | " + " | ".join(f"{first['base'][n]:.3f}" for n in names) + " | 1 |"
    lines = [
        "Mean over run seeds and prompts (difference to base [95 % interval]).",
        "",
        *head,
        base,
    ]
    for arm, found in arms.items():
        cells = [f"{found['tuned'][n]:.3f} ({_interval(found['over base'][n])})" for n in names]
        ratio = found["diversity"]
        cells.append("" if ratio is None else f"{ratio:.2f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    against = {arm: found["over random"] for arm, found in arms.items() if "over random" in found}
    if against:
        lines += ["", "Difference to `random` at equal cost [95 % interval].", ""]
        lines += ["| arm | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for arm, gaps in against.items():
            lines.append(f"| {arm} | " + " | ".join(_interval(gaps[n]) for n in names) + " |")
    return "\n".join(lines) + "\n"


def _interval(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _settings(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(recipe)))


if __name__ == "__main__":
    main()
