"""The README's picture: base above tuned, same prompts and noise, from a finished run.

    python bench/picture.py runs/demo docs/before-after.png

Nobody chose the prompts: it is the first one of each category, by id, where base and tuned differ
in the verdict of `--reward` if there is such a one, so that the picture shows what changed; the
report shows the unfiltered grid and the largest losses.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from craftune.images import decode
from craftune.records import read_table
from craftune.runs import stage_folder

TILE, GAP, LABEL = 160, 12, 34


def main() -> None:
    """Compose the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reward", default="shapes-verifier")
    options = parser.parse_args()
    folder = stage_folder(options.run, "evaluate")
    images = {m: rows(folder, f"images-{m}-*") for m in ("base", "tuned")}
    scores = {
        m: {
            key(row): row["value"]
            for row in read_table(folder.glob(f"scores-{m}-*.parquet")).to_pylist()
            if row["reward"] == options.reward
        }
        for m in ("base", "tuned")
    }
    chosen: dict[str, tuple[str, int]] = {}
    for place in sorted(images["base"]):
        category = images["base"][place]["category"]
        if scores["base"][place] != scores["tuned"][place]:
            chosen.setdefault(category, place)
    compose([(images["base"][p], images["tuned"][p]) for p in chosen.values()]).save(options.out)


def key(row: dict) -> tuple[str, int]:
    """What pairs base with tuned."""
    return row["prompt_id"], row["sample"]


def rows(folder: Path, pattern: str) -> dict[tuple[str, int], dict]:
    """Evaluation images by prompt and sample."""
    return {key(row): row for row in read_table(folder.glob(pattern)).to_pylist()}


def compose(pairs: list[tuple[dict, dict]]) -> Image.Image:
    """Two rows of tiles, base above tuned, the prompt below."""
    width = 70 + len(pairs) * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, 2 * (TILE + GAP) + GAP + LABEL), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for y, name in ((GAP, "base"), (2 * GAP + TILE, "tuned")):
        draw.text(
            (GAP, y + TILE // 2 - 8), name, fill="black", font=ImageFont.load_default(size=16)
        )
    for i, pair in enumerate(pairs):
        x = 70 + i * (TILE + GAP)
        for row, y in zip(pair, (GAP, 2 * GAP + TILE), strict=True):
            tile = decode(row["image"]["bytes"]).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, y))
        words, lines = pair[0]["prompt"].split(), [""]
        for word in words:
            grown = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], grown] if draw.textlength(grown, font) < TILE else [*lines, word]
        draw.multiline_text(
            (x, 2 * (TILE + GAP) + 2), "\n".join(lines[:2]), fill="black", font=font
        )
    return sheet


if __name__ == "__main__":
    main()
