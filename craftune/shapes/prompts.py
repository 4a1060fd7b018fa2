"""The prompt files: training, validation and test prompts, split by what they mean.

    python -m craftune.shapes.prompts

writes `prompts/*.jsonl` again, byte for byte. A spec's prompts all fall into one split; "single"
and "two" have too few specs for that and are split by (spec, phrasing).
"""

import hashlib
import json
import random
from pathlib import Path

from craftune.shapes.captions import short_captions
from craftune.shapes.world import CATEGORIES, Spec, specs_by_category

FOLDER = Path(__file__).parent / "prompts"
SIZES = {
    "train": {
        "single": 60,
        "color": 160,
        "count": 260,
        "two": 140,
        "position": 220,
        "binding": 260,
        "position_binding": 300,
    },
    "validation": dict.fromkeys(CATEGORIES, 32),
    "test": dict.fromkeys(CATEGORIES, 56),
}
"""Prompts per split and category."""

_SHARES = (("test", 0.34), ("validation", 0.20), ("train", 0.46))
_BY_PHRASING = ("single", "two")


def split_prompts() -> dict[str, list[tuple[str, str]]]:
    """(prompt, category) of every split; texts are unique over all splits."""
    splits: dict[str, list[tuple[str, str]]] = {name: [] for name in SIZES}
    for category, specs in specs_by_category().items():
        for name, texts in _split_category(category, specs).items():
            chosen = _spread(texts, SIZES[name][category], f"{name}/{category}")
            splits[name] += [(text, category) for text in chosen]
    return splits


def write(folder: Path) -> None:
    """Write one jsonl file per split: {"prompt": ..., "category": ...}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in split_prompts().items():
        lines = [json.dumps({"prompt": text, "category": kind}) + "\n" for text, kind in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def read(split: str) -> list[tuple[str, str]]:
    """(prompt, category) of a split that ships with the package."""
    rows = map(json.loads, (FOLDER / f"{split}.jsonl").read_text().splitlines())
    return [(row["prompt"], row["category"]) for row in rows]


def _split_category(category: str, specs: list[Spec]) -> dict[str, list[list[str]]]:
    """Per split, the prompts of each of its units; a unit is a spec, or a phrasing of one."""
    if category in _BY_PHRASING:
        units = [[text] for spec in specs for text in short_captions(spec)]
    else:
        units = [short_captions(spec) for spec in specs]
    units.sort(key=lambda unit: hashlib.sha256(unit[0].encode()).hexdigest())
    splits, start, share = {}, 0, 0.0
    for name, part in _SHARES:
        share += part
        end = round(share * len(units))
        splits[name], start = units[start:end], end
    return splits


def _spread(units: list[list[str]], size: int, seed: str) -> list[str]:
    """`size` prompts, from every unit in turn, phrasings at random."""
    rng = random.Random(seed)
    shuffled = [rng.sample(unit, len(unit)) for unit in units]
    turns = range(max(map(len, shuffled)))
    texts = [unit[turn] for turn in turns for unit in shuffled if turn < len(unit)]
    if len(texts) < size:
        raise ValueError(f"{seed}: {len(texts)} prompts, fewer than {size}")
    return texts[:size]


if __name__ == "__main__":
    write(FOLDER)
