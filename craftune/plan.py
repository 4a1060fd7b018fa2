"""What each stage is made from, and what it does: the recipe as up to eight `runs.Stage`."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from craftune import methods, models, refiners, rewards
from craftune.config import ModelConfig, Recipe
from craftune.hub_prompts import on_hub
from craftune.methods import PGRAFT
from craftune.models.files import checkpoint, stored_dtype
from craftune.plugins import source_sha256
from craftune.processes import ALONE, Processes
from craftune.records import canonical, sha256, write_json
from craftune.runs import NEEDS, STAGES, Stage, stage_folder
from craftune.sampling import Stitched
from craftune.seeds import stream_seed
from craftune.stages.evaluate import evaluate
from craftune.stages.generate import generate, sampler_of
from craftune.stages.prompt_feed import prompt_feed
from craftune.stages.prompts import prompts
from craftune.stages.refine import refine
from craftune.stages.report import report
from craftune.stages.score import score
from craftune.stages.select import choose
from craftune.stages.train import Feed, example_feed, train
from craftune.types import Model, Reward

NOT_DRAWING = ("batch_size", "seeds_per_variant", "shard_size", "keep_latents", "keep_states")
"""Keys of [generate] that say nothing of how a picture is drawn."""


@dataclass(frozen=True)
class _Plan:
    """What the stages share.

    Attributes:
        start: the checkpoint that draws and is trained: the recipe's, or the last round's.
        seed: of drawing and training, the round's own.
        at: folder of each stage.
        made_from: settings of the run and of the model.
    """

    recipe: Recipe
    method: methods.FromExamples | methods.FromPrompts
    start: ModelConfig
    seed: int
    settings: Mapping[str, Any]
    at: Mapping[str, Path]
    device: torch.device
    processes: Processes
    made_from: Mapping[str, Any]

    def load(self, config: ModelConfig) -> Model:
        """A checkpoint on the run's device."""
        return models.load(config, self.device)

    def load_exactly(self) -> Model:
        """The checkpoint on the CPU, in no narrower dtype than it is stored in."""
        dtype = stored_dtype(checkpoint(self.start))
        return models.load(replace(self.start, dtype=dtype), torch.device("cpu"))

    def reward(self, name: str) -> Reward:
        """A reward on the run's device."""
        return rewards.load(name, self.device, self.recipe.reward)

    def weights(self, names: Iterable[str]) -> dict[str, Any]:
        """Which weights the published rewards among these have."""
        found = self.processes.told(lambda: rewards.made_from(names, self.recipe.reward))
        return {"reward": found} if found else {}

    def only(self, section: str, *keys: str) -> dict[str, Any]:
        """These keys of a section."""
        return {key: self.settings[section][key] for key in keys}

    def without(self, section: str, *keys: str) -> dict[str, Any]:
        """A section without the keys that change no result."""
        return {k: v for k, v in self.settings[section].items() if k not in keys}

    def drawing(self, config: ModelConfig) -> Model:
        """A checkpoint as it draws: what P-GRAFT tuned only as far as t*."""
        model, method = self.load(config), self.method
        if not isinstance(method, PGRAFT) or config == self.recipe.model:
            return model
        base = self.load(self.recipe.model)
        t_star = _t_star(self.recipe, base, method)
        return replace(model, denoiser=Stitched(model.denoiser, base.denoiser, t_star))


def trained(recipe: Recipe, folder: Path) -> ModelConfig:
    """What a run, or a round of it, trained, as it is loaded to draw."""
    return ModelConfig(str(stage_folder(folder, "train") / "model"), dtype=recipe.model.dtype)


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
    identity = processes.told(lambda: models.identity(start))
    weights = hashlib.sha256(canonical(identity).encode()).hexdigest()
    plan = _Plan(
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


def _texts(plan: _Plan) -> list[Stage]:
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


def _pool(plan: _Plan) -> list[Stage]:
    recipe, at, device = plan.recipe, plan.at, str(plan.device)
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


def _train(plan: _Plan) -> Stage:
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
    return Stage(
        "train",
        reads=reads,
        made_from=made_from,
        work=lambda out: _tune(plan, out),
        code=code,
        device=str(plan.device),
        shared=True,
    )


def _feed(plan: _Plan) -> Callable[[Model], Feed]:
    """What the method is fed with, once the model is there."""
    recipe, at, method, seed = plan.recipe, plan.at, plan.method, plan.seed
    if method.fed_with == "examples":
        selection, pool = at["select"] / "selection.parquet", at["generate"]
        return lambda model: example_feed(recipe.train, method, model, seed, selection, pool)

    def prompts_alone(model: Model) -> Feed:
        named = {name: plan.reward(name) for name in method.rewards}
        texts = at["prompts"] / "prompts.jsonl"
        return prompt_feed(recipe.train, method, recipe.generate, model, named, seed, texts)

    return prompts_alone


def _evaluate(plan: _Plan) -> Stage:
    recipe, method = plan.recipe, plan.method
    first = method.rewards if method.fed_with == "prompts" else ()
    names = tuple(dict.fromkeys((*first, *recipe.score.rewards, *recipe.evaluate.rewards)))
    return Stage(
        "evaluate",
        reads=("prompts", "train"),
        made_from={
            **plan.made_from,
            "generate": plan.without("generate", "batch_size", "keep_latents"),
            "score": plan.only("score", "rewards"),
            "evaluate": plan.only("evaluate", "images_per_prompt", "rewards"),
            **plan.weights(names),
        },
        work=lambda out: _compare(plan, names, out),
        code=_code(names, "evaluate.rewards"),
        device=str(plan.device),
        shared=True,
    )


def _tune(plan: _Plan, out: Path) -> dict[str, int]:
    """Train; for P-GRAFT, write down beside the model how it is stitched."""
    recipe, method = plan.recipe, plan.method
    model = plan.load(replace(plan.start, dtype=recipe.training_dtype))
    counts = train(
        recipe.train,
        method,
        model,
        plan.seed,
        _feed(plan),
        out,
        plan.processes,
        None if recipe.training_dtype == "float32" else plan.load_exactly,
    )
    if isinstance(method, PGRAFT) and plan.processes.main:
        stitch = {
            "base": recipe.model.path,
            "t_star": _t_star(recipe, model, method),
            "sampler": sampler_of(recipe.generate, model),
            "num_steps": recipe.generate.num_steps,
            "guidance_scale": recipe.generate.guidance_scale,
        }
        write_json(out / "stitch.json", stitch)
    return counts


def _t_star(recipe: Recipe, model: Model, method: PGRAFT) -> float:
    """The timestep at which P-GRAFT's chain goes on with the starting network."""
    grid = model.grid(sampler_of(recipe.generate, model), recipe.generate.num_steps)
    return float(grid.timesteps[method.after])


def _compare(plan: _Plan, names: tuple[str, ...], out: Path) -> dict[str, int]:
    """Base, then tuned, on the evaluation prompts."""
    recipe, prompts = plan.recipe, plan.at["prompts"] / "evaluation.jsonl"
    tuned = trained(recipe, plan.at["train"].parent)
    counts: dict[str, int] = {}
    for arm, config in (("base", recipe.model), ("tuned", tuned)):
        model, seed = plan.drawing(config), recipe.run.seed
        counts |= evaluate(
            arm,
            recipe.evaluate,
            recipe.generate,
            model,
            names,
            seed,
            prompts,
            out,
            plan.reward,
            plan.processes,
        )
    if plan.processes.main:
        shutil.copy(prompts, out / "prompts.jsonl")
    return counts


def _report(plan: _Plan, folder: Path) -> Stage:
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
