"""Rewards from outside: any function (images, prompts) -> numbers, by "package.module:name"."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from craftune.errors import UserError
from craftune.types import Reward


def from_import_path(path: str) -> Reward:
    """The reward that "package.module:name" stands for.

    The object is a `Reward`, a factory without arguments that returns one, or a function from a
    list of PIL images and a list of prompts to one number per image (list, array or tensor).
    Modules are also found in the current directory. The identity carries the module's sha256.

    Raises:
        UserError: no such module or name, or the object is not callable.
    """
    module_name, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"reward {path!r}: cannot import {module_name!r}: {error}") from None
    found = getattr(module, name, None)
    if isinstance(found, Reward):
        return found
    if not callable(found):
        raise UserError(f"reward {path!r}: {module_name!r} has no function {name!r}")
    if not inspect.signature(found).parameters:
        made = found()
        if not isinstance(made, Reward):
            raise UserError(f"reward {path!r}: the factory returned {type(made).__name__}")
        return made
    return _wrap(path, found, module)


def _wrap(path: str, function: Callable[..., Any], module: Any) -> Reward:
    """A plain function as a reward named by its import path."""

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        return torch.as_tensor(function(images, prompts), dtype=torch.float32)

    source = Path(module.__file__).read_bytes() if module.__file__ else b""
    identity = {
        "name": path,
        "version": str(getattr(module, "__version__", "")),
        "sha256": hashlib.sha256(source).hexdigest(),
        "preprocessing": "PIL images as stored",
        "dtype": "float32",
    }
    return Reward(name=path, score=score, identity=identity)
