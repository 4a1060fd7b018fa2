"""report.html: one file without external resources, from the summary and the run."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from craftune.methods import METHODS, about
from craftune.models.files import loading_arguments
from craftune.reporting import charts, comparison, diagrams, examples, units, wording
from craftune.reporting.read import Run
from craftune.runs import stage_folder

HERE = Path(__file__).parent
CURVES = ("reward", "loss", "error", "grad_norm")
"""Shown first; further metrics follow in a fold."""
MADE = {
    "prompts": ("prompts", "evaluation_prompts"),
    "generate": ("candidates", "noises"),
    "score": ("scores",),
    "select": ("selected",),
    "train": ("examples", "steps"),
}
"""Which counts of a stage are named beside its cost; all where a stage is not listed."""
RATED = ("generate", "score", "train")
UNDRAWN = ("step", "seconds", "learning_rate")


def render(run: Run, summary: Mapping[str, Any], costs: Mapping[str, Any]) -> str:
    """The whole page, rewards in the units of `units`.

    Args:
        summary: the content of report.json.
        costs: the content of costs.json.
    """
    summary = units.in_tables(summary)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.number,
        "percent": wording.percent,
        "level": wording.level,
        "change": wording.change,
        "interval": wording.interval,
        "label": wording.label,
        "duration": wording.duration,
        "breakable": wording.breakable,
        "words": lambda name: name.replace("_", " "),
    }
    script = (HERE / "script.html").read_text(encoding="utf-8")
    fed_with = METHODS[run.recipe["method"]["name"]].fed_with
    model = stage_folder(run.folder, "train") / "model"
    return environment.get_template("page.html").render(
        title=run.recipe["report"]["title"] or run.recipe["run"]["name"],
        run=run,
        method=about(run.recipe["method"]["name"])[0],
        s=summary,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        few_prompts=wording.FEW_PROMPTS,
        example=next(t for t in run.evaluation.texts)[:200],
        costs=costs,
        fed_with=fed_with,
        load="" if fed_with == "pictures" else loading_arguments(model),
        **_comparison(run, summary),
        **(_pool(run, summary) if run.pool else {}),
        curves=_curves(run, CURVES),
        more_curves=_curves(run, [name for name in run.metrics if name not in CURVES]),
        made={stage["stage"]: _made(stage) for stage in costs["stages"]},
        settings=_flat(summary["settings"]),
        identities={name: _flat(value) for name, value in summary["identities"].items()},
    )


def primary(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The measure that the page opens with: held out and a share, else held out, else any."""
    held_out = [entry for entry in entries if entry["role"] == "held-out"]
    shares = [entry for entry in held_out if entry["kind"] == "share"]
    return [*shares, *held_out, *entries][0]


def _comparison(run: Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the sections on base and tuned show."""
    pairs, evaluation = units.pairs_in_tables(comparison.measures(run)), run.evaluation
    entries = [summary["composite"], *summary["rewards"]]
    first = primary(entries)
    headline = [entry for entry in entries if entry["role"] != "training"]
    ordered = [first, *(entry for entry in headline if entry is not first)]
    ordered += [entry for entry in entries if entry["role"] == "training"]
    base, tuned = pairs["composite"]
    gains, losses = examples.extremes(evaluation, tuned - base)
    grid = examples.first_pairs(
        evaluation, examples.balanced(evaluation, run.recipe["report"]["grid"])
    )
    shown = examples.examples(run, pairs, ordered, [*grid, *gains, *losses])
    return {
        "primary": first,
        "headline": ordered[: len(headline)],
        "entries": ordered,
        "forest": diagrams.forest(ordered),
        "grid": shown[: len(grid)],
        "gains": shown[len(grid) : len(grid) + len(gains)],
        "losses": shown[len(grid) + len(gains) :],
        "distributions": [
            (entry, charts.histogram(*pairs[entry["name"]], entry["name"]))
            for entry in ordered
            if entry["kind"] == "score"
        ],
        "shares": [entry for entry in ordered if entry["kind"] == "share"],
        "sweeps": _sweeps(summary["scales"], ordered),
        "dumbbells": diagrams.dumbbells(summary["categories"], first),
        "verdict": wording.verdict,
    }


def _sweeps(
    found: Mapping[str, Any] | None, entries: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Markup]]:
    """A curve per measure over the tuning's scale; none where there is no sweep."""
    rows = found["rows"] if found else []
    charted = []
    for entry in entries if rows else ():
        cells = [row["measures"][entry["name"]] for row in rows]
        base = cells[0]["mean"]
        ends = [
            (c["mean"], c["mean"])
            if c["difference"]["low"] is None
            else (base + c["difference"]["low"], base + c["difference"]["high"])
            for c in cells
        ]
        scales, means = [row["scale"] for row in rows], [cell["mean"] for cell in cells]
        charted.append((entry, charts.sweep(scales, means, ends, entry["name"])))
    return charted


def _pool(run: Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the sections on prompts, filters and chosen samples show."""
    entries = {entry["name"]: entry for entry in [summary["composite"], *summary["rewards"]]}
    run = replace(run, pool=units.pool_in_tables(run.pool))
    of_pool = {name: entries[name] for name in ["composite", *run.pool]}
    chosen = examples.selected_rows(run, run.recipe["report"]["gallery"])
    refused = examples.refused_rows(run)
    shown = examples.verdicts(run, of_pool, [*chosen, *refused])
    groups = summary["selection"]["funnel"].get("groups", 0)
    return {
        "chosen": shown[: len(chosen)],
        "refused": shown[len(chosen) :],
        "prompt_funnel": diagrams.prompt_funnel(summary["prompt_counts"]),
        "funnel": diagrams.candidate_funnel(summary["selection"]["status"], run.recipe["select"]),
        "keeps": [
            (name or "no filter", count, 100 * count / max(groups, 1))
            for name, count in summary["selection"]["keeps"].items()
        ],
        "groups": groups,
    }


def _curves(run: Run, names: Sequence[str]) -> list[tuple[str, Markup]]:
    return [
        (name, charts.curve(run.metrics["step"], run.metrics[name], name))
        for name in names
        if name in run.metrics and name not in UNDRAWN
    ]


def _made(stage: Mapping[str, Any]) -> str:
    """What a stage made, and how fast."""
    counts = stage["counts"]
    names = MADE.get(stage["stage"], tuple(counts))
    text = ", ".join(
        f"{wording.number(counts[name])} {name.replace('_', ' ')}"
        for name in names
        if counts.get(name)
    )
    main = counts.get(names[-1], 0) if names else 0
    if stage["stage"] not in RATED or not main or not stage["seconds"]:
        return text
    rate = main / stage["seconds"]
    return f"{text} ({wording.number(rate, 0 if rate >= 100 else 1)} per second)"


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and values as text."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            rows += _flat(item, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, json.dumps(item, ensure_ascii=False)))
    return rows
