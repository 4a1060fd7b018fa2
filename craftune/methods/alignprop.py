"""AlignProp: the reward's gradient through a random number of the sampler's last steps.

Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
arXiv:2310.03739. DRaFT's objective with randomised truncated back-propagation: a step is drawn per
batch, and the steps before it keep no gradient. Short cuts are cheap and calm, long ones reach what
the early steps decide; the mixture is less prone to collapse than all steps are.

Fed with `Prompts`. Needs differentiable rewards and no reference. Cost per image, with guidance's
two branches: 2S forward passes, and 2K forward (recomputed) and 2K backward passes, K random.

Follows the authors' code (mihirp1998/AlignProp) in the two laws of the cut. Differs: their
configuration draws with eta = 1, here the sampler is deterministic; their factor of the loss
(0.01) is left out, as Adam removes it.
"""

from dataclasses import field
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.batches import Prompts, Starts
from craftune.config import STRICT
from craftune.diffusion import Schedule
from craftune.methods.drawing import Passes, Scales, Weights, draw, rewarded, starts
from craftune.types import Denoiser, Metrics

MEAN, DEVIATION = 42 / 50, 5 / 50
"""Of the Gaussian cut, in shares of the sampler's steps: 42 and 5 of 50."""


@dataclass(frozen=True, config=STRICT)
class AlignProp:
    """Hyper-parameters and training step of AlignProp."""

    fed_with: ClassVar[Literal["prompts"]] = "prompts"

    rewards: Weights
    """Reward -> its factor in the sum that is maximised; each must be differentiable."""
    scales: Scales = field(default_factory=dict)
    """Reward -> [center, spread]: it counts as (score - center) / spread. Raw where left out."""
    law: Literal["uniform", "gaussian"] = "uniform"
    """Of the first step with gradient: any of them (the paper's), or about 84 % of the way with a
    deviation of 10 %, never the first (the released code's default)."""

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def passes(self, steps: int) -> Passes:
        """Of one image, over the law of the cut; one step alone is not taken again."""
        law = self.chances(steps)
        backward = sum(chance * (steps - cut) for cut, chance in enumerate(law))
        return Passes(steps, backward, backward - law[steps - 1])

    def chances(self, steps: int) -> list[float]:
        """Of each cut, 0 to steps - 1, as `cut` draws them."""
        if self.law == "uniform" or steps == 1:
            return [1 / steps] * steps
        normal = NormalDist(MEAN, DEVIATION)
        masses = [normal.cdf((k + 1) / steps) - normal.cdf(k / steps) for k in range(1, steps)]
        return [0.0, *(mass / sum(masses) for mass in masses)]

    def draw(self, schedule: Schedule, batch: Prompts, rng: torch.Generator) -> Starts:
        """The noise that each image starts from, and the first step with gradient."""
        del schedule
        return starts(batch, rng, cut=self.cut(len(batch.drawing.grid), rng))

    def cut(self, steps: int, rng: torch.Generator) -> int:
        """The first step with gradient, 0 to steps - 1."""
        if self.law == "uniform" or steps == 1:
            return int(torch.randint(steps, (), generator=rng, device=rng.device))
        while True:
            normal = torch.randn((), generator=rng, device=rng.device).item()
            step = int(steps * (MEAN + DEVIATION * normal))
            if 1 <= step < steps:
                return step

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Prompts, draws: Starts
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Minus the mean reward of fresh images."""
        del reference
        x_0 = draw(policy, draws.noise, batch, grad_steps=len(batch.drawing.grid) - draws.cut)
        reward, metrics = rewarded(x_0, batch)
        loss = -reward.mean()
        return loss, {"loss": loss.item(), **metrics}

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""
