"""Between models and beyond: tuned weights scaled, and several tunings mixed, at inference.

DRaFT (arXiv:2309.17400, section 5.4) scales its adapters between the base (0) and the tuned model
(1) and adds those of several rewards:

    W = W_0 + sum_i s_i (W_i - W_0).

For LoRA W_i - W_0 = B_i A_i, so this is scaling and adding the adapters themselves; it holds for
models whose weights were all trained as well. It needs only saved models of one architecture.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def mixed(
    base: Mapping[str, Tensor], tuned: Sequence[tuple[Mapping[str, Tensor], float]]
) -> dict[str, Tensor]:
    """State of a network between (and beyond) these, in float32.

    Args:
        base: W_0, as `state_dict` gives it.
        tuned: W_i and its scale s_i; 0 is the base, 1 the tuned model, more goes beyond.

    Raises:
        ValueError: the networks have other weights, or other shapes.
    """
    found = {}
    for name, start in base.items():
        whole = start.float().clone()
        for other, scale in tuned:
            if name not in other or other[name].shape != start.shape:
                raise ValueError(f"weight {name!r} is not the same in all models that are mixed")
            whole += scale * (other[name].to(whole) - start.float())
        found[name] = whole
    return found


def mix_into(network: nn.Module, tuned: Sequence[tuple[nn.Module, float]]) -> None:
    """Turn a base network into the mixture, in place, in its own dtype."""
    states = [(other.state_dict(), scale) for other, scale in tuned]
    network.load_state_dict(mixed(network.state_dict(), states))
