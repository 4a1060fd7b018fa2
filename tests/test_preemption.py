"""Training stopped or killed by real signals in real processes, under every kind of state."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks, forks
from tiny import Tiny, files, tiny

STEPS = 24
OPTIONS = {
    "full, adamw, ema": ["train.ema_decay=0.9", "train.lr_schedule=linear"],
    "full, adafactor": ["train.optimizer=adafactor", "train.lr_schedule=cosine"],
    "lora, adafactor, ema": [
        "train.lora={ rank = 2 }",
        "train.optimizer=adafactor",
        "train.ema_decay=0.9",
        "train.lr_schedule=cosine",
    ],
}
COMMON = [f"train.steps={STEPS}", "train.warmup_steps=3", "train.keep_checkpoints=0"]


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


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=list(OPTIONS))
def test_kills_at_random_moments_change_no_bit(
    selected: Tiny, processes: Forks, settings: list[str]
) -> None:
    rng = random.Random(str(settings))
    name = f"kill{list(OPTIONS.values()).index(settings)}"
    settings = [*settings, "train.save_every=2"]
    whole = command(selected, f"{name}-whole", settings)
    assert processes.run(whole, selected.folder).status == 0
    killed = command(selected, name, settings)
    folder = selected.run.parent / name / "6-train"
    for step in sorted(rng.sample(range(1, STEPS - 2), 3)):
        send = at_step(folder, step, signal.SIGKILL, rng.uniform(0, 0.02))
        ended = processes.run(killed, selected.folder, send)
        assert ended.status == -signal.SIGKILL, ended
    ended = processes.run(killed, selected.folder)
    assert ended.status == 0, ended.err
    assert "going on from checkpoint-" in ended.err
    assert outcome(folder) == outcome(folder.parents[1] / f"{name}-whole" / "6-train")
    assert len(outcome(folder)) > 4


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_training_saves_the_step_and_loses_none(
    selected: Tiny, processes: Forks, number: int, status: int
) -> None:
    name, settings = f"stop{status}", ["train.ema_decay=0.9", "train.save_every=1000"]
    whole = command(selected, f"{name}-whole", settings)
    assert processes.run(whole, selected.folder).status == 0
    stopped = command(selected, name, settings)
    folder = selected.run.parent / name / "6-train"
    ended = processes.run(stopped, selected.folder, at_step(folder, 3, number))
    assert ended.status == status, ended
    last = ended.err.splitlines()[-1]
    assert last == "craftune: stopped; finished work is kept, run the same command again"
    assert "Traceback" not in ended.err
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert 3 <= step == len(rows) < STEPS
    assert not (folder / "model").exists()
    ended = processes.run(stopped, selected.folder)
    assert ended.status == 0, ended.err
    assert f"going on from {checkpoint.name}" in ended.err
    assert outcome(folder) == outcome(folder.parents[1] / f"{name}-whole" / "6-train")


def test_the_checkpoint_of_an_average_holds_what_trains_and_no_more(
    selected: Tiny, processes: Forks
) -> None:
    settings = [*OPTIONS["lora, adafactor, ema"], "train.save_every=20"]
    assert processes.run(command(selected, "size", settings), selected.folder).status == 0
    folder = selected.run.parent / "size" / "6-train" / "checkpoint-20"
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["average"].keys() == state["network"].keys()
    assert all("lora_" in name for name in state["average"])
