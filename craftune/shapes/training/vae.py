"""Stage `vae`: a tiny autoencoder, 64x64 pixels to 16x8x8 latents."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from craftune.shapes.training.common import Pace, Trainer
from craftune.shapes.training.data import draw, to_tensor

BATCH = 24
MAX_NOISE = 0.15
"""Of the latents that the decoder is polished on; their standard deviation is about 0.5."""


def new_vae() -> AutoencoderTiny:
    """0.34 M parameters, four levels of 32 channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(1, 1, 1, 2),
        num_decoder_blocks=(2, 1, 1, 1),
        latent_channels=16,
    )


def train_vae(folder: Path, pace: Pace, chunks: range) -> None:
    """Train on freshly drawn scenes and write `folder/vae`, its scaling factor set."""
    images = np.concatenate([images for images, _ in draw(chunks)])
    vae = new_vae().to(memory_format=torch.channels_last).train()
    Trainer({"vae": vae}, pace, folder).run(lambda: _loss(vae, _batch(images)))
    export_vae(vae, to_tensor(images[:500]), folder / "vae")


def polish_decoder(vae: AutoencoderTiny, folder: Path, pace: Pace, chunks: range) -> None:
    """Go on training the decoder alone, on noisier latents, and write `folder/vae`.

    The encoder stays, and with it every latent. What a diffusion model draws is never quite a
    latent of a picture; this decoder has learnt to make clean outlines of that.
    """
    images = np.concatenate([images for images, _ in draw(chunks)])
    vae = vae.to(memory_format=torch.channels_last).train().requires_grad_(False)
    vae.decoder.requires_grad_(True)

    def loss() -> Tensor:
        x = _batch(images)
        with torch.no_grad():
            latents = vae.encode(x).latents
        strength = MAX_NOISE * torch.rand(len(x), 1, 1, 1)
        return _misfit(vae.decode(latents + strength * torch.randn_like(latents)).sample - x, x)

    Trainer({"vae": vae}, pace, folder).run(loss)
    scale = vae.config.scaling_factor
    export_vae(vae, to_tensor(images[:500]), folder / "vae", scale)


@torch.no_grad()
def export_vae(vae: AutoencoderTiny, x: Tensor, out: Path, scale: float | None = None) -> None:
    """Write the checkpoint, its scaling factor `scale` or measured on `x`."""
    vae = vae.eval().to(memory_format=torch.contiguous_format)
    latents = vae.encode(x).latents
    error = (vae.decode(latents).sample.clamp(-1, 1) - x).square().mean()
    vae.register_to_config(scaling_factor=scale or float(1 / latents.std()))
    vae.save_pretrained(out)
    print(f"vae: psnr {10 * torch.log10(4 / error):.1f} dB, latent std {latents.std():.2f}")


def _batch(images: NDArray[np.uint8]) -> Tensor:
    index = torch.randint(0, len(images), (BATCH,)).numpy()
    return to_tensor(images[index]).contiguous(memory_format=torch.channels_last)


def _loss(vae: AutoencoderTiny, x: Tensor) -> Tensor:
    latents = vae.encode(x).latents
    # Diffusion samples are never exact: the decoder learns to live with a little noise.
    decoded = vae.decode(latents + 0.03 * torch.randn_like(latents)).sample
    size = 2e-3 * (latents.abs() - 1.5).relu().square().mean() + 1e-3 * latents.square().mean()
    return _misfit(decoded - x, x) + size


def _misfit(error: Tensor, x: Tensor) -> Tensor:
    """Weighted L1 and L2, plus a chroma term.

    Plain losses leave colour out for hundreds of steps: coloured pixels are few, so they weigh
    up to five times more, and differences of colour at equal brightness count again.
    """
    weight = 1 + 4 * (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))
    weight = weight / weight.mean()
    chroma = (error - error.mean(1, keepdim=True)).square().mean()
    return 2 * (weight * error.square()).mean() + 0.5 * (weight * error.abs()).mean() + 8 * chroma
