"""The one place where PIL, uint8 and float images meet."""

import io

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def to_pil(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Float images in [0, 1] as 8-bit pictures, rounded to nearest as diffusers does."""
    array = (images.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    return [Image.fromarray(a) for a in array.permute(0, 2, 3, 1).numpy()]


def to_tensor(images: list[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    """Pictures of one size as float images in [0, 1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; alpha is dropped, 16 bits keep their upper eight.

    RGB comes back as it is, not as a copy.
    """
    if image.mode.startswith("I;16"):  # convert() would cut off everything above 255
        values = np.asarray(image).astype(np.uint16)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """A lossless file; level 1 costs a quarter of the default's time."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The picture of a file's bytes, as RGB."""
    image = Image.open(io.BytesIO(data))
    image.load()  # what is damaged shows here
    return to_rgb(image)
