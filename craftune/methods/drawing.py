"""What methods on the reward's gradient share: images of a live policy, and what they are worth.

The chain that is differentiated is noise -> sampler (guidance with both branches) -> decoder ->
reward. The sampler is deterministic, so all randomness is the noise, which is drawn beforehand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from craftune.batches import Prompts, Starts
from craftune.diffusion import Grid
from craftune.sampling import sample
from craftune.types import Denoiser, Metrics

Weights = Annotated[dict[str, float], Field(min_length=1)]
"""Reward -> its factor in the sum that is maximised."""
Scales = dict[str, tuple[float, Annotated[float, Field(gt=0)]]]
"""Reward -> (center, spread): it counts as (score - center) / spread."""


@dataclass(frozen=True)
class Passes:
    """What one prompt's image costs in one update, on average; a step is a call per branch.

    Attributes:
        forward: the sampler's steps that are taken, with gradient or without.
        backward: those that are differentiated.
        again: those that are taken again in the backward pass (see `draw`).
        decoded: images decoded and rewarded with gradient.
        at_once: of them in one backward pass.
        guided: whether a step has guidance's two branches.
    """

    forward: float | int
    backward: float | int
    again: float | int
    decoded: int = 1
    at_once: int = 1
    guided: bool = True


def weighted(
    scores: Mapping[str, Float[Tensor, " b"]], weights: Weights, scales: Scales
) -> Float[Tensor, " b"]:
    """The sum over rewards of weight * (score - center) / spread, float32."""
    parts = []
    for name, weight in weights.items():
        center, spread = scales.get(name, (0.0, 1.0))
        parts.append(weight * (scores[name].float() - center) / spread)
    return torch.stack(parts).sum(0)


def starts(batch: Prompts, rng: torch.Generator, *, again: int = 0, cut: int = 0) -> Starts:
    """Fresh noise for each prompt, and `again` times more."""
    shape, n = batch.drawing.latent_shape, len(batch.texts)
    device = batch.cond.tensors["tokens"].device
    noise = torch.randn((n, *shape), generator=rng, device=rng.device)
    more = torch.randn((n, again, *shape), generator=rng, device=rng.device)
    return Starts(noise.to(device), more.to(device), cut)


def draw(
    policy: Denoiser,
    noise: Float[Tensor, "b ..."],
    batch: Prompts,
    *,
    grad_steps: int,
    grid: Grid | None = None,
    guided: bool = True,
) -> Float[Tensor, "b ..."]:
    """Latents of the batch's prompts, with the gradient of the last `grad_steps` steps.

    Where there are several, each call of the network is recomputed in the backward pass, so that
    one call's activations are kept and not `grad_steps` of them.

    Args:
        grid: part of the sampler's steps; None is all.
        guided: False leaves out classifier-free guidance.
    """
    how, first = batch.drawing, torch.zeros(len(noise), dtype=torch.long, device=noise.device)
    return sample(
        policy,
        noise,
        batch.cond,
        how.empty.rows(first),
        how.grid if grid is None else grid,
        sampler=how.sampler,
        guidance_scale=how.guidance_scale if guided else 1.0,
        grad_steps=grad_steps,
        checkpoint=grad_steps > 1,
    )


def rewarded(
    latents: Float[Tensor, "b ..."], batch: Prompts
) -> tuple[Float[Tensor, " b"], Metrics]:
    """What the decoded latents are worth, `[b]` with gradient, and the means for the log.

    In float32 whatever the network's dtype: rewards lie close together.
    """
    with torch.autocast(latents.device.type, enabled=False):
        images = batch.drawing.decode(latents.float())
        total, parts = batch.drawing.reward(images, batch.texts)
    means = {name: score.mean().item() for name, score in parts.items()}
    return total, {"reward": total.mean().item(), **means}
