"""What a run will need, from counted networks: GPU memory, disk, arithmetic. Loads nothing.

FLOPs are 2 x multiply-add. Every figure is an estimate; the constants say where they come from.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from craftune.config import Recipe, TrainConfig

Number: TypeAlias = int | float


@dataclass(frozen=True)
class Figures:
    """A checkpoint, counted: per image and per prompt, bytes as of 16-bit numbers.

    Attributes:
        denoiser: name of the part that is trained, "unet" or "transformer".
        parameters: part -> number of weights.
        latent_numbers: of one image's latents.
        side: of the images, in pixels.
        guidance_embedded: guidance is an input, so a step is one call; without it, as in a
            de-distilled FLUX.1-dev, one at scale 1 and else two.
        forward_flops: of one call of the denoiser.
        decode_flops: of the VAE.
        text_flops: of all text encoders, one prompt.
        forward_bytes: most activations alive in one call without gradient.
        decode_bytes: the same of the VAE's decoder.
        trained: weights that training changes.
        kept_bytes: activations kept for the backward pass.
    """

    denoiser: str
    parameters: Mapping[str, int]
    latent_numbers: int
    side: int
    guidance_embedded: bool
    forward_flops: int
    decode_flops: int
    text_flops: int
    forward_bytes: int
    decode_bytes: int
    trained: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it: GiB of memory, dense TFLOP/s in bfloat16 and float32."""

    memory: Number
    bfloat16: Number
    float32: Number


GPUS = {
    "RTX 4090": Gpu(24, 165, 83),
    "L40S": Gpu(48, 362, 92),
    "A100 80 GB": Gpu(80, 312, 19.5),
    "H100 80 GB": Gpu(80, 989, 67),
    "H200": Gpu(141, 989, 67),
}
SHARE = {"float32": 0.6, "bfloat16": 0.3, "float16": 0.3}
"""Assumed share of the data sheet's rate, by dtype. Public figures of eager UNets in 16 bit lie
between 17 and 40 % (SD1.5 and SDXL by diffusers on A100 and H100, torch's own attention)."""
REWARDS = {
    "hpsv2.1": (986e6, 382e9),
    "pickscore": (986e6, 382e9),
    "aesthetic": (428e6, 162e9),
}
"""Weights and FLOPs per image with its prompt; ViT-H/14 and ViT-L/14, counted. Others are left out:
next to drawing images, scoring costs little."""
BACKWARD = 2.0
"""Of the forward pass, when all weights are trained; counted: 1.99 to 2.00."""
BACKWARD_LORA = 1.1
"""With the weights frozen, only the path to the adapters; counted: 1.1."""
RECOMPUTED = {"unet": 0.75, "transformer": 1.0}
"""Of the forward pass, under gradient checkpointing; counted."""
AUTOCAST = 1.3
"""Activations kept under autocast over those in pure 16 bit: norms and softmax stay float32."""
RESERVE = 1.5
"""GiB of CUDA context, workspaces and fragmentation."""
PNG_BYTES = 1.7
"""Per pixel, a photograph at compression level 1."""
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
STATE = {"adamw": 8.0, "adamw8bit": 2.0, "adafactor": 0.5}
"""Bytes of optimizer state per trained weight."""
GIB = 2**30


@dataclass(frozen=True)
class StageCost:
    """One stage: images it draws, scores or trains on, FLOPs, bytes of GPU memory and disk."""

    name: str
    images: int
    flops: Number
    memory: Number
    disk: Number
    dtype: str

    def hours(self, gpu: Gpu) -> float:
        """GPU-hours on one GPU of this kind."""
        rate = gpu.float32 if self.dtype == "float32" else gpu.bfloat16
        return self.flops / (rate * 1e12 * SHARE[self.dtype]) / 3600


