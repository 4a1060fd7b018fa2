"""What the stages of one round have at hand; its training and its comparison, start to end.

`craftune.plan` says what each stage is made from; here is what those do that hold more than one
model: training, and the comparison of what it made with what it started from.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from craftune import methods, models, rewards
from craftune.config import ModelConfig, Recipe
from craftune.methods import PGRAFT, NoiseCorrection
from craftune.mixing import mix_into, scale_arm
from craftune.models.files import checkpoint, stored_dtype
from craftune.noise import Corrected, load_corrector
from craftune.processes import Processes
from craftune.records import read_json, write_json
from craftune.runs import stage_folder
from craftune.sampling import Stitched
from craftune.stages.correct import FOLDER, train_corrector
from craftune.stages.evaluate import evaluate
from craftune.stages.generate import sampler_of
from craftune.stages.prompt_feed import prompt_feed
from craftune.stages.train import Feed, example_feed, train
from craftune.types import Model, Reward

SCALED = "images at other scales"
"""Name of their count."""
MFLOP = {"base": "MFLOP per image of base", "tuned": "MFLOP per image of tuned"}
"""Names of the counts of noise correction's arithmetic, by model."""


@dataclass(frozen=True)
class Plan:
    """What the stages of a round share.

    Attributes:
        start: the checkpoint that draws and is trained: the recipe's, or the last round's.
        seed: of drawing and training, the round's own.
        at: folder of each stage.
        made_from: settings of the run and of the model.
    """

    recipe: Recipe
    method: methods.AnyMethod
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

    def load_exactly(self, config: ModelConfig) -> Model:
        """A checkpoint on the CPU, in no narrower dtype than it is stored in."""
        dtype = stored_dtype(checkpoint(config))
        return models.load(replace(config, dtype=dtype), torch.device("cpu"))

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
        stitched = Stitched(model.denoiser, base.denoiser, t_star(self.recipe, base, method))
        return replace(model, denoiser=stitched)


def trained(recipe: Recipe, folder: Path) -> ModelConfig:
    """What a run, or a round of it, trained, as it is loaded to draw."""
    return ModelConfig(str(stage_folder(folder, "train") / "model"), dtype=recipe.model.dtype)


def t_star(recipe: Recipe, model: Model, method: PGRAFT) -> float:
    """The timestep at which P-GRAFT's chain goes on with the starting network."""
    grid = model.grid(sampler_of(recipe.generate, model), recipe.generate.num_steps)
    return float(grid.timesteps[method.after])


def tune(plan: Plan, out: Path) -> dict[str, int]:
    """Train; for P-GRAFT, write down beside the model how it is stitched."""
    recipe, method = plan.recipe, plan.method
    if isinstance(method, NoiseCorrection):
        model, pool = plan.load(plan.start), plan.at["generate"]
        how = (recipe.train, method, recipe.generate, model, plan.seed, pool, out)
        return train_corrector(*how, plan.processes)
    model = plan.load(replace(plan.start, dtype=recipe.training_dtype))
    counts = train(
        recipe.train,
        method,
        model,
        plan.seed,
        _feed(plan),
        out,
        plan.processes,
        None if recipe.training_dtype == "float32" else lambda: plan.load_exactly(plan.start),
    )
    if isinstance(method, PGRAFT) and plan.processes.main:
        stitch = {
            "base": recipe.model.path,
            "t_star": t_star(recipe, model, method),
            "sampler": sampler_of(recipe.generate, model),
            "num_steps": recipe.generate.num_steps,
            "guidance_scale": recipe.generate.guidance_scale,
        }
        write_json(out / "stitch.json", stitch)
    return counts


def _feed(plan: Plan) -> Callable[[Model], Feed]:
    """What the method is fed with, once the model is there."""
    recipe, at, method, seed = plan.recipe, plan.at, plan.method, plan.seed
    if method.fed_with == "examples":
        selection, pool = at["select"] / "selection.parquet", at["generate"]
        return lambda model: example_feed(recipe.train, method, model, seed, selection, pool)
    assert method.fed_with == "prompts"

    def prompts_alone(model: Model) -> Feed:
        named = {name: plan.reward(name) for name in method.rewards}
        texts = at["prompts"] / "prompts.jsonl"
        return prompt_feed(recipe.train, method, recipe.generate, model, named, seed, texts)

    return prompts_alone


def compare(plan: Plan, names: tuple[str, ...], out: Path) -> dict[str, int]:
    """Base, then tuned, then the scales of the tuning, on the evaluation prompts."""
    recipe, prompts = plan.recipe, plan.at["prompts"] / "evaluation.jsonl"
    tuned = trained(recipe, plan.at["train"].parent)

    def drawn(arm: str, model: Model, count: int = 0) -> dict[str, int]:
        return evaluate(
            arm,
            recipe.evaluate,
            recipe.generate,
            model,
            names,
            recipe.run.seed,
            prompts,
            out,
            plan.reward,
            plan.processes,
            count,
        )

    counts = drawn("base", plan.drawing(recipe.model))
    if isinstance(plan.method, NoiseCorrection):
        model, counts = _corrected(plan), counts | _mflop(plan.at["train"])
    else:
        model = plan.drawing(tuned)
    counts |= drawn("tuned", model)
    between = 0
    for arm in _scaled(plan, model, tuned):
        between += drawn(arm, model, recipe.evaluate.scale_prompts)[f"{arm} images"]
    if plan.processes.main:
        shutil.copy(prompts, out / "prompts.jsonl")
    return counts | ({SCALED: between} if between else {})


def _scaled(plan: Plan, model: Model, tuned: ModelConfig) -> Iterator[str]:
    """Give the tuned model, in place, the weights of each of evaluate.scales; yields its name.

    They are mixed as they are stored and rounded to model.dtype once: most of what lies between
    two weights that were rounded before would round to one of them.
    """
    scales = plan.recipe.evaluate.scales
    configs = (plan.recipe.model, tuned) if scales else ()
    ends = [plan.load_exactly(config).denoiser.network.state_dict() for config in configs]
    for scale in scales:
        mix_into(model.denoiser.network, ends[0], [(ends[1], scale)])
        yield scale_arm(scale)


def _corrected(plan: Plan) -> Model:
    """The model as it is, started from the corrector's noise."""
    model = plan.load(plan.recipe.model)
    corrector, shape = load_corrector(plan.at["train"] / FOLDER, plan.device)
    corrected = Corrected(model.denoiser, corrector, shape.corrector_steps)
    return replace(model, denoiser=corrected)


def _mflop(trained: Path) -> dict[str, int]:
    """What drawing an image costs, without decoding it."""
    found = read_json(trained / "flops.json")
    return {name: round(found[f"{arm}_image"] / 1e6) for arm, name in MFLOP.items()}
