"""Pictures of the report: small copies as data URIs, and what the diversity is measured on."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from craftune.images import decode
from craftune.reporting.read import KEY, iterate_images

REDUCED = 32
"""Side of the pictures that distances are measured on, in pixels."""
SMALL = 128
"""Up to this side a picture is embedded as it is and enlarged by whole pixels."""


@dataclass(frozen=True)
class Picture:
    """An image as the page embeds it.

    Attributes:
        uri: a data URI.
        width: shown at, in CSS pixels (less where there is no room).
        height: likewise.
        pixelated: enlarged, so its pixels are to stay sharp.
    """

    uri: str
    width: int
    height: int
    pixelated: bool


def embed(data: bytes, side: int = 320) -> Picture:
    """The file itself where the image is tiny, else a JPEG of at most this side."""
    image = decode(data)
    longest = max(image.size)
    if longest <= SMALL:
        scale = max(1, round(150 / longest))
        uri = _uri(data, "png" if data.startswith(b"\x89PNG") else "jpeg")
        return Picture(uri, image.width * scale, image.height * scale, scale > 1)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85, optimize=True)
    return Picture(_uri(buffer.getvalue(), "jpeg"), image.width, image.height, False)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def reduced(paths: Iterable[Path]) -> dict[tuple[str, int], UInt8[np.ndarray, " d"]]:
    """Every image by (prompt id, sample), reduced to 32 x 32 by area."""
    return {key: _reduce(data) for key, data in iterate_images(paths, KEY)}


def _reduce(data: bytes) -> UInt8[np.ndarray, " d"]:
    small = decode(data).resize((REDUCED, REDUCED), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1)
