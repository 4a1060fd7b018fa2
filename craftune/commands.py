"""What each command of the command line does; imported only once a command is known."""

import argparse
import inspect
from typing import Any

from pydantic import TypeAdapter

from craftune import pipeline
from craftune.config import load_recipe
from craftune.errors import UserError, unknown_name
from craftune.methods import METHODS
from craftune.models import FAMILIES
from craftune.records import read_json
from craftune.refiners import FROM_FILE, REFINERS
from craftune.rewards import REWARDS
from craftune.runs import stage_folder
from craftune.selection import FILTERS, SelectConfig, select
from craftune.selection import explain as explain_cell
from craftune.stages.select import load_pool


def run(options: argparse.Namespace) -> int:
    """All stages or one."""
    recipe = load_recipe(options.recipe, options.set)
    folder = pipeline.run(recipe, only=options.stage, again=options.redo)
    if options.stage in (None, "report"):
        model = stage_folder(folder, "train") / "model"
        print(f"report: {stage_folder(folder, 'report') / 'report.html'}")
        print(f"model:  {model}")
        print(f'load:   diffusers.DiffusionPipeline.from_pretrained("{model}")')
    else:
        print(stage_folder(folder, options.stage))
    return 0


def check(options: argparse.Namespace) -> int:
    """Validate a recipe and everything it names."""
    recipe = load_recipe(options.recipe, options.set)
    pipeline.check(recipe)
    print(f"{options.recipe}: in order; `craftune run` would write {pipeline.run_folder(recipe)}")
    return 0


def list_names(options: argparse.Namespace) -> int:
    """One line per name of a table."""
    tables: dict[str, dict[str, Any]] = {
        "rewards": REWARDS,
        "methods": METHODS,
        "families": FAMILIES,
        "refiners": REFINERS,
        "filters": {name: " and ".join(roles) for name, roles in FILTERS.items()},
    }
    table = tables[options.table]
    width = max(map(len, table))
    for name, entry in table.items():
        text = entry if isinstance(entry, str) else (inspect.getdoc(entry) or "").splitlines()[0]
        print(f"{name:<{width}}  {text}")
    if options.table == "refiners":
        print(f"{FROM_FILE:<{width}}  Rewrites from refine.source.")
    if options.table in ("rewards", "refiners"):
        print("Out of tree: package.module:function")
    return 0


def explain(options: argparse.Namespace) -> int:
    """The verdicts of one prompt's candidates, of one candidate, or the funnel of the pool."""
    recipe = options.run / "run.json"
    if not recipe.is_file():
        raise UserError(f"{options.run}: not a run folder (no run.json in it)")
    config = TypeAdapter(SelectConfig).validate_python(read_json(recipe)["select"])
    pool = load_pool(stage_folder(options.run, "generate"), stage_folder(options.run, "score"))
    found = select(config, pool.names, pool.scores, pool.present)
    if not (options.candidate or options.prompt):
        for name, count in found.funnel.items():
            print(f"{count:>8}  {name}")
        return 0
    ids, prompts = pool.table["prompt_id"].to_pylist(), pool.table["prompt"].to_pylist()
    names = pool.table["id"].to_pylist()
    if options.candidate:
        if options.candidate not in names:
            raise UserError(f"--candidate: {unknown_name('candidate', options.candidate, names)}")
        i = names.index(options.candidate)
        asked = int(pool.column[i])
    else:
        rows = [i for i, p in enumerate(prompts) if options.prompt in (p, ids[i])]
        if not rows:
            known = dict.fromkeys(prompts)
            raise UserError(f"--prompt: {unknown_name('prompt', options.prompt, known)}")
        i, asked = rows[0], None
    group = int(pool.row[i])
    print(f"prompt {ids[i]}: {prompts[i]!r}")
    for row in range(len(names)):
        if pool.row[row] == group and asked in (None, int(pool.column[row])):
            text = pool.table["refined_prompt"][row].as_py()
            print(f"   j = {pool.column[row]}  {names[row]}  {text!r}")
    print(explain_cell(found, config, group, asked))
    return 0
