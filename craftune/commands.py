"""What each command of the command line does; imported only once a command is known."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from craftune import pipeline
from craftune.config import Recipe
from craftune.errors import UserError, unknown_name
from craftune.explain import explain as explain_cell
from craftune.listing import list_names
from craftune.models.files import loading_arguments, stitched_code
from craftune.processes import ALONE, Processes, joined
from craftune.recipes import load_recipe
from craftune.records import read_json
from craftune.reporting.units import in_tables
from craftune.runs import stage_folder
from craftune.scoring.verify import verify_reward
from craftune.select_config import SelectConfig
from craftune.selection import NothingSelected, select
from craftune.stages.select import Pool, load_pool


def run(options: argparse.Namespace) -> int:
    """All stages or one."""
    with joined() as processes:
        recipe = _checked(options, processes)
        folder = pipeline.run(recipe, processes, only=options.stage, again=options.redo)
        if processes.main:
            _print_outcome(folder, options.stage)
    return 0


def _print_outcome(folder: Path, stage: str | None) -> None:
    """Where the outputs of a stage are; after the last one, what it found."""
    if stage not in (None, "report"):
        print(stage_folder(folder, stage))
        return
    model, report = stage_folder(folder, "train") / "model", stage_folder(folder, "report")
    found = in_tables(read_json(report / "report.json"))
    lines = [*found["headline"], *(found["scales"] or {}).get("sentences", ())]
    print(found["conclusion"], *(f"  {line}" for line in lines), "", sep="\n")
    print(f"report: {report / 'report.html'}")
    corrector = model.with_name("corrector")
    if corrector.is_dir():
        print(f'load:   craftune.noise.load_corrector("{corrector}")')
        return
    print(f"model:  {model}")
    stitch = model.with_name("stitch.json")
    if stitch.is_file():
        how = read_json(stitch)
        print(f"load:   {stitched_code(str(model), how)}  # num_inference_steps={how['num_steps']}")
        return
    arguments = f'"{model}"{loading_arguments(model)}'
    print(f"load:   diffusers.DiffusionPipeline.from_pretrained({arguments})")


def score(options: argparse.Namespace) -> int:
    """The stage of a recipe, or any images: what the argument is tells them apart."""
    from craftune.scoring.command import refuse_options_of_images, score_images

    if options.recipe.suffix.lower() != ".toml":
        return score_images(options)
    refuse_options_of_images(options)
    return run(options)


def check(options: argparse.Namespace) -> int:
    """Validate a recipe and everything it names."""
    recipe = _checked(options)
    print(f"{options.recipe}: in order; `craftune run` would write {pipeline.run_folder(recipe)}")
    return 0


def _checked(options: argparse.Namespace, processes: Processes = ALONE) -> Recipe:
    recipe = load_recipe(options.recipe, options.set)
    try:
        pipeline.check(recipe, processes)
    except UserError as error:
        raise UserError(f"{options.recipe}, {error}") from error
    return recipe


def plan(options: argparse.Namespace) -> int:
    """Estimate what a recipe needs; loads no weights."""
    from craftune.budget import budget

    print(budget(load_recipe(options.recipe, options.set)))
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Check this machine; 1 where something must be mended."""
    from craftune.doctor import examine, page

    findings = examine(options.out)
    print(page(findings))
    return int(any(finding.state == "wrong" for finding in findings))


def explain(options: argparse.Namespace) -> int:
    """The verdicts of one prompt's candidates, of one candidate, or the funnel of the pool."""
    config = _selection_of(options.run)
    drawn, scored = (stage_folder(options.run, name) for name in ("generate", "score"))
    pool = load_pool(drawn, scored, config.accept.key)
    try:
        found = select(config, pool.names, pool.scores, pool.present, pool.keys)
    except NothingSelected as error:
        raise UserError(f"nothing was chosen: {error}") from None
    if not (options.candidate or options.prompt):
        _print_funnel(options.run, found.funnel)
        return 0
    group, asked = _asked(options, pool)
    names, columns = pool.table["id"].to_pylist(), pool.column.tolist()
    rows = [r for r in range(len(names)) if pool.row[r] == group and asked in (None, columns[r])]
    first = pool.table.slice(rows[0], 1).to_pylist()[0]
    print(f"prompt {first['prompt_id']}: {first['prompt']!r}")
    width = max(len(names[r]) for r in rows)
    for r in rows:
        print(f"{columns[r]:4d} {names[r]:<{width}}  {pool.table['refined_prompt'][r].as_py()!r}")
    print(explain_cell(found, config, group, asked).partition("\n")[2])
    return 0


