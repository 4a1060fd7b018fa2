"""Prompt files of many kinds -> rows of text and category, nothing judged, nothing lost."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from craftune.errors import UserError, unknown_name
from craftune.records import json_lines

Records: TypeAlias = list[tuple[int, Mapping[str, Any]]]
"""Number (of the line, where there are lines) and values by column."""


@dataclass(frozen=True)
class Row:
    """A row of the user's file, as found."""

    number: int
    prompt: object
    category: object


def read_prompts(path: Path, column: str, category: str, parquet: Any = None) -> list[Row]:
    """Every row of a prompt file; columns are matched without regard to case.

    Args:
        column: of the text; a .txt has no columns, each line is a prompt.
        category: of a category; may be missing.
        parquet: an open binary file to read instead of the path, which then only names it.

    Raises:
        UserError: unknown kind of file, damaged file, or no such column.
    """
    kind = path.suffix.lower()
    if kind == ".txt":
        return [Row(n, line, "") for n, line in enumerate(_decoded(path).splitlines(), 1)]
    if kind == ".parquet":
        return _parquet(path, parquet or path, column, category)
    if kind not in READERS:
        known = ", ".join(KINDS)
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without ending'!r}; {known}")
    records = READERS[kind](path)
    if not records:
        return []
    names = {name for _, record in records for name in record}
    text, label = _columns(path, names, column, category)
    return [Row(number, record.get(text), record.get(label)) for number, record in records]


def _columns(path: Path, names: Iterable[str], column: str, category: str) -> tuple[str, str]:
    """The true names of text and category; "" where there is no category."""
    columns = {name.lower(): name for name in sorted(names)}
    if column.lower() not in columns:
        unknown = unknown_name("column", column, columns.values())
        raise UserError(f"{path}, prompts.column: {unknown}")
    return columns[column.lower()], columns.get(category.lower(), "")


def _decoded(path: Path) -> str:
    """The text of a file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json(path: Path) -> Records:
    records = []
    for number, value in json_lines(path):
        if not isinstance(value, dict):
            raise UserError(f'{path}, line {number}: expected an object like {{"prompt": "..."}}')
        records.append((number, value))
    return records


def _comma(path: Path) -> Records:
    return _delimited(path, ",", csv.QUOTE_MINIMAL)


def _tab(path: Path) -> Records:
    """Tab-separated prompt lists quote nothing: a lone " is part of the prompt."""
    return _delimited(path, "\t", csv.QUOTE_NONE)


def _delimited(path: Path, delimiter: str, quoting: Any) -> Records:
    text = _decoded(path)
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    try:
        header = next(reader, [])
        # strict=False: a short row has no prompt, which is then said of it.
        return [
            (reader.line_num, dict(zip(header, values, strict=False)))
            for values in reader
            if values
        ]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _list(path: Path) -> Records:
    """One JSON list of objects; a row's number is its place in it."""
    try:
        values = json.loads(_decoded(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f'{path}: expected a list of objects like {{"prompt": "..."}}')
    return list(enumerate(values, 1))


def _parquet(path: Path, source: Any, column: str, category: str) -> list[Row]:
    """Only the two columns are read: pictures stay where they are."""
    try:
        file = pq.ParquetFile(source, pre_buffer=True)
        text, label = _columns(path, file.schema_arrow.names, column, category)
        table = file.read(columns=[text, label] if label else [text])
    except UserError:
        raise
    except (pa.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None
    texts = table[text].to_pylist()
    labels = table[label].to_pylist() if label else [None] * len(texts)
    return [Row(n, *values) for n, values in enumerate(zip(texts, labels, strict=True), 1)]


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _json,
    ".json": _list,
    ".csv": _comma,
    ".tsv": _tab,
}
"""By the ending of the file's name: kinds that are read whole, as rows with columns."""

KINDS = (".txt", *READERS, ".parquet")
"""Endings of all files that can be read."""
