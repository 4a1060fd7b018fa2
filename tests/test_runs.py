"""The run folder: skipped when equal, refused when different, gone on with when unfinished."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from craftune import runs
from craftune.errors import UserError
from craftune.records import sha256, write_json
from craftune.runs import STAGES, Stage, done, execute, locked, redo, refuse_change, stage_folder


def writes(name: str = "out.txt", text: str = "x") -> Callable[[Path], Mapping[str, int]]:
    def work(folder: Path) -> Mapping[str, int]:
        (folder / name).write_text(text)
        return {"files": 1}

    return work


def prompts(work: Any = None, made_from: Any = None, **others: Any) -> Stage:
    return Stage("prompts", (), made_from or {"prompts": {"limit": 3}}, work or writes(), **others)


def refine(work: Any = None) -> Stage:
    return Stage("refine", ("prompts",), {}, work or writes())


def forbidden(folder: Path) -> Mapping[str, int]:
    raise AssertionError(f"{folder} was worked on again")


def test_a_finished_stage_is_skipped(run_folder: Path) -> None:
    assert execute(run_folder, prompts())
    assert not execute(run_folder, prompts(forbidden))


def test_the_record_says_from_what_and_what(run_folder: Path) -> None:
    execute(run_folder, prompts(code={"my:f": "12"}, device="cuda:1"))
    execute(run_folder, refine())
    record, later = done(run_folder, "prompts"), done(run_folder, "refine")
    assert record is not None
    assert later is not None
    digest = sha256(stage_folder(run_folder, "prompts") / "out.txt")
    assert record["outputs"] == {"out.txt": digest}
    assert record["config"] == {"prompts": {"limit": 3}}
    assert record["code"] == {"my:f": "12"}
    assert record["counts"] == {"files": 1}
    assert record["device"] == "cuda:1"
    assert record["seconds"] >= 0
    assert {"python", "torch", "craftune"} <= record["versions"].keys()
    assert later["inputs"] == {"prompts": {"out.txt": digest}}
    assert not (stage_folder(run_folder, "prompts") / "begun.json").exists()


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"prompts": {"limit": 4}}, "made with prompts.limit = 3, now it is 4"),
        ({"prompts": {}}, "made with prompts.limit = 3, now it is None"),
        ({"prompts": {"limit": 3}, "run": {"seed": 1}}, "run"),
        ({"prompts": {"limit": [3]}}, r"= 3, now it is \[3\]"),
    ],
)
def test_other_settings_are_refused_by_name(run_folder: Path, now: Any, said: str) -> None:
    execute(run_folder, prompts())
    with pytest.raises(UserError, match=rf"1-prompts was .*{said}.*--redo prompts"):
        execute(run_folder, prompts(forbidden, now))


def test_a_changed_file_is_not_shown_as_digests(run_folder: Path) -> None:
    before, now = ({"prompts": {"source": "a", "source_sha256": c * 64}} for c in "ab")
    execute(run_folder, prompts(made_from=before))
    with pytest.raises(UserError, match=r"before the content of prompts.source changed"):
        execute(run_folder, prompts(forbidden, now))


def test_changed_code_is_refused_once_done_and_taken_while_not(run_folder: Path) -> None:
    def fails(folder: Path) -> Mapping[str, int]:
        (folder / "shard").write_text("1")
        raise UserError("mend it")

    with pytest.raises(UserError):
        execute(run_folder, prompts(fails, code={"my:f": "1"}))
    assert execute(run_folder, prompts(code={"my:f": "2"}))
    with pytest.raises(UserError, match="before the source of 'my:f' changed"):
        execute(run_folder, prompts(forbidden, code={"my:f": "3"}))


def test_other_inputs_are_refused(run_folder: Path) -> None:
    execute(run_folder, prompts())
    execute(run_folder, refine())
    folder = stage_folder(run_folder, "prompts")
    (folder / "done.json").unlink()
    execute(run_folder, prompts(writes(text="y")))
    with pytest.raises(UserError, match=r"made from another out.txt of stage 'prompts'"):
        execute(run_folder, refine(forbidden))


def test_an_unfinished_stage_goes_on_with_its_files(run_folder: Path) -> None:
    def fails(folder: Path) -> Mapping[str, int]:
        (folder / "shard").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(run_folder, prompts(fails))
    assert done(run_folder, "prompts") is None
    with pytest.raises(UserError, match="limit = 3, now it is 4"):
        execute(run_folder, prompts(forbidden, {"prompts": {"limit": 4}}))
    execute(run_folder, prompts(writes("other")))
    record = done(run_folder, "prompts")
    assert record is not None
    assert record["outputs"].keys() == {"other", "shard"}


def test_a_stage_that_left_nothing_may_change(run_folder: Path) -> None:
    """What failed before its first file binds nobody, e.g. a model folder that was damaged."""

    def fails(folder: Path) -> Mapping[str, int]:
        (folder / "half.partial").write_text("1")
        raise UserError("mend it")

    with pytest.raises(UserError):
        execute(run_folder, prompts(fails))
    assert execute(run_folder, prompts(made_from={"prompts": {"limit": 4}}))


def test_marks_stand_at_every_moment(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without a mark could be taken for those of other settings."""
    folder, standing = stage_folder(run_folder, "prompts"), []

    def watched(path: Path, value: Any) -> None:
        standing.append((path.name, sorted(p.name for p in folder.glob("*.json"))))
        write_json(path, value)

    monkeypatch.setattr(runs, "write_json", watched)
    execute(run_folder, prompts())
    (folder / "out.txt").unlink()
    execute(run_folder, prompts())
    assert standing == [
        ("begun.json", []),
        ("done.json", ["begun.json"]),
        ("begun.json", ["done.json"]),
        ("done.json", ["begun.json"]),
    ]


