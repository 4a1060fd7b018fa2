"""Functions from outside the package, named "package.module:function" in a recipe."""

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from craftune.errors import UserError, unknown_name
from craftune.records import sha256


def imported(path: str, key: str) -> tuple[Callable[..., Any], ModuleType]:
    """The function (or class, or callable object) of this name, and its module.

    Modules are also found in the current directory.

    Raises:
        UserError: the module cannot be imported, or has nothing callable of that name.
    """
    module_name, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code runs here: anything may come
        raise UserError(
            f"{key} {path!r}: cannot import {module_name!r}: {described(error)}; modules are "
            f"looked up as by Python, and in {Path.cwd()}"
        ) from error
    known = [word for word, value in vars(module).items() if callable(value) and word[0] != "_"]
    found = vars(module).get(name)
    if not callable(found):
        raise UserError(f"{key} {path!r}: {module_name}: {unknown_name('function', name, known)}")
    return found, module


def source_sha256(path: str, key: str) -> str:
    """Digest of the source file of a function from outside; "" for one without a file."""
    file = getattr(imported(path, key)[1], "__file__", None)
    return sha256(Path(file)) if file else ""


def described(error: BaseException) -> str:
    """One line for an exception of the user's code: its type, its message and where it arose."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    if isinstance(error, SyntaxError) or not frames or frames[-1].filename == __file__:
        return text
    return f"{text} (in {frames[-1].name}, {frames[-1].filename}, line {frames[-1].lineno})"
