"""What JPEG would lose, as a proxy of compressibility that has a gradient (no weights).

Minus the mean squared difference of a picture and what a JPEG codec makes of it, in squared 8-bit
levels: 0 where nothing is lost, which a picture that compresses well comes near. DRaFT (Clark et
al. 2024, arXiv:2309.17400) trains on such a distance. It is a proxy: the size in kB is
`jpeg-compressibility`, which has no gradient.

The codec is the standard one at quality 50 (ITU-T T.81, annexes A and K; 4:2:0), except that
rounding is smooth: n + (x - n)^3, with n the nearest number (Shin & Song 2017).
"""

import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from craftune.images import to_rgb, to_tensor
from craftune.types import Reward

QUALITY = 50

_LUMA = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101
72 92 95 98 112 100 103 99
"""
_CHROMA = (
    """
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
"""
    + "99 " * 32
)

_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


def jpeg_proxy() -> Reward:
    """Minus the mean squared error of the proxy at quality 50, in squared 8-bit levels."""

    def gradient(images: Tensor, prompts: list[str]) -> Float[Tensor, " b"]:
        del prompts
        shown = images.float().clamp(0, 1)
        return -(255 * (shown - decoded(shown, QUALITY))).square().flatten(1).mean(1)

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " b"]:
        del prompts
        values = [gradient(to_tensor([to_rgb(image)]), [""]) for image in images]
        return torch.cat(values) if values else torch.zeros(0)

    identity = {
        "name": "jpeg-proxy",
        "version": "1",
        "sha256": "analytic",
        "preprocessing": f"RGB, proxy of JPEG quality {QUALITY}, smooth rounding",
        "dtype": "float32",
    }
    return Reward("jpeg-proxy", score, identity, gradient, uses_prompt=False)


def decoded(images: Float[Tensor, "b 3 h w"], quality: int) -> Float[Tensor, "b 3 h w"]:
    """Images in [0, 1] after JPEG at this quality, 1 to 100, with smooth rounding."""
    height, width = images.shape[-2:]
    padded = F.pad(255 * images, (0, -width % 16, 0, -height % 16), mode="replicate")
    matrix = images.new_tensor(_YCBCR)
    planes = torch.einsum("ij,bjhw->bihw", matrix, padded)
    luma = _coded(planes[:, :1] - 128, _table(_LUMA, quality)) + 128
    small = F.avg_pool2d(planes[:, 1:], 2)
    chroma = F.interpolate(_coded(small, _table(_CHROMA, quality)), scale_factor=2, mode="bilinear")
    rgb = torch.einsum("ij,bjhw->bihw", matrix.inverse(), torch.cat((luma, chroma), 1))
    return (rgb[..., :height, :width] / 255).clamp(0, 1)


def _coded(planes: Tensor, table: Tensor) -> Tensor:
    """Blocks of 8 x 8: cosine transform, division, smooth rounding, and back."""
    b, c, height, width = planes.shape
    blocks = planes.view(b, c, height // 8, 8, width // 8, 8).transpose(3, 4)
    cosines, table = _cosines().to(planes), table.to(planes)
    levels = cosines @ blocks @ cosines.T / table
    nearest = levels.detach().round()
    levels = nearest + (levels - nearest) ** 3
    blocks = cosines.T @ (levels * table) @ cosines
    return blocks.transpose(3, 4).reshape(b, c, height, width)


@functools.cache
def _cosines() -> Tensor:
    """The orthonormal 8-point transform; rows are frequencies."""
    places = torch.arange(8, dtype=torch.float64)
    rows = torch.cos((2 * places + 1) * places[:, None] * math.pi / 16) / 2
    rows[0] /= math.sqrt(2)
    return rows


@functools.cache
def _table(text: str, quality: int) -> Tensor:
    """Divisors at a quality, as the reference implementation scales the standard's tables."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.tensor([int(number) for number in text.split()])
    return ((base * scale + 50) // 100).clamp(1, 255).view(8, 8)
