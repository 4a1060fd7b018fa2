"""Numbers and findings in words. Honest ones: an interval that holds zero is no clear change."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from markupsafe import Markup

Number: TypeAlias = int | float
MINUS, NARROW, ARROW = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}", "\N{RIGHTWARDS ARROW}"
IMPROVED, UNCLEAR, WORSE = "improved", "no clear change", "worse"
FEW_PROMPTS = 20
"""Below this a percentile interval is too narrow to trust; the report says so."""


def verdict(difference: Mapping[str, Any]) -> str:
    """One of improved, no clear change, worse."""
    if difference["low"] is None:
        return UNCLEAR
    return IMPROVED if difference["low"] > 0 else WORSE if difference["high"] < 0 else UNCLEAR


def number(value: Number | None, decimals: int = 0) -> str:
    """1,234.5 with a true minus sign; an n-dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:,.{decimals}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: Number | None, decimals: int = 0) -> str:
    """With a sign, which stays where rounding leaves only zeros: +0.00 is above zero."""
    if value is None or not math.isfinite(value) or value == 0:
        return number(value, decimals)
    return ("+" if value > 0 else MINUS) + number(abs(value), decimals)


def percent(value: Number | None, decimals: int = 1) -> str:
    """0.523 as 52.3 %."""
    return f"{number(None if value is None else 100 * value, decimals)}{NARROW}%"


def decimals(entry: Mapping[str, Any]) -> int:
    """Digits after the point that the interval's width supports, shares counted in percent."""
    if entry["kind"] == "share":
        return 1
    difference = entry["difference"]
    width = 0.0 if difference["low"] is None else difference["high"] - difference["low"]
    size = width or abs(entry["base"]) / 10 or 1.0
    return min(6, max(0, 1 - math.floor(math.log10(size))))


def fine(entry: Mapping[str, Any]) -> int:
    """Digits after the point for single images: three figures of the range they spread over."""
    at = entry["quantiles"]
    ends = [*at["base"], *at["tuned"]]
    return min(6, max(0, 2 - math.floor(math.log10(max(ends) - min(ends) or 1.0))))


def breakable(name: str) -> Markup:
    """A name that may be long, such as package.module:function, with places to wrap at."""
    parts = re.findall(r"[^-_.:/]{1,14}[-_.:/]*|[-_.:/]+", name)
    return Markup("<wbr>").join(parts)


def level(value: Number | None, entry: Mapping[str, Any]) -> str:
    """A score or mean of this reward."""
    if entry["kind"] == "share":
        return percent(value)
    return number(value, decimals(entry))


def change(value: Number | None, entry: Mapping[str, Any]) -> str:
    """A difference of this reward, signed; of shares in percentage points."""
    if entry["kind"] == "share":
        return signed(None if value is None else 100 * value, 1)
    return signed(value, decimals(entry))


def interval(difference: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """[low, high] in the units of `change`; empty without an interval."""
    if difference["low"] is None:
        return ""
    return f"[{change(difference['low'], entry)}, {change(difference['high'], entry)}]"


def label(entry: Mapping[str, Any]) -> str:
    """What the number is, in words."""
    if entry["role"] == "composite":
        return "Composite reward"
    return f"Images that pass {entry['name']}" if entry["kind"] == "share" else entry["name"]


def sentence(entry: Mapping[str, Any]) -> str:
    """E.g. "Images that pass strict: 52.3 % -> 61.0 %, +8.7 points [+6.1, +11.4]: improved"."""
    difference = entry["difference"]
    unit = " points" if entry["kind"] == "share" else ""
    bounds = interval(difference, entry)
    return (
        f"{label(entry)}: {level(entry['base'], entry)} {ARROW} {level(entry['tuned'], entry)}, "
        f"{change(difference['mean'], entry)}{unit}{' ' + bounds if bounds else ''}: "
        f"{entry['verdict']}"
    )


def by_scale(entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """E.g. "shapes-i at scale 0.5: +0.21 [+0.10, +0.32]; at 1: +0.27 [+0.03, +0.50]"."""
    parts = []
    for row in rows:
        difference = row["measures"][entry["name"]]["difference"]
        unit = " points" if entry["kind"] == "share" else ""
        bounds = interval(difference, entry)
        moved = f"{change(difference['mean'], entry)}{unit}{' ' + bounds if bounds else ''}"
        if row["scale"]:
            parts.append(f"{row['scale']:g}: {moved}")
    return f"{label(entry)} at scale {'; at '.join(parts)}"


def conclusion(entries: Sequence[Mapping[str, Any]]) -> str:
    """All headline measures in one sentence, by name."""
    named = {found: [] for found in (IMPROVED, WORSE, UNCLEAR)}
    for entry in entries:
        name = "the composite reward" if entry["role"] == "composite" else entry["name"]
        named[entry["verdict"]].append(name)
    moved = [f"better on {listing(named[IMPROVED], 'and')}"] if named[IMPROVED] else []
    moved += [f"worse on {listing(named[WORSE], 'and')}"] if named[WORSE] else []
    if not moved:
        return f"No clear change on {listing(named[UNCLEAR], 'or')}."
    rest = f"; no clear change on {listing(named[UNCLEAR], 'or')}" if named[UNCLEAR] else ""
    return f"The tuned model is {' and '.join(moved)}{rest}."


def listing(names: Sequence[str], word: str) -> str:
    """a, b and c."""
    return f" {word} ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def duration(seconds: Number) -> str:
    """4.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {rest:02d}{NARROW}s"
    return f"{minutes // 60}{NARROW}h {minutes % 60:02d}{NARROW}min"
