"""Prompts of a dataset on the Hugging Face hub: one column, without its pictures.

Of Parquet files only the bytes of the text column are fetched, by range requests; other files
(.json, .tsv ...) come whole and stay in the hub's cache under HF_HOME. With HF_HUB_OFFLINE=1 all is
read from that cache. The commit is looked up first and everything is read at it.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from craftune.errors import UserError, unknown_name
from craftune.progress import track
from craftune.prompt_files import KINDS, Row, read_prompts

PREFIX = "hf://"
SOURCE = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/\s]+))?(?:/(?P<file>.+))?"
)
FORM = "hf://OWNER/NAME, hf://OWNER/NAME/FILE or hf://OWNER/NAME@REVISION/FILE"
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")


@dataclass(frozen=True)
class Address:
    """A dataset's place: "OWNER/NAME", branch, tag or commit, and a file, folder or pattern."""

    repo: str
    revision: str | None
    file: str


@dataclass(frozen=True)
class Dataset:
    """The files of a dataset at one commit; `fetch` gives a whole file, `open` one to seek in."""

    commit: str
    names: tuple[str, ...]
    fetch: Callable[[str], Path]
    open: Callable[[str], AbstractContextManager[Any]]


def on_hub(source: str) -> bool:
    """Whether a source is a dataset of the hub."""
    return source.startswith(PREFIX)


def parse(source: str, key: str) -> Address:
    """The parts of "hf://OWNER/NAME@REVISION/FILE".

    Raises:
        UserError: it has another form.
    """
    found = SOURCE.fullmatch(source)
    if not found:
        raise UserError(f"{key} {source!r}: a dataset of the hub is written {FORM}")
    return Address(found["repo"], found["revision"], (found["file"] or "").strip("/"))


def read_hub(
    source: str, key: str, split: str, column: str, category: str
) -> tuple[list[Row], dict[str, Any]]:
    """Every row of a dataset, numbered through its files; and where it came from.

    Raises:
        UserError: no such dataset, split, file or column; no access; or no network.
    """
    from huggingface_hub.errors import HTTPError

    address = parse(source, key)
    try:
        dataset = _dataset(address)
        names = chosen(dataset.names, address, split, f"{key} {source!r}")
        rows: list[Row] = []
        for name in track(names, "prompts", len(names), "file"):
            start = rows[-1].number if rows else 0
            found = _rows(dataset, name, f"{address.repo}/{name}", column, category)
            rows += [Row(start + row.number, row.prompt, row.category) for row in found]
    except (OSError, HTTPError) as error:  # the hub's and the network's; the client's
        raise UserError(f"{key} {source!r}: {_reason(error)}") from None
    return rows, {"source": source, "commit": dataset.commit, "files": names}


def chosen(names: tuple[str, ...], address: Address, split: str, where: str) -> list[str]:
    """The files that the address means: by name, folder or pattern, or else by the split.

    Raises:
        UserError: there are none, or they are of several configurations.
    """
    data = sorted(name for name in names if Path(name).suffix.lower() in KINDS)
    if address.file:
        pattern = address.file
        found = [n for n in names if n == pattern or fnmatchcase(n, pattern)]
        found = found or [name for name in data if name.startswith(f"{pattern}/")]
        if not found:
            raise UserError(f"{where}: {unknown_name('file', pattern, data or names)}")
        return sorted(found)
    found = [name for name in data if split in _splits(name)]
    parquet = [name for name in found if name.endswith(".parquet")]
    found = parquet or found
    if not found and len(data) == 1:
        return data
    if not found:
        raise UserError(
            f"{where}: prompts.split: no file of a split {split!r}; name one in the source, "
            f"{FORM} (there are {', '.join(data[:6]) or 'no files of a known kind'})"
        )
    folders = sorted({str(Path(name).parent) for name in found})
    if len(folders) > 1:
        raise UserError(
            f"{where}: its split {split!r} lies in several folders ({', '.join(folders[:6])}); add "
            f"one to the source, e.g. hf://{address.repo}/{folders[0]}/*"
        )
    return found


def _splits(name: str) -> set[str]:
    """What a file's name says of its split: data/train-00000-of-00002.parquet, test/0.jsonl."""
    path = Path(name)
    return {SHARD.sub("", path.stem), *path.parent.parts}


def _rows(dataset: Dataset, name: str, label: str, column: str, category: str) -> list[Row]:
    if not name.endswith(".parquet"):
        return read_prompts(dataset.fetch(name), column, category)
    with dataset.open(name) as file:
        return read_prompts(Path(label), column, category, file)


def _dataset(address: Address) -> Dataset:
    from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        return _cached(address)
    info = HfApi().dataset_info(address.repo, revision=address.revision)
    commit = str(info.sha)
    files = HfFileSystem()

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(address.repo, name, repo_type="dataset", revision=commit))

    def open_(name: str) -> AbstractContextManager[Any]:
        # Parquet asks for what it needs: nothing is read ahead.
        return files.open(f"datasets/{address.repo}@{commit}/{name}", "rb", cache_type="none")

    names = tuple(sibling.rfilename for sibling in info.siblings or [])
    return Dataset(commit, names, fetch, open_)


def _cached(address: Address) -> Dataset:
    """What the hub's cache has of a dataset."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        folder = Path(
            snapshot_download(
                address.repo,
                repo_type="dataset",
                revision=address.revision,
                local_files_only=True,
            )
        )
    except IncompleteSnapshotError as error:  # the file that is asked for may be there
        folder = Path(error.snapshot_path)
    names = tuple(
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()
    )
    return Dataset(
        folder.name, names, lambda name: folder / name, lambda name: (folder / name).open("rb")
    )


def _reason(error: Exception) -> str:
    """What went wrong with the hub and what would mend it, on one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    mends = [
        (GatedRepoError, "access must be asked for on its page; then log in with `hf auth login`"),
        (
            RepositoryNotFoundError,
            "no such dataset, or it is private; check the name, or log in with `hf auth login`",
        ),
        (RevisionNotFoundError, "no such revision of the dataset"),
        (
            (LocalEntryNotFoundError, OfflineModeIsEnabled),
            "not in the cache, and HF_HUB_OFFLINE is set; unset it, or fetch the files once with "
            "`hf download --repo-type dataset`",
        ),
    ]
    for kinds, text in mends:
        if isinstance(error, kinds):
            return text
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"the hub did not give it ({lines[0]:.200}); check the network, or give a local file"
