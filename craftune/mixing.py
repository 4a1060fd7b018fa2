"""Between models and beyond: tuned weights scaled, and several tunings mixed, at inference.

DRaFT (arXiv:2309.17400, section 5.4) scales its adapters between the base (0) and the tuned model
(1) and adds those of several rewards:

    W = W_0 + sum_i s_i (W_i - W_0) = (1 - sum_i s_i) W_0 + sum_i s_i W_i.

For LoRA W_i - W_0 = B_i A_i, so this is scaling and adding the adapters themselves; it holds for
models whose weights were all trained as well. It needs only saved models of one architecture.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]
"""Weights by name, as `state_dict` gives them."""


def scale_arm(scale: float) -> str:
    """What a scale of the tuning is called in the files of the comparison."""
    return f"scale-{scale!r}"


@torch.no_grad()
def mixed(base: State, tuned: Sequence[tuple[State, float]]) -> dict[str, Tensor]:
    """State of a network between (and beyond) these, in float32; exact at the ends.

    Args:
        base: W_0.
        tuned: W_i and its scale s_i; 0 is the base, 1 the tuned model, more goes beyond.

    Raises:
        ValueError: the networks have other weights, or other shapes.
    """
    check_alike(base, [state for state, _ in tuned])
    return {name: _weight(name, base, tuned).float() for name in base}


@torch.no_grad()
def mix_into(network: nn.Module, base: State, tuned: Sequence[tuple[State, float]]) -> None:
    """Give a network the mixture's weights, in place, one after the other, in its own dtype.

    Raises:
        ValueError: as `mixed`; nothing was changed.
    """
    own = network.state_dict()
    check_alike(own, [base, *(state for state, _ in tuned)])
    for name, weight in own.items():
        weight.copy_(_weight(name, base, tuned))


def check_alike(first: State, others: Sequence[State]) -> None:
    """Refuse networks that cannot be mixed.

    Raises:
        ValueError: names the first weight that is not in all of them, or not of one shape.
    """
    for other in others:
        for name in [*first, *(name for name in other if name not in first)]:
            shapes = [tuple(s[name].shape) if name in s else None for s in (first, other)]
            if shapes[0] != shapes[1]:
                told = " and ".join("absent" if x is None else f"of shape {x}" for x in shapes)
                raise ValueError(f"weight {name!r} is not the same in all models: {told}")


def _weight(name: str, base: State, tuned: Sequence[tuple[State, float]]) -> Tensor:
    """On the CPU in float64, whose rounding is below that of any stored dtype."""
    left = 1 - math.fsum(scale for _, scale in tuned)
    whole = left * base[name].to("cpu", torch.float64)
    for state, scale in tuned:
        whole += scale * state[name].to("cpu", torch.float64)
    return whole
