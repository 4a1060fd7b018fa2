"""Methods: one file each, a frozen dataclass that reads like its paper. `METHODS` is the table."""

import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from craftune.errors import UserError, unknown_name
from craftune.methods.alignprop import AlignProp
from craftune.methods.craft import CRAFT
from craftune.methods.denoising import NoiseLevels
from craftune.methods.draft import DRaFT as DRaFT
from craftune.methods.graft import GRAFT
from craftune.methods.noise_correction import NoiseCorrection as NoiseCorrection
from craftune.methods.pgraft import PGRAFT as PGRAFT
from craftune.methods.refl import ReFL
from craftune.methods.sft import SFT

FromExamples: TypeAlias = CRAFT | SFT | GRAFT | PGRAFT
FromPrompts: TypeAlias = DRaFT | ReFL | AlignProp
AnyMethod: TypeAlias = FromExamples | FromPrompts | NoiseCorrection

METHODS: dict[str, type[AnyMethod]] = {
    "craft": CRAFT,
    "sft": SFT,
    "graft": GRAFT,
    "pgraft": PGRAFT,
    "draft": DRaFT,
    "refl": ReFL,
    "alignprop": AlignProp,
    "noise-correction": NoiseCorrection,
}


def about(name: str) -> tuple[str, str]:
    """A method as papers write it, and what it does in a line; `name` is of the table."""
    text = (sys.modules[METHODS[name].__module__].__doc__ or "").splitlines()[0]
    title, _, rest = text.partition(": ")
    return title, rest


def build(name: str, settings: Mapping[str, Any]) -> AnyMethod:
    """The method of a recipe with its hyper-parameters.

    Raises:
        UserError: unknown method or hyper-parameter, or a value out of range.
    """
    if name not in METHODS:
        raise UserError(f"method.name: {unknown_name('method', name, METHODS)}")
    kind = METHODS[name]
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        found = error.errors()[0]
        key = "method.settings." + ".".join(str(part) for part in found["loc"])
        if found["type"] == "unexpected_keyword_argument":
            inner = NoiseLevels if found["loc"][0] == "noise" else kind
            known = inner.__dataclass_fields__
            raise UserError(
                f"{key}: {unknown_name('setting', str(found['loc'][-1]), known)}"
            ) from None
        raise UserError(f"{key}: {found['msg'].lower()}, got {found['input']!r}") from None
