"""The model card: README.md of an export, with the header that the hub reads."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import craftune
from craftune.exporting.loading import how_to_load
from craftune.exporting.trained import Trained
from craftune.models import EMBEDDED
from craftune.reporting import wording
from craftune.reporting.summary import settings
from craftune.reporting.units import in_tables

LICENCE_OF_EMBEDDED = "apache-2.0"
FUNNEL = {
    "candidates": "candidates drawn",
    "dropped_no_baseline": "of a prompt whose plain picture has no score",
    "dropped_nan": "without a finite score",
    "baseline": "are the plain prompts' own pictures",
    "removed_by_filter": "of a prompt that the filter lets go",
    "not_a_winner": "beaten by the plain prompt's picture",
    "cut_by_cap": "over the limit per prompt",
    "cut_by_k": "below the best ones",
    "selected": "trained on",
}
"""The selection's counts in words."""


def card(run: Trained, to: str, dtype: str, check: Mapping[str, Any]) -> str:
    """README.md of an export.

    Args:
        to: the format's name.
        dtype: of the weights.
        check: the comparison with the trained model, see `exporting.Check`.
    """
    sections = {
        "How to load it": how_to_load(run, to, dtype, _base_name(run)),
        "How it was made": _making(run),
        "Rewards": _rewards(run),
        "Data": _data(run),
        "Evaluation": _evaluation(run),
        "Base model and licence": _base(run),
        "This export": _export(to, dtype, check),
        "Settings": _settings(run),
    }
    body = "\n".join(f"\n## {title}\n\n{text}" for title, text in sections.items())
    what = "LoRA adapters for" if to in ("lora", "kohya") else "A fine-tuned copy of"
    rewards = ", ".join(f"`{name}`" for name in run.rewards)
    intro = (
        f"# {run.recipe.run.name}\n\n{what} `{_base_name(run)}`, aligned with {rewards} by "
        f"craftune {craftune.__version__} (method `{run.recipe.method.name}`).\n"
    )
    return f"---\n{_header(run, to)}\n---\n\n{intro}{body}"


def _header(run: Trained, to: str) -> str:
    """YAML that the hub accepts: a licence it knows or "other", a base only if it is on the hub."""
    from huggingface_hub import ModelCardData

    adapters, licence, hub = to in ("lora", "kohya"), _licence(run), _on_hub(run)
    extra: dict[str, Any] = {"base_model_relation": "adapter" if adapters else "finetune"}
    data = ModelCardData(
        license=licence.get("license", "other"),
        license_name=licence.get("license_name", None if "license" in licence else "as-the-base"),
        license_link=licence.get("license_link"),
        base_model=run.recipe.model.path if hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "craftune", "reward-alignment", *(["lora"] if adapters else [])],
        **(extra if hub else {}),
    )
    return data.to_yaml().strip()


def _on_hub(run: Trained) -> bool:
    path = run.recipe.model.path
    return not path.startswith(EMBEDDED) and not Path(path).expanduser().exists()


def _base_name(run: Trained) -> str:
    """As the recipe has it; a local folder by its name alone."""
    path = run.recipe.model.path
    return path if _on_hub(run) or path.startswith(EMBEDDED) else Path(path).name


def _licence(run: Trained) -> dict[str, str]:
    """The licence keys of the base's own card, empty where it has none here."""
    if run.recipe.model.path.startswith(EMBEDDED):
        return {"license": LICENCE_OF_EMBEDDED}
    from huggingface_hub.repocard import metadata_load

    readme = run.base / "README.md"
    try:
        found = metadata_load(readme) if readme.is_file() else None
    except ValueError:
        found = None
    keys = ("license", "license_name", "license_link")
    return {key: str(found[key]) for key in keys if found and found.get(key)}


def _base(run: Trained) -> str:
    licence = _licence(run)
    stated = licence.get("license_name") or licence.get("license")
    told = f"`{stated}`, as its own card says" if stated else "see the base"
    revision = run.recipe.model.revision
    at = f" at revision `{revision}`" if revision else ""
    return (
        f"Base: `{_base_name(run)}`{at}, family `{run.family}`. Licence of the base: {told}. What "
        "it allows and forbids holds for these weights too.\n"
    )