def _selection_of(run: Path) -> SelectConfig:
    """The [select] section that a run folder was made with."""
    path = run / "run.json"
    if not path.is_file():
        raise UserError(f"{run}: not a run folder (no run.json in it)")
    for name in ("generate", "score"):
        if not any(stage_folder(run, name).glob("part-*.parquet")):
            raise UserError(f"{run}: nothing to explain yet, stage {name!r} has not run")
    try:
        return TypeAdapter(SelectConfig).validate_python(read_json(path)["select"])
    except (ValidationError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; `craftune run` with the recipe writes it anew") from None


def _print_funnel(run: Path, funnel: Mapping[str, int]) -> None:
    for name, count in funnel.items():
        if count:
            print(f"{count:>10,}  {name.replace('_', ' ')}")
    print(f"\nOne prompt: craftune explain {run} --prompt TEXT")


def _asked(options: argparse.Namespace, pool: Pool) -> tuple[int, int | None]:
    """Group, and column for a candidate, that the options name."""
    if options.candidate:
        names = pool.table["id"].to_pylist()
        if options.candidate not in names:
            raise UserError(f"--candidate: {unknown_name('candidate', options.candidate, names)}")
        i = names.index(options.candidate)
        return int(pool.row[i]), int(pool.column[i])
    ids, prompts = pool.table["prompt_id"].to_pylist(), pool.table["prompt"].to_pylist()
    asked = " ".join(options.prompt.split())
    rows = [i for i, prompt in enumerate(prompts) if asked in (prompt, ids[i])]
    if not rows:
        known = dict.fromkeys(prompts)
        raise UserError(f"--prompt: {unknown_name('prompt', asked, known)}")
    return int(pool.row[rows[0]]), None


def export(options: argparse.Namespace) -> int:
    """The tuned model in a format of others, compared with the trained one before it is kept."""
    from craftune import exporting  # imports diffusers

    out, check = exporting.export(options.run, options.to, options.out, options.dtype)
    print(out)
    print(
        f"loaded with {check.loader}, {check.pictures} pictures in {check.num_steps} steps: differ "
        f"from the trained model's by {check.difference:.2g} of full brightness on average "
        f"(limit {check.limit:.2g}; the base's differ by {check.change:.2g})"
    )
    stitch = out / "stitch.json"
    if stitch.is_file():
        print("P-GRAFT: drawn with alone these weights are not what was evaluated; load both:")
        print(stitched_code(str(out), read_json(stitch)))
    if options.push_to_hub:
        from craftune.exporting.hub import push

        print(push(out, options.push_to_hub))
    return 0


def mix(options: argparse.Namespace) -> int:
    """Several tunings of one model as one diffusers folder."""
    from craftune.exporting.mix import mix as mix_models  # imports diffusers

    out = mix_models(options.base, options.tunings, options.out, options.dtype)
    print(out)
    print(f'load:   diffusers.DiffusionPipeline.from_pretrained("{out}"{loading_arguments(out)})')
    return 0


def serve_reward(options: argparse.Namespace) -> int:
    """One reward behind an address, until it is stopped."""
    from craftune.scoring.command import serve_one

    return serve_one(options)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run,
    "score": score,
    "check": check,
    "plan": plan,
    "doctor": doctor,
    "explain": explain,
    "export": export,
    "mix": mix,
    "serve-reward": serve_reward,
    "verify-reward": verify_reward,
    "list": list_names,
}
"""Name on the command line -> what it does; the stages' own commands are `run` of one stage."""
