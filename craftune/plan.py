"""What each stage is made from, and what it does: the recipe as up to eight `runs.Stage`."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from craftune import methods, models, refiners
from craftune.config import Recipe
from craftune.hub_prompts import on_hub
from craftune.methods import NoiseCorrection
from craftune.plugins import source_sha256
from craftune.processes import ALONE, Processes
from craftune.records import sha256
from craftune.runs import NEEDS, STAGES, Stage, stage_folder
from craftune.seeds import stream_seed
from craftune.stages.generate import generate
from craftune.stages.invert import invert_pictures, source_of
from craftune.stages.prompts import prompts
from craftune.stages.refine import refine
from craftune.stages.report import report
from craftune.stages.score import score
from craftune.stages.select import choose
from craftune.tuning import Plan, compare, trained, tune

NOT_DRAWING = ("batch_size", "seeds_per_variant", "shard_size", "keep_latents", "keep_states")
"""Keys of [generate] that say nothing of how a picture is drawn."""
UNDOING = ("sampler", "num_steps", "guidance_scale", "shard_size")
"""Those that say how one is undone; each shard has its own stream of blur."""
INVERTING = ("source", "pictures", "blur", "most_iterations")
"""Settings of noise correction that its noises depend on."""


def stages(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    processes: Processes = ALONE,
    before: Path | None = None,
) -> list[Stage]:
    """The stages of one round that the method needs, in order, not yet run.

    Args:
        folder: of the run, or of the round.
        before: folder of the round before, whose model this one starts from.
    """
    settings, start, run = asdict(recipe), recipe.model, {"seed": recipe.run.seed}
    if before is not None:
        start = trained(recipe, before)
        run["seed"] = stream_seed("round", run["seed"], before.name)
    # Reads every weight, so once is enough.
    weights = processes.told(lambda: models.weights_sha256(start))
    plan = Plan(
        recipe,
        methods.build(recipe.method.name, recipe.method.settings),
        start,
        run["seed"],
        settings,
        {name: stage_folder(folder, name) for name in STAGES},
        device,
        processes,
        {
            "run": run,
            "model": asdict(start) | {"path_sha256": weights},
        },
    )
    found = [*_texts(plan), *_pool(plan), _train(plan), _evaluate(plan), _report(plan, folder)]
    return [stage for stage in found if stage.name in NEEDS[plan.method.fed_with]]


def _texts(plan: Plan) -> list[Stage]:
    recipe, seed = plan.recipe, plan.recipe.run.seed
    run = {"run": plan.only("run", "seed")}
    return [
        Stage(
            "prompts",
            reads=(),
            made_from={
                **run,
                "prompts": plan.without("prompts", *_unused(recipe.prompts.source))
                | _content(recipe.prompts.source),
                "evaluate": plan.only("evaluate", "source", "num_prompts")
                | _content(recipe.evaluate.source),
            },
            work=lambda out: prompts(recipe.prompts, recipe.evaluate, seed, out),
        ),
        Stage(
            "refine",
            reads=("prompts",),
            made_from={**run, "refine": refiners.made_from(recipe.refine)},
            work=lambda out: refine(
                recipe.refine, seed, plan.at["prompts"] / "prompts.jsonl", out, str(plan.device)
            ),
            code=_code([recipe.refine.by], "refine.by"),
        ),
    ]


def _pool(plan: Plan) -> list[Stage]:
    recipe, at, device = plan.recipe, plan.at, str(plan.device)
    if isinstance(plan.method, NoiseCorrection):
        return [_inverted(plan, plan.method)]
    return [
        Stage(
            "generate",
            reads=("prompts", "refine"),
            made_from={
                **plan.made_from,
                "generate": plan.without("generate", "batch_size"),
            },
            work=lambda out: generate(
                recipe.generate,
                plan.drawing(plan.start),
                plan.seed,
                at["prompts"] / "prompts.jsonl",
                at["refine"] / "refined.jsonl",
                out,
                plan.processes,
            ),
            device=device,
            shared=True,
        ),
        Stage(
            "score",
            reads=("generate",),
            made_from={
                "score": plan.only("score", "rewards"),
                **plan.weights(recipe.score.rewards),
            },
            work=lambda out: score(recipe.score, at["generate"], out, plan.reward, plan.processes),
            code=_code(recipe.score.rewards, "score.rewards"),
            device=device,
            shared=True,
        ),
        Stage(
            "select",
            reads=("generate", "score"),
            made_from={"select": plan.settings["select"]},
            work=lambda out: choose(recipe.select, at["generate"], at["score"], out),
            code=_code([recipe.select.accept.key], "select.accept.key"),
        ),
    ]


def _inverted(plan: Plan, method: NoiseCorrection) -> Stage:
    recipe, at = plan.recipe, plan.at
    source = source_of(method)
    return Stage(
        "generate",
        reads=("prompts",),
        made_from={
            **plan.made_from,
            "generate": plan.only("generate", *UNDOING),
            "method": {key: getattr(method, key) for key in INVERTING}
            | ({"source_sha256": _digest(source.made_from())} if source else {}),
        },
        work=lambda out: invert_pictures(
            recipe.generate,
            method,
            plan.load(plan.start),
            plan.seed,
            at["prompts"] / "prompts.jsonl",
            out,
            plan.processes,
        ),
        device=str(plan.device),
        shared=True,
    )


def _train(plan: Plan) -> Stage:
    method = plan.method
    unchanging = ("micro_batch", "gradient_checkpointing", "save_every", "keep_checkpoints")
    made_from = {
        **plan.made_from,
        "train": plan.without("train", *unchanging),
        "method": plan.settings["method"],
    }
    reads, code = ("generate", "select"), {}
    if method.fed_with == "prompts":
        made_from |= {
            "generate": plan.without("generate", *NOT_DRAWING),
            **plan.weights(method.rewards),
        }
        code = _code(method.rewards, "method.settings.rewards")
        reads = ("prompts",)
    elif method.fed_with == "pictures":
        reads = ("generate",)
    return Stage(
        "train",
        reads=reads,
        made_from=made_from,
        work=lambda out: tune(plan, out),
        code=code,
        device=str(plan.device),
        shared=True,
    )


def _evaluate(plan: Plan) -> Stage:
    recipe, method = plan.recipe, plan.method
    first = method.rewards if method.fed_with == "prompts" else ()
    names = tuple(dict.fromkeys((*first, *recipe.score.rewards, *recipe.evaluate.rewards)))
    scaled = ("scales", "scale_prompts") if recipe.evaluate.scales else ()
    return Stage(
        "evaluate",
        reads=("prompts", "train"),
        made_from={
            **plan.made_from,
            "generate": plan.without("generate", "batch_size", "keep_latents"),
            "score": plan.only("score", "rewards"),
            "evaluate": plan.only("evaluate", "images_per_prompt", "rewards", *scaled),
            **plan.weights(names),
        },
        work=lambda out: compare(plan, names, out),
        code=_code(names, "evaluate.rewards"),
        device=str(plan.device),
        shared=True,
    )


def _report(plan: Plan, folder: Path) -> Stage:
    return Stage(
        "report",
        reads=tuple(name for name in NEEDS[plan.method.fed_with] if name != "report"),
        made_from={
            "run": plan.only("run", "seed"),
            "report": plan.settings["report"],
            "evaluate": plan.only("evaluate", "resamples"),
        },
        work=lambda out: report(folder, out),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _content(source: str) -> dict[str, str]:
    """Digest of the user's file, where one is given."""
    if not source or on_hub(source):  # whose commit is looked up when it is read, and kept
        return {}
    return {"source_sha256": sha256(models.resolve(source))}


def _unused(source: str) -> tuple[str, ...]:
    """Keys of [prompts] that are not looked at."""
    return () if on_hub(source) else ("split",)


def _code(names: Iterable[str], key: str) -> dict[str, str]:
    """Digests of the functions from outside."""
    return {name: source_sha256(name, key) for name in names if ":" in name and "://" not in name}
