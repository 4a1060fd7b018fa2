"""Stage `prompts`: the user's files -> prompts.jsonl and evaluation.jsonl, every row counted."""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from craftune.config import EvaluateConfig, PromptsConfig
from craftune.errors import UserError, unknown_name
from craftune.models import resolve
from craftune.records import Prompt, prompt_id, write_rows

READERS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Rejection:
    """A row of the source that became no prompt, and why."""

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
        out: receives prompts.jsonl, evaluation.jsonl and rejections.jsonl.

    Returns:
        Counts that add up: rows = prompts + not_drawn + held_out + the rejections.

    Raises:
        UserError: a file is missing, of an unknown kind, without the column, or without prompts.
    """
    rows = _read(resolve(config.source), config)
    kept, rejected = _distinct(rows)
    if not kept:
        raise UserError(f"{config.source}: no prompt in it ({len(rows)} rows, all empty)")
    rng = random.Random(f"prompts/{seed}")
    if evaluation.source:
        held_out, _ = _distinct(_read(resolve(evaluation.source), config))
        held_out = _sample(held_out, evaluation.num_prompts, rng)
        texts = {prompt.prompt for prompt in held_out}
        leaked = [p for p in kept if p.prompt in texts]
        rejected += [Rejection(-1, p.prompt, "is an evaluation prompt") for p in leaked]
        kept = [p for p in kept if p.prompt not in texts]
    else:
        held_out = _sample(kept, min(evaluation.num_prompts, len(kept) // 2), rng)
        names = {prompt.id for prompt in held_out}
        kept = [p for p in kept if p.id not in names]
    if not kept:
        raise UserError(f"{config.source}: every prompt is also in {evaluation.source}")
    chosen = _sample(kept, config.limit, rng)
    write_rows(out / "rejections.jsonl", rejected)
    write_rows(out / "evaluation.jsonl", held_out)
    write_rows(out / "prompts.jsonl", chosen)
    reasons = {"empty", "duplicate", "is an evaluation prompt"}
    counts = {f"rejected: {r}": sum(x.reason == r for x in rejected) for r in sorted(reasons)}
    return {
        "rows": len(rows),
        **counts,
        "held_out": 0 if evaluation.source else len(held_out),
        "not_drawn": len(kept) - len(chosen),
        "prompts": len(chosen),
        "evaluation_prompts": len(held_out),
    }


def _distinct(rows: list[tuple[str, str]]) -> tuple[list[Prompt], list[Rejection]]:
    """Prompts in file order without empty and repeated ones; those are named."""
    kept: dict[str, Prompt] = {}
    rejected = []
    for number, (text, category) in enumerate(rows, 1):
        text = " ".join(text.split())
        if not text:
            rejected.append(Rejection(number, "", "empty"))
        elif prompt_id(text) in kept:
            rejected.append(Rejection(number, text, "duplicate"))
        else:
            kept[prompt_id(text)] = Prompt(prompt_id(text), text, category)
    return list(kept.values()), rejected


def _sample(rows: list[Prompt], n: int, rng: random.Random) -> list[Prompt]:
    """n of them by rng, in the original order; all where n is 0 or enough."""
    if n == 0 or n >= len(rows):
        return rows
    return [rows[i] for i in sorted(rng.sample(range(len(rows)), n))]


def _read(path: Path, config: PromptsConfig) -> list[tuple[str, str]]:
    """(text, category) of every row."""
    if not path.is_file():
        raise UserError(f"prompts.source {str(path)!r}: no such file")
    if path.suffix not in READERS:
        raise UserError(f"{path}: unknown kind {path.suffix!r}; use one of {', '.join(READERS)}")
    try:
        if path.suffix == ".txt":
            return [(line, "") for line in path.read_text(encoding="utf-8").splitlines()]
        if path.suffix == ".parquet":
            table = pq.ParquetFile(path).read()
            records = table.to_pylist()
        elif path.suffix == ".jsonl":
            records = _json_lines(path)
        else:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            # Tab-separated prompt lists quote nothing: a lone " is part of the prompt.
            quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
            with path.open(encoding="utf-8", newline="") as file:
                records = list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not records:
        raise UserError(f"{path}: no prompt in it")
    text = _column(path, "prompts.column", config.column, list(records[0]))
    names = {name.lower(): name for name in records[0]}
    category = names.get(config.category.lower())
    return [
        (str(row.get(text) or ""), str(row.get(category) or "") if category else "")
        for row in records
    ]


def _json_lines(path: Path) -> list[dict[str, object]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {error.msg}") from None
        if not isinstance(value, dict):
            raise UserError(f'{path}, line {number}: expected an object like {{"prompt": "..."}}')
        records.append(value)
    return records


def _column(path: Path, key: str, name: str, columns: list[str]) -> str:
    """The column of this name, without regard to case."""
    for column in columns:
        if column.lower() == name.lower():
            return column
    raise UserError(f"{path}, {key}: {unknown_name('column', name, columns)}")
