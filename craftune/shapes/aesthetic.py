"""An analytic aesthetic score: crisp, colourful things on an even ground."""

import torch
import torch.nn.functional as F
from torch import Tensor

_COLORED = 0.12
"""Chroma (largest minus smallest channel, of 1) of a coloured pixel, half way of a soft step."""


def aesthetic(images: Tensor) -> Tensor:
    """Score pictures `[b, 3, 64, 64]` in [0, 1]: `[b]` in [0, 1], with a gradient.

    The weighted sum of how vivid the coloured area is (0.4), how steep its edges are (0.3) and
    how even the ground is (0.3), times whether there is a picture at all: blank ones and those
    without ground get 0.
    """
    chroma = images.amax(1) - images.amin(1)
    colored = torch.sigmoid((chroma - _COLORED) / 0.02)
    share = colored.mean((1, 2))
    vivid = _saturate(_mean(chroma, colored * chroma) / 0.7)
    sharp = _saturate(_sharpness(images) / 0.5)
    even = torch.exp(-_ground_spread(images.mean(1), colored) / 0.06)
    score = 0.4 * vivid + 0.3 * sharp + 0.3 * even
    return score * _between(share)


def _sharpness(images: Tensor) -> Tensor:
    """Mean step between neighbours, weighted by itself, of 1; blur makes it small."""
    across = (images[..., :-1, 1:] - images[..., :-1, :-1]).abs().amax(1)
    down = (images[..., 1:, :-1] - images[..., :-1, :-1]).abs().amax(1)
    step = torch.maximum(across, down)
    return _mean(step, (step - 0.04).relu())


def _saturate(x: Tensor) -> Tensor:
    """About x below 1, below 1 above: no clamp, so that the gradient never vanishes."""
    return x / (1 + x**4) ** 0.25


def _ground_spread(light: Tensor, colored: Tensor) -> Tensor:
    """Standard deviation of the light of the ground, away from coloured things."""
    near = F.max_pool2d(colored[:, None], 7, 1, 3)[:, 0]
    ground = 1 - near
    mean = _mean(light, ground)[:, None, None]
    return (_mean((light - mean).square(), ground) + 1e-8).sqrt()


def _between(share: Tensor) -> Tensor:
    """1 where 2 % to 65 % of the picture is coloured, falling to 0 at 0.5 % and 85 %."""
    enough = ((share - 0.005) / 0.015).clamp(0, 1)
    return enough * ((0.85 - share) / 0.20).clamp(0, 1)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum((1, 2)) / (weights.sum((1, 2)) + 1e-4)
