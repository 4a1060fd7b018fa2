"""The rows that stages exchange, and how they lie on disk.

Small tables are JSON lines, the pool is Parquet that `datasets` opens with an Image column.
Every file is written beside its place and renamed, so a killed run leaves no half file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from craftune.errors import UserError

Row = TypeVar("Row")


@dataclass(frozen=True)
class Prompt:
    """One prompt of the user's; `id` is the first 12 hex digits of the text's sha256."""

    id: str
    prompt: str
    category: str = ""


@dataclass(frozen=True)
class Refined:
    """One rewrite of a prompt; `variant` counts from 1, since 0 is the prompt itself."""

    prompt_id: str
    variant: int
    refined: str
    by: str


CANDIDATE = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("refined_prompt", pa.string()),
        ("category", pa.string()),
        ("variant", pa.int32()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("sampler", pa.string()),
        ("num_steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("model", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("latents", pa.list_(pa.float32())),
        (
            "states",
            pa.list_(
                pa.struct(
                    [
                        ("after", pa.int32()),
                        ("timestep", pa.float64()),
                        ("alpha", pa.float64()),
                        ("sigma", pa.float64()),
                        ("latents", pa.list_(pa.float32())),
                    ]
                )
            ),
        ),
    ],
    metadata={
        "huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}),
    },
)
"""One image of the pool. `variant` 0 is the plain prompt; `sample` counts images of one variant.

`states` are latents that its chain passed, by generate.keep_states: after how many steps, the
timestep at which the chain went on from there, and the scales of signal and noise."""

SCORE = pa.schema(
    [
        ("candidate", pa.string()),
        ("reward", pa.string()),
        ("value", pa.float32()),
        ("identity", pa.dictionary(pa.int32(), pa.string())),
    ]
)
"""One number that one reward gave to one candidate, raw units; identity is canonical JSON."""


def prompt_id(text: str) -> str:
    """Identity of a prompt: 12 hex digits of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A partial path to write to; renamed to `path`, durably, when the block ends well."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException:  # a full disk has no room for what is left of a file
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder: Path, size: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: an existing one on that disk.
        size: bytes that will be written; a tenth more must be free.

    Raises:
        UserError: too little is free.
    """
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise UserError(
            f"{folder}: {what} needs {size / 1e9:.2f} GB but {free / 1e9:.2f} GB are free; free "
            "some space and run again, finished work is kept"
        )


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Indented, keys in the given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        stage = path.parent.name.partition("-")[2]
        mend = f"; run again with --redo {stage}" if path.parent.name[:1].isdigit() else ""
        raise UserError(f"{path}: damaged, not JSON ({error}){mend}") from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of every line that is not blank.

    Raises:
        UserError: a line is not JSON, or the file not UTF-8; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    # Not splitlines(), which also splits at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {error.msg}") from None


def write_rows(path: Path, rows: Iterable[Any]) -> int:
    """Dataclass rows as JSON lines. Returns their number."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))
    return len(lines)


def read_rows(kind: type[Row], path: Path) -> list[Row]:
    """JSON lines as dataclass rows.

    Raises:
        UserError: a line is no JSON object with exactly the row's fields; names file and line.
    """
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    rows = []
    for number, value in json_lines(path):
        if not isinstance(value, dict) or set(value) != names:
            raise UserError(f"{path}, line {number}: expected the fields {sorted(names)}")
        rows.append(kind(**value))
    return rows


def write_table(path: Path, rows: dict[str, list[Any]] | list[dict[str, Any]], schema: pa.Schema):
    """Rows or columns as one Parquet file of this schema."""
    table = (
        pa.Table.from_pylist(rows, schema=schema)
        if isinstance(rows, list)
        else pa.Table.from_pydict(rows, schema=schema)
    )
    with written(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_table(paths: Path | Iterable[Path], columns: list[str] | None = None) -> pa.Table:
    """One Parquet file, or several of one schema as one table.

    Raises:
        UserError: a file is missing or damaged; names it. There is no file at all.
    """
    tables = []
    for path in [paths] if isinstance(paths, Path) else sorted(paths):
        try:
            tables.append(pq.ParquetFile(path).read(columns=columns))
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path}: not a readable Parquet file ({reason}); "
                "delete it and run again, only this file is made anew"
            ) from None
    if not tables:
        raise UserError("there are no Parquet files to read; run the earlier stages first")
    # Shards may have met their dictionaries' values in different orders.
    return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
