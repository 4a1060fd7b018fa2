"""Several processes share a run: queue, waiting, sums, failures; as real processes in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from forks import Forks, forks, this_package
from safetensors.torch import load_file
from tiny import STAGES, Tiny, files, tiny
from torch import Tensor
from torch.distributed import HashStore

from craftune import processes as module
from craftune.errors import EndedElsewhere, UserError
from craftune.pipeline import check, device_of
from craftune.processes import ALONE, Processes, joined
from craftune.recipes import load_recipe
from craftune.runs import locked

MODULE = "rewards_processes"
MEET = """
import os, pathlib, signal, time

def meet(images, prompts, place=pathlib.Path(__file__).parent):
    "Each process of a launch comes here at least once; the trouble hits the second."
    rank = os.environ.get("RANK", "")
    with (place / "scored.txt").open("a") as file:
        file.write(f"{rank} {len(images)}\\n")
    (place / f"here-{rank}").touch()
    while rank and not (place / f"here-{1 - int(rank)}").exists():
        time.sleep(0.005)
    trouble = (place / "trouble.txt").read_text() if rank == "1" else ""
    if trouble == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "slow":
        time.sleep(60)
    return [float("nan") if trouble == "failed" else 0.0] * len(images)
"""


def together(count: int, call: Callable[[Processes], Any]) -> list[Any]:
    """What each of `count` simulated processes returns; the error of the first that raises."""
    store = HashStore()
    members = [Processes(rank, count, rank, store) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return [future.result(10) for future in [pool.submit(call, one) for one in members]]


@pytest.mark.parametrize("seed", range(5))
def test_each_item_goes_to_one_process_and_the_fast_draw_more(seed: int) -> None:
    items = [f"part-{i}" for i in range(60)]
    count = 2 + seed % 3

    def work(one: Processes) -> list[str]:
        rng = random.Random(seed * 10 + one.rank)
        drawn = []
        for item in one.share(items):
            drawn.append(item)
            time.sleep(rng.uniform(0.5, 1) * (0.01 if one.rank == 0 else 0.001))
        return drawn

    found = together(count, work)
    assert Counter(item for drawn in found for item in drawn) == Counter(items)
    assert all(drawn == sorted(drawn, key=items.index) for drawn in found)
    assert len(found[0]) < max(len(drawn) for drawn in found[1:])  # 0 is slow


def test_each_queue_is_its_own_and_what_the_main_process_sees_counts() -> None:
    def work(one: Processes) -> list[list[int]]:
        left = one.told(lambda: [one.rank, 1, 2])
        assert left == [0, 1, 2]
        return [list(one.share(left)), list(one.share(left))]

    first, second = zip(*together(3, work), strict=True)
    for drawn in (first, second):
        assert sorted(chain(*drawn)) == [0, 1, 2]


def test_one_process_alone_draws_everything_and_waits_for_nobody() -> None:
    assert list(ALONE.share(["a", "b"])) == ["a", "b"]
    assert ALONE.told(lambda: (1, 2)) == (1, 2)
    assert ALONE.part(7) == range(7)
    ALONE.settle([Path("nowhere")])
    ALONE.require_same(Path("nowhere"))
    assert ALONE.totals({"loss": 0.1}) == {"loss": 0.1}
    assert ALONE.any(True)
    assert not ALONE.any(False)


@pytest.mark.parametrize("size", [4, 7, 128])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_parts_of_a_batch_make_it_up(size: int, count: int) -> None:
    parts = [Processes(rank, count).part(size) for rank in range(count)]
    assert [row for part in parts for row in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_sums_are_of_every_tensor_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one that adds twice what this process has, in buckets that hold about three numbers."""
    summed = []

    def reduce(self: Processes, tensor: Tensor) -> None:
        summed.append(len(tensor))
        tensor.mul_(3)

    monkeypatch.setattr(Processes, "_all_reduce", reduce)
    monkeypatch.setattr(module, "BUCKET", 3)
    one = Processes(0, 2)
    tensors = [torch.ones(shape) * (i + 1) for i, shape in enumerate([2, (2, 2), 1, 1, (3, 1), 1])]
    wanted = [3 * tensor for tensor in tensors]
    one.add_up(tensors)
    assert all(torch.equal(*pair) for pair in zip(tensors, wanted, strict=True))
    assert summed == [6, 5, 1]
    assert one.totals({"a": 0.1, "b": -1.0}) == {"a": 3 * 0.1, "b": -3.0}
    monkeypatch.setattr(Processes, "_all_reduce", lambda self, tensor: None)
    assert (one.any(True), one.any(False)) == (True, False)


def test_the_main_process_waits_for_the_work_of_all(tmp_path: Path) -> None:
    made = tmp_path / "late"

    def work(one: Processes) -> bool:
        if not one.main:
            time.sleep(0.05)
            made.touch()
        one.settle()
        return made.exists()

    assert together(2, work) == [True, True]


def test_a_file_that_shows_late_is_waited_for_and_one_that_never_shows_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LATE", 0.05)
    with pytest.raises(UserError, match=r"part-7.*run.out must be a folder that all machines"):
        together(2, lambda one: one.settle([tmp_path / "part-7"]))


