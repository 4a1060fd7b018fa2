"""Files: written whole or not at all, read back exactly, damage named with file and line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from craftune.errors import UserError, unknown_name
from craftune.images import decode, encode_png
from craftune.records import (
    CANDIDATE,
    Prompt,
    canonical,
    json_lines,
    prompt_id,
    read_json,
    read_rows,
    read_table,
    sha256,
    write_json,
    write_rows,
    write_table,
    written,
)

ODD = ["a\u2028b", "a\u0085b", 'quote " and \\', "", "😀", "a\x0bb", "ü", "\t", "a\x1cb"]


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    """Characters that split lines elsewhere are part of a text here."""
    rows = [Prompt(prompt_id(text), text, text) for text in ODD]
    assert write_rows(tmp_path / "rows.jsonl", rows) == len(ODD)
    assert read_rows(Prompt, tmp_path / "rows.jsonl") == rows


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    rows = [Prompt("x", text) for text in texts]
    write_rows(path, rows)
    assert read_rows(Prompt, path) == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"id": "1", "prompt": "a"}\n', "line 1: expected the fields"),
        ('{"id": "1", "prompt": "a", "category": "", "x": 1}\n', "line 1: expected the fields"),
        ("\n[1]\n", "line 2: expected the fields"),
        ('{"id": "1", "prompt": "a", "category": ""}\n{"id"', "line 2: not valid JSON"),
        (b"\xff\n", "not UTF-8 text"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"rows.jsonl.*{words}"):
        read_rows(Prompt, path)


def test_json_lines_count_as_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf1\r\n\r\n 2")
    assert list(json_lines(path)) == [(1, 1), (3, 2)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half() -> None:
        with written(path) as partial:
            partial.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_stands_in_its_place_before_it_is_whole(tmp_path: Path) -> None:
    with written(tmp_path / "file") as partial:
        partial.write_text("new")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_text() == "new"


def test_no_number_that_json_lacks_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_damaged_json_names_the_stage_to_redo(tmp_path: Path) -> None:
    path = tmp_path / "5-select" / "selection.json"
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(UserError, match=r"selection.json: damaged.*--redo select"):
        read_json(path)


def test_equal_values_have_equal_canonical_text() -> None:
    assert canonical({"b": 1, "a": "ü"}) == canonical({"a": "ü", "b": 1}) == '{"a": "ü", "b": 1}'


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    """Of "abc", by FIPS 180-2, appendix B.1."""
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")
    assert prompt_id("abc") == "ba7816bf8f01"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A shard of the pool with three candidates."""
    image = {"bytes": encode_png(Image.new("RGB", (4, 4), (255, 0, 0))), "path": None}
    row = dict.fromkeys(CANDIDATE.names) | {"image": image, "latents": [0.5, 1.5], "prompt": "ü"}
    rows = [row | {"id": f"c{i}", "seed": 2**62 + i} for i in range(3)]
    write_table(tmp_path / "part-00000.parquet", rows, CANDIDATE)
    return tmp_path / "part-00000.parquet"


def test_the_pool_opens_as_a_data_set_of_images(pool: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_parquet(str(pool), cache_dir=str(pool.parent / "cache"))
    assert found[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert found[2]["seed"] == 2**62 + 2
    assert found[0]["latents"] == [0.5, 1.5]


def test_shards_are_read_in_the_order_of_their_names(pool: Path) -> None:
    write_table(pool.with_name("part-00001.parquet"), [{"id": "d"}], CANDIDATE)
    found = read_table(pool.parent.glob("*.parquet"), ["id"])
    assert found["id"].to_pylist() == ["c0", "c1", "c2", "d"]


@pytest.mark.parametrize("size", [0, 10, -1])
def test_a_damaged_shard_is_named(pool: Path, size: int) -> None:
    pool.write_bytes(pool.read_bytes()[:size])
    with pytest.raises(UserError, match=r"part-00000.parquet: not a readable.*made anew"):
        read_table(pool)


def test_no_shard_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Parquet files"):
        read_table(tmp_path.glob("part-*.parquet"))
    with pytest.raises(UserError, match=r"none.parquet: not a readable"):
        read_table(tmp_path / "none.parquet")


def test_a_row_that_does_not_fit_the_schema_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises((pa.ArrowException, TypeError)):
        write_table(tmp_path / "x.parquet", [{"id": 3}], CANDIDATE)
    assert list(tmp_path.iterdir()) == []


def test_the_pool_keeps_its_features_in_the_file(pool: Path) -> None:
    metadata = pq.read_schema(pool).metadata
    assert json.loads(metadata[b"huggingface"])["info"]["features"]["image"]["_type"] == "Image"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trian", "unknown key 'trian'; did you mean 'train'? (known: run, train)"),
        ("zzz", "unknown key 'zzz' (known: run, train)"),
    ],
)
def test_unknown_names_get_the_closest_one(name: str, said: str) -> None:
    assert unknown_name("key", name, ["train", "run"]) == said


def test_long_lists_of_names_are_cut() -> None:
    said = unknown_name("name", "x", [f"n{i:02d}" for i in range(99)])
    assert said.endswith("n11, ... 99 in all)")
    assert unknown_name("name", "x", []).endswith("(known: none)")


def test_a_picture_that_is_cut_off_is_refused_when_it_is_decoded() -> None:
    whole = encode_png(Image.effect_noise((64, 64), 50).convert("RGB"))
    with pytest.raises(OSError, match="truncated"):
        decode(whole[: len(whole) // 2])
