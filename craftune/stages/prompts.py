"""Stage `prompts`: the user's files -> prompts.jsonl and evaluation.jsonl, every row counted."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craftune.config import EvaluateConfig, PromptsConfig
from craftune.errors import UserError
from craftune.hub_prompts import on_hub, read_hub
from craftune.models import resolve
from craftune.prompt_files import Row, read_prompts
from craftune.records import Prompt, prompt_id, write_json, write_rows

EMPTY, NO_TEXT, DUPLICATE = "empty", "not text", "duplicate"
LEAK = "is an evaluation prompt"


@dataclass(frozen=True)
class Rejection:
    """A row of the source that became no prompt, and why; `row` is its line or number."""

    row: int
    text: str
    reason: str


def prompts(
    config: PromptsConfig, evaluation: EvaluateConfig, seed: int, out: Path
) -> dict[str, int]:
    """Read, de-duplicate and draw the training prompts; set the evaluation prompts apart.

    A prompt of the evaluation never trains: it is rejected by name from the training prompts.
    Without an evaluation file, `num_prompts` of the source are held out by seed.

    Args:
        out: receives prompts.jsonl, evaluation.jsonl and rejections.jsonl; for datasets of the
            hub also hub.json: at which commit, and from which files, they were read.

    Returns:
        Counts that add up: rows = prompts + not_drawn + held_out + the rejections.

    Raises:
        UserError: a file is missing, of an unknown kind, without the column, or without prompts.
    """
    origins: list[dict[str, Any]] = []
    count, kept, rejected = _read("prompts.source", config.source, config, origins)
    rng = random.Random(f"prompts/{seed}")
    if evaluation.source:
        others = _read("evaluate.source", evaluation.source, config, origins)[1]
        held_out = _sample(list(others.values()), evaluation.num_prompts, rng)
    else:
        held_out = _hold_out(config, evaluation, list(kept.values()), rng)
    apart = {prompt.id for prompt in held_out}
    if evaluation.source:
        leaks = [(row, prompt) for row, prompt in kept.items() if prompt.id in apart]
        rejected += [Rejection(row, prompt.prompt, LEAK) for row, prompt in leaks]
    left = [prompt for prompt in kept.values() if prompt.id not in apart]
    if not left:
        raise UserError(
            f"prompts.source {config.source!r}: every prompt of it is also in evaluate.source "
            f"{evaluation.source!r}, so none is left to train on"
        )
    chosen = _sample(left, config.limit, rng)
    write_rows(out / "rejections.jsonl", sorted(rejected, key=lambda r: r.row))
    if origins:
        write_json(out / "hub.json", origins)
    write_rows(out / "evaluation.jsonl", held_out)
    write_rows(out / "prompts.jsonl", chosen)
    reasons = (DUPLICATE, EMPTY, NO_TEXT, LEAK)
    return {
        "rows": count,
        **{f"rejected: {name}": sum(r.reason == name for r in rejected) for name in reasons},
        "held_out": 0 if evaluation.source else len(held_out),
        "not_drawn": len(left) - len(chosen),
        "prompts": len(chosen),
        "evaluation_prompts": len(held_out),
    }


def _read(
    key: str, source: str, config: PromptsConfig, origins: list[dict[str, Any]]
) -> tuple[int, dict[int, Prompt], list[Rejection]]:
    """Number of rows; row -> prompt; the rows that are empty, no text or repeated.

    Args:
        origins: receives where a dataset of the hub was read from.
    """
    if on_hub(source):
        rows, origin = read_hub(source, key, config.split, config.column, config.category)
        origins.append(origin)
    else:
        path = resolve(source)
        if not path.is_file():
            raise UserError(f"{key} {source!r}: no such file")
        rows = read_prompts(path, config.column, config.category)
    kept, rejected = _distinct(rows)
    if not kept:
        raise UserError(f"{key} {source!r}: no prompt in it ({len(rows)} rows); add some")
    return len(rows), kept, rejected


def _distinct(rows: list[Row]) -> tuple[dict[int, Prompt], list[Rejection]]:
    kept: dict[int, Prompt] = {}
    seen: set[str] = set()
    rejected = []
    for row in rows:
        text, reason = _text(row.prompt)
        if not reason and prompt_id(text) in seen:
            reason = DUPLICATE
        if reason:
            rejected.append(Rejection(row.number, text, reason))
            continue
        category = str(row.category) if isinstance(row.category, str | int) else ""
        kept[row.number] = Prompt(prompt_id(text), text, _text(category)[0])
        seen.add(prompt_id(text))
    return kept, rejected


def _text(value: object) -> tuple[str, str]:
    """A text with single blanks for all white space, and why it is no prompt, or ""."""
    if not isinstance(value, str | None):
        return repr(value), NO_TEXT
    text = " ".join((value or "").split())
    if not text.isascii() and text != text.encode(errors="ignore").decode():
        return ascii(text), NO_TEXT  # half of a surrogate pair, as JSON may hold
    return text, "" if text else EMPTY


def _hold_out(
    config: PromptsConfig, evaluation: EvaluateConfig, kept: list[Prompt], rng: random.Random
) -> list[Prompt]:
    """Some of the training prompts, at most half."""
    if len(kept) < 2:
        raise UserError(
            f"prompts.source {config.source!r}: its one prompt cannot both train and be held out; "
            "add prompts, or give evaluate.source"
        )
    return _sample(kept, min(evaluation.num_prompts, len(kept) // 2), rng)


def _sample(rows: list[Prompt], n: int, rng: random.Random) -> list[Prompt]:
    """n of them by rng, in the original order; all where n is 0 or enough."""
    if n == 0 or n >= len(rows):
        return rows
    return [rows[i] for i in sorted(rng.sample(range(len(rows)), n))]
