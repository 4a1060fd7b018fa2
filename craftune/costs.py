"""What a run will need, from counted networks: GPU memory, disk, arithmetic. Loads nothing."""

from dataclasses import replace

from craftune.assumed import GIB, PNG_BYTES, RESERVE, SIZE, Figures, Number, StageCost
from craftune.config import Recipe
from craftune.methods import PGRAFT, FromExamples, FromPrompts
from craftune.training_costs import (
    branches,
    memory,
    micro_batch,
    planned,
    reward_flops,
    reward_memory,
    training_cost,
    training_disk,
)


def costs(recipe: Recipe, figures: Figures, prompts: int, held_out: int) -> list[StageCost]:
    """The stages that cost something, in order.

    Args:
        prompts: that the pool is drawn for.
        held_out: prompts that base and tuned are compared on.
    """
    method = planned(recipe)
    pool, training = _pool(recipe, figures, prompts), _training(recipe, figures)
    rounds = recipe.run.rounds if method.fed_with == "examples" else 1
    repeated = [_times(cost, rounds) for cost in (*pool, training)]
    own = method.rewards if method.fed_with == "prompts" else ()
    rewards = tuple(dict.fromkeys((*own, *recipe.score.rewards, *recipe.evaluate.rewards)))
    images = compared_images(recipe, held_out)
    evaluation = StageCost(
        "evaluate",
        images,
        images * (image_flops(recipe, figures) + reward_flops(rewards)),
        _drawing_memory(recipe, figures, method) + reward_memory(rewards) - RESERVE * GIB,
        images * PNG_BYTES * figures.side**2,
        recipe.model.dtype,
    )
    kept = ("generate", "score", "train") if method.fed_with == "examples" else ("train",)
    return [*(cost for cost in repeated if cost.name in kept), evaluation]


def _pool(recipe: Recipe, figures: Figures, prompts: int) -> list[StageCost]:
    """Of one round: drawn, with its latents and states in float32, and scored."""
    pool = prompts * (1 + recipe.refine.variants * recipe.generate.seeds_per_variant)
    method = planned(recipe)
    stored = recipe.generate.keep_latents + len(recipe.generate.keep_states)
    drawn = PNG_BYTES * figures.side**2 + 4 * figures.latent_numbers * stored
    started = method if recipe.run.rounds > 1 else None
    return [
        StageCost(
            "generate",
            pool,
            pool * image_flops(recipe, figures),
            _drawing_memory(recipe, figures, started),
            pool * drawn,
            recipe.model.dtype,
        ),
        StageCost(
            "score",
            pool,
            pool * reward_flops(recipe.score.rewards),
            reward_memory(recipe.score.rewards),
            0,
            "float32",
        ),
    ]


def _training(recipe: Recipe, figures: Figures) -> StageCost:
    """Of one round."""
    examples = recipe.train.steps * recipe.train.batch_size
    each, exact = training_cost(recipe, figures)
    return StageCost(
        "train",
        examples,
        examples * each,
        memory(recipe, figures, micro_batch(recipe.train)),
        training_disk(recipe.train, figures),
        recipe.train.precision,
        examples * exact,
    )


def _times(cost: StageCost, rounds: int) -> StageCost:
    """All rounds of it; each keeps its files."""
    return replace(
        cost,
        images=rounds * cost.images,
        flops=rounds * cost.flops,
        disk=rounds * cost.disk,
        exact=rounds * cost.exact,
    )


def compared_images(recipe: Recipe, held_out: int) -> int:
    """Of base and tuned, and of each scale of the tuning."""
    scaled = min(recipe.evaluate.scale_prompts or held_out, held_out)
    prompts = 2 * held_out + len(recipe.evaluate.scales) * scaled
    return prompts * recipe.evaluate.images_per_prompt


def image_flops(recipe: Recipe, figures: Figures) -> Number:
    """To draw one image, its prompt's encoding included."""
    calls = recipe.generate.num_steps * branches(recipe, figures)
    return calls * figures.forward_flops + figures.decode_flops + figures.text_flops


def _drawing_memory(
    recipe: Recipe, figures: Figures, method: FromExamples | FromPrompts | None
) -> Number:
    """Args: method: that tuned what draws; P-GRAFT's is drawn with beside a whole base."""
    size, batch = SIZE[recipe.model.dtype], recipe.generate.batch_size
    call = batch * branches(recipe, figures) * figures.forward_bytes
    activations = max(call, batch * figures.decode_bytes) * size / 2
    models = 2 if isinstance(method, PGRAFT) else 1
    return models * size * sum(figures.parameters.values()) + activations + RESERVE * GIB
