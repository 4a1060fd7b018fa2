"""Inverse noise correction: learn the noise that a model's own few steps need; no reward.

Anil et al. 2025, arXiv:2510.02692, Section 4 and Algorithm 6. With G the map of a deterministic
sampler from noise to latents and Q the law of G^-1(data), a start from Q instead of N(0, I) gives
data: G is a bijection. The model stays as it is. A small flow, the corrector, learns Q by flow
matching from N(0, I):

    L = E || v(cos(a) z + sin(a) noise, a) - (-sin(a) z + cos(a) noise) ||^2,   z ~ Q, a uniform

Q is close to N(0, I) where the model is good. The path is trigonometric, not the paper's straight
one: `craftune.noise.corrector` says why.

Fed with `InvertedNoise`, which a run makes of pictures in its stage `generate`. No reference; one
forward and backward pass of the corrector per example, none of the model.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from craftune.batches import Draws
from craftune.config import STRICT
from craftune.diffusion import Schedule
from craftune.methods.denoising import squared_error
from craftune.types import Cond, Denoiser, Metrics


@dataclass(frozen=True)
class InvertedNoise:
    """What a corrector learns from: noises as `invert` found them, not standardised anew."""

    noise: Float[Tensor, "b ..."]
    cond: Cond

    def rows(self, index: slice) -> "InvertedNoise":
        """Part of the batch: a micro-batch."""
        return InvertedNoise(self.noise[index], self.cond.rows(index))


@settings(frozen=True, config=STRICT)
class NoiseCorrection:
    """Hyper-parameters and training step of inverse noise correction."""

    fed_with: ClassVar[Literal["pictures"]] = "pictures"

    source: str = ""
    """In a recipe: pictures with their prompts, as `craftune score` reads them: a folder with
    metadata.jsonl, a Parquet file, or a folder of those. "craftune:shapes/world" draws them of the
    training prompts, for the embedded model."""
    pictures: Annotated[int, Field(ge=1)] = 1000
    """Inverted at most; thousands are better. Each costs about 10 calls of the model per step."""
    blur: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of normal noise that is added to the pictures' latents (which have about
    1): without any the last steps may not be invertible."""
    most_iterations: Annotated[int, Field(ge=1)] = 64
    """Of Picard's, per sampling step."""
    corrector_steps: Annotated[int, Field(ge=1)] = 2
    """Calls of the corrector per image."""
    width: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    """Of the corrector, a transformer over patches of the latents."""
    depth: Annotated[int, Field(ge=1)] = 2
    """Its blocks."""
    patch: Annotated[int, Field(ge=1)] = 2
    """Side of its patches; must divide both sides of the latents."""

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def draw(self, schedule: Schedule, batch: InvertedNoise, rng: torch.Generator) -> Draws:
        """A uniform time and fresh normal noise per example."""
        shape, device = batch.noise.shape, batch.noise.device
        t = torch.randint(len(schedule), (shape[0],), generator=rng, device=rng.device)
        start = torch.randn(shape, generator=rng, device=rng.device)
        return Draws(t.to(device), start.to(device))

    def loss(
        self,
        policy: Denoiser,
        reference: Denoiser | None,
        batch: InvertedNoise,
        draws: Draws,
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Mean squared error of the corrector's velocity."""
        del reference
        schedule = policy.schedule
        x_t = schedule.add_noise(batch.noise, draws.noise, draws.t)
        target = schedule.training_target(batch.noise, draws.noise, draws.t)
        error = squared_error(policy(x_t, draws.t, batch.cond).float(), target.float()).mean()
        return error, {"loss": error.item()}

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""
