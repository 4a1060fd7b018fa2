"""DRaFT: fine-tune on the reward's own gradient, back through the sampler.

Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024,
arXiv:2309.17400. Maximised is the mean over prompts c and noise x_T of

    r(D(x_0(theta, c, x_T)), c),   x_0 from a deterministic sampler, D the decoder.

DRaFT differentiates all S steps, DRaFT-K the last K = `grad_steps`. DRaFT-LV differentiates the
last step alone, n = `repeats` times per image, each from the drawn x_0 noised anew:

    x_1 = alpha_1 x_0 + sigma_1 noise_i,   x_0 without gradient, 1 the sampler's last timestep,

and averages: the decoded image is paid for once, and the gradient of K = 1 varies less.

Fed with `Prompts`. Needs differentiable rewards and no reference. Cost per image, with guidance's
two branches: 2S forward passes, and 2K backward passes (with 2K more forward passes where K > 1,
as activations are recomputed); LV adds 2n forward and 2n backward passes.

Differs from the paper: it trains adapters alone, here all weights may be trained; its rewards and
settings are recipes (docs/draft.md). Its code is not public.
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
class DRaFT:
    """Hyper-parameters and training step of DRaFT, DRaFT-K and DRaFT-LV."""

    fed_with: ClassVar[Literal["prompts"]] = "prompts"

    rewards: Weights
    """Reward -> its factor in the sum that is maximised; each must be differentiable."""
    scales: Scales = field(default_factory=dict)
    """Reward -> [center, spread]: it counts as (score - center) / spread. Raw where left out."""
    grad_steps: Annotated[int, Field(ge=0)] = 1
    """K: the sampler's last steps that are differentiated; 0 is all of them (DRaFT)."""
    repeats: Annotated[int, Field(ge=0)] = 0
    """n of DRaFT-LV, 2 in the paper; 0 is off."""

    def __post_init__(self) -> None:
        if self.repeats and self.grad_steps != 1:
            raise ValueError("repeats (DRaFT-LV) are of the last step alone: leave grad_steps at 1")

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def passes(self, steps: int) -> Passes:
        """Of one image, with a sampler of so many steps."""
        n, k = self.repeats, min(self.grad_steps or steps, steps)
        if n:
            return Passes(steps + n, n, 0, decoded=n, at_once=n)
        return Passes(steps, k, k if k > 1 else 0)

    def draw(self, schedule: Schedule, batch: Prompts, rng: torch.Generator) -> Starts:
        """The noise that each image starts from, and DRaFT-LV's."""
        del schedule
        return starts(batch, rng, again=self.repeats)

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Prompts, draws: Starts
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Minus the mean reward of fresh images."""
        del reference
        if self.repeats:
            return _low_variance(policy, batch, draws)
        x_0 = draw(
            policy, draws.noise, batch, grad_steps=self.grad_steps or len(batch.drawing.grid)
        )
        reward, metrics = rewarded(x_0, batch)
        loss = -reward.mean()
        return loss, {"loss": loss.item(), **metrics}

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""


def _low_variance(
    policy: Denoiser, batch: Prompts, draws: Starts
) -> tuple[Float[Tensor, ""], Metrics]:
    """DRaFT-LV: minus the mean reward of the last step taken again from other noise."""
    x_0, last = draw(policy, draws.noise, batch, grad_steps=0), batch.drawing.grid.tail(1)
    n = draws.again.shape[1]
    x_1 = last.alphas[0, 0] * x_0[:, None] + last.sigmas[0, 0] * draws.again
    repeated = batch.repeated(n)
    again = draw(policy, x_1.flatten(0, 1), repeated, grad_steps=1, grid=last)
    reward, metrics = rewarded(again, repeated)
    loss = -reward.mean()
    return loss, {"loss": loss.item(), **metrics}