def test_different_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together(2, lambda one: one.require_same(tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "LATE", 0.05)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()

    def work(one: Processes) -> str:
        if one.main:
            with pytest.raises(EndedElsewhere):
                one.require_same(folders[0])
            return ""
        with pytest.raises(UserError, match="does not see it") as caught:
            one.require_same(folders[1])
        assert one.speaks(caught.value)
        return str(caught.value)

    assert str(folders[1]) in together(2, work)[1]


def test_a_run_stays_locked_until_its_last_process_is_gone(tmp_path: Path) -> None:
    def work(one: Processes) -> None:
        with locked(tmp_path, one):
            one.settle()
            if one.main:
                return
            one.store.wait(["tried"])

    store, count = HashStore(), 2
    members = [Processes(rank, count, rank, store) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        main, other = (pool.submit(work, one) for one in members)
        main.result(10)
        with pytest.raises(UserError, match="another craftune process"), locked(tmp_path):
            pass
        store.set("tried", "")
        other.result(10)
    with locked(tmp_path):
        pass


def test_who_fails_first_speaks_alone() -> None:
    store = HashStore()
    main, first, last = (Processes(rank, 3, rank, store) for rank in range(3))
    assert first.speaks(UserError("a"))
    assert not last.speaks(UserError("b"))
    assert not main.speaks(KeyboardInterrupt())  # as the launcher stops it
    assert not main.speaks(EndedElsewhere())


def test_a_signal_is_told_by_the_main_process_alone() -> None:
    found = together(3, lambda one: one.speaks(KeyboardInterrupt()))
    assert found == [True, False, False]


def test_waiting_ends_when_another_process_has_failed() -> None:
    store = HashStore()
    one, other = (Processes(rank, 2, rank, store) for rank in range(2))
    assert other.speaks(UserError("a"))
    with pytest.raises(EndedElsewhere):
        one.settle()
    with pytest.raises(EndedElsewhere):
        list(one.share([1, 2]))
    with pytest.raises(EndedElsewhere):
        other.told(list)


def test_only_the_main_process_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        with Processes(rank, 2).one_voice():
            print(f"out {rank}")
            print(f"err {rank}", file=sys.stderr)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("out 0\n", "err 0\n")


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it for the machines
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with joined() as found:
        assert found is ALONE
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as found:
        assert found is ALONE


def test_each_process_has_a_device_and_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load_recipe(tiny(tmp_path).recipe, [])
    second = Processes(1, 2, 1)

    def empty(size: int, device: str) -> Tensor:
        """As on a machine with two GPUs."""
        return cast(Tensor, SimpleNamespace(device=torch.device(device), size=size))

    monkeypatch.setattr("craftune.pipeline.torch.empty", empty)

    def on(device: str) -> torch.device:
        return device_of(replace(recipe, run=replace(recipe.run, device=device)), second)

    assert on("cpu") == torch.device("cpu")
    assert on("cuda") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"'cuda:0': 2 processes need a device each; write 'cuda'"):
        on("cuda:0")
    with pytest.raises(UserError, match=r"train.batch_size: 4 is fewer than 5 processes"):
        check(recipe, Processes(0, 5))


# ---------------------------------------------------------------------------------------------
# Real processes


@pytest.fixture(scope="module")
def processes() -> Iterator[Forks]:
    with forks() as started:
        yield started


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, processes: Forks) -> Tiny:
    """A run by one process."""
    job = tiny(tmp_path_factory.mktemp("alone"), MODULE)
    assert processes.run(["run", str(job.recipe)], job.folder).status == 0
    return job


def meeting(folder: Path, trouble: str = "") -> Tiny:
    """A tiny run whose processes meet while they score the pool."""
    job = tiny(folder, MODULE)
    (folder / "meeting.py").write_text(MEET)
    (folder / "trouble.txt").write_text(trouble)
    text = job.recipe.read_text()
    job.recipe.write_text(text.replace('rough"]', 'rough", "meeting:meet"]', 1))
    return job


def forget_meeting(job: Tiny) -> None:
    (job.folder / "trouble.txt").write_text("")
    for path in [job.folder / "scored.txt", *job.folder.glob("here-*")]:
        path.unlink(missing_ok=True)


def assert_equal_results(run: Path, one: Path) -> None:
    """Bit by bit up to the training, then up to the order of two sums."""
    mine, others = (
        {name: digest for name, digest in files(at).items() if "tfevents" not in name}
        for at in (run, one)
    )
    for name, digest in others.items():
        if name[0] in "12345" and not name.endswith("done.json"):
            assert mine[name] == digest, name
    assert mine.keys() == others.keys()
    log, expected = (
        [json.loads(line) for line in (at / "6-train/metrics.jsonl").read_text().splitlines()]
        for at in (run, one)
    )
    for row, right in zip(log, expected, strict=True):
        assert row == pytest.approx(right, rel=1e-4)  # the gradient's norm among them
    for name in (n for n in others if n.startswith("6-train/model") and n.endswith("safetensors")):
        weights, right = load_file(run / name), load_file(one / name)
        for key, value in right.items():
            torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=0)
    reports = [json.loads((at / "8-report/report.json").read_text()) for at in (run, one)]
    assert reports[0]["conclusion"] == reports[1]["conclusion"]


