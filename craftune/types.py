"""The few shapes of data that stages, methods, models and the training loop exchange.

Axes: b batch; ... latent axes of a family, e.g. (c, h, w); h w image pixels.
Images are RGB: a PIL picture where bytes matter, or float32 in [0, 1], `b 3 h w`.
Latents are scaled (and shifted) as the family's denoiser takes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, Num
from PIL import Image
from torch import Tensor, nn

from craftune.diffusion import Grid, Schedule

Metrics: TypeAlias = dict[str, float]
"""Scalars for the log, e.g. {"loss": 0.69, "error": 0.11}."""

Guidance = Literal["classifier-free", "embedded", "none"]
"""How a guidance scale reaches a network: by a second call with the empty prompt; as its input,
`cond.tensors["guidance"]`, one number per row; or not at all."""


@dataclass(frozen=True)
class Cond:
    """Encoded prompts: all that a family's denoiser needs, one row per prompt.

    Attributes:
        tensors: name -> `[b, ...]`; "tokens" `[b, length, width]` in every family, more where
            the family needs it ("pooled" and "time_ids" for SDXL, "pooled" for SD3 and FLUX.1).
            "guidance" `[b]` is the scale of a network that has guidance embedded.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Int[Tensor, " n"] | slice) -> "Cond":
        """The prompts at these positions, in this order; a position may repeat."""
        return Cond({name: tensor[index] for name, tensor in self.tensors.items()})

    def having(self, name: str, tensor: Num[Tensor, "b ..."]) -> "Cond":
        """The same with one more tensor."""
        return Cond({**self.tensors, name: tensor})

    def to(self, device: torch.device) -> "Cond":
        """The same on another device."""
        return Cond({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence["Cond"]) -> "Cond":
        """Several batches of prompts as one."""
        return Cond({k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors})


@runtime_checkable
class Denoiser(Protocol):
    """A network and its noise schedule. The policy is trained, the reference is frozen."""

    @property
    def schedule(self) -> Schedule:
        """Noise levels and prediction target of the family."""
        ...

    @property
    def network(self) -> nn.Module:
        """Where the trainable weights live."""
        ...

    def __call__(
        self, x_t: Float[Tensor, "b ..."], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b ..."]:
        """Prediction of the schedule's target at (x_t, t), given encoded prompts.

        In training t indexes the schedule; a sampler of a family with continuous time also
        calls between timesteps.
        """
        ...


@runtime_checkable
class Inputs(Protocol):
    """How a reward's network sees a picture, by its size."""

    def plan(self, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
        """For pictures of (width, height): a hashable function to one input of the network.

        Plans that are equal give equal inputs, so rewards share what equal plans made.
        """
        ...


@dataclass(frozen=True)
class PromptLimit:
    """How much of a prompt a reward reads.

    Attributes:
        tokens: at most so many, start and end included.
        cuts: whether a prompt is longer.
    """

    tokens: int
    cuts: Callable[[str], bool]


@dataclass(frozen=True)
class Reward:
    """A function images, prompts -> one number per image, higher is better.

    Attributes:
        name: the name in recipes, tables and reports.
        score: PIL images (any size and mode) and their prompts -> float32 `[b]`, raw units, no
            gradient. This is the path whose numbers are stored and compared.
        identity: what was measured with: name, version, sha256 of the weights, preprocessing,
            dtype and whatever else changes the number. Scores of different identities never mix.
        gradient: float images `[b, 3, h, w]` in [0, 1] and prompts -> `[b]` with a gradient to
            the pixels; None where the reward has none.
        uses_prompt: False where the prompt does not change the score.
        inputs: how the network sees a picture; None where `score` needs the picture itself.
        score_inputs: inputs, stacked, and prompts -> what `score` gives; None without `inputs`.
        limit: how much of a prompt is read; None where all of it is.
    """

    name: str
    score: Callable[[list[Image.Image], list[str]], Tensor]
    identity: Mapping[str, str]
    gradient: Callable[[Tensor, list[str]], Tensor] | None = None
    uses_prompt: bool = True
    inputs: Inputs | None = None
    score_inputs: Callable[[Tensor, list[str]], Tensor] | None = None
    limit: PromptLimit | None = None


@dataclass(frozen=True)
class Encoded:
    """What a VAE makes of images: a normal distribution of latents, in the denoiser's units.

    Attributes:
        std: None where the VAE has no distribution; its latents are then `mean`.
    """

    mean: Float[Tensor, "b ..."]
    std: Float[Tensor, "b ..."] | None


@dataclass(frozen=True)
class Model:
    """A text-to-image checkpoint, taken apart into what craftune needs of it.

    Attributes:
        family: its name in `craftune.models.FAMILIES`.
        identity: which weights these are: path or hub id, revision, sha256.
        denoiser: the network that is trained, and its schedule.
        latent_shape: of one image, e.g. (4, 64, 64).
        encode_prompts: texts -> `Cond`; the empty text is the unconditional branch.
        decode: latents `[b, ...]` -> images float32 `[b, 3, h, w]` in [0, 1], with gradient.
        encode_images: images float32 `[b, 3, h, w]` in [0, 1] -> `Encoded`, no gradient.
        grid: sampler name, number of steps -> the noise levels the family samples at.
        samplers: those that `grid` admits, the family's own first; it refuses others.
        guidance: how the guidance scale takes effect.
        lora_targets: module names that LoRA adapts by default.
        save: (folder, network, dtype) writes the whole pipeline with this network's weights in
            a layout that the family's diffusers pipeline loads.
        save_lora: (folder, network) writes the network's adapters as
            pytorch_lora_weights.safetensors, for `load_lora_weights`.
        move_rest: (device) moves all networks but the denoiser there: text encoders and VAE need
            no room on the GPU while it trains. They work again once they are back.
    """

    family: str
    identity: Mapping[str, str]
    denoiser: Denoiser
    latent_shape: tuple[int, ...]
    encode_prompts: Callable[[list[str]], Cond]
    decode: Callable[[Tensor], Tensor]
    encode_images: Callable[[Tensor], Encoded]
    grid: Callable[[str, int], Grid]
    samplers: tuple[str, ...]
    lora_targets: tuple[str, ...]
    save: Callable[[Path, nn.Module, torch.dtype], None]
    save_lora: Callable[[Path, nn.Module], None]
    move_rest: Callable[[torch.device], None]
    guidance: Guidance = "classifier-free"


@runtime_checkable
class Rows(Protocol):
    """What the loop can split into micro-batches: `Examples`, `Draws`, pairs, prompts."""

    def rows(self, index: slice) -> "Rows":
        """Part of the batch."""
        ...


Batch = TypeVar("Batch", bound=Rows, contravariant=True)
Drawn = TypeVar("Drawn", bound=Rows)


@runtime_checkable
class Method(Protocol[Batch, Drawn]):
    """An alignment method: a frozen dataclass of hyper-parameters, its draws and its loss.

    `Batch` says what it is fed with: `Examples`, preference pairs, or `Prompts` to sample from.
    """

    @property
    def needs_reference(self) -> bool:
        """Whether `loss` reads the frozen starting network."""
        ...

    def draw(self, schedule: Schedule, batch: Batch, rng: torch.Generator) -> Drawn:
        """All randomness of one step; the loss itself is deterministic."""
        ...

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Batch, draws: Drawn
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Mean over the batch of what is minimised, and scalars to log.

        The scalars are means over the batch too, so that those of micro-batches add up.
        """
        ...

    def check(self, metrics: Metrics) -> None:
        """Called with the whole batch's scalars before the optimizer steps.

        Raises:
            FloatingPointError: training has gone wrong; says what to change.
        """
        ...
