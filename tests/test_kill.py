"""kill -9 at random moments in each stage, then the same command: the same weights and report."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Ended, Forks, forks, this_package
from PIL import Image
from tiny import STAGES, Tiny, files, results, tiny

from craftune.images import encode_png
from craftune.records import read_table
from craftune.scoring.tables import SHARD

MODULE = "rewards_kill"
TIMED = ("8-report/report.html", "8-report/costs.json", "done.json")
"""Files that say how long something took; all others must be the same, byte by byte."""


@pytest.fixture(scope="module")
def processes() -> Iterator[Forks]:
    with forks() as started:
        yield started


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run that nothing disturbed, by the real command line."""
    job = tiny(tmp_path_factory.mktemp("whole"), MODULE)
    command = [sys.executable, "-m", "craftune", "run", str(job.recipe)]
    subprocess.run(
        command, cwd=job.folder, env=this_package(), check=True, capture_output=True, timeout=300
    )
    return job


def outcome(run: Path) -> dict[str, str]:
    """Every file but those with times in them and the by-products, which may be missing."""
    by_product = re.compile(r"\.lock|run\.json|6-train/(checkpoint-|tensorboard)")
    return {
        k: v for k, v in files(run).items() if not by_product.match(k) and not k.endswith(TIMED)
    }


def records(run: Path) -> dict[str, dict[str, object]]:
    """What the stages recorded, without the times and where the run lies."""
    found = {}
    for path in sorted(run.glob("*/done.json")):
        record = json.loads(path.read_text())
        del record["seconds"]
        for name in ("report.html", "costs.json"):
            record["outputs"].pop(name, None)
        # The two runs have prompt files of their own, of equal content.
        found[path.parent.name] = json.loads(
            json.dumps(record).replace(record["config"].get("prompts", {}).get("source", "-"), "")
        )
    return found


def assert_same(run: Path, undisturbed: Path) -> None:
    assert results(run) == results(undisturbed)
    assert len(results(run)) == 4  # three networks and report.json
    assert records(run) == records(undisturbed)
    assert outcome(run) == outcome(undisturbed)


class Killer:
    """Waits for a stage to begin, then a while, then sends a signal."""

    def __init__(self, folder: Path, delay: float, number: int = signal.SIGKILL) -> None:
        self.folder, self.delay, self.number = folder, delay, number
        self.before = self.mark()

    def mark(self) -> int:
        """When the stage last began, 0 for never."""
        path = self.folder / "begun.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def __call__(self, pid: int) -> None:
        deadline = time.monotonic() + 60
        while self.mark() in (0, self.before):
            assert time.monotonic() < deadline, f"{self.folder} never began"
            time.sleep(0.0005)
        time.sleep(self.delay)
        os.kill(pid, self.number)


def harass(job: Tiny, processes: Forks, rng: random.Random, kills: int) -> dict[str, int]:
    """Kill the run in each stage, at file changes and at moments; returns hits per stage."""
    hits: dict[str, int] = dict.fromkeys(STAGES, 0)
    for stage in STAGES:
        for attempt in range(kills):
            done = (job.stage(stage) / "done.json").exists()
            command = ["run", str(job.recipe), *(["--redo", stage] if done else [])]
            if attempt % 2:
                delay = rng.uniform(0, 0.2)
                print(f"{stage}: kill {delay:.3f} s after its beginning")
                ended = processes.run(command, job.folder, Killer(job.stage(stage), delay))
            else:
                change = rng.randint(1, 5 if attempt == 0 else 14)
                print(f"{stage}: kill before its file change {change}")
                place = (str(job.stage(stage)), change)
                ended = processes.run(command, job.folder, kill_at=place)
            assert ended.status in (-signal.SIGKILL, 0), ended
            hits[stage] += ended.status == -signal.SIGKILL
    return hits


def check_kills(folder: Path, whole: Tiny, processes: Forks, seed: int, kills: int) -> None:
    job = tiny(folder, MODULE)
    hits = harass(job, processes, random.Random(seed), kills)
    print(f"seed {seed}: kills {hits}")
    assert all(hits.values()), hits
    ended = processes.run(["run", str(job.recipe)], job.folder)
    assert ended.status == 0, ended.err
    assert_same(job.run, whole.run)


