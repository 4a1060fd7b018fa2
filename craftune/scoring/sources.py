"""Where images and prompts come from: a folder, an ImageFolder, Parquet files, or a craftune run.

Names and prompts are listed at once; pixels are read when they are scored.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from craftune.errors import UserError
from craftune.prompt_files import READERS
from craftune.runs import stage_folder
from craftune.scoring.batches import Item
from craftune.scoring.tables import NAMES, PROMPTS, SHARD, Source, is_scores, mark, opened, tables

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_source(path: Path, prompts: Path | None) -> Source:
    """Find out what a path holds.

    Args:
        path: a folder of images, with or without metadata.jsonl; a Parquet file or a folder of
            them; a run folder; or one image.
        prompts: a .jsonl, .json, .csv, .tsv or .parquet file with columns `NAMES`, `PROMPTS`.

    Raises:
        UserError: nothing there that could be scored; says what would do.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    given = None if prompts is None else read_prompts(_there(prompts, path))
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return tables([path], given)
        of_it = [row for row in given or () if row[0] == path.name]
        return _files(path.parent, [path.name], of_it)
    if (path / "run.json").is_file():
        shards = sorted(stage_folder(path, "generate").glob("part-*.parquet"))
        if not shards:
            raise UserError(f"{path}: a run without candidates yet; run its stage 'generate' first")
        return tables(shards, given)
    found = _listed(path)
    images = [name for name in found if name.lower().endswith(IMAGES)]
    parquet = [path / name for name in found if name.lower().endswith(".parquet")]
    parquet = [file for file in parquet if not is_scores(file)]
    if parquet and not images:
        return tables(parquet, given)
    if not images:
        raise UserError(
            f"{path}: no images ({', '.join(IMAGES)}) and no Parquet files in it, and no run.json"
        )
    own: list[tuple[str, str | None]] = []
    for name in found:
        if given is None and name.split("/")[-1] == "metadata.jsonl":
            inside = name.removesuffix("metadata.jsonl")
            rows = read_prompts(path / name, required=False)
            own += [(inside + image, prompt) for image, prompt in rows]
    return _files(path, images, own if given is None else given)


def read_prompts(path: Path, *, required: bool = True) -> list[tuple[str, str | None]]:
    """File name and prompt of every row of a table.

    Args:
        required: whether a table without prompts is refused.

    Raises:
        UserError: unknown kind of file, a damaged one, or no column of names or prompts.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        with opened(path) as file:
            columns = [name for name in (*NAMES, *PROMPTS) if name in file.schema_arrow.names]
            records = file.read(columns=columns).to_pylist()
    elif kind in READERS:
        records = [record for _, record in READERS[kind](path)]
        columns = list(dict.fromkeys(name for record in records for name in record))
    else:
        raise UserError(
            f"{path}: prompts need the images' file names beside them; give a .jsonl, .json, .csv, "
            ".tsv or .parquet with columns file_name and prompt"
        )
    name, prompt = _column(path, columns, NAMES), ""
    if required or not set(PROMPTS).isdisjoint(columns):
        prompt = _column(path, columns, PROMPTS)
    rows = ((record.get(name), record.get(prompt)) for record in records)
    return [(str(image), None if text is None else str(text)) for image, text in rows]


def _there(prompts: Path, path: Path) -> Path:
    """As given, or inside the folder of images."""
    for place in (prompts, path / prompts):
        if place.is_file():
            return place
    raise UserError(f"--prompts {prompts}: no such file here or in {path}")


def _column(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in columns:
            return name
    there = ", ".join(columns) or "none"
    raise UserError(f"{path}: no column {', '.join(wanted[:-1])} or {wanted[-1]} (has {there})")


def _listed(folder: Path) -> list[str]:
    """All files below, relative, sorted; hidden ones are left out."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        inside = Path(place).relative_to(folder)
        found += [(inside / name).as_posix() for name in files if name[0] != "."]
    return sorted(found)


def _files(
    folder: Path, images: Sequence[str], prompts: Sequence[tuple[str, str | None]]
) -> Source:
    """Images in files: first those that have a row with a prompt, in its order, then the others."""
    named = {name for name, _ in prompts}
    if prompts and named.isdisjoint(images):
        raise UserError(
            f"{folder}: holds none of the {len(named):,} images that the prompts are for, such as "
            f"{prompts[0][0]!r}; names are relative to the folder"
        )
    rows = [*prompts, *((name, None) for name in images if name not in named)]

    def read_from(start: int, stop: int | None) -> str:
        return repr([(name, prompt, mark(folder / name)) for name, prompt in rows[start:stop]])

    def shards() -> Iterator[tuple[str, list[Item]]]:
        for start in range(0, len(rows), SHARD):
            part = rows[start : start + SHARD]
            items = [Item(name, prompt, folder / name) for name, prompt in part]
            yield read_from(start, start + SHARD), items

    about = f"{len(rows):,} image{'s' * (len(rows) != 1)} in files"
    with_prompt = any(prompt is not None for _, prompt in rows)
    return Source(about, len(rows), with_prompt, lambda: read_from(0, None), shards)
