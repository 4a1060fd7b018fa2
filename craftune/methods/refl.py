"""ReFL: the reward of a clean image predicted late, but not last, in the sampler.

Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
NeurIPS 2023, arXiv:2304.05977, Algorithm 1. A step tau is drawn, the steps before it are taken
without gradient, and the x_0 that the network predicts there is decoded and rewarded:

    L = scale * max(0, hinge - r(D(x_0-hat(x_tau)), c)),   tau uniform in the last quarter.

Later predictions are clear enough to be judged. The hinge ends the chase: images that are good
enough teach nothing more.

Fed with `Prompts`. Needs differentiable rewards and no reference. Cost per image: up to S forward
passes and 1 backward pass.

Follows the authors' code (THUDM/ImageReward, ReFL.py): 40 steps with tau in 30..39, one tau per
batch, no guidance in the drawing, hinge 2 in ImageReward's units. Differs: the paper adds the
pre-training loss on real images; the released code does not, nor do we. tau is the same in all
processes.
"""

from dataclasses import field
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.batches import Prompts, Starts
from craftune.config import STRICT
from craftune.diffusion import Schedule
from craftune.methods.drawing import Passes, Scales, Weights, draw, rewarded, starts
from craftune.types import Denoiser, Metrics


@dataclass(frozen=True, config=STRICT)
class ReFL:
    """Hyper-parameters and training step of ReFL."""

    fed_with: ClassVar[Literal["prompts"]] = "prompts"

    rewards: Weights
    """Reward -> its factor in the sum that is maximised; each must be differentiable."""
    scales: Scales = field(default_factory=dict)
    """Reward -> [center, spread]: it counts as (score - center) / spread. Raw where left out."""
    earliest: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of the sampler's steps before the earliest tau."""
    hinge: float = 2.0
    """The reward from which an image teaches nothing more, in units of the weighted sum."""
    scale: Annotated[float, Field(gt=0)] = 1e-3
    """Factor of the loss; under Adam it matters to `train.max_grad_norm` alone."""
    guided: bool = False
    """Draw with the recipe's guidance and differentiate both branches; not so in the paper."""

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def passes(self, steps: int) -> Passes:
        """Of one image: the steps before tau, and tau's own."""
        before = (int(self.earliest * steps) + steps - 1) / 2
        return Passes(before + 1, 1, 0, guided=self.guided)

    def draw(self, schedule: Schedule, batch: Prompts, rng: torch.Generator) -> Starts:
        """The noise that each image starts from, and tau."""
        del schedule
        steps = len(batch.drawing.grid)
        tau = torch.randint(int(self.earliest * steps), steps, (), generator=rng, device=rng.device)
        return starts(batch, rng, cut=int(tau))

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Prompts, draws: Starts
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The hinge on the predicted images' rewards."""
        del reference
        grid = batch.drawing.grid.jump(draws.cut)
        x_0 = draw(policy, draws.noise, batch, grad_steps=1, grid=grid, guided=self.guided)
        reward, metrics = rewarded(x_0, batch)
        loss = self.scale * (self.hinge - reward).relu().mean()
        below = (reward < self.hinge).float().mean().item()
        return loss, {"loss": loss.item(), **metrics, "below_hinge": below}

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""
