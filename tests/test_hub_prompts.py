"""Prompts of a hub dataset, from a hub that is a folder: one column, one commit, clear refusals."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from craftune.config import EvaluateConfig, PromptsConfig
from craftune.errors import UserError
from craftune.hub_prompts import Address, chosen, parse, read_hub
from craftune.records import Prompt, read_json, read_rows
from craftune.stages.prompts import prompts

COMMIT = "c" * 40
PICTURE = 300_000


class Counted(io.BytesIO):
    """An open file that counts what is read of it."""

    bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        Counted.bytes_read += len(data)
        return data


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files under this folder are the dataset "me/mine" at one commit."""
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)

    def dataset_info(self: Any, repo: str, revision: str | None = None) -> Any:
        if repo != "me/mine":
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404\nmany lines", response=response)  # type: ignore
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return SimpleNamespace(
            sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in files]
        )

    def open_(self: Any, path: str, *args: Any, **kwargs: Any) -> Counted:
        place = f"datasets/me/mine@{COMMIT}/"
        assert path.startswith(place), "read at another commit"
        return Counted((folder / path.removeprefix(place)).read_bytes())

    def download(repo: str, name: str, repo_type: str, revision: str) -> str:
        assert (repo_type, revision) == ("dataset", COMMIT)
        return str(folder / name)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "open", open_)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    Counted.bytes_read = 0
    return folder


def write_shards(folder: Path, split: str = "train", shards: int = 2) -> None:
    """Rows of a caption and a picture of noise, as preference datasets have them."""
    for i in range(shards):
        captions = [f"{split} thing {3 * i + j}" for j in range(3)]
        table = pa.table({"caption": captions, "jpg_0": [os.urandom(PICTURE) for _ in captions]})
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"{split}-{i:05d}-of-{shards:05d}-0a1b.parquet")


def read(source: str, split: str = "train", column: str = "caption") -> Any:
    return read_hub(source, "prompts.source", split, column, "category")


def test_the_column_is_read_and_the_pictures_stay(hub: Path) -> None:
    write_shards(hub / "data")
    write_shards(hub / "data", "test", 1)
    rows, origin = read("hf://me/mine")
    assert [row.prompt for row in rows] == [f"train thing {i}" for i in range(6)]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
    assert 0 < Counted.bytes_read < PICTURE / 2
    assert origin == {
        "source": "hf://me/mine",
        "commit": COMMIT,
        "files": [f"data/train-0000{i}-of-00002-0a1b.parquet" for i in range(2)],
    }
    assert read("hf://me/mine", "test")[0][0].prompt == "test thing 0"


def test_the_stage_records_the_commit(hub: Path, tmp_path: Path) -> None:
    write_shards(hub / "data")
    config = PromptsConfig("hf://me/mine", column="caption", limit=2)
    counts = prompts(config, EvaluateConfig(num_prompts=2), 0, tmp_path)
    assert counts["rows"] == 6
    assert len(read_rows(Prompt, tmp_path / "prompts.jsonl")) == 2
    (origin,) = read_json(tmp_path / "hub.json")
    assert origin["commit"] == COMMIT


def test_a_list_of_objects(hub: Path) -> None:
    """As HPDv2 has it: train.json beside archives of pictures."""
    rows = [{"prompt": "a cat", "image_path": ["1.jpg"]}, {"prompt": "a dog"}]
    (hub / "train.json").write_text(json.dumps(rows))
    (hub / "train.tar.gz").write_bytes(b"")
    assert [r.prompt for r in read("hf://me/mine", column="prompt")[0]] == ["a cat", "a dog"]


def test_the_only_file_needs_no_split(hub: Path) -> None:
    """As PartiPrompts has it."""
    (hub / "PartiPrompts.tsv").write_text("Prompt\tCategory\na cat\tAnimals\n")
    (hub / "README.md").write_text("read me")
    (row,) = read("hf://datasets/me/mine", column="prompt")[0]
    assert (row.prompt, row.category) == ("a cat", "Animals")


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("hf://me/mine", Address("me/mine", None, "")),
        ("hf://datasets/me/mine", Address("me/mine", None, "")),
        ("hf://me/mine@v1.0", Address("me/mine", "v1.0", "")),
        ("hf://me/mine/a/b*.tsv", Address("me/mine", None, "a/b*.tsv")),
        ("hf://me/mine@abc/x.json", Address("me/mine", "abc", "x.json")),
    ],
)
def test_addresses(source: str, address: Address) -> None:
    assert parse(source, "prompts.source") == address


@pytest.mark.parametrize("source", ["hf://", "hf://mine", "hf://me/mi ne", "hf://me/mine@"])
def test_no_address(source: str) -> None:
    with pytest.raises(UserError, match=r"prompts\.source .*is written hf://OWNER/NAME"):
        parse(source, "prompts.source")


FILES = (
    "README.md",
    "a/train/0.parquet",
    "data/validation-00000-of-00001.parquet",
    "data/validation_unique-00000-of-00001.parquet",
    "extra.json",
)


@pytest.mark.parametrize(
    ("file", "split", "names"),
    [
        ("", "validation", [FILES[2]]),
        ("", "train", [FILES[1]]),
        ("extra.json", "train", [FILES[4]]),
        ("data", "train", [FILES[2], FILES[3]]),
        ("data/*unique*", "train", [FILES[3]]),
    ],
)
def test_files_of_a_split(file: str, split: str, names: list[str]) -> None:
    assert chosen(FILES, Address("me/mine", None, file), split, "here") == names


@pytest.mark.parametrize(
    ("files", "file", "said"),
    [
        (FILES, "extra.jsn", "unknown file 'extra.jsn'; did you mean 'extra.json'"),
        (("a.json", "b.json"), "", r"no file of a split 'train'.*a\.json, b\.json"),
        (("x.tar",), "", "no files of a known kind"),
        (("a/train.json", "b/train.json"), "", r"several folders \(a, b\).*hf://me/mine/a/\*"),
    ],
)
def test_files_that_are_not_there(files: tuple[str, ...], file: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen(files, Address("me/mine", None, file), "train", "here")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://me/others", "no such dataset, or it is private"),
        ("hf://me/mine", "me/mine/data/train-00000.*unknown column 'prompt'.*caption"),
    ],
)
def test_what_the_hub_refuses(hub: Path, source: str, said: str) -> None:
    write_shards(hub / "data")
    with pytest.raises(UserError, match=said) as caught:
        read(source, column="prompt")
    assert "\n" not in str(caught.value)


def test_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    with pytest.raises(UserError, match=r"did not give it .*name resolution.*check the network"):
        read("hf://me/mine")


def test_a_client_that_cannot_connect(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client's own errors are no OSError."""
    from huggingface_hub.errors import HTTPError

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise HTTPError("connection refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    with pytest.raises(UserError, match=r"did not give it .*connection refused"):
        read("hf://me/mine")


def test_offline_it_comes_from_the_cache(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(hub / "data")
    kept = hub.rename(hub.with_name(COMMIT))

    def snapshot(repo: str, local_files_only: bool, **kwargs: Any) -> str:
        if repo != "me/mine":
            raise LocalEntryNotFoundError("not there")
        assert local_files_only
        return str(kept)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    rows, origin = read("hf://me/mine")
    assert len(rows) == 6
    assert origin["commit"] == COMMIT
    with pytest.raises(UserError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        read("hf://me/others")


def test_offline_and_nothing_kept() -> None:
    """The client itself, as installed."""
    with pytest.raises(UserError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        read("hf://nobody/nothing")
