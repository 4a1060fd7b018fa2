"""Images and prompts in Parquet files, as `datasets`, craftune's runs and others write them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from craftune.errors import UserError
from craftune.scoring.batches import Item

NAMES = ("file_name", "image", "path", "id", "name")
"""Columns that name an image, the first that is there."""
PROMPTS = ("prompt", "text", "caption")
"""Columns that hold its prompt, the first that is there."""
ABOUT = b"craftune"
"""Key of the metadata in the files of scores that craftune writes."""
SHARD = 128
"""Images that are kept, or lost by a kill, together."""
BUFFER = 1 << 20
"""Bytes of a Parquet column that are read at a time, so that large row groups need no memory."""


@dataclass(frozen=True)
class Source:
    """Images to score.

    Attributes:
        about: what was found, for people.
        total: number of images.
        prompts: whether any image has a prompt.
        made_from: other where an image or a prompt has changed: names, sizes, times of change.
        shards: goes through all of them, at most `SHARD` at a time, with the same for the shard.
    """

    about: str
    total: int
    prompts: bool
    made_from: Callable[[], str]
    shards: Callable[[], Iterator[tuple[str, list[Item]]]]


def tables(paths: Sequence[Path], given: Sequence[tuple[str, str | None]] | None) -> Source:
    """Images in Parquet files; a prompt that is given for a name goes before the file's own.

    Raises:
        UserError: a damaged file, or one without a column of images.
    """
    replaced = dict(given or ())
    total, prompts = 0, bool(replaced)
    for path in paths:
        with opened(path) as file:
            total += file.metadata.num_rows
            columns = file.schema_arrow.names
            _image_column(path, file.schema_arrow)
            prompts |= any(name in columns for name in PROMPTS)

    def shards() -> Iterator[tuple[str, list[Item]]]:
        for path in paths:
            with opened(path) as file:
                yield from _rows(path, file, replaced)

    def made_from() -> str:
        return repr([list(replaced.items()), [(path.name, mark(path)) for path in paths]])

    several = f"{len(paths):,} Parquet files" if len(paths) > 1 else paths[0].name
    return Source(f"{total:,} images in {several}", total, prompts, made_from, shards)


def _rows(
    path: Path, file: pq.ParquetFile, prompts: dict[str, str | None]
) -> Iterator[tuple[str, list[Item]]]:
    schema = file.schema_arrow
    image = _image_column(path, schema)
    name = next((n for n in NAMES if n in schema.names and n != image), None)
    prompt = next((n for n in PROMPTS if n in schema.names), None)
    columns = [column for column in (image, name, prompt) if column]
    state, start = mark(path), 0
    try:
        for batch in file.iter_batches(SHARD, columns=columns):
            rows = batch.to_pylist()
            items = []
            for number, row in enumerate(rows, start):
                called = str(row[name]) if name else f"{path.name}:{number}"
                text = prompts.get(called, row[prompt] if prompt else None)
                items.append(Item(called, text, _data(row[image], path.parent)))
            yield repr([path.name, state, start, [(i.name, i.prompt) for i in items]]), items
            start += len(rows)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged Parquet file after row {start:,} ({reason})") from None


def _image_column(path: Path, schema: pa.Schema) -> str:
    """The one column of images: bytes, or a struct of bytes and path as `datasets` writes it.

    Raises:
        UserError: there is none, or several of which none is called "image".
    """
    found = []
    for field in schema:
        inner = field.type
        if pa.types.is_struct(inner):
            index = inner.get_field_index("bytes")
            inner = inner.field(index).type if index >= 0 else inner
        if pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
            found.append(field.name)
    if "image" in found:
        return "image"
    if len(found) == 1:
        return found[0]
    what = f"several columns of images ({', '.join(found)}); call one" if found else "no column"
    raise UserError(f"{path}: {what} 'image', of bytes or of structs with bytes")


def _data(value: Any, folder: Path) -> bytes | Path | None:
    if not isinstance(value, dict):
        return value
    if value.get("bytes") is not None:
        return value["bytes"]
    return folder / value["path"] if value.get("path") else None


def opened(path: Path) -> pq.ParquetFile:
    """A Parquet file whose columns are read piece by piece.

    Raises:
        UserError: it is none, or damaged.
    """
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None


def is_scores(path: Path) -> bool:
    """Whether this is a file of scores that craftune wrote, which holds no images."""
    with opened(path) as file:
        return ABOUT in (file.schema_arrow.metadata or {})


def mark(path: Path) -> str:
    """Changes when the file does."""
    try:
        state = path.stat()
    except OSError:
        return ""
    return f"{state.st_size} {state.st_mtime_ns}"
