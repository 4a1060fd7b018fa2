"""Training stopped or killed by real signals in real processes, under every kind of state."""

import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import Forks, forks
from tiny import Tiny, files, tiny

STEPS = 12
OPTIONS = {
    "lora, adafactor, ema, cosine": [
        "train.lora={ rank = 2 }",
        "train.optimizer=adafactor",
        "train.ema_decay=0.9",
        "train.lr_schedule=cosine",
    ],
    "full, adamw, ema, linear": ["train.ema_decay=0.9", "train.lr_schedule=linear"],
    "full, adafactor, cosine": ["train.optimizer=adafactor", "train.lr_schedule=cosine"],
    "dora, adamw": ["train.lora={ rank = 2, dora = true }"],
}
COMMON = [f"train.steps={STEPS}", "train.warmup_steps=3", "train.keep_checkpoints=0"]
MANY = [pytest.param(name, 6, marks=pytest.mark.slow, id=name) for name in OPTIONS]


@pytest.fixture(scope="module")
def processes() -> Iterator[Forks]:
    with forks() as started:
        yield started


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory, processes: Forks) -> Tiny:
    """A run that has its selection: all that training reads."""
    job = tiny(tmp_path_factory.mktemp("selected"), "rewards_preemption")
    for stage in ("prompts", "refine", "generate", "score", "select"):
        ended = processes.run([stage, str(job.recipe)], job.folder)
        assert ended.status == 0, ended.err
    return job


def command(job: Tiny, name: str, settings: list[str]) -> list[str]:
    """`craftune train` on a copy of the selected run."""
    if not (job.run.parent / name).exists():
        shutil.copytree(job.run, job.run.parent / name)
    changes = [f"run.name={name}", *COMMON, *settings]
    return ["train", str(job.recipe), *(part for c in changes for part in ("--set", c))]


def at_step(folder: Path, step: int, number: int, delay: float = 0.0) -> Callable[[int], None]:
    """Sends a signal a while after that step's metrics are there."""

    def send(pid: int) -> None:
        deadline = time.monotonic() + 60
        log = folder / "metrics.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < step:
            assert time.monotonic() < deadline, f"step {step} never came"
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(pid, number)

    return send


def outcome(folder: Path) -> dict[str, str]:
    """What training is for: the model, the adapters, the log."""
    made = files(folder)
    return {k: v for k, v in made.items() if k.split("/")[0] in ("model", "lora", "metrics.jsonl")}


@pytest.fixture(scope="module")
def wholes(selected: Tiny, processes: Forks) -> Callable[[str], dict[str, str]]:
    """What training ends with under some options when nothing disturbs it."""

    @functools.cache
    def whole(option: str) -> dict[str, str]:
        name = f"whole{list(OPTIONS).index(option)}"
        ended = processes.run(command(selected, name, OPTIONS[option]), selected.folder)
        assert ended.status == 0, ended.err
        return outcome(selected.run.parent / name / "6-train")

    return whole


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("option", "kills"), [("lora, adafactor, ema, cosine", 2), *MANY])
def test_kills_at_random_moments_change_no_bit(
    selected: Tiny,
    processes: Forks,
    wholes: Callable[[str], dict[str, str]],
    option: str,
    kills: int,
) -> None:
    rng, name = random.Random(option), f"killed{list(OPTIONS).index(option)}-{kills}"
    killed = command(selected, name, [*OPTIONS[option], "train.save_every=2"])
    folder = selected.run.parent / name / "6-train"
    for step in sorted(rng.sample(range(2, STEPS - 2), kills)):
        send = at_step(folder, step, signal.SIGKILL, rng.uniform(0, 0.01))
        ended = processes.run(killed, selected.folder, send)
        assert ended.status in (-signal.SIGKILL, 0), ended
    assert len(list(folder.glob("checkpoint-*"))) > 1
    ended = processes.run(killed, selected.folder)
    assert ended.status == 0, ended.err
    assert "going on from checkpoint-" in ended.err
    assert len(wholes(option)) > 4
    assert outcome(folder) == wholes(option)


STOPS = [
    pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
    pytest.param(signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.slow),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "status"), STOPS)
def test_a_signal_in_training_saves_the_step_and_loses_none(
    selected: Tiny,
    processes: Forks,
    wholes: Callable[[str], dict[str, str]],
    number: int,
    status: int,
) -> None:
    option, name = "lora, adafactor, ema, cosine", f"stop{status}"
    stopped = command(selected, name, [*OPTIONS[option], "train.save_every=1000"])
    folder = selected.run.parent / name / "6-train"
    ended = processes.run(stopped, selected.folder, at_step(folder, 3, number))
    assert ended.status == status, ended
    last = ended.err.splitlines()[-1]
    assert last == "craftune: stopped; finished work is kept, run the same command again"
    assert "Traceback" not in ended.err
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert 3 <= step == (folder / "metrics.jsonl").read_bytes().count(b"\n") < STEPS
    assert not (folder / "model").exists()
    ended = processes.run(stopped, selected.folder)
    assert ended.status == 0, ended.err
    assert f"going on from {checkpoint.name}" in ended.err
    assert outcome(folder) == wholes(option)
