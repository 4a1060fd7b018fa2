"""`craftune plan`: what a recipe will need, as text for a terminal of 80 columns."""

import textwrap
from collections.abc import Iterable

from craftune.assumed import GIB, GPUS, REWARDS, SHARE, Figures, Gpu, Number, StageCost
from craftune.config import PromptsConfig, Recipe
from craftune.costs import costs
from craftune.errors import UserError
from craftune.methods import PGRAFT
from craftune.models import resolve
from craftune.models.figures import figures
from craftune.prompt_files import read_prompts
from craftune.training_costs import checkpointing, largest_micro_batch, planned

COLUMNS = 80
WHAT = {
    "generate": "images drawn",
    "score": "images scored",
    "train": "examples",
    "evaluate": "images compared",
}


def budget(recipe: Recipe) -> str:
    """The whole page.

    Raises:
        UserError: the checkpoint or the number of prompts is not known here, or there is no such
            method or hyper-parameter, or it inverts pictures.
    """
    planned(recipe)  # refuses what is not estimated, before anything is looked up
    counted = figures(recipe.model, recipe.train.lora, checkpointing(recipe.train))
    prompts, held_out = _prompts(recipe)
    found = costs(recipe, counted, prompts, held_out)
    parts = [_head(recipe, counted), _stages(found), _gpus(recipe, counted, found)]
    remarks = [
        textwrap.fill(line, COLUMNS, break_on_hyphens=False) for line in _remarks(recipe, found)
    ]
    return "\n\n".join([*parts, "\n".join(remarks)])


def _prompts(recipe: Recipe) -> tuple[int, int]:
    """How many the pool is drawn for, and how many are held out."""
    held_out = recipe.evaluate.num_prompts
    if recipe.evaluate.source and not held_out:
        held_out = _rows("evaluate.source", recipe.evaluate.source, recipe.prompts, "num_prompts")
    if recipe.prompts.limit:
        return recipe.prompts.limit, held_out
    rows = _rows("prompts.source", recipe.prompts.source, recipe.prompts, "limit")
    return rows - (0 if recipe.evaluate.source else min(held_out, rows // 2)), held_out


def _rows(key: str, source: str, config: PromptsConfig, number: str) -> int:
    path = resolve(source)
    if not path.is_file():
        section = key.partition(".")[0]
        raise UserError(
            f"{key} {source!r}: not a file here, so its prompts cannot be counted; "
            f"--set {section}.{number}=N plans for N"
        )
    return len(read_prompts(path, config.column, config.category))


def _head(recipe: Recipe, counted: Figures) -> str:
    weights = counted.parameters[counted.denoiser]
    lora = recipe.train.lora.rank
    trained = f"{_count(counted.trained)} trained (LoRA, rank {lora})" if lora else "all trained"
    return (
        f"{recipe.run.name}: {recipe.model.path}\n"
        f"{counted.side} x {counted.side} pixels, {counted.forward_flops / 1e12:.3g} TFLOP "
        f"a forward pass of the {counted.denoiser};\n"
        f"{_count(weights)} weights in it, {trained}.\n"
        "Nothing was loaded; what follows is estimated."
    )


def _stages(found: list[StageCost]) -> str:
    lines = [f"{'':10}{'images':>11}  {'':15}{'PFLOP':>9}{'GPU memory':>13}{'disk':>10}"]
    lines += [
        f"{cost.name:<10}{cost.images:>11,}  {WHAT[cost.name]:<15}{_short(cost.flops / 1e15):>9}"
        f"{cost.memory / GIB:>9.1f} GiB{_bytes(cost.disk):>10}"
        for cost in found
    ]
    flops, disk = sum(c.flops for c in found), sum(c.disk for c in found)
    memory = max(c.memory for c in found) / GIB
    lines.append(
        f"{'in all':<38}{_short(flops / 1e15):>9}{memory:>9.1f} GiB{_bytes(disk):>10}",
    )
    return "\n".join(lines)


def _gpus(recipe: Recipe, counted: Figures, found: list[StageCost]) -> str:
    lines = [
        f"{'GPU-hours':<12}" + "".join(f"{c.name:>10}" for c in found) + f"{'in all':>9}  memory"
    ]
    for name, gpu in GPUS.items():
        hours = [cost.hours(gpu) for cost in found]
        lines.append(
            f"{name:<12}"
            + "".join(f"{_short(h):>10}" for h in hours)
            + f"{_short(sum(hours)):>9}  {_fits(recipe, counted, found, gpu)}"
        )
    return "\n".join(lines)


def _fits(recipe: Recipe, counted: Figures, found: list[StageCost], gpu: Gpu) -> str:
    """Whether the recipe fits as it is, and what would have to change."""
    small = [c.name for c in found if c.memory > gpu.memory * GIB]
    if not small:
        return "fits"
    if small == ["train"]:
        size = largest_micro_batch(recipe, counted, gpu)
        return f"micro_batch {size}" if size else "cannot train"
    return "not enough"


def _remarks(recipe: Recipe, found: list[StageCost]) -> Iterable[str]:
    total = sum(cost.flops for cost in found)
    worst = max(found, key=lambda cost: cost.flops)
    yield f"Most of it is {worst.name}: {worst.flops / total:.0%} of the arithmetic."
    if recipe.train.micro_batch == "auto":
        yield 'train: at least one example at once, as micro_batch = "auto" takes what fits.'
    used = {recipe.model.dtype, recipe.train.precision}
    shares = " and ".join(f"{SHARE[d]:.0%} of the {d} rate" for d in sorted(used))
    yield f"Assumed: {shares} of the data sheet; loading and downloads not counted."
    method = planned(recipe)
    drawn = method.fed_with == "prompts"
    if drawn:
        yield "train: each example is an image drawn, decoded, scored and differentiated."
    elif recipe.run.rounds > 1:
        yield f"generate, score and train: all {recipe.run.rounds} rounds, whose files stay."
    if isinstance(method, PGRAFT):
        yield f"generate stores {len(recipe.generate.keep_states)} states a candidate."
    named = (*(method.rewards if drawn else ()), *recipe.score.rewards, *recipe.evaluate.rewards)
    unknown = [name for name in dict.fromkeys(named) if name not in REWARDS]
    if unknown:
        yield f"Not counted: the reward{'s' * (len(unknown) > 1)} {', '.join(unknown)}."
    if not drawn and recipe.refine.by in ("openai", "transformers"):
        yield "Not counted: the language model that rewrites the prompts."
    if recipe.model.dtype == "float32":
        yield 'model.dtype = "bfloat16" would draw several times faster on these GPUs.'
    if recipe.train.precision == "float32":
        yield 'train.precision = "bfloat16" would train several times faster on these GPUs.'


def _count(number: Number) -> str:
    return f"{number / 1e6:,.1f} M"


def _short(number: Number) -> str:
    """Three digits, or all before the point."""
    if 0 < number < 0.01:
        return "<0.01"
    return f"{number:,.0f}" if number >= 100 or not number else f"{number:.3g}"


def _bytes(number: Number) -> str:
    if not number:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e6:.0f} MB"
