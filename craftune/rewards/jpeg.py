"""JPEG size as a reward (Black et al. 2023, "DDPO", arXiv:2305.13301, section 5.1): no weights."""

import io

import PIL
import torch
from PIL import Image
from torch import Tensor

from craftune.types import Reward


def compressibility() -> Reward:
    """Minus the size of the image as a JPEG of quality 95, in kB (1000 bytes)."""
    return _reward("jpeg-compressibility", -1)


def incompressibility() -> Reward:
    """The size of the image as a JPEG of quality 95, in kB (1000 bytes)."""
    return _reward("jpeg-incompressibility", 1)


def _reward(name: str, sign: int) -> Reward:
    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        del prompts
        return torch.tensor([sign * _jpeg_bytes(image) / 1000 for image in images])

    identity = {
        "name": name,
        "version": "1",
        "sha256": "analytic",
        "preprocessing": f"RGB, JPEG quality 95, Pillow {PIL.__version__}",
        "dtype": "float32",
    }
    return Reward(name, score, identity, uses_prompt=False)


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell()
