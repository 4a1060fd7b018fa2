"""The VAE of every family: latents in the denoiser's units to images, and back.

Latents are (z - shift) * scaling_factor in the denoiser's units.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from craftune.errors import UserError
from craftune.types import Encoded


def vae_decoder(
    vae: Any, shift: float = 0.0
) -> Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b 3 y x"]]:
    """Scaled latents -> images float32 in [0, 1], with gradient.

    Raises (when called):
        UserError: an image is not finite, as where a VAE overflows in float16.
    """
    scale = float(vae.config.scaling_factor)

    def decode(latents: Tensor) -> Tensor:
        image = vae.decode(latents.to(vae.dtype) / scale + shift, return_dict=False)[0]
        if not torch.isfinite(image).all():
            raise _overflow(vae, "the VAE" if torch.isfinite(latents).all() else "the denoiser")
        return (image.float() / 2 + 0.5).clamp(0, 1)

    return decode


def vae_encoder(vae: Any, shift: float = 0.0) -> Callable[[Float[Tensor, "b 3 y x"]], Encoded]:
    """Images float32 in [0, 1] -> their scaled latents' distribution, no gradient.

    Raises (when called):
        UserError: the latents are not finite, as where a VAE overflows in float16.
    """
    scale = float(vae.config.scaling_factor)

    @torch.no_grad()
    def encode_images(images: Tensor) -> Encoded:
        found = vae.encode((images * 2 - 1).to(vae.device, vae.dtype))
        if hasattr(found, "latents"):  # AutoencoderTiny has no distribution
            clean, std = found.latents.float(), None
        else:
            clean, std = found.latent_dist.mean.float(), found.latent_dist.std.float() * scale
        if not all(torch.isfinite(part).all() for part in (clean, std) if part is not None):
            raise _overflow(vae, "the VAE's encoder")
        return Encoded((clean - shift) * scale, std)

    return encode_images


def _overflow(vae: Any, whose: str) -> UserError:
    return UserError(
        f"model.dtype: {whose} gives values that are not finite (the VAE is in "
        f"{str(vae.dtype).removeprefix('torch.')}); use 'bfloat16' or 'float32'"
    )
