"""Rewards from outside: a function of the user's, by "package.module:name".

The names of its parameters say how it is called, and nothing else does:

    def f(images, prompts)    a list of PIL images and of their prompts -> one number per image
    def f(image, prompt)      one image and its prompt -> its number
    def f(images), f(image)   the same, without prompts
    def f()                   called once -> a `craftune.Reward`

Other names are refused: a function that is called with lists where it expects single images may
well return something.
"""

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

    Numbers come as list, array or tensor. The identity carries the module's sha256.

    Raises:
        UserError: no such module or name, parameters of other names, or a factory that fails or
            returns something else.
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
    parameters = _parameters(path, function)
    if parameters:
        per_image, uses_prompt = parameters[0] == "image", len(parameters) == 2
        whole = _over_images(function) if per_image else function
        asked = whole if uses_prompt else _without_prompts(whole)
        return Reward(path, _guarded(path, asked), identity, uses_prompt=uses_prompt)
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


KINDS = (("images", "prompts"), ("image", "prompt"), ("images",), ("image",), ())
"""Parameters that a function of the user's may have, besides ones with defaults."""


def _parameters(path: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """Those of `KINDS` that the function has.

    Raises:
        UserError: it has others.
    """
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise _unclear(path, "Python cannot tell its parameters") from None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    kinds = {name for kind in KINDS for name in kind}
    names = tuple(
        p.name
        for p in found
        if p.name in kinds or (p.default is p.empty and p.kind not in variadic)
    )
    positional = all(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in found if p.name in names
    )
    starred = not names and any(p.kind in variadic for p in found)
    if names not in KINDS or not positional or starred:
        raise _unclear(path, f"its parameters are {inspect.signature(function)}")
    return names


def _unclear(path: str, seen: str) -> UserError:
    return UserError(
        f"reward {path!r}: {seen}; name them (images, prompts) to get lists and return one number "
        "per image, or (image, prompt) to get one image at a time; the prompt may be left out"
    )


def _over_images(function: Callable[..., Any]) -> Callable[..., list[float]]:
    """A function of one image as one of many.

    Each value must be one number: `float` would take a string, and an array of one element.
    """

    def of_many(*lists: list[Any]) -> list[float]:
        found = [function(*one) for one in zip(*lists, strict=True)]
        for value in found:
            if isinstance(value, str) or getattr(value, "ndim", 0):
                raise TypeError(f"returned {type(value).__name__} for one image, not a number")
        return [float(value) for value in found]

    return of_many


def _without_prompts(function: Callable[..., Any]) -> Callable[..., Any]:
    def of_images(images: list[Image.Image], prompts: list[str]) -> Any:
        del prompts
        return function(images)

    return of_images


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
