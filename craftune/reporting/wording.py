"""Numbers and findings in words. Honest ones: an interval that holds zero is no clear change."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MINUS, NARROW, ARROW = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}", "\N{RIGHTWARDS ARROW}"
IMPROVED, UNCLEAR, WORSE = "improved", "no clear change", "worse"
FEW_PROMPTS = 20
"""Below this a percentile interval is too narrow to trust; the report says so."""


def verdict(difference: Mapping[str, Any]) -> str:
    """One of improved, no clear change, worse."""
    if difference["low"] is None:
        return UNCLEAR
    return IMPROVED if difference["low"] > 0 else WORSE if difference["high"] < 0 else UNCLEAR


def number(value: float | None, decimals: int = 0) -> str:
    """1,234.5 with a true minus sign; an n-dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:,.{decimals}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float | None, decimals: int = 0) -> str:
    """With a sign, also when positive."""
    text = number(value, decimals)
    return f"+{text}" if text[0].isdigit() and text.strip("0.,") else text


def percent(value: float | None, decimals: int = 1) -> str:
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


def level(value: float | None, entry: Mapping[str, Any]) -> str:
    """A score or mean of this reward."""
    if entry["kind"] == "share":
        return percent(value)
    return number(value, decimals(entry))


def change(value: float | None, entry: Mapping[str, Any]) -> str:
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


def conclusion(entries: Sequence[Mapping[str, Any]]) -> str:
    """All headline measures in one sentence."""
    total = len(entries)
    count = {v: sum(e["verdict"] == v for e in entries) for v in (IMPROVED, UNCLEAR, WORSE)}
    if total == 1:
        return {
            IMPROVED: "The tuned model is better on the one headline measure.",
            UNCLEAR: "No clear change on the one headline measure.",
            WORSE: "The tuned model is worse on the one headline measure.",
        }[entries[0]["verdict"]]
    everywhere = "both" if total == 2 else f"all {total}"
    if count[IMPROVED] == total:
        return f"The tuned model is better on {everywhere} headline measures."
    if count[WORSE] == total:
        return f"The tuned model is worse on {everywhere} headline measures."
    if count[UNCLEAR] == total:
        return (
            f"No clear change on {'either' if total == 2 else 'any'} of {total} headline measures."
        )
    parts = [f"better on {count[IMPROVED]}"] if count[IMPROVED] else []
    parts += [f"worse on {count[WORSE]}"] if count[WORSE] else []
    tail = f", with no clear change on {count[UNCLEAR]}" if count[UNCLEAR] else ""
    return f"Of {total} headline measures, the tuned model is {' and '.join(parts)}{tail}."


def duration(seconds: float) -> str:
    """4.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {rest:02d}{NARROW}s"
    return f"{minutes // 60}{NARROW}h {minutes % 60:02d}{NARROW}min"
