"""Every recipe in recipes/ loads, names what exists, and says what it costs."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from craftune import methods, rewards
from craftune.assumed import GIB, GPUS
from craftune.costs import costs
from craftune.models.published import PUBLISHED, published
from craftune.recipes import load_recipe
from craftune.refiners import REFINERS
from craftune.rewards import REWARDS
from craftune.selection import NothingSelected, select
from craftune.training_costs import checkpointing

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
HOURS = {
    "H100 80 GB": r"(?<![\d.])(\d+) H100-hour",
    "RTX 4090": r"(\d+) hours of an RTX 4090",
    "L40S": r"(\d+) of an L40S",
}
"""GPU -> how headers say its hours."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_in_order(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.run.name == path.stem
    assert {*recipe.score.rewards, *recipe.evaluate.rewards} <= REWARDS.keys()
    assert recipe.refine.by in REFINERS
    assert recipe.model.path in (*PUBLISHED, "craftune:shapes/model")
    method = methods.build(recipe.method.name, recipe.method.settings)
    if method.fed_with == "prompts":
        assert method.rewards.keys() <= REWARDS.keys()
        return
    if method.fed_with == "pictures":
        assert method.source == "craftune:shapes/world"
        return
    columns = 1 + recipe.refine.variants * recipe.generate.seeds_per_variant
    names = recipe.score.rewards
    scores = np.random.default_rng(0).normal(size=(len(names), 50, columns))
    config = dataclasses.replace(recipe.select, k=min(recipe.select.k, 10))
    try:
        found = select(config, names, scores)
    except NothingSelected:
        pytest.fail("its selection takes nothing from a pool of 50 prompts")
    assert found.selected.sum() > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_says_command_hardware_and_time(path: Path) -> None:
    header = path.read_text().partition("[run]")[0]
    assert f"craftune run recipes/{path.name}" in header
    assert "Hardware: " in header
    assert "Time: " in header or "hours" in header


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if "`craftune plan`" in p.read_text()], ids=lambda p: p.stem
)
def test_a_header_says_what_the_plan_says(path: Path) -> None:
    header = path.read_text().partition("[run]")[0].replace("\n#", "")
    recipe = load_recipe(path)
    counted = published(recipe.model.path, recipe.train.lora, checkpointing(recipe.train))
    assert counted is not None
    found = costs(recipe, counted, recipe.prompts.limit or 1, recipe.evaluate.num_prompts)

    (size,) = re.findall(r"one GPU of (\d+) GB", header)
    assert max(cost.memory for cost in found) < int(size) * GIB
    (disk,) = re.findall(r"(\d+) GB of disk", header)
    assert sum(cost.disk for cost in found) / 1e9 == pytest.approx(int(disk), abs=0.5)
    said = 0
    for gpu, words in HOURS.items():
        for number in re.findall(words, header):
            hours = sum(cost.hours(GPUS[gpu]) for cost in found)
            assert hours == pytest.approx(int(number), abs=0.5), gpu
            said += 1
    assert said
    for limit, number in re.findall(r"limit = (\d+): (\d+)", header):
        fewer = costs(recipe, counted, int(limit), recipe.evaluate.num_prompts)
        hours = sum(cost.hours(GPUS["RTX 4090"]) for cost in fewer)
        assert hours == pytest.approx(int(number), abs=0.5)
    requests = re.findall(r"([\d,]+) requests to the language model", " ".join(header.split()))
    asked = [f"{recipe.prompts.limit:,}"] if recipe.refine.by == "openai" else []
    assert requests == asked
    assert bool(asked) == (f"export {recipe.refine.chat.key_env}=" in header)


@pytest.mark.parametrize(("name", "steps"), [("craft-sd15", 120), ("craft-sdxl", 200)])
def test_the_paper_s_numbers(name: str, steps: int) -> None:
    recipe = load_recipe(RECIPES[0].with_name(f"{name}.toml"))
    assert (recipe.prompts.limit, recipe.refine.variants) == (10_000, 4)
    assert recipe.select.weights == {"h": 0.4, "p": 0.4, "a": 0.2}
    assert (recipe.select.filter, recipe.select.k, recipe.select.strategy) == ("I_hpa", 100, "top")
    train = recipe.train
    assert (train.steps, train.batch_size, train.learning_rate) == (steps, 128, 5e-5)
    assert train.lora.rank == 0


@pytest.mark.parametrize(
    ("name", "reward", "rank", "rate", "batch", "steps"),
    [("small", "aesthetic", 8, 4e-4, 4, 2_000), ("large", "hpsv2.0", 32, 2e-4, 16, 10_000)],
)
def test_draft_s_numbers(
    name: str, reward: str, rank: int, rate: float, batch: int, steps: int
) -> None:
    """Of both settings; LV with n = 2, 50 steps of DDIM, guidance 7.5, weight decay 0.1."""
    recipe = load_recipe(RECIPES[0].with_name(f"draft-sd15-{name}.toml"))
    train, drawn = recipe.train, recipe.generate
    assert (train.lora.rank, train.learning_rate, train.batch_size, train.steps) == (
        rank, rate, batch, steps,
    )  # fmt: skip
    assert (train.optimizer, train.weight_decay, train.betas) == ("adamw", 0.1, (0.9, 0.999))
    assert (drawn.sampler, drawn.num_steps, drawn.guidance_scale) == ("ddim", 50, 7.5)
    method = methods.build(recipe.method.name, recipe.method.settings)
    assert isinstance(method, methods.DRaFT)
    assert (method.rewards, method.grad_steps, method.repeats) == ({reward: 1.0}, 1, 2)
    rewards.check_gradients([reward], "method.settings.rewards")
    assert reward not in recipe.evaluate.rewards
    counted = published(recipe.model.path, recipe.train.lora, True)
    assert counted is not None
    needed = max(cost.memory for cost in costs(recipe, counted, 10_000, 500))
    assert needed < GPUS["RTX 4090"].memory * GIB  # as the header says


@pytest.mark.parametrize(("name", "scale"), [("craft-sd35-lora", 4.5), ("craft-flux-lora", 3.5)])
def test_flow_models_train_adapters_beside_weights_as_published(name: str, scale: float) -> None:
    """In bfloat16 from drawing to saving, drawn by the family's own sampler and usual scale."""
    recipe = load_recipe(RECIPES[0].with_name(f"{name}.toml"))
    assert recipe.train.lora.rank > 0
    assert {recipe.model.dtype, recipe.training_dtype, recipe.train.save_dtype} == {"bfloat16"}
    assert recipe.generate.sampler == "auto"
    assert recipe.generate.guidance_scale == scale
    assert (recipe.train.prompt_dropout > 0) == (name == "craft-sd35-lora")
    counted = published(recipe.model.path, recipe.train.lora, True)
    assert counted is not None
    needed = max(cost.memory for cost in costs(recipe, counted, 2000, 500))
    assert needed < GPUS["L40S"].memory * GIB  # as the header says
