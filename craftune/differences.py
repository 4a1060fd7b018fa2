"""How two records of settings or inputs differ, in words."""

from collections.abc import Mapping
from typing import Any


def told(part: str, where: str, old: Any, new: Any) -> str:
    """A difference in words; nobody wants to read two digests."""
    if part == "inputs":
        stage, _, file = where.partition(".")
        return f"was made from another {file or 'outcome'} of stage {stage!r}"
    if part == "code":
        return f"was made before the source of {where!r} changed"
    if where.endswith("_sha256"):
        return f"was made before the content of {where.removesuffix('_sha256')} changed"
    return f"was made with {where} = {old!r}, now it is {new!r}"


def first_difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Dotted key, old and new value of the first place where two plain values differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else (where, before, now)
    for key in sorted(before.keys() | now.keys()):
        place = f"{where}.{key}" if where else key
        found = first_difference(before.get(key), now.get(key), place)
        if found:
            return found
    return None


def plain(value: Any) -> Any:
    """The same value as JSON would give it back."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
