"""`craftune plan`: hand-worked costs, and the page."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny import call, tiny

from craftune.assumed import AUTOCAST, GIB, GPUS, RESERVE, SHARE, Figures, Gpu, StageCost
from craftune.config import LoraConfig, MethodConfig, Recipe, TrainConfig
from craftune.costs import costs
from craftune.recipes import load_recipe
from craftune.training_costs import example_flops, largest_micro_batch, memory, training_memory

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


def test_the_micro_batch_that_fits(recipe: Recipe) -> None:
    config, least = dataclasses.replace(PLAIN, batch_size=64), RESERVE + 0.1
    job = dataclasses.replace(recipe, train=config)
    assert largest_micro_batch(job, FIGURES, Gpu(least + 80, 1, 1)) == 4
    assert largest_micro_batch(job, FIGURES, Gpu(least + 79, 1, 1)) == 2
    assert largest_micro_batch(job, FIGURES, Gpu(least, 1, 1)) == 0
    assert largest_micro_batch(job, FIGURES, Gpu(10**6, 1, 1)) == 64


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


def drawn(recipe: Recipe, name: str, **settings: Any) -> Recipe:
    """With a method that draws its own images, adapters, and two at once of batches of 8."""
    train = dataclasses.replace(recipe.train, lora=LoraConfig(rank=4), micro_batch=2, batch_size=8)
    method = MethodConfig(name, {"rewards": {"pickscore": 1.0}, **settings})
    return dataclasses.replace(recipe, method=method, train=train)


JUDGED = 2 * 382e9
"""PickScore, forward and back to the picture."""


@pytest.mark.parametrize(
    ("name", "settings", "calls", "decoded"),
    [
        # 10 steps of 2 branches; the last step's backward pass through adapters is 1.1 forward
        ("draft", {}, 2 * (10 + 1.1), 1),
        # three steps back, each made again
        ("draft", {"grad_steps": 3}, 2 * (10 + 3 + 3 * 1.1), 1),
        ("draft", {"grad_steps": 0}, 2 * (10 + 10 + 10 * 1.1), 1),
        # 10 steps, then the last one twice more, both decoded
        ("draft", {"repeats": 2}, 2 * (10 + 2 + 2 * 1.1), 2),
        # tau is 7, 8 or 9, and then one step; unguided
        ("refl", {}, 8 + 1 + 1.1, 1),
        ("refl", {"guided": True}, 2 * (8 + 1 + 1.1), 1),
        # 1 to 10 steps back, 5.5 on average; one of ten times a single one, not made again
        ("alignprop", {}, 2 * (10 + 5.5 * 1.1 + 5.5 - 0.1), 1),
    ],
)
def test_drawing_in_training_by_hand(
    recipe: Recipe, name: str, settings: dict[str, Any], calls: float, decoded: int
) -> None:
    found = by_name(drawn(recipe, name, **settings))
    assert list(found) == ["train", "evaluate"]
    assert found["train"].images == 64
    rewarded = 64 * decoded * JUDGED
    assert found["train"].exact == pytest.approx(rewarded)
    wanted = 64 * (calls * 7 + decoded * 2 * 5 + 3)
    assert found["train"].flops - rewarded == pytest.approx(wanted, abs=0.1)
    assert found["evaluate"].flops == pytest.approx(120 * (10 * 2 * 7 + 5 + 3 + 382e9))


def test_recomputed_blocks_add_to_each_differentiated_step(recipe: Recipe) -> None:
    """On top of K > 1's own recomputing: 0.75 of a call for each of its three steps."""
    job = drawn(recipe, "draft", grad_steps=3)
    again = dataclasses.replace(job.train, gradient_checkpointing=True)
    with_blocks = by_name(dataclasses.replace(job, train=again))["train"]
    without = by_name(job)["train"]
    assert with_blocks.flops - without.flops == pytest.approx(64 * 2 * 3 * 0.75 * 7, abs=0.1)


def test_memory_of_drawing_in_training_by_hand(recipe: Recipe) -> None:
    """Everything stays on the GPU; a step's two branches, the decoder and the reward are kept."""
    figures = dataclasses.replace(FIGURES, trained=10, decode_kept_bytes=GIB)
    judge = 64 * 257 * 1280 * 32
    fixed = 4 * 1110 + (4 + 8 + 4) * 10 + 4 * 986e6 + RESERVED
    each = 2 * 2 * 10 * GIB + 2 * GIB + judge
    for grad_steps in (1, 3, 0):
        job = drawn(recipe, "draft", grad_steps=grad_steps)
        assert memory(job, figures, 2) == pytest.approx(fixed + 2 * each, rel=1e-12)
    twice = drawn(recipe, "draft", repeats=2)
    assert memory(twice, figures, 2) == pytest.approx(fixed + 4 * each, rel=1e-12)
    alone = memory(drawn(recipe, "refl"), figures, 2)
    assert alone == pytest.approx(fixed + 2 * (each - 2 * 10 * GIB), rel=1e-12)
    room = (fixed + 4 * each) / GIB + 0.1
    assert largest_micro_batch(drawn(recipe, "draft"), figures, Gpu(room, 1, 1)) == 4
    assert by_name(drawn(recipe, "draft"), figures)["train"].memory == pytest.approx(
        fixed + 2 * each
    )


def test_rewards_take_float32_s_time_whatever_the_precision() -> None:
    """A second of bfloat16's arithmetic, and one of float32's."""
    gpu = Gpu(80, 989, 67)
    half, exact = 989e12 * 0.3, 67e12 * 0.6
    cost = StageCost("train", 1, half + exact, 0, 0, "bfloat16", exact)
    assert cost.hours(gpu) == pytest.approx(2 / 3600)


def test_states_and_rounds_by_hand(recipe: Recipe) -> None:
    """Two states of 16 numbers beside the latents; three rounds of pool and training."""
    once = by_name(recipe)
    kept = dataclasses.replace(recipe.generate, keep_states=(3, 6))
    method = MethodConfig("pgraft", {"after": 3})
    stored = dataclasses.replace(recipe, generate=kept, method=method)
    found = by_name(stored)
    assert found["generate"].disk == pytest.approx(500 * (1.7 * 100 + 3 * 4 * 16))
    assert found["generate"].memory == once["generate"].memory
    assert found["evaluate"].memory == once["evaluate"].memory + 4 * 1110  # a whole base beside
    thrice = dataclasses.replace(stored, run=dataclasses.replace(stored.run, rounds=3))
    rounds = by_name(thrice)
    assert rounds["generate"].images == 3 * 500
    assert rounds["generate"].memory == once["generate"].memory + 4 * 1110
    for name in ("generate", "score", "train"):
        assert rounds[name].flops == 3 * found[name].flops
        assert rounds[name].disk == 3 * found[name].disk
    assert rounds["evaluate"] == found["evaluate"]


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
