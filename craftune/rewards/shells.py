"""A pickled network, read for its tensors alone: none of its code is imported or run.

torch's own restricted unpickler does the reading. It knows tensors and plain containers, and of the
rest makes what it is told to: here an inert object for the names of network classes, which keeps
attributes and does nothing. Any other name in the file refuses it before a byte is unpickled.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craftune.errors import UserError

CLASSES = ("torch.nn.modules.", "transformers.", "trainer.models.")
"""Beginnings of names that become inert objects."""

FUNCTIONS = ("torch._C._nn.gelu", "torch.nn.functional.gelu")
"""Names of functions that networks keep as attributes."""


class _Shell:
    """Stands for any object of a network; holds what the file says it holds."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Nothing is done with arguments."""


def read_network(file: Path, key: str) -> dict[str, Tensor]:
    """The state of a module that torch.save pickled whole: parameters and kept buffers by name.

    Raises:
        UserError: damaged, or the file names something that is no part of a network.
    """
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except OSError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own
        raise UserError(f"{key}: {file}: damaged ({_line(error)}); fetch it again") from None
    for name in names:
        if not name.startswith(CLASSES) and name not in FUNCTIONS:
            raise UserError(
                f"{key}: {file}: names {name!r}, which is no part of a network; a file that asks "
                "for it is not read, as it may run code"
            )
    try:
        with torch.serialization.safe_globals([(_Shell, name) for name in names]):
            found = torch.load(file, map_location="cpu", weights_only=True)
        return dict(_state(found, ""))
    except OSError:
        raise
    except Exception as error:  # whatever a broken or hostile file leads to
        raise UserError(
            f"{key}: {file}: damaged, or no pickled network ({_line(error)}); fetch it again"
        ) from None


def _state(shell: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """As `nn.Module.state_dict` lists it."""
    held = vars(shell)
    for name, tensor in (held["_parameters"] | held["_buffers"]).items():
        dropped = name in held.get("_non_persistent_buffers_set", ())
        if isinstance(tensor, Tensor) and not dropped:
            yield prefix + name, tensor.detach()
    for name, child in held["_modules"].items():
        if child is not None:
            yield from _state(child, f"{prefix}{name}.")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