@pytest.mark.timeout(400)
def test_a_killed_run_ends_as_an_undisturbed_one(
    tmp_path: Path, whole: Tiny, processes: Forks
) -> None:
    check_kills(tmp_path, whole, processes, seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_kills(tmp_path: Path, whole: Tiny, processes: Forks, seed: int) -> None:
    check_kills(tmp_path, whole, processes, seed, kills=12)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_before_every_single_file_change(
    tmp_path: Path, whole: Tiny, processes: Forks, stage: str
) -> None:
    job = tiny(tmp_path, MODULE)
    command = ["run", str(job.recipe)]
    for change in range(1, 200):
        place = (str(job.stage(stage)), change)
        ended = processes.run([*command, "--redo", stage], job.folder, kill_at=place)
        finished = ended.status == 0
        ended = processes.run(command, job.folder)
        assert ended.status == 0, (change, ended.err)
        assert_same(job.run, whole.run)
        if finished:
            assert change > 4
            return
    raise AssertionError("the stage never ended")


@pytest.mark.timeout(400)
def test_a_killed_training_goes_on_from_its_checkpoint(
    tmp_path: Path, whole: Tiny, processes: Forks
) -> None:
    """Killed where its second checkpoint would begin, and where the model would be written."""
    job = tiny(tmp_path, MODULE)
    command = ["run", str(job.recipe)]
    for name, change in (("checkpoint-2", 1), ("model", 4)):
        place = (str(job.stage("train") / name), change)
        assert processes.run(command, job.folder, kill_at=place).status == -signal.SIGKILL
    ended = processes.run(command, job.folder)
    assert ended.status == 0, ended.err
    assert "going on from checkpoint-2" in ended.err
    assert_same(job.run, whole.run)


@pytest.mark.timeout(400)
def test_a_redo_that_is_killed_loses_no_consistency(
    tmp_path: Path, whole: Tiny, processes: Forks
) -> None:
    """The folders go one by one, the last stage first, each at once."""
    job = tiny(tmp_path, MODULE)
    command = ["run", str(job.recipe)]
    assert processes.run(command, job.folder).status == 0
    for change in (2, 9):  # within the first folder that goes, and later
        place = (str(job.run), change + 1)
        ended = processes.run([*command, "--redo", "select"], job.folder, kill_at=place)
        assert ended.status == -signal.SIGKILL, ended
        for stage in STAGES:
            folder = job.stage(stage)
            assert not folder.exists() or (folder / "done.json").exists(), stage
    assert processes.run(command, job.folder).status == 0
    assert not (job.run / ".trash").exists()
    assert_same(job.run, whole.run)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_so_and_goes_on(
    tmp_path: Path, whole: Tiny, processes: Forks, number: int, status: int
) -> None:
    job = tiny(tmp_path, MODULE)
    command = ["run", str(job.recipe)]
    ended = processes.run(command, job.folder, Killer(job.stage("train"), 0.05, number))
    assert_stopped(ended, status)
    assert processes.run(command, job.folder).status == 0
    assert_same(job.run, whole.run)


def assert_stopped(ended: Ended, status: int) -> None:
    assert ended.status == status, ended
    *before, last = ended.err.splitlines()
    assert last == "craftune: stopped; finished work is kept, run the same command again"
    assert "Traceback" not in ended.err
    assert not any(line.startswith("craftune: ") for line in before)


@pytest.mark.parametrize("n", [2, 3])
def test_killed_scoring_of_images_goes_on(tmp_path: Path, processes: Forks, n: int) -> None:
    """Whatever was finished is not made again, and the end is the same."""
    (tmp_path / "images").mkdir()
    for i in range(2 * SHARD + 5):
        data = encode_png(Image.new("RGB", (2, 2), (i % 256, i // 256, 0)))
        (tmp_path / "images" / f"{i:03d}.png").write_bytes(data)
    out = tmp_path / "scores.parquet"
    arguments = ["score", str(tmp_path / "images"), "--rewards", "jpeg-compressibility"]
    parts = tmp_path / "scores.parquet.parts"
    killed = processes.run(
        [*arguments, "--out", str(out)], tmp_path, kill_at=(str(parts / "part-"), n)
    )
    assert killed.status == -9
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert kept
    answer = processes.run([*arguments, "--out", str(out)], tmp_path)
    assert answer.status == 0, answer.err
    assert f"{len(kept) * SHARD} of {2 * SHARD + 5} images are there already" in answer.err
    assert not parts.exists()
    other = tmp_path / "undisturbed.parquet"
    assert processes.run([*arguments, "--out", str(other)], tmp_path).status == 0
    assert read_table(out).equals(read_table(other))
    assert len(read_table(out)) == 2 * SHARD + 5
