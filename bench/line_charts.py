"""Line charts side by side as one SVG file, for the pages in docs/."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float, float, float]
"""x, y, and the ends of y's interval (equal to y where there is none)."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 440, 300, 52, 44, 30
COLOURS = ("#c33", "#27a", "#282", "#a6a", "#c80", "#555")


@dataclass(frozen=True)
class Panel:
    """One chart: series by name, drawn in the order given."""

    title: str
    x: str
    series: Mapping[str, Sequence[Point]]


def picture(panels: Sequence[Panel]) -> str:
    """An SVG file; a series has the same colour in all panels, by its name's place."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    drawn = "".join(_panel(panel, i * WIDTH, colours) for i, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f"{drawn}</svg>\n"
    )


def _panel(panel: Panel, left: int, colours: Mapping[str, str]) -> str:
    points = [point for series in panel.series.values() for point in series]
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[2] for p in points), max(p[3] for p in points)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    floor, right = HEIGHT - BOTTOM, left + WIDTH - 16

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - first) / (last - first), (y - low) / (high - low)
        start = left + LEFT
        return round(start + across * (right - start), 1), round(floor - up * (floor - TOP), 1)

    parts = [
        f'<text x="{left + LEFT}" y="18" font-weight="bold">{panel.title}</text>',
        f'<path d="M{left + LEFT} {TOP}V{floor}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{(left + LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{panel.x}</text>",
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = first + share * (last - first), low + share * (high - low)
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        here, there = at(x, low)[0], at(first, y)[1]
        label = f'<text x="{here}" y="{floor + 16}" text-anchor="{anchor}">{x:,.6g}</text>'
        parts += [
            label,
            f'<text x="{left + LEFT - 6}" y="{there}" text-anchor="end">{y:.2f}</text>',
        ]
    for row, (name, series) in enumerate(panel.series.items()):
        colour, line = colours[name], " ".join(f"{x},{y}" for x, y in (at(*p[:2]) for p in series))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, least, most in series:
            if least < most:
                bar = f"M{at(x, least)[0]} {at(x, least)[1]}V{at(x, most)[1]}"
                cx, cy = at(x, y)
                parts.append(f'<path d="{bar}" stroke="{colour}"/>')
                parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{colour}"/>')
        parts.append(
            f'<text x="{right - 4}" y="{floor - 10 - 15 * row}" text-anchor="end" '
            f'fill="{colour}">{name}</text>'
        )
    return "".join(parts)