def complaints(texts: list[str]) -> list[str]:
    assert not any("Traceback" in text for text in texts), texts
    return [line for text in texts for line in text.splitlines() if line.startswith("craftune: ")]


@pytest.mark.timeout(300)
def test_two_processes_make_what_one_makes(tmp_path: Path, alone: Tiny, processes: Forks) -> None:
    job = tiny(tmp_path, MODULE)
    ended = processes.together(2, ["run", str(job.recipe)], job.folder)
    assert [one.status for one in ended] == [0, 0], ended
    assert_equal_results(job.run, alone.run)
    assert ended[1].err == (job.folder / "stdout-1").read_text() == ""
    told = [line.split()[1] for line in ended[0].err.splitlines() if line[0].isdigit()]
    assert told == list(STAGES)
    # Nothing is left of the launch, and one process finds everything done.
    again = processes.run(["run", str(job.recipe)], job.folder)
    assert again.err.count("already") == 8


@pytest.mark.timeout(300)
@pytest.mark.parametrize("trouble", ["failed", "killed", "slow"])
def test_the_work_goes_on_after_a_process_failed(
    tmp_path: Path, processes: Forks, trouble: str
) -> None:
    """One that fails, one that is killed, and SIGTERM to all while they work."""
    job = meeting(tmp_path, trouble)
    command = ["score", str(job.recipe)]

    def stop(pids: list[int]) -> None:
        while trouble == "slow" and not (job.folder / "here-1").exists():
            time.sleep(0.01)
        for pid in pids if trouble == "slow" else []:
            os.kill(pid, signal.SIGTERM)

    for name in ("prompts", "refine", "generate"):
        assert processes.run([name, str(job.recipe)], job.folder).status == 0
    ended = processes.together(2, command, job.folder, stop)
    (line,) = complaints([one.err for one in ended])
    if trouble == "failed":
        assert "returned nan for image" in line
        assert [one.status for one in ended] == [2, 2]
        assert line in ended[1].err
    else:
        assert line.startswith("craftune: stopped; finished work is kept")
        assert ended[0].status == 143
    finished = {path.name for path in job.stage("score").glob("part-*.parquet")}
    assert finished < {path.name for path in job.stage("generate").glob("part-*.parquet")}

    forget_meeting(job)
    ended = processes.together(2, command, job.folder)
    assert [one.status for one in ended] == [0, 0], ended
    scored = [line.split() for line in (job.folder / "scored.txt").read_text().splitlines()]
    assert sum(int(count) for _, count in scored) == 24 - 8 * len(finished)  # each once, no more


@pytest.mark.timeout(300)
def test_a_training_by_two_that_was_killed_is_finished_by_one(
    tmp_path: Path, alone: Tiny, processes: Forks
) -> None:
    job = tiny(tmp_path, MODULE)
    place = (str(job.stage("train") / "checkpoint-2"), 1)
    ended = processes.together(2, ["run", str(job.recipe)], job.folder, kill_at=place)
    assert ended[0].status == -signal.SIGKILL
    assert complaints([one.err for one in ended]) == []  # the launcher says who was killed
    last = processes.run(["run", str(job.recipe)], job.folder)
    assert "going on from checkpoint-1" in last.err, last
    assert_equal_results(job.run, alone.run)


@pytest.mark.timeout(300)
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    tmp_path: Path, processes: Forks
) -> None:
    job = tiny(tmp_path, MODULE)
    log = job.stage("train") / "metrics.jsonl"

    def stop(pids: list[int]) -> None:
        deadline = time.monotonic() + 100
        while not (log.is_file() and log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(pids[1], signal.SIGTERM)

    long = ["--set", "train.steps=2000", "--set", "train.save_every=2000"]
    ended = processes.together(2, ["run", str(job.recipe), *long], job.folder, stop)
    (line,) = complaints([one.err for one in ended])
    assert line == "craftune: stopped; finished work is kept, run the same command again"
    assert line in ended[0].err
    (checkpoint,) = job.stage("train").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{len(log.read_text().splitlines())}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("trouble", ["", "failed", "killed"])
def test_accelerate_launch(tmp_path: Path, trouble: str) -> None:
    job = meeting(tmp_path, trouble)
    flags = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    )
    command = ["-m", "accelerate.commands.launch", *flags.split(), "-m", "craftune", "run"]
    ended = subprocess.run(
        [sys.executable, *command, str(job.recipe)],
        cwd=job.folder,
        env=this_package(),
        capture_output=True,
        text=True,
    )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("craftune: ")]
    if not trouble:
        assert (ended.returncode, lines) == (0, [])
        assert ended.stdout.count("report:") == 1
        assert "on 2 x cpu" in ended.stderr
        return
    assert ended.returncode != 0
    told = {"failed": "returned nan for image", "killed": "craftune: stopped"}
    (line,) = lines
    assert told[trouble] in line
    assert (job.stage("generate") / "done.json").exists()
