"""What an image costs: arithmetic counted in the network, not estimated."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from craftune.types import Cond, Denoiser


@torch.no_grad()
def call_flops(denoiser: Denoiser, latents: Float[Tensor, "1 ..."], cond: Cond) -> int:
    """FLOPs (2 x multiply-add) of one call on one example.

    An image costs (steps) x (main's call), twice that with classifier-free guidance, plus
    (corrector's steps) x (corrector's call); decoding comes on top and is the same for all.
    """
    t = torch.zeros(len(latents), device=latents.device)
    # Attention written out: the counter does not know every device's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser(latents, t, cond)
    return counter.get_total_flops()