def _making(run: Trained) -> str:
    train, lora = run.recipe.train, run.recipe.train.lora
    settings = f"{train.steps} optimizer steps of batch {train.batch_size}"
    trained = f"LoRA of rank {lora.rank}, alpha {run.alpha}" if lora.rank else "all weights of"
    trained += " in the denoiser" if lora.rank else " the denoiser"
    if not run.funnel:
        return (
            f"{settings} at learning rate {train.learning_rate:g} trained {trained} on the "
            f"rewards' own gradient, back through the sampler, with method "
            f"`{run.recipe.method.name}`. Text encoders and VAE are the base's.\n"
        )
    return (
        f"The base drew candidates from rewrites of the prompts, the rewards scored them, and "
        f"{settings} at learning rate "
        f"{train.learning_rate:g} trained {trained} on the selected ones with method "
        f"`{run.recipe.method.name}`. Text encoders and VAE are the base's.\n"
    )


def _rewards(run: Trained) -> str:
    identities = (run.report or {}).get("identities", {})
    names = [*run.rewards, *run.recipe.score.rewards, *run.recipe.evaluate.rewards]
    lines = ["| Reward | Use | Version | Weights (sha256) | Licence |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(names):
        known = identities.get(name, {})
        use = "training" if name in run.rewards else "evaluation only"
        digest = str(known.get("sha256", ""))[:12]
        licence = known.get("license") or known.get("licence") or "not stated"
        lines.append(f"| `{name}` | {use} | {known.get('version', '')} | {digest} | {licence} |")
    return "\n".join(lines) + "\n"


def _data(run: Trained) -> str:
    recipe, counts = run.recipe, run.counts
    select, drawn = recipe.select, counts.get("prompts", {})
    read = f"{drawn.get('prompts', 0):,} of {drawn.get('rows', 0):,} rows"
    if not run.funnel:
        return (
            f"Prompts: `{Path(recipe.prompts.source).name}`, {read}. Every training image was "
            "drawn of them in training; no image came from outside.\n"
        )
    chosen = " + ".join(select.filter) if isinstance(select.filter, tuple) else select.filter
    funnel = "\n".join(
        f"| {text} | {run.funnel[name]:,} |"
        for name, text in FUNNEL.items()
        if run.funnel.get(name)
    )
    return (
        f"Prompts: `{Path(recipe.prompts.source).name}`, {read}; rewritten by "
        f"`{recipe.refine.by}`, {recipe.refine.variants} times each. Every training image was "
        f"drawn by the base itself; no image came from outside. Filter `{chosen}`, "
        f"then the best {select.k} by `{select.rank_by}` ({select.strategy}).\n\n"
        f"| Candidates | Number |\n|---|---|\n{funnel}\n"
    )


def _evaluation(run: Trained) -> str:
    if run.report is None:
        return "This run has not been evaluated.\n"
    return evaluation_table(run.report)


def evaluation_table(report: Mapping[str, Any]) -> str:
    """Every measure of a report.json, in the units of `reporting.units`."""
    report = in_tables(report)
    lines = [
        f"{report['conclusion']} On {report['prompts']:,} held-out prompts, the same noise for "
        "both models; 95 % paired-bootstrap intervals over prompts.",
        "",
        "| Measure | Use | Base | Tuned | Difference | Interval | Verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in (report["composite"], *report["rewards"]):
        cells = (
            wording.label(entry),
            entry["role"].replace("_", " "),
            wording.level(entry["base"], entry),
            wording.level(entry["tuned"], entry),
            wording.change(entry["difference"]["mean"], entry),
            wording.interval(entry["difference"], entry),
            entry["verdict"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _export(to: str, dtype: str, check: Mapping[str, Any]) -> str:
    return (
        f"Format `{to}`, weights in {dtype}, written by craftune {craftune.__version__}. It was "
        f"loaded back with diffusers' `{check['loader']}` and drew {check['pictures']} pictures in "
        f"{check['num_steps']} steps; pixels in [0, 1] differ from the trained model's by "
        f"{check['difference']:.2g} on average (base and trained differ by "
        f"{check['change']:.2g}).\n"
    )


def _settings(run: Trained) -> str:
    lines = "\n".join(_flat(settings(asdict(run.recipe))))
    return f"```\n{lines}\n```\n"


def _flat(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield f"{key} = {value!r}"
