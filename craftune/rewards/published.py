"""A reward with published weights: an entry of `REWARDS` that is loaded onto a device.

Its settings are the section [reward."NAME"] of a recipe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from craftune.errors import UserError, unknown_name
from craftune.types import Reward

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of a reward's network; "auto" is float16 on CUDA and float32 elsewhere."""


@dataclass(frozen=True)
class Published:
    """How a published reward is had.

    Attributes:
        about: one line for `craftune list rewards`.
        settings: frozen dataclass with the keys of [reward."NAME"]; all have defaults.
        files: the local files of the weights, by role; downloads from the hub on first use.
        load: settings, device -> the reward.
        source: where the weights are published.
        licence: of the weights.
        download: how much, e.g. "3.9 GB".
        display_scale: tables show the score times this, as papers do; stored scores are raw.
    """

    about: str
    settings: type[Any]
    files: Callable[[Any], Mapping[str, Path]]
    load: Callable[[Any, torch.device], Reward]
    source: str
    licence: str
    download: str
    display_scale: float = 1.0

    def configured(self, name: str, given: Mapping[str, Any]) -> Any:
        """The settings, checked.

        Raises:
            UserError: unknown key, or a value of the wrong type or out of range.
        """
        return configured(self.settings, name, given)


def configured(kind: type[Any], name: str, given: Mapping[str, Any]) -> Any:
    """The settings of a reward, checked.

    Raises:
        UserError: unknown key, or a value of the wrong type or out of range.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(given))
    except ValidationError as error:
        found = error.errors()[0]
        key = f'reward."{name}".' + ".".join(str(part) for part in found["loc"])
        if found["type"] == "unexpected_keyword_argument":
            known = [field.name for field in fields(kind)]
            unknown = unknown_name("setting", str(found["loc"][-1]), known)
            raise UserError(f"{key}: {unknown}") from None
        raise UserError(f"{key}: {found['msg'].lower()}, got {found['input']!r}") from None


def dtype_of(name: Dtype, device: torch.device) -> torch.dtype:
    """What "auto" means on this device."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
