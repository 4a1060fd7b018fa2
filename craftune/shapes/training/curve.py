"""The loss curve of the base, as a small picture; Pillow is enough."""

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN, LEFT = 640, 300, 34, 58
_SMOOTH = 0.9
"""Weight of the past in the running mean that is drawn."""


def draw_curve(log: Path, samples_per_step: int, out: Path) -> None:
    """Draw the loss in `log` (jsonl with step and loss) over the samples seen, log scale."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    losses = _smooth([row["loss"] for row in rows])
    most = rows[-1]["step"]
    low, high = math.log(min(losses) * 0.95), math.log(max(losses) * 1.05)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - MARGIN) * step / most
        share = (math.log(loss) - low) / (high - low)
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas = ImageDraw.Draw(image)
    for loss in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0):
        if low < math.log(loss) < high:
            y = place(0.0, loss)[1]
            canvas.line((LEFT, y, WIDTH - MARGIN, y), "#dddddd")
            canvas.text((LEFT - 30, y - 6), f"{loss:g}", "#444444")
    for quarter in range(5):
        x = place(most * quarter / 4, 1.0)[0]
        seen = most * quarter / 4 * samples_per_step / 1000
        canvas.text((x - 10, HEIGHT - MARGIN + 6), f"{seen:.0f}k", "#444444")
    steps = [row["step"] for row in rows]
    points = [place(float(step), loss) for step, loss in zip(steps, losses, strict=True)]
    canvas.line(points, "#1f5fbf", 2)
    canvas.text((LEFT, 8), "velocity error (running mean) over samples seen", "#222222")
    image.quantize(32).save(out, optimize=True)


def _smooth(values: list[float]) -> list[float]:
    smooth, mean = [], values[0]
    for value in values:
        mean = _SMOOTH * mean + (1 - _SMOOTH) * value
        smooth.append(mean)
    return smooth
