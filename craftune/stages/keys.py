"""Which candidates of a pool are copies of each other, by a function of the user's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from craftune.errors import UserError
from craftune.images import decode
from craftune.plugins import described, imported
from craftune.records import read_table

SETTING = "select.accept.key"


def copies(path: str, pool: Path, batch_size: int = 64) -> Int[np.ndarray, " n"]:
    """A number per candidate in pool order, equal for candidates of equal key.

    Args:
        path: "package.module:function", (PIL images, prompts) -> one text or number per image.
        pool: folder of the stage `generate`.

    Raises:
        UserError: there is no such function, it fails, or gives another number of keys.
    """
    function = imported(path, SETTING)[0]
    found: list[str] = []
    for shard in sorted(pool.glob("part-*.parquet")):
        rows = read_table(shard, ["prompt", "image"]).to_pylist()
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            images = [decode(row["image"]["bytes"]) for row in batch]
            found += _called(path, function, images, [row["prompt"] for row in batch])
    return np.unique(np.array(found), return_inverse=True)[1].ravel()


def _called(
    path: str, function: Callable[..., Any], images: list[Any], prompts: list[str]
) -> list[str]:
    try:
        keys = [str(key) for key in function(images, prompts)]
    except Exception as error:  # the user's code runs here: anything may come
        raise UserError(f"{SETTING} {path!r} failed: {described(error)}") from error
    if len(keys) != len(images):
        raise UserError(f"{SETTING} {path!r} gave {len(keys)} keys for {len(images)} images")
    return keys
