"""Stage prompts: files of every kind, every row a prompt, a named rejection, or an error."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craftune.config import EvaluateConfig, PromptsConfig
from craftune.errors import UserError
from craftune.prompt_files import read_prompts
from craftune.records import Prompt, read_rows
from craftune.stages.prompts import prompts

PARTI = Path(__file__).parents[3] / "shared/data/partiprompts/PartiPrompts.tsv"
HOLD_OUT = EvaluateConfig(num_prompts=2)


def run(path: Path, out: Path, evaluation: EvaluateConfig = HOLD_OUT, **settings: Any) -> Any:
    """Counts, training prompts, evaluation prompts, rejections as (row, text, reason)."""
    seed = settings.pop("seed", 0)
    out.mkdir(exist_ok=True)
    counts = prompts(PromptsConfig(str(path), **settings), evaluation, seed, out)
    lines = (out / "rejections.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rejected = [tuple(json.loads(line).values()) for line in lines]
    train = read_rows(Prompt, out / "prompts.jsonl")
    return counts, train, read_rows(Prompt, out / "evaluation.jsonl"), rejected


def adds_up(counts: dict[str, int]) -> bool:
    ends = ("prompts", "not_drawn", "held_out")
    rejected = sum(n for name, n in counts.items() if name.startswith("rejected: "))
    return counts["rows"] == rejected + sum(counts[name] for name in ends)


def test_every_row_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\n\n a  cat \na dog\na bird\na fox\n\t\na cow\n", encoding="utf-8")
    counts, train, held_out, rejected = run(path, tmp_path / "out", limit=2)
    assert rejected == [(2, "", "empty"), (3, "a cat", "duplicate"), (7, "", "empty")]
    assert counts["rows"] == 8
    assert counts["rejected: duplicate"] == 1
    assert counts["rejected: empty"] == 2
    assert counts["held_out"] == counts["evaluation_prompts"] == len(held_out) == 2
    assert counts["prompts"] == len(train) == 2
    assert counts["not_drawn"] == 1
    assert adds_up(counts)
    assert not {p.id for p in train} & {p.id for p in held_out}


LINES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=3)
)


@given(
    lines=LINES,
    others=LINES,
    limit=st.integers(0, 4),
    held_out=st.integers(0, 4),
    seed=st.integers(),
)
def test_the_funnel_adds_up_for_any_file(
    tmp_path_factory: pytest.TempPathFactory, lines, others, limit, held_out, seed
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name, texts in (("a.jsonl", lines), ("b.jsonl", others)):
        rows = [json.dumps({"prompt": text}) for text in texts]
        (folder / name).write_text("\n".join(rows), encoding="utf-8")
    evaluation = EvaluateConfig(source=str(folder / "b.jsonl"), num_prompts=held_out)
    known = {" ".join(text.split()) for text in lines} - {""}
    try:
        counts, train, apart, rejected = run(
            folder / "a.jsonl", folder / "any", evaluation, limit=limit, seed=seed
        )
    except UserError:
        asked = {" ".join(text.split()) for text in others} - {""}
        assert not asked or not known - asked or held_out
        return
    assert adds_up(counts)
    assert counts["rows"] == len(lines)
    assert counts["prompts"] == len(train) > 0
    assert len(rejected) == sum(n for k, n in counts.items() if k.startswith("rejected"))
    assert {p.prompt for p in train} <= known
    assert not {p.prompt for p in train} & {p.prompt for p in apart}


def test_an_evaluation_prompt_never_trains(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat\na dog\na bird\n")
    (tmp_path / "test.txt").write_text("a  dog\na fish\n")
    evaluation = EvaluateConfig(source=str(tmp_path / "test.txt"), num_prompts=0)
    counts, train, held_out, rejected = run(tmp_path / "train.txt", tmp_path / "out", evaluation)
    assert [p.prompt for p in train] == ["a cat", "a bird"]
    assert [p.prompt for p in held_out] == ["a dog", "a fish"]
    assert rejected == [(2, "a dog", "is an evaluation prompt")]
    assert counts["held_out"] == 0
    assert adds_up(counts)


def test_prompts_are_drawn_by_seed_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"prompt {i:02d}" for i in range(40)))
    draws = [run(path, tmp_path / "out", limit=10, seed=seed)[1] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert [p.prompt for p in draws[0]] == sorted(p.prompt for p in draws[0])


def test_at_most_half_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    counts, *_ = run(tmp_path / "p.txt", tmp_path / "out", EvaluateConfig(num_prompts=300))
    assert (counts["held_out"], counts["prompts"]) == (1, 2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("p.txt", lambda path, rows: path.write_text("\n".join(t for t, _ in rows), "utf-8-sig")),
        ("p.jsonl", lambda path, rows: path.write_text(jsonl(rows), "utf-8")),
        ("p.csv", lambda path, rows: delimited(path, rows, ",")),
        ("p.TSV", lambda path, rows: delimited(path, rows, "\t")),
        ("p.parquet", lambda path, rows: parquet(path, rows)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, write: Any) -> None:
    rows = [('a "big", cat', "animal"), ("zwölf 🐈", "x"), ("it's", ""), ('"an open quote', "y")]
    write(tmp_path / name, rows)
    found = read_prompts(tmp_path / name, "prompt", "category")
    assert [row.prompt for row in found] == [text for text, _ in rows]
    assert [row.category for row in found] == [k if name != "p.txt" else "" for _, k in rows]


def jsonl(rows: list[tuple[str, str]]) -> str:
    return "\n".join(json.dumps({"Prompt": text, "category": kind}) for text, kind in rows)


def delimited(path: Path, rows: list[tuple[str, str]], delimiter: str) -> None:
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(
            file, delimiter=delimiter, quoting=quoting, quotechar=None if delimiter == "\t" else '"'
        )
        writer.writerows([("id", "PROMPT", "Category"), *((i, *row) for i, row in enumerate(rows))])


def parquet(path: Path, rows: list[tuple[str, str]]) -> None:
    texts, kinds = zip(*rows, strict=True)
    pq.write_table(pa.table({"prompt": texts, "Category": kinds}), path)


def test_odd_values_are_named_rejections(tmp_path: Path) -> None:
    values = ["a cat", 5, None, ["a"], "\ud800x", {"a": 1}, True, "", "a dog"]
    lines = [json.dumps({"prompt": value}) for value in values] + ['{"text": "no prompt"}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    counts, _, _, rejected = run(tmp_path / "p.jsonl", tmp_path / "out")
    reasons = [(row, reason) for row, _, reason in rejected]
    no_text, empty = [2, 4, 5, 6, 7], [3, 8, 10]
    assert reasons == sorted(
        [(row, "not text") for row in no_text] + [(row, "empty") for row in empty]
    )
    assert adds_up(counts)


def test_short_and_long_rows_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,prompt\n1,a cat\n2\n3,a dog,what,else\n\n4,a bird\n")
    found = read_prompts(tmp_path / "p.csv", "prompt", "category")
    assert [(row.number, row.prompt) for row in found] == [
        (2, "a cat"),
        (3, None),
        (4, "a dog"),
        (6, "a bird"),
    ]


def test_a_long_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f"prompt\n{'a' * 500_000}\n")
    (row,) = read_prompts(tmp_path / "p.csv", "prompt", "category")
    assert row.prompt == "a" * 500_000


@pytest.mark.skipif(not PARTI.is_file(), reason=f"{PARTI} is not here")
def test_the_parti_prompts_are_read_as_they_are(tmp_path: Path) -> None:
    counts, train, held_out, _ = run(PARTI, tmp_path / "out")
    assert counts["rows"] == 1632
    assert adds_up(counts)
    assert len(train) + len(held_out) + counts["rejected: duplicate"] == 1632
    assert {"Animals", "Abstract"} <= {p.category for p in train}
