"""`craftune plan`: hand-worked costs, and the page."""

import dataclasses
from pathlib import Path

import pytest
from tiny import call, tiny

from craftune.config import LoraConfig, Recipe, TrainConfig
from craftune.costs import (
    AUTOCAST,
    GIB,
    GPUS,
    RESERVE,
    SHARE,
    Figures,
    Gpu,
    StageCost,
    costs,
    example_flops,
    largest_micro_batch,
    training_memory,
)
from craftune.recipes import load_recipe

FIGURES = Figures(
    denoiser="unet",
    parameters={"unet": 1000, "vae": 100, "text_encoder": 10},
    latent_numbers=16,
    side=10,
    guidance_embedded=False,
    forward_flops=7,
    decode_flops=5,
    text_flops=3,
    forward_bytes=2_000,
    decode_bytes=3_000,
    trained=1000,
    kept_bytes=10 * GIB,
)
RESERVED = RESERVE * GIB
PLAIN = TrainConfig(gradient_checkpointing=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """4 + 1 images a prompt, 10 steps with guidance; 8 x 6 examples."""
    settings = {
        "refine.variants": 2,
        "generate.seeds_per_variant": 2,
        "generate.num_steps": 10,
        "generate.guidance_scale": 7.5,
        "generate.batch_size": 4,
        "train.steps": 8,
        "train.batch_size": 6,
        "train.gradient_checkpointing": "false",
        "evaluate.images_per_prompt": 3,
    }
    return load_recipe(tiny(tmp_path).recipe, [f"{k}={v}" for k, v in settings.items()])


def by_name(recipe: Recipe, figures: Figures = FIGURES) -> dict[str, StageCost]:
    return {cost.name: cost for cost in costs(recipe, figures, prompts=100, held_out=20)}


def test_images_and_flops_by_hand(recipe: Recipe) -> None:
    found = by_name(recipe)
    image = 10 * 2 * 7 + 5 + 3
    assert (found["generate"].images, found["generate"].flops) == (500, 500 * image)
    assert (found["train"].images, found["train"].flops) == (48, 48 * 3 * 7)
    assert (found["evaluate"].images, found["evaluate"].flops) == (120, 120 * image)


@pytest.mark.parametrize(("first", "images"), [(0, 120 + 2 * 60), (5, 120 + 2 * 15), (99, 240)])
def test_each_scale_costs_as_much_as_the_tuned_model(
    recipe: Recipe, first: int, images: int
) -> None:
    """2 x 20 prompts x 3 images, and 20 x 3 more per scale, or 5 x 3."""
    wanted = dataclasses.replace(recipe.evaluate, scales=(0.25, 0.5), scale_prompts=first)
    found = by_name(dataclasses.replace(recipe, evaluate=wanted))["evaluate"]
    assert (found.images, found.flops) == (images, images * (10 * 2 * 7 + 5 + 3))
    assert found.disk == pytest.approx(images * 1.7 * 100)


def test_guidance_that_is_an_input_is_one_call(recipe: Recipe) -> None:
    embedded = dataclasses.replace(FIGURES, guidance_embedded=True)
    assert by_name(recipe, embedded)["generate"].flops == 500 * (10 * 7 + 5 + 3)
    unguided = dataclasses.replace(
        recipe, generate=dataclasses.replace(recipe.generate, guidance_scale=1.0)
    )
    assert by_name(unguided)["generate"].flops == 500 * (10 * 7 + 5 + 3)


def test_memory_of_drawing_by_hand(recipe: Recipe) -> None:
    """Float32 doubles the counted 16-bit bytes; a guided call holds two images each."""
    call, decode = 2 * 4 * 2 * 2_000, 2 * 4 * 3_000
    assert by_name(recipe)["generate"].memory == 4 * 1110 + max(call, decode) + RESERVED


def test_memory_of_training_by_hand() -> None:
    kept = 10 * GIB
    assert training_memory(PLAIN, FIGURES, 2, "float32") == 16 * 1000 + 2 * 2 * kept + RESERVED
    half = dataclasses.replace(PLAIN, precision="bfloat16", ema_decay=0.9)
    expected = (16 + 4 + 2) * 1000 + 2 * AUTOCAST * kept + RESERVED
    assert training_memory(half, FIGURES, 2, "float32") == pytest.approx(expected, rel=1e-12)
    adapters = dataclasses.replace(FIGURES, trained=10)
    lora = dataclasses.replace(PLAIN, lora=LoraConfig(rank=4))
    assert training_memory(lora, adapters, 1, "float32") == (
        4 * 1000 + 16 * 10 + 2 * kept + RESERVED
    )


def test_a_frozen_base_in_half_the_bytes() -> None:
    """No 16-bit copies beside it; the adapters have weights, gradients, moments in float32."""
    config = dataclasses.replace(PLAIN, lora=LoraConfig(rank=4), precision="bfloat16")
    figures = dataclasses.replace(FIGURES, trained=10, kept_bytes=0)
    found = [training_memory(config, figures, 1, dtype) for dtype in ("float32", "bfloat16")]
    assert found[0] - RESERVED == (4 + 2) * 1000 + 16 * 10
    assert found[1] - RESERVED == 2 * 1110 == max(2 * 1110, 2 * 1000 + 16 * 10)


def test_what_adapters_recomputing_and_other_optimizers_cost_by_hand() -> None:
    lora = dataclasses.replace(PLAIN, lora=LoraConfig(rank=4))
    again = dataclasses.replace(PLAIN, gradient_checkpointing=True)
    transformer = dataclasses.replace(FIGURES, denoiser="transformer")
    assert example_flops(PLAIN, FIGURES) == 7 * 3
    assert example_flops(lora, FIGURES) == pytest.approx(7 * 2.1)
    assert example_flops(again, FIGURES) == pytest.approx(7 * 3.75)
    assert example_flops(again, transformer) == 7 * 4
    kept = 2 * 10 * GIB  # float32, and as much again for the block that is recomputed
    assert training_memory(again, FIGURES, 3, "float32") == 16 * 1000 + 3 * 2 * kept + RESERVED
    for name, state in (("adamw8bit", 2), ("adafactor", 0.5)):
        other = dataclasses.replace(PLAIN, optimizer=name)
        assert training_memory(other, FIGURES, 1, "float32") == (8 + state) * 1000 + kept + RESERVED


def test_memory_of_scoring_counts_each_reward_and_the_reserve_once(recipe: Recipe) -> None:
    judged = dataclasses.replace(
        recipe,
        score=dataclasses.replace(recipe.score, rewards=("hpsv2.1", "aesthetic")),
        evaluate=dataclasses.replace(recipe.evaluate, rewards=("pickscore",)),
    )
    found = by_name(judged)
    assert found["score"].flops == 500 * (382e9 + 162e9)
    assert found["score"].memory == 4 * (986e6 + 428e6) + RESERVED
    assert found["evaluate"].memory == found["generate"].memory + 4 * (986e6 + 428e6 + 986e6)


def test_the_whole_checkpoint_has_to_fit_while_it_loads() -> None:
    big = dataclasses.replace(FIGURES, kept_bytes=0, parameters={"unet": 1000, "t5": 10**10})
    assert training_memory(PLAIN, big, 1, "float32") == 4 * (10**10 + 1000) + RESERVED


def test_the_micro_batch_that_fits() -> None:
    config, least = dataclasses.replace(PLAIN, batch_size=64), RESERVE + 0.1
    assert largest_micro_batch(config, FIGURES, Gpu(least + 80, 1, 1), "float32") == 4
    assert largest_micro_batch(config, FIGURES, Gpu(least + 79, 1, 1), "float32") == 2
    assert largest_micro_batch(config, FIGURES, Gpu(least, 1, 1), "float32") == 0
    assert largest_micro_batch(config, FIGURES, Gpu(10**6, 1, 1), "float32") == 64


def test_disk_by_hand(recipe: Recipe) -> None:
    found = by_name(recipe)
    assert found["generate"].disk == pytest.approx(500 * (1.7 * 100 + 4 * 16))
    bare = dataclasses.replace(recipe.generate, keep_latents=False)
    without = by_name(dataclasses.replace(recipe, generate=bare))
    assert without["generate"].disk == pytest.approx(500 * 1.7 * 100)
    # two checkpoints and one in the making, 4 + 8 bytes a weight; the model in float16
    assert found["train"].disk == 3 * 12 * 1000 + 2 * 1110
    assert found["evaluate"].disk == pytest.approx(120 * 1.7 * 100)


def test_hours_depend_on_the_dtype() -> None:
    cost = StageCost("train", 1, 989e12 * 0.3 * 3600, 0, 0, "bfloat16")
    assert cost.hours(GPUS["H100 80 GB"]) == pytest.approx(1)
    slow = dataclasses.replace(cost, dtype="float32").hours(GPUS["H100 80 GB"])
    assert slow == pytest.approx(989 * SHARE["bfloat16"] / (67 * SHARE["float32"]))


def test_the_page_fits_a_terminal_and_loads_no_weights(tmp_path: Path) -> None:
    files = tiny(tmp_path)
    model = tmp_path / "configs"
    source = Path(load_recipe(files.recipe).model.path)
    for path in source.glob("*/config.json"):
        (model / path.parent.name).mkdir(parents=True)
        (model / path.parent.name / "config.json").write_bytes(path.read_bytes())
    answer = call(["plan", files.recipe, "--set", f"model.path={model}"], tmp_path)
    assert answer.status == 0
    lines = answer.out.splitlines()
    assert [line for line in lines[1:] if len(line) > 80] == []
    rows = {line.split()[0]: line.split() for line in lines if line}
    # twelve prompts, four of them held out: 8 x (1 + 2) images
    assert rows["generate"][1] == "24"
    assert rows["evaluate"][1] == "16"
    assert rows["train"][1] == "12"
    assert "estimated" in answer.out
    assert "Most of it is generate" in answer.out
    assert "fits" in " ".join(rows["H200"])


def test_prompts_that_cannot_be_counted_are_named(tmp_path: Path) -> None:
    files = tiny(tmp_path)
    somewhere = "prompts.source=hf://OWNER/NAME"
    answer = call(["plan", files.recipe, "--set", somewhere], tmp_path)
    assert "--set prompts.limit=N" in answer.complaint
    planned = call(["plan", files.recipe, "--set", somewhere, "--set", "prompts.limit=9"], tmp_path)
    assert planned.status == 0
    assert " 27  images drawn" in planned.out
