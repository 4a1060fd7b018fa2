"""Distance against FLOPs per image as an SVG file, for bench/noise_correction.py."""

from collections.abc import Sequence
from typing import Any

PANEL = (400, 300)


def curve(points: list[dict[str, Any]], towers: Sequence[str]) -> str:
    """Distance against FLOPs per image, with intervals, as a picture: one panel per tower."""
    width, height = len(towers) * PANEL[0], PANEL[1]
    panels = "".join(_panel(points, tower, i * PANEL[0]) for i, tower in enumerate(towers))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f"{panels}</svg>\n"
    )


def _panel(points: list[dict[str, Any]], tower: str, left: int) -> str:
    """Grey: n steps of the flow; red: n + the corrector's."""
    most = max(p["flops"] for p in points) * 1.15
    top = max(p["distance"][tower]["high"] for p in points) * 1.1
    floor, parts = PANEL[1] - 40, []

    def at(flops: float, distance: float) -> tuple[float, float]:
        x = left + 50 + (PANEL[0] - 60) * flops / most
        return round(x, 1), round(floor - (floor - 12) * distance / top, 1)

    for p in points:
        color = "#c33" if p["corrector steps"] else "#777"
        found, beside = p["distance"][tower], 18 if p["corrector steps"] else -6
        x, y = at(p["flops"], found["mean"])
        low, high = at(0, found["low"])[1], at(0, found["high"])[1]
        parts += [
            f'<path d="M{x} {low}V{high}" stroke="{color}"/>',
            f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>',
            f'<text x="{x + 6}" y="{y + beside}" fill="{color}">{p["name"]}</text>',
        ]
    right = left + PANEL[0] - 10
    parts += [
        f'<path d="M{left + 50} 12V{floor}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{left + 50}" y="{floor + 18}">0</text>',
        f'<text x="{right}" y="{floor + 18}" text-anchor="end">{most / 1e6:.0f} MFLOP</text>',
        f'<text x="{left + 46}" y="20" text-anchor="end">{top:.2f}</text>',
        f'<text x="{left + 60}" y="20">Fréchet distance, tower {tower}</text>',
    ]
    return "".join(parts)
