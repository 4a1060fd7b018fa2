"""Pictures that are made where they are asked for, by the name of their source."""

from collections.abc import Callable, Iterator, Sequence

from PIL import Image

from craftune.shapes.pictures import world_pictures

MADE: dict[str, Callable[[Sequence[str], int, int], Iterator[Image.Image]]] = {
    "craftune:shapes/world": world_pictures
}
"""Name -> (prompts, how many, seed) -> pictures of the prompts in turn."""
