"""A recipe: TOML plus `--set section.key=value` -> `craftune.config.Recipe`.

Everything is checked before anything loads: unknown sections, keys and names are refused with
the closest known one, values of the wrong type or out of range with what was expected.
"""

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from craftune.config import Recipe
from craftune.errors import UserError, unknown_name

SECTIONS = (
    "run",
    "model",
    "prompts",
    "refine",
    "generate",
    "score",
    "select",
    "method",
    "train",
    "evaluate",
    "report",
)
"""In the order in which a run needs them."""

MEND = {
    "int_type": "write a whole number without quotes",
    "float_type": "write a number without quotes",
    "bool_type": "write true or false",
    "string_type": 'write "..."',
    "tuple_type": 'write ["...", ...]',
    "dict_type": "write { name = value, ... }",
    "dataclass_type": "write a section of keys",
}
"""What would do, by pydantic's type of error."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a TOML file.
        overrides: "section.key=value" strings; the value is TOML, or a bare string.

    Raises:
        UserError: the file is missing or no TOML, a key is unknown, or a value has a wrong type or
            is out of range. Names file and key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; see the folder recipes/ for examples")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    for override in overrides:
        _apply(data, override)
    return _validate(data, str(path))


def overridden(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What "section.key=value" strings say by themselves, by section; not checked further.

    Raises:
        UserError: a string of another form.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        _apply(data, override)
    return data


def settings() -> Iterator[tuple[str, str, str]]:
    """Every key of a recipe, in the order of the stages: section, "key = default", what it does."""
    kinds = get_type_hints(Recipe)
    for section in SECTIONS:
        yield from keys_of(kinds[section], section)


def keys_of(kind: Any, section: str) -> Iterator[tuple[str, str, str]]:
    """The same for one section, or for a method's hyper-parameters."""
    hints = get_type_hints(kind)
    for name, info in kind.__pydantic_fields__.items():
        if is_dataclass(hints[name]):
            yield from keys_of(hints[name], f"{section}.{name}")
            continue
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        shown = name if default is None else f"{name} = {_toml(default)}"
        text = " ".join((info.description or "").split())
        yield section, shown, f"Required. {text}" if info.is_required() else text


def _toml(value: Any) -> str:
    """A default as a recipe would write it."""
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {_toml(v)}" for key, v in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return json.dumps(value)


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one dotted key in place."""
    key, separator, text = override.partition("=")
    *sections, name = _parts(key)
    if not separator or not sections or not all([*sections, name]):
        raise UserError(f"--set {override!r}: expected section.key=value, e.g. train.steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section")
    data[name] = value


def _parts(key: str) -> list[str]:
    """Of a dotted key; a part with a dot in it is quoted, as in reward."hpsv2.1".path."""
    try:
        found, parts = tomllib.loads(f"{key} = 0"), []
    except tomllib.TOMLDecodeError:
        return [part.strip() for part in key.split(".")]
    while isinstance(found, dict):
        ((part, found),) = found.items()
        parts.append(part)
    return parts


def _validate(data: dict[str, Any], source: str) -> Recipe:
    """JSON mode is strict about types but takes lists for tuples, as TOML needs."""
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(f"{source}, {_explain(error, data)}") from None
    except TypeError as error:
        raise UserError(f"{source}: a value cannot be used in a recipe: {error}") from None


def _explain(error: ValidationError, data: dict[str, Any]) -> str:
    """One finding as "section.key: what is wrong, what was got, what would do".

    Unknown keys come first: they often explain the others. Of a union's findings, the deepest.
    """
    found = min(
        error.errors(), key=lambda e: (e["type"] != "unexpected_keyword_argument", -len(e["loc"]))
    )
    key, got = _place(found["loc"], data)
    if found["type"] == "unexpected_keyword_argument":
        kind: Any = Recipe
        for part in found["loc"][:-1]:
            kind = get_type_hints(kind)[str(part)]
        name = str(found["loc"][-1])
        return f"{key}: {unknown_name('key', name, [f.name for f in fields(kind)])}"
    if found["type"] == "missing":
        missing = ".".join(str(part) for part in found["loc"])
        return f"{missing}: missing; it has no default"
    message = found["msg"].removeprefix("Value error, ")
    if message.startswith(f"{key}."):  # our own checks name the key and the value themselves
        return message
    message = message.replace("Input should", "it should")
    mend = f"; {MEND[found['type']]}" if found["type"] in MEND else ""
    return f"{key}: {message[0].lower()}{message[1:]}, got {got!r}{mend}"


def _place(loc: tuple[int | str, ...], data: Any) -> tuple[str, Any]:
    """Dotted key and value; the names of a union's members in `loc` lead nowhere in the data."""
    parts = []
    for part in loc:
        inside = part in data if isinstance(data, dict) else isinstance(part, int)
        if inside:
            parts.append(str(part))
            data = data[part]
    return ".".join(parts), data