def costs(recipe: Recipe, figures: Figures, prompts: int, held_out: int) -> list[StageCost]:
    """The stages that cost something, in order.

    Args:
        prompts: that the pool is drawn for.
        held_out: prompts that base and tuned are compared on.
    """
    pool = prompts * (1 + recipe.refine.variants * recipe.generate.seeds_per_variant)
    compared = compared_images(recipe, held_out)
    rewards = (*recipe.score.rewards, *recipe.evaluate.rewards)
    drawing = _drawing_memory(recipe, figures)
    picture = PNG_BYTES * figures.side**2
    dtype = recipe.model.dtype
    return [
        StageCost(
            "generate",
            pool,
            pool * image_flops(recipe, figures),
            drawing,
            pool * (picture + 4 * figures.latent_numbers * recipe.generate.keep_latents),
            dtype,
        ),
        StageCost(
            "score",
            pool,
            pool * _reward_flops(recipe.score.rewards),
            _reward_memory(recipe.score.rewards),
            0,
            "float32",
        ),
        StageCost(
            "train",
            recipe.train.steps * recipe.train.batch_size,
            recipe.train.steps * recipe.train.batch_size * example_flops(recipe.train, figures),
            training_memory(
                recipe.train, figures, micro_batch(recipe.train), recipe.training_dtype
            ),
            _training_disk(recipe.train, figures),
            recipe.train.precision,
        ),
        StageCost(
            "evaluate",
            compared,
            compared * (image_flops(recipe, figures) + _reward_flops(rewards)),
            drawing + _reward_memory(rewards) - RESERVE * GIB,
            compared * picture,
            dtype,
        ),
    ]


def compared_images(recipe: Recipe, held_out: int) -> int:
    """Of base and tuned, and of each scale of the tuning."""
    scaled = min(recipe.evaluate.scale_prompts or held_out, held_out)
    prompts = 2 * held_out + len(recipe.evaluate.scales) * scaled
    return prompts * recipe.evaluate.images_per_prompt


def image_flops(recipe: Recipe, figures: Figures) -> Number:
    """To draw one image, its prompt's encoding included."""
    calls = recipe.generate.num_steps * _branches(recipe, figures)
    return calls * figures.forward_flops + figures.decode_flops + figures.text_flops


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

    Text encoders and VAE leave the GPU before the first step, but everything has to fit while it
    is loaded. Without checkpointing, autocast's 16-bit copies of float32 weights live until the
    backward pass.

    Args:
        dtype: `Recipe.training_dtype`, of what is loaded; what is trained is float32.
    """
    weights = figures.parameters[figures.denoiser]
    fixed = SIZE[dtype] * weights + (4 + STATE[config.optimizer]) * figures.trained
    fixed += 4 * figures.trained * (bool(config.lora.rank) + bool(config.ema_decay))
    half = config.precision == "bfloat16"
    if half and dtype == "float32" and not checkpointing(config):
        fixed += 2 * weights
    kept = figures.kept_bytes * (AUTOCAST if half else 2)
    recomputed = 2 if checkpointing(config) else 1  # one block at a time, about as much
    loaded = SIZE[dtype] * sum(figures.parameters.values())
    return max(fixed + micro * kept * recomputed, loaded) + RESERVE * GIB


def largest_micro_batch(config: TrainConfig, figures: Figures, gpu: Gpu, dtype: str) -> int:
    """The most examples at once, a power of two; 0 where not even one fits."""
    best, size, room = 0, 1, gpu.memory * GIB
    while size <= config.batch_size and training_memory(config, figures, size, dtype) <= room:
        best, size = size, 2 * size
    return best


def _branches(recipe: Recipe, figures: Figures) -> int:
    """Calls of the denoiser per step and image."""
    return 1 if figures.guidance_embedded or recipe.generate.guidance_scale == 1 else 2


def _drawing_memory(recipe: Recipe, figures: Figures) -> Number:
    size, batch = SIZE[recipe.model.dtype], recipe.generate.batch_size
    call = batch * _branches(recipe, figures) * figures.forward_bytes
    activations = max(call, batch * figures.decode_bytes) * size / 2
    return size * sum(figures.parameters.values()) + activations + RESERVE * GIB


def _training_disk(config: TrainConfig, figures: Figures) -> Number:
    state = figures.trained * (4 + STATE[config.optimizer] + (4 if config.ema_decay else 0))
    kept = config.keep_checkpoints or config.steps // config.save_every
    model = SIZE[config.save_dtype] * sum(figures.parameters.values())
    return (kept + 1) * state + model  # one more while the next is being written


def _reward_flops(names: Iterable[str]) -> Number:
    return sum(REWARDS[name][1] for name in names if name in REWARDS)


def _reward_memory(names: Iterable[str]) -> Number:
    """All at once, in float32."""
    return 4 * sum(REWARDS[name][0] for name in names if name in REWARDS) + RESERVE * GIB
