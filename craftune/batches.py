"""What the training loop is fed with: examples and prompts, and the randomness of a step.

Axes: b batch; ... latent axes of a family, e.g. (c, h, w); h w image pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from craftune.diffusion import Grid
from craftune.types import Cond


@dataclass(frozen=True)
class Level:
    """How noisy an example's latents are, and from where on they are trained on.

    Attributes:
        alpha: signal scale; 1 for clean latents.
        sigma: noise scale; 0 for clean latents.
        least: the lowest timestep (index of the schedule) that they are trained on at.
    """

    alpha: float = 1.0
    sigma: float = 0.0
    least: int = 0


@dataclass(frozen=True)
class Examples:
    """Selected images, each with its weight. Fed to SFT, CRAFT, GRAFT and P-GRAFT."""

    latents: Float[Tensor, "b ..."]
    cond: Cond
    weight: Float[Tensor, " b"]
    """Factor in the loss, as the method's `weigh` made it from the advantage."""
    std: Float[Tensor, "b ..."] | None = None
    """Where latents are the mean of what a VAE made of pictures: its standard deviation."""
    level: Level = Level()
    """Of all the latents."""

    def rows(self, index: Int[Tensor, " n"] | slice) -> "Examples":
        """Part of the batch: a micro-batch, or examples at these positions."""
        std = None if self.std is None else self.std[index]
        latents, cond = self.latents[index], self.cond.rows(index)
        return Examples(latents, cond, self.weight[index], std, self.level)

    def drawn(self, rng: torch.Generator) -> "Examples":
        """With latents drawn from their distribution, where they have one; the rng is the CPU's."""
        if self.std is None:
            return self
        noise = torch.randn(self.latents.shape, generator=rng).to(self.latents)
        return replace(self, latents=self.latents + self.std * noise, std=None)


@dataclass(frozen=True)
class Draws:
    """The randomness of one optimizer step, drawn for the whole batch at once.

    A method draws it before the batch is split, so the micro-batch size changes no number.
    """

    t: Int[Tensor, " b"]
    noise: Float[Tensor, "b ..."]

    def rows(self, index: slice) -> "Draws":
        """Part of the batch: a micro-batch."""
        return Draws(self.t[index], self.noise[index])


@dataclass(frozen=True)
class Drawing:
    """How images are drawn from a live policy, and what they are worth.

    Attributes:
        grid: the sampler's steps, as at inference.
        sampler: its name.
        guidance_scale: 1 where guidance takes no second call of the network.
        latent_shape: of one image.
        empty: the encoded empty prompt, one row.
        decode: latents -> images `[b, 3, h, w]` in [0, 1], with gradient.
        reward: images and their prompts -> the number `[b]` that is maximised, with a gradient to
            the pixels, and each reward's own `[b]` by name.
    """

    grid: Grid
    sampler: str
    guidance_scale: float
    latent_shape: tuple[int, ...]
    empty: Cond
    decode: Callable[[Tensor], Tensor]
    reward: Callable[[Tensor, list[str]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Prompts:
    """Prompts to draw from. Fed to methods that need the reward's gradient."""

    texts: list[str]
    cond: Cond
    drawing: Drawing

    def rows(self, index: slice) -> "Prompts":
        """Part of the batch: a micro-batch."""
        return Prompts(self.texts[index], self.cond.rows(index), self.drawing)

    def repeated(self, n: int) -> "Prompts":
        """Each prompt n times in a row."""
        index = torch.arange(len(self.texts)).repeat_interleave(n)
        return Prompts([self.texts[i] for i in index], self.cond.rows(index), self.drawing)


@dataclass(frozen=True)
class Starts:
    """The randomness of drawing one image per prompt.

    Attributes:
        noise: where the sampler starts.
        again: further noise, n per image; n = 0 where none is needed.
        cut: a step of the sampler, one for the whole batch, where the method draws one.
    """

    noise: Float[Tensor, "b ..."]
    again: Float[Tensor, "b n ..."]
    cut: int = 0

    def rows(self, index: slice) -> "Starts":
        """Part of the batch: a micro-batch."""
        return Starts(self.noise[index], self.again[index], self.cut)
