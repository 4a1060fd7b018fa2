"""craftune: align a text-to-image diffusion model with reward models.

    import craftune
    recipe = craftune.load_recipe("recipes/demo.toml", ["train.steps=50"])
    folder = craftune.run(recipe)          # runs/demo, with 8-report/report.html in it

Names load on first use, so that `craftune --help` does not wait for torch.
"""

import importlib
import typing

__version__ = "0.1.0"
__all__ = [
    "Reward",
    "SelectConfig",
    "UserError",
    "__version__",
    "load_recipe",
    "load_stitched",
    "run",
    "score",
    "select",
]

if typing.TYPE_CHECKING:
    from craftune.errors import UserError
    from craftune.models.stitched import load_stitched
    from craftune.pipeline import run
    from craftune.recipes import load_recipe
    from craftune.scoring.api import score
    from craftune.select_config import SelectConfig
    from craftune.selection import select
    from craftune.types import Reward

_HOME = {
    "Reward": "craftune.types",
    "SelectConfig": "craftune.selection",
    "UserError": "craftune.errors",
    "load_recipe": "craftune.recipes",
    "load_stitched": "craftune.models.stitched",
    "run": "craftune.pipeline",
    "score": "craftune.scoring.api",
    "select": "craftune.selection",
}


def __getattr__(name: str) -> typing.Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'craftune' has no attribute {name!r}")
