"""GRAFT: fine-tune on what generalised rejection sampling accepted.

Anil et al. 2025, "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping",
arXiv:2510.02692 (ICLR 2026). Images drawn from p(x|c) and accepted with probability A have the law
p(x|c) * kappa(x) / Z, kappa(x) = E[A | x]: the maximiser of E[log kappa] - KL(. || p). So the loss
is plain denoising, every accepted image counted alike; all that is GRAFT happens before, in the
stage `select` under [select.accept] (`craftune.acceptance`).

Fed with `Examples`. Needs no reference; one forward and one backward pass per example. Best of N
then fine-tune (RAFT, arXiv:2304.06767) is the rule "best-of"; `run.rounds` repeats the whole.

The authors published no code. Silent in what we could read, and chosen here: the t of the family's
pre-training, uniform weights over t, prompt dropout (train.prompt_dropout).
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
class GRAFT:
    """Training step of GRAFT."""

    fed_with: ClassVar[Literal["examples"]] = "examples"

    noise: NoiseLevels = field(default_factory=NoiseLevels)

    @property
    def needs_reference(self) -> bool:
        """It does not: the KL to the start is in the law of the examples."""
        return False

    def weigh(self, advantage: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """1 for every accepted example: its weight was its chance of being one."""
        return torch.ones_like(advantage)

    def draw(self, schedule: Schedule, batch: Examples, rng: torch.Generator) -> Draws:
        """One timestep and one noise per example."""
        return self.noise.draw(schedule, batch, rng)

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Examples, draws: Draws
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """E || prediction - target ||^2 under the accepted law."""
        del reference
        return plain_loss(self.noise, policy, batch, draws)

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""
