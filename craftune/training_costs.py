"""What training costs: selected images denoised, or the reward's gradient through the sampler."""

from collections.abc import Iterable

from craftune.assumed import (
    AUTOCAST,
    BACKWARD,
    BACKWARD_FROZEN,
    BACKWARD_LORA,
    GIB,
    RECOMPUTED,
    RESERVE,
    REWARDS,
    SIZE,
    STATE,
    Figures,
    Gpu,
    Number,
)
from craftune.config import Recipe, TrainConfig
from craftune.errors import UserError
from craftune.methods import FromExamples, FromPrompts, NoiseCorrection, build
from craftune.methods.drawing import Passes


def planned(recipe: Recipe) -> FromExamples | FromPrompts:
    """The recipe's method.

    Raises:
        UserError: there is no such method or hyper-parameter, or it inverts pictures.
    """
    method = build(recipe.method.name, recipe.method.settings)
    if isinstance(method, NoiseCorrection):
        raise UserError(
            f"method.name: {recipe.method.name!r} inverts pictures, whose cost is not estimated: "
            "about 100 calls of the model per picture; plan with method.name = 'craft' for the rest"
        )
    return method


def training_cost(recipe: Recipe, figures: Figures) -> tuple[Number, Number]:
    """FLOPs of one example in one update; how many of them are in float32 in any case."""
    method = planned(recipe)
    if method.fed_with == "examples":
        return example_flops(recipe.train, figures), 0
    passes = method.passes(recipe.generate.num_steps)
    exact = passes.decoded * (1 + BACKWARD_FROZEN) * reward_flops(method.rewards)
    return drawn_flops(recipe, figures, passes) + exact, exact


def memory(recipe: Recipe, figures: Figures, micro: int) -> Number:
    """Bytes on the GPU while training with `micro` examples at once."""
    method = planned(recipe)
    if method.fed_with == "examples":
        return training_memory(recipe.train, figures, micro, recipe.training_dtype)
    return drawn_memory(recipe, figures, method, micro)


def drawn_flops(recipe: Recipe, figures: Figures, passes: Passes) -> Number:
    """Of one prompt's image in one update, drawn and differentiated; without the rewards."""
    config = recipe.train
    per_step = figures.forward_flops * (branches(recipe, figures) if passes.guided else 1)
    backward = BACKWARD_LORA if config.lora.rank else BACKWARD
    blocks = RECOMPUTED[figures.denoiser] if checkpointing(config) else 0
    calls = passes.forward + passes.again + passes.backward * (backward + blocks)
    decoded = passes.decoded * (1 + BACKWARD_FROZEN) * figures.decode_flops
    return calls * per_step + decoded + figures.text_flops


def example_flops(config: TrainConfig, figures: Figures) -> Number:
    """Of one example in one update: forward, backward and what is recomputed."""
    backward = BACKWARD_LORA if config.lora.rank else BACKWARD
    recomputed = RECOMPUTED[figures.denoiser] if checkpointing(config) else 0
    return figures.forward_flops * (1 + backward + recomputed)


def micro_batch(config: TrainConfig) -> int:
    """Examples per forward and backward pass; 1 for "auto", the least that must fit."""
    return 1 if config.micro_batch == "auto" else min(config.micro_batch, config.batch_size)


def checkpointing(config: TrainConfig) -> bool:
    """Whether activations are recomputed; "auto" is planned so, as it may have to."""
    return config.gradient_checkpointing is not False


def training_memory(config: TrainConfig, figures: Figures, micro: int, dtype: str) -> Number:
    """Bytes on the GPU with `micro` examples at once: weights, gradients, optimizer, activations.

    Of methods on selected images; for the others see `drawn_memory`.

    Text encoders and VAE leave the GPU before the first step, but everything has to fit while it
    is loaded. Without checkpointing, autocast's 16-bit copies of float32 weights live until the
    backward pass.

    Args:
        dtype: `Recipe.training_dtype`, of what is loaded; what is trained is float32.
    """
    fixed = SIZE[dtype] * figures.parameters[figures.denoiser] + _states(config, figures, dtype)
    loaded = SIZE[dtype] * sum(figures.parameters.values())
    return max(fixed + micro * _call_bytes(config, figures), loaded) + RESERVE * GIB


def drawn_memory(recipe: Recipe, figures: Figures, method: FromPrompts, micro: int) -> Number:
    """The same of methods that draw in training: text encoders, VAE and rewards stay there too.

    One step's activations, with guidance those of both branches; where several steps are
    differentiated each is recomputed, and all that grows with them is latents, which count little.
    """
    config, dtype = recipe.train, recipe.training_dtype
    passes = method.passes(recipe.generate.num_steps)
    calls = branches(recipe, figures) if passes.guided else 1
    decoder = figures.decode_kept_bytes * SIZE[dtype] / 2
    kept = sum(REWARDS[name].kept for name in method.rewards if name in REWARDS)
    judged = reward_memory(method.rewards) - RESERVE * GIB
    loaded = SIZE[dtype] * sum(figures.parameters.values()) + judged
    each = passes.at_once * (calls * _call_bytes(config, figures) + decoder + kept)
    return loaded + _states(config, figures, dtype) + micro * each + RESERVE * GIB


def _states(config: TrainConfig, figures: Figures, dtype: str) -> Number:
    """Gradients, optimizer and averages, and 16-bit copies of float32 weights."""
    fixed = (4 + STATE[config.optimizer]) * figures.trained
    fixed += 4 * figures.trained * (bool(config.lora.rank) + bool(config.ema_decay))
    if config.precision == "bfloat16" and dtype == "float32" and not checkpointing(config):
        fixed += 2 * figures.parameters[figures.denoiser]
    return fixed


def _call_bytes(config: TrainConfig, figures: Figures) -> Number:
    """Activations that one call of the denoiser keeps for the backward pass."""
    kept = figures.kept_bytes * (AUTOCAST if config.precision == "bfloat16" else 2)
    return kept * (2 if checkpointing(config) else 1)  # one block at a time, about as much


def largest_micro_batch(recipe: Recipe, figures: Figures, gpu: Gpu) -> int:
    """The most examples at once, a power of two; 0 where not even one fits."""
    best, size, room = 0, 1, gpu.memory * GIB
    while size <= recipe.train.batch_size and memory(recipe, figures, size) <= room:
        best, size = size, 2 * size
    return best


def training_disk(config: TrainConfig, figures: Figures) -> Number:
    """Of checkpoints and the saved model."""
    state = figures.trained * (4 + STATE[config.optimizer] + (4 if config.ema_decay else 0))
    kept = config.keep_checkpoints or config.steps // config.save_every
    model = SIZE[config.save_dtype] * sum(figures.parameters.values())
    return (kept + 1) * state + model  # one more while the next is being written


def branches(recipe: Recipe, figures: Figures) -> int:
    """Calls of the denoiser per step and image."""
    return 1 if figures.guidance_embedded or recipe.generate.guidance_scale == 1 else 2


def reward_flops(names: Iterable[str]) -> Number:
    """Of one image under all of these that are counted."""
    return sum(REWARDS[name].flops for name in names if name in REWARDS)


def reward_memory(names: Iterable[str]) -> Number:
    """All at once, in float32."""
    return 4 * sum(REWARDS[name].parameters for name in names if name in REWARDS) + RESERVE * GIB
