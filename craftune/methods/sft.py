"""SFT: the denoising loss on the selected images, all counted alike.

The baseline of every select-then-fine-tune method, and the step of GRAFT (Anil et al. 2025,
arXiv:2510.02692). The selection happens before, in the stage `select`.

Fed with `Examples`. Needs no reference; one forward and one backward pass per example.
"""

from dataclasses import field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.batches import Draws, Examples
from craftune.config import STRICT
from craftune.diffusion import Schedule
from craftune.methods.denoising import NoiseLevels, plain_loss
from craftune.types import Denoiser, Metrics


@dataclass(frozen=True, config=STRICT)
class SFT:
    """Plain supervised fine-tuning."""

    fed_with: ClassVar[Literal["examples"]] = "examples"

    noise: NoiseLevels = field(default_factory=NoiseLevels)

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def weigh(self, advantage: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """1 for every example."""
        return torch.ones_like(advantage)

    def draw(self, schedule: Schedule, batch: Examples, rng: torch.Generator) -> Draws:
        """One timestep and one noise per example."""
        return self.noise.draw(schedule, batch, rng)

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Examples, draws: Draws
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Mean squared error of the prediction."""
        del reference
        return plain_loss(self.noise, policy, batch, draws)

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""
