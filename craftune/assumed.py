"""What a plan rests on: a checkpoint's counted figures, GPUs' data sheets, assumed constants.

FLOPs are 2 x multiply-add. Every figure is an estimate; the constants say where they come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

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
        decode_kept_bytes: its activations kept for the backward pass to the latents.
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
    decode_kept_bytes: int = 0
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


@dataclass(frozen=True)
class Judge:
    """A reward, counted: weights, FLOPs per image with its prompt, and bytes that the backward pass
    to one image keeps, in float32."""

    parameters: Number
    flops: Number
    kept: Number


_VIT_H = Judge(986e6, 382e9, 64 * 257 * 1280 * 32)
REWARDS = {
    "hpsv2.1": _VIT_H,
    "hpsv2.0": _VIT_H,
    "pickscore": _VIT_H,
    "aesthetic": Judge(428e6, 162e9, 64 * 257 * 1024 * 24),
}
"""ViT-H/14 and ViT-L/14. Others are left out: next to drawing images, scoring costs little. What is
kept is 16 numbers per token, width and layer (Korthikanti et al. 2022, arXiv:2205.05198, section
4.1, without dropout and the matrix of all pairs)."""
BACKWARD = 2.0
"""Of the forward pass, when all weights are trained; counted: 1.99 to 2.00."""
BACKWARD_LORA = 1.1
"""With the weights frozen, only the path to the adapters; counted: 1.1."""
BACKWARD_FROZEN = 1.0
"""To the input alone, as through decoder and rewards; counted of SD1.5's decoder: 1.01."""
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
    """One stage: images it draws, scores or trains on, FLOPs, bytes of GPU memory and disk.

    Attributes:
        dtype: of the arithmetic, but for `exact` FLOPs of it, which are in float32 in any case.
    """

    name: str
    images: int
    flops: Number
    memory: Number
    disk: Number
    dtype: str
    exact: Number = 0

    def hours(self, gpu: Gpu) -> float:
        """GPU-hours on one GPU of this kind."""
        rate = gpu.float32 if self.dtype == "float32" else gpu.bfloat16
        seconds = (self.flops - self.exact) / (rate * SHARE[self.dtype])
        return (seconds + self.exact / (gpu.float32 * SHARE["float32"])) / 1e12 / 3600
