"""The command line as a newcomer meets it: help, tables, progress, last lines, explanations."""

import argparse
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from forks import this_package
from tiny import STAGES, Tiny, call, tiny

from craftune import cli, pipeline, progress
from craftune.errors import UserError
from craftune.images import decode
from craftune.records import read_table
from craftune.refiners import REFINERS
from craftune.rewards import REWARDS
from craftune.runs import Stage

COMMANDS = (
    "run",
    *STAGES,
    "check",
    "plan",
    "doctor",
    "explain",
    "verify-reward",
    "export",
    "mix",
    "serve-reward",
    "list",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A finished run; no test changes it."""
    job = tiny(tmp_path_factory.mktemp("cli"), "rewards_cli")
    answer = call(["run", job.recipe], job.folder)
    assert answer.status == 0, answer.err
    (job.folder / "stdout").write_text(answer.out)
    (job.folder / "stderr").write_text(answer.err)
    return job


# --- help ------------------------------------------------------------------------------------


def parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_few_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: craftune {name}" in capsys.readouterr().out
    actions = [a for a in parsers()[name]._actions if not isinstance(a, argparse._HelpAction)]
    assert len(actions) <= 6
    assert [a.dest for a in actions if not a.help] == []


def test_the_help_names_every_command_and_shows_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert set(parsers()) == set(COMMANDS)
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert [name for name in COMMANDS if not re.search(rf"^    {name}\s", text, re.M)] == []
    examples = re.findall(r"^  craftune (\w+) (.*)$", text, re.MULTILINE)
    assert len(examples) >= 4
    for name, rest in examples:
        options = re.split(r"\s{2,}", rest)[0].replace('"a red circle"', "text").split()
        parsers()[name].parse_args(options)


def test_resume_latest_is_what_happens_anyway(
    done: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("run", "train"):
        again = call([command, done.recipe, "--resume", "latest"], done.folder)
        assert again.status == 0
        assert again.err == call([command, done.recipe], done.folder).err
        with pytest.raises(SystemExit):
            parsers()[command].parse_args(["a.toml", "--resume", "checkpoint-3"])
    with pytest.raises(SystemExit):
        parsers()["train"].parse_args(["a.toml", "--resume", "latest", "--redo"])
    assert "not allowed with argument --resume" in capsys.readouterr().err


def test_libraries_remark_nothing(done: Tiny) -> None:
    """On what is not installed, as importing diffusers without torchvision does."""
    command = [sys.executable, "-m", "craftune", "plan", str(done.recipe)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=done.folder)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_unknown_command_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["rum"])
    assert stopped.value.code == 2
    assert "invalid choice: 'rum'" in capsys.readouterr().err


def test_python_m_and_a_pipe_that_closes(done: Tiny) -> None:
    """As with `| head`: nobody reads on, and that is no error."""
    command = [sys.executable, "-m", "craftune", "list", "settings"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=done.folder,
        env=this_package(),
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_text_that_the_terminal_cannot_show_stops_nothing(done: Tiny) -> None:
    environment = this_package() | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "craftune", "run", str(done.recipe)]
    answer = subprocess.run(command, cwd=done.folder, env=environment, capture_output=True)
    assert answer.returncode == 0, answer.stderr
    assert b"report: " in answer.stdout


# --- tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("rewards", [*REWARDS, "Your own: package.module:function"]),
        ("refiners", [*REFINERS, "file", "Your own: package.module:function"]),
        ("methods", ["craft ", "[method.settings]", 'negatives = "drop"', "beta = 1", "sft "]),
        ("families", ["sd"]),
        ("filters", ["I_h", "I_hpa", "none"]),
        ("settings", ["[train]", "steps = 120", "lora.rank", "[report]"]),
    ],
)
def test_tables(tmp_path: Path, table: str, names: list[str]) -> None:
    answer = call(["list", table], tmp_path)
    assert answer.status == 0
    assert answer.err == ""
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 130
    if table == "settings":
        names = ["[train]", "steps = 120", "[train.lora]", "rank = 0", "[report]"]
        names += ['[reward."hpsv2.1"]', 'path = "xswu/HPSv2"']
    for name in names:
        assert any(line.startswith(name) for line in lines), name
    rows = [line for line in lines if line and line[0] not in "[ " and "Your own" not in line]
    if table == "rewards":
        assert " " * 24 + "weights: xswu/HPSv2, HPS_v2.1_compressed.pt; Apache-2.0; 2.0 GB" in lines
    assert [row for row in rows if len(row.split()) < 3] == []


# --- a run -----------------------------------------------------------------------------------


def test_a_run_says_what_each_stage_made(done: Tiny) -> None:
    lines = (done.folder / "stderr").read_text().splitlines()
    assert lines[0].startswith(f"{done.run}: ")
    stages = [line for line in lines if line[0].isdigit()]
    assert [line.split()[:2] for line in stages] == [[str(i), n] for i, n in enumerate(STAGES, 1)]
    assert all(re.match(r"\d \w+ +\d+\.\d s  \S", line) for line in stages)
    assert len({line.index(" s  ") for line in stages}) == 1  # one column
    assert "8 of 12 rows to train on, 4 to compare on" in stages[0]
    assert "24 candidates" in stages[2]


def test_the_last_lines_say_where_it_is_and_how_to_load_it(done: Tiny) -> None:
    *found, _, report, model, load = (done.folder / "stdout").read_text().splitlines()
    assert found[0].endswith(".")
    assert all(line.startswith("  ") for line in found[1:])
    assert Path(report.removeprefix("report: ")).is_file()
    assert Path(model.removeprefix("model:  ")).is_dir()
    code = load.removeprefix("load:   diffusers.")
    pipe = eval(code, {"DiffusionPipeline": DiffusionPipeline})
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe("a red dog", num_inference_steps=2).images
    assert image.size == (32, 32) or image.size[0] % 8 == 0


def test_a_second_run_skips_everything_at_once(done: Tiny) -> None:
    started = time.process_time()
    answer = call(["run", done.recipe], done.folder)
    assert time.process_time() - started < 2
    assert answer.status == 0
    assert answer.err.count("  already  ") == len(STAGES)
    assert answer.out == (done.folder / "stdout").read_text()


def test_tuned_images_come_from_the_tuned_weights(done: Tiny) -> None:
    """A learning rate that breaks the model shows in the tuned images, and in no other."""
    broken = ["--set", "train.learning_rate=0.1", "--set", "train.max_grad_norm=1e9"]
    other = ["--set", "run.name=broken", "--set", "report.grid=1", *broken]
    answer = call(["run", done.recipe, *other], done.folder)
    assert answer.status == 0, answer.err
    drawn = {}
    for run in (done.run, done.run.with_name("broken")):
        for arm in ("base", "tuned"):
            table = read_table((run / "7-evaluate").glob(f"images-{arm}-*.parquet"), ["image"])
            pixels = [np.asarray(decode(i["bytes"]), float) for i in table["image"].to_pylist()]
            drawn[run.name, arm] = np.stack(pixels)
    assert np.array_equal(drawn["tiny", "base"], drawn["broken", "base"])
    assert np.abs(drawn["broken", "tuned"] - drawn["tiny", "tuned"]).mean() > 5


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_a_command_of_its_own(done: Tiny, stage: str) -> None:
    answer = call([stage, done.recipe], done.folder)
    assert answer.status == 0, answer.err
    assert [line.split()[1] for line in answer.err.splitlines()[1:]] == [stage]
    assert str(done.stage(stage)) in answer.out


def test_check_says_where_the_run_would_be(done: Tiny) -> None:
    answer = call(["check", done.recipe], done.folder)
    assert answer.status == 0
    assert str(done.run) in answer.out
    assert answer.err == ""


def test_too_little_memory_says_what_to_lower(run_folder: Path) -> None:
    def work(folder: Path) -> Mapping[str, int]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(UserError, match=r"'prompts': CUDA out of memory. .* run again"):
        pipeline._execute(run_folder, Stage("prompts", (), {}, work))

    def on_the_cpu(folder: Path) -> Mapping[str, int]:
        return {"numbers": len(torch.empty(10**14))}

    with pytest.raises(UserError, match=r"'generate': .*memory.* lower generate\.batch_size"):
        pipeline._execute(run_folder, Stage("generate", (), {}, on_the_cpu))

    def in_numpy(folder: Path) -> Mapping[str, int]:
        raise MemoryError

    with pytest.raises(UserError, match=r"'score': out of memory; lower score\.batch_size"):
        pipeline._execute(run_folder, Stage("score", (), {}, in_numpy))
    known = {f"{section}.{key}" for section, key in keys()}
    named = re.findall(r"\w+(?:\.\w+)+", " ".join(pipeline.LESS_MEMORY.values()))
    assert named
    assert set(named) <= known


def keys() -> set[tuple[str, str]]:
    from craftune.recipes import settings

    return {(section, key.split(" = ")[0]) for section, key, _ in settings()}


# --- explain ---------------------------------------------------------------------------------


def test_explain_shows_the_funnel(done: Tiny) -> None:
    answer = call(["explain", done.run], done.folder)
    assert answer.status == 0
    counts = {name: int(n) for n, name in re.findall(r"^ +(\d+)  (.+)$", answer.out, re.MULTILINE)}
    assert counts["candidates"] == 24
    assert counts["baseline"] == 8
    assert "--prompt" in answer.out


def test_explain_shows_every_candidate_of_a_prompt(done: Tiny) -> None:
    table = read_table(done.stage("select") / "selection.parquet")
    rows = [row for row in table.to_pylist() if row["prompt_id"] == table["prompt_id"][0].as_py()]
    by_text = call(["explain", done.run, "--prompt", rows[0]["prompt"]], done.folder)
    by_id = call(["explain", done.run, "--prompt", rows[0]["prompt_id"]], done.folder)
    spaced = f"  {rows[0]['prompt'].replace(' ', '   ')} "
    assert (
        by_text.out == by_id.out == call(["explain", done.run, "--prompt", spaced], done.folder).out
    )
    scores = read_table(done.stage("score").glob("*.parquet")).to_pylist()
    for row in rows:
        assert row["candidate"] in by_text.out
        assert repr(row["refined_prompt"]) in by_text.out
        assert row["reason"] in by_text.out
        for value in (s["value"] for s in scores if s["candidate"] == row["candidate"]):
            assert f"{value:.5g}" in by_text.out
        if row["variant"]:
            assert f"{row['advantage']:+.4f}" in by_text.out


def test_explain_shows_one_candidate_beside_its_baseline(done: Tiny) -> None:
    row = read_table(done.stage("select") / "selection.parquet").to_pylist()[1]
    answer = call(["explain", done.run, "--candidate", row["candidate"]], done.folder)
    assert row["reason"] in answer.out
    lines = answer.out.splitlines()
    assert len([line for line in lines if re.match(r" {3}[01] +\S", line)]) >= 3
    assert "never selected" not in answer.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a red dogg"], "unknown prompt 'a red dogg'; did you mean 'a red dog'"),
        (["--candidate", "x"], "unknown candidate 'x'"),
    ],
)
def test_explain_knows_what_it_does_not_know(done: Tiny, arguments: list[str], said: str) -> None:
    assert said in call(["explain", done.run, *arguments], done.folder).complaint


def test_explain_of_what_is_no_finished_run(tmp_path: Path, done: Tiny) -> None:
    assert "not a run folder" in call(["explain", tmp_path / "none"], tmp_path).complaint
    job = tiny(tmp_path / "job", "rewards_cli")
    call(["prompts", job.recipe], job.folder)
    assert "stage 'generate' has not run" in call(["explain", job.run], job.folder).complaint
    (job.run / "run.json").write_text("{}")
    for name in ("generate", "score"):
        job.stage(name).symlink_to(done.stage(name))
    assert "run.json: damaged" in call(["explain", job.run], job.folder).complaint


# --- progress --------------------------------------------------------------------------------


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)) * 6)
    assert list(progress.track("abcd", "draw", 14, "image", step=4, done=0)) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "  draw: 8 of 14 images, 0.667/s, 9 s left",
    ]


def test_what_is_there_already_is_said_and_not_in_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)) * 10)
    list(progress.track("ab", "draw", 100, "image", step=10, done=80))
    assert capsys.readouterr().err.splitlines() == [
        "  draw: 80 of 100 images are there already",
        "  draw: 90 of 100 images, 1/s, 10 s left",
    ]


def test_a_bar_on_a_terminal() -> None:
    code = (
        "import time\nfrom craftune.progress import track\n"
        "for _ in track(range(5), 'draw', 18, 'image', 4): time.sleep(0.11)\n"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # how Linux says that the other side has closed
                break
            if not block:
                break
            text += block
    os.close(ours)
    assert process.returncode == 0
    shown = text.decode()
    assert re.search(r"  draw +\d+% \|.*\| \d+ of 18 images, .*left", shown)
    assert shown.count("\n") == 0  # the bar goes away without a trace
