"""Rewards from outside: any function (images, prompts) -> numbers, by "package.module:name"."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from craftune.errors import UserError
from craftune.plugins import described, imported
from craftune.types import Reward


def from_import_path(path: str) -> Reward:
    """The reward that "package.module:name" stands for; it goes by that name.

    The object is a factory without arguments that returns a `Reward`, or a function from a list
    of PIL images and a list of prompts to one number per image (list, array or tensor). The
    identity carries the module's sha256.

    Raises:
        UserError: no such module or name, or the factory fails or returns something else.
    """
    function, module = imported(path, "reward")
    source = Path(module.__file__).read_bytes() if module.__file__ else b""
    identity = {
        "name": path,
        "version": str(vars(module).get("__version__", "")),
        "sha256": hashlib.sha256(source).hexdigest(),
        "preprocessing": "PIL images as stored",
        "dtype": "float32",
    }
    if _takes_arguments(function):
        return Reward(path, _guarded(path, function), identity)
    made = _call(path, "failed to load", function)
    if not isinstance(made, Reward):
        raise UserError(
            f"reward {path!r}: returned {type(made).__name__} when called without arguments; it "
            "must take (images, prompts), or return a craftune.Reward"
        )
    given = {str(key): str(value) for key, value in made.identity.items()}
    identity |= given | {"sha256": f"{identity['sha256']} {given.get('sha256', '')}".strip()}
    score = _guarded(path, made.score)
    return replace(made, name=path, score=score, identity=identity, inputs=None, score_inputs=None)


def _takes_arguments(function: Callable[..., Any]) -> bool:
    try:
        return bool(inspect.signature(function).parameters)
    except ValueError:  # some builtins have no signature
        return True


def _guarded(path: str, function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Whatever goes wrong inside becomes one line that names the reward and the place."""

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        values = _call(path, f"failed on {len(images)} images", function, images, prompts)
        try:
            return torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            kind = type(values).__name__
            raise UserError(
                f"reward {path!r} returned {kind}; it must return one number per image"
            ) from None

    return score


def _call(path: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        raise  # the stage knows what to lower
    except Exception as error:  # the user's code runs here: anything may come
        raise UserError(f"reward {path!r} {what}: {described(error)}") from error
