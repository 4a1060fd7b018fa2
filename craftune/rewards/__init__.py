"""Rewards: images and prompts -> one number per image. `REWARDS` is the table of names.

A reward is a factory without arguments that returns a `Reward`; weights load inside it, once
per process. Out of tree, write "package.module:name" wherever a name is accepted: a factory of
a `Reward`, or simply a function (images, prompts) -> one number per image.
"""

import functools
from collections.abc import Callable, Iterable

from craftune.errors import UserError, unknown_name
from craftune.plugins import imported
from craftune.rewards.custom import from_import_path
from craftune.rewards.jpeg import compressibility, incompressibility
from craftune.shapes.rewards import shapes_a, shapes_h, shapes_i, shapes_p, shapes_verifier
from craftune.types import Reward

REWARDS: dict[str, Callable[[], Reward]] = {
    "jpeg-compressibility": compressibility,
    "jpeg-incompressibility": incompressibility,
    "shapes-h": shapes_h,
    "shapes-p": shapes_p,
    "shapes-a": shapes_a,
    "shapes-i": shapes_i,
    "shapes-verifier": shapes_verifier,
}


def check_names(names: Iterable[str], key: str) -> None:
    """Refuse unknown and repeated names before anything loads; modules from outside are imported.

    Raises:
        UserError: names the recipe key, the name and the closest known one.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{key}: {name!r} is listed twice")
        seen.add(name)
        if ":" in name:
            imported(name, f"{key}, reward")
        elif name not in REWARDS:
            hint = 'or give "package.module:function"'
            raise UserError(f"{key}: {unknown_name('reward', name, REWARDS)}; {hint}")


@functools.cache
def load(name: str) -> Reward:
    """The reward of this name or import path, loaded once per process."""
    check_names([name], "reward")
    return REWARDS[name]() if name in REWARDS else from_import_path(name)