def test_a_kill_between_the_marks_leaves_nothing_to_do(run_folder: Path) -> None:
    execute(run_folder, prompts())
    begun = stage_folder(run_folder, "prompts") / "begun.json"
    begun.write_text("{}")
    assert not execute(run_folder, prompts(forbidden))
    assert not begun.exists()


def test_by_products_are_no_outputs(run_folder: Path) -> None:
    def work(folder: Path) -> Mapping[str, int]:
        for name in ("checkpoint-3", "tensorboard", "model"):
            (folder / name).mkdir()
            (folder / name / "file").write_text(name)
        (folder / "rest.partial").write_text("")
        return {}

    execute(run_folder, prompts(work))
    assert (done(run_folder, "prompts") or {})["outputs"].keys() == {"model/file"}


def test_a_stage_needs_those_it_reads(run_folder: Path) -> None:
    with pytest.raises(UserError, match="'prompts' has not run, but 'refine' reads it"):
        execute(run_folder, refine(forbidden))


@pytest.mark.parametrize(("damage", "said"), [("edit", "was changed after"), ("delete", "missing")])
def test_inputs_are_checked_against_their_record(run_folder: Path, damage: str, said: str) -> None:
    execute(run_folder, prompts())
    file = stage_folder(run_folder, "prompts") / "out.txt"
    file.write_text("z") if damage == "edit" else file.unlink()
    with pytest.raises(UserError, match=rf"out.txt: .*{said}.*--redo prompts"):
        execute(run_folder, refine(forbidden))


def test_redo_throws_away_this_stage_and_the_later_ones(run_folder: Path) -> None:
    execute(run_folder, prompts())
    execute(run_folder, refine())
    execute(run_folder, Stage("generate", ("prompts", "refine"), {}, writes()))
    redo(run_folder, "refine")
    assert done(run_folder, "prompts")
    assert not stage_folder(run_folder, "refine").exists()
    assert not stage_folder(run_folder, "generate").exists()
    redo(run_folder, "prompts")
    assert list(run_folder.iterdir()) == []


def test_settings_are_compared_without_touching_anything(run_folder: Path) -> None:
    refuse_change(run_folder, prompts())
    assert not run_folder.exists()
    execute(run_folder, prompts())
    refuse_change(run_folder, prompts())
    with pytest.raises(UserError, match="limit"):
        refuse_change(run_folder, prompts(made_from={"prompts": {"limit": 4}}))


def test_one_process_per_run(run_folder: Path) -> None:
    with locked(run_folder), pytest.raises(UserError, match="another craftune process"):
        locked(run_folder).__enter__()
    with locked(run_folder):
        pass


@pytest.mark.parametrize("text", ["[]", "{}", '"a"', "nonsense"])
def test_a_damaged_mark_is_named(run_folder: Path, text: str) -> None:
    execute(run_folder, prompts())
    (stage_folder(run_folder, "prompts") / "done.json").write_text(text)
    with pytest.raises(UserError, match=r"1-prompts/done.json: damaged.*--redo prompts"):
        execute(run_folder, prompts(forbidden))


def test_tuples_and_lists_are_equal_in_a_record(run_folder: Path) -> None:
    execute(run_folder, prompts(made_from={"score": {"rewards": ("a", "b")}}))
    assert not execute(run_folder, prompts(forbidden, {"score": {"rewards": ["a", "b"]}}))
    record = json.loads((stage_folder(run_folder, "prompts") / "done.json").read_text())
    assert record["config"]["score"]["rewards"] == ["a", "b"]


def test_stages_are_numbered_in_their_order(run_folder: Path) -> None:
    assert stage_folder(run_folder, "prompts").name == "1-prompts"
    assert stage_folder(run_folder, STAGES[-1]).name == "8-report"
