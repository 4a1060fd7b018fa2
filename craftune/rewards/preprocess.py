"""How CLIP-like networks see a picture: shortest edge to `size`, bicubic, then the middle square.

Upstream packages do this on 8-bit PIL images (with rounding) or on float tensors (without), and
their middles differ by a pixel for some sizes. A score follows its upstream exactly.

The differentiable path is the float one. Against PIL it differs by the rounding to 8 bits and by
the fixed-point weights of PIL's filter: at most 0.015 after normalisation, 0.004 in the mean.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from craftune.images import to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

LONGEST = 16
"""Of a picture more than this times longer than wide only the middle part of that shape is resized:
the square sees the same, and a strip of 1 x 10,000 does not fill the memory."""


@dataclass(frozen=True)
class MiddleSquare:
    """The middle square, `size` pixels wide.

    Attributes:
        size: edge of the square.
        resize: "pil" gives uint8, "tensor" float32 around [0, 1] (bicubic overshoots).
        middle: where (long - size) is odd, "round" half to even (torchvision), or "floor"
            (transformers' image processor).
    """

    size: int = 224
    resize: Literal["pil", "tensor"] = "pil"
    middle: Literal["round", "floor"] = "round"

    def plan(self, size: tuple[int, int]) -> "Resized":
        """What is done with a picture of (width, height)."""
        width, height = (min(edge, LONGEST * min(size)) for edge in size)
        if width <= height:
            wide, high = self.size, int(self.size * height / width)
        else:
            wide, high = int(self.size * width / height), self.size
        left, top = (self._offset(edge - self.size) for edge in (wide, high))
        return Resized((width, height), (wide, high), (left, top), self.size, self.resize)

    def differentiable(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.size} {self.size}"]:
        """Float images in [0, 1] of any one size, with a gradient; float32, clamped to [0, 1].

        Bicubic with antialiasing exists on the CPU in float32 alone, so other dtypes come after.
        """
        height, width = images.shape[-2:]
        plan = self.plan((width, height))
        resized = plan.tensor(images.float().clamp(0, 1))
        return resized.clamp(0, 1) if self.resize == "pil" else resized

    def __str__(self) -> str:
        """For a reward's identity."""
        return f"RGB, {self.resize} bicubic antialias, middle {self.size} ({self.middle})"

    def _offset(self, rest: int) -> int:
        return round(rest / 2) if self.middle == "round" else rest // 2


@dataclass(frozen=True)
class Resized:
    """One picture size's way to the square: (width, height) and (left, top) throughout."""

    part: tuple[int, int]
    """The middle part that is resized; all of the picture unless it is a long strip."""
    to: tuple[int, int]
    offset: tuple[int, int]
    size: int
    resize: Literal["pil", "tensor"]

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture of any mode to `[3, size, size]`."""
        image = to_rgb(image)
        if image.size != self.part:
            (width, height), (wide, high) = image.size, self.part
            left, top = (width - wide) // 2, (height - high) // 2
            image = image.crop((left, top, left + wide, top + high))
        if self.resize == "tensor":
            return self.tensor(_chw(image)[None].float().div_(255))[0]
        left, top = self.offset
        resized = image.resize(self.to, Image.Resampling.BICUBIC)
        return _chw(resized.crop((left, top, left + self.size, top + self.size)))

    def tensor(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """The same on float images, with a gradient."""
        (height, width), (wide, high) = images.shape[-2:], self.part
        left, top = (width - wide) // 2, (height - high) // 2
        images = images[..., top : top + high, left : left + wide]
        resized = F.interpolate(images, self.to[::-1], mode="bicubic", antialias=True)
        left, top = self.offset
        return resized[..., top : top + self.size, left : left + self.size]


BACKGROUND = tuple(int(255 * mean) for mean in CLIP_MEAN)
"""CLIP's mean colour, in 8 bits."""


@dataclass(frozen=True)
class PaddedSquare:
    """The whole picture in the middle of a square of CLIP's mean colour, `size` pixels wide.

    Attributes:
        size: edge of the square.
    """

    size: int

    def plan(self, size: tuple[int, int]) -> "PaddedSquare":
        """What is done with a picture: the same for every size."""
        del size
        return self

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture of any mode to uint8 `[3, size, size]`, by PIL."""
        image = to_rgb(image)
        (width, height), edge = image.size, max(image.size)
        square = Image.new("RGB", (edge, edge), BACKGROUND)
        square.paste(image, ((edge - width) // 2, (edge - height) // 2))
        return _chw(square.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def differentiable(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.size} {self.size}"]:
        """Float images in [0, 1] of any one size, with a gradient; float32, clamped to [0, 1]."""
        height, width = images.shape[-2:]
        edge = max(height, width)
        top, left = (edge - height) // 2, (edge - width) // 2
        ground = images.new_tensor(BACKGROUND, dtype=torch.float32)[:, None, None] / 255
        square = ground.expand(len(images), 3, edge, edge).clone()
        square[..., top : top + height, left : left + width] = images.float().clamp(0, 1)
        to = (self.size, self.size)
        return F.interpolate(square, to, mode="bicubic", antialias=True).clamp(0, 1)

    def __str__(self) -> str:
        """For a reward's identity."""
        return f"RGB, padded to a square, pil bicubic antialias, {self.size}"


def normalized(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8, or float in [0, 1], `[b, 3, h, w]` to float32 in the network's units."""
    # In place but for the first step: new memory costs more time than the arithmetic.
    pixels = inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs.float()
    shift, scale = (pixels.new_tensor(v)[:, None, None] for v in (mean, std))
    return (pixels - shift).div_(scale)


def _chw(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
