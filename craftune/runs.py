"""The run folder: what is done, what it was made from, and how a killed run goes on.

runs/<name>/{run.json, 1-prompts/, 2-refine/, ... 8-report/}. A stage writes `begun.json` first
and `done.json` last. `done.json` holds what the stage was made from (settings, sha256 of every
input) and what it made (sha256 of every output). Equal -> skipped; different -> an error names
the key; begun but not done -> it goes on from the finished files. At no moment does a stage's
folder hold files but neither mark, so files of other settings never mix in.
"""

import fcntl
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from craftune.differences import first_difference, plain, told
from craftune.errors import UserError
from craftune.processes import ALONE, Processes
from craftune.records import read_json, sha256, write_json

STAGES = ("prompts", "refine", "generate", "score", "select", "train", "evaluate", "report")
NEEDS: dict[str, tuple[str, ...]] = {
    "examples": STAGES,
    "prompts": ("prompts", "train", "evaluate", "report"),
    "pictures": ("prompts", "generate", "train", "evaluate", "report"),
}
"""The stages of a run, by what its method is fed with: images that were drawn and selected before
it; prompts alone, of which it draws its own images; or pictures, whose noises `generate` finds."""
PACKAGES = ("craftune", "torch", "diffusers", "transformers", "peft", "numpy", "pyarrow", "pillow")
BEGUN, DONE, TRASH = "begun.json", "done.json", ".trash"


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: one of `STAGES`.
        reads: earlier stages whose outputs it reads.
        made_from: every setting that its outcome depends on, by section and key.
        work: writes the outputs into the stage's folder; returns counts for the log.
        code: sha256 of the user's functions that it calls. They may be mended while the stage is
            unfinished: `work` itself makes anew what they changed.
        device: where it runs, for the record.
        shared: whether every process of a launch takes part in `work`; else the main one alone.
    """

    name: str
    reads: tuple[str, ...]
    made_from: Mapping[str, Any]
    work: Callable[[Path], Mapping[str, int]]
    code: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    shared: bool = False


def stage_folder(run: Path, name: str) -> Path:
    """Where a stage's files lie, e.g. runs/demo/3-generate."""
    return run / f"{STAGES.index(name) + 1}-{name}"


def done(run: Path, name: str) -> dict[str, Any] | None:
    """What a finished stage recorded, or None where it is not finished.

    Raises:
        UserError: the record is damaged.
    """
    return _mark(run, name, DONE, {"config", "code", "inputs", "outputs", "counts", "seconds"})


@contextmanager
def locked(run: Path, processes: Processes = ALONE) -> Iterator[None]:
    """One launch per run folder; the lock goes with its last process, however that ends.

    Raises:
        UserError: another process works on this run, or not all processes see one folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        if processes.main:
            _lock(run, file, fcntl.LOCK_EX)
            shutil.rmtree(run / TRASH, ignore_errors=True)  # of a --redo that was killed
        if processes.count > 1:
            if processes.main:
                _lock(run, file, fcntl.LOCK_SH)
            processes.require_same(run)
            if not processes.main:
                _lock(run, file, fcntl.LOCK_SH)
        yield


def _lock(run: Path, file: IO[str], kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{run}: another craftune process is working on this run; wait for it, or choose "
            "another run.name"
        ) from None


def redo(run: Path, name: str) -> None:
    """Throw away a stage and all that come after it, the last one first."""
    for later in reversed(STAGES[STAGES.index(name) :]):
        if stage_folder(run, later).exists():
            # All at once: a kill leaves no stage that has lost half its files.
            stage_folder(run, later).rename(run / TRASH)
            shutil.rmtree(run / TRASH)


def execute(run: Path, stage: Stage, processes: Processes = ALONE) -> bool:
    """Run one stage unless it is done. Returns whether anything was done.

    Args:
        processes: those of this launch; each calls this function, the main one writes the marks.

    Raises:
        UserError: the stage was made from other settings or inputs; an input is missing or was
            changed by hand; an earlier stage has not run.
    """
    folder = stage_folder(run, stage.name)
    key = processes.told(lambda: _begin(run, stage))
    if key is None:
        return False
    if not processes.main:
        if stage.shared:
            stage.work(folder)
        return True
    started = time.monotonic()
    counts = dict(stage.work(folder))
    outputs = sorted(p for p in folder.rglob("*") if p.is_file() and _is_output(p, folder))
    record = {
        "stage": stage.name,
        **key,
        "outputs": {str(p.relative_to(folder)): sha256(p) for p in outputs},
        "counts": counts,
        "seconds": round(time.monotonic() - started, 3),
        "device": stage.device,
        "versions": versions(),
    }
    write_json(folder / DONE, record)
    (folder / BEGUN).unlink()
    return True


def _begin(run: Path, stage: Stage) -> dict[str, Any] | None:
    """Write the first mark and return what it holds; None where the stage is done already."""
    folder = stage_folder(run, stage.name)
    inputs = _inputs(run, stage)
    refuse_change(run, stage, inputs)
    finished = done(run, stage.name)
    if finished and all((folder / name).is_file() for name in finished["outputs"]):
        (folder / BEGUN).unlink(missing_ok=True)  # of a process killed between the two marks
        return None
    _verify_inputs(run, stage)

    key = {"config": plain(stage.made_from), "code": dict(stage.code), "inputs": inputs}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BEGUN, key)
    (folder / DONE).unlink(missing_ok=True)
    return key


def refuse_change(run: Path, stage: Stage, inputs: Mapping[str, Any] | None = None) -> None:
    """Refuse a stage that was made, or begun, from something else.

    Args:
        inputs: as `done.json` records them; None compares only the settings.

    Raises:
        UserError: names the first key that differs, and both values.
    """
    before, parts = done(run, stage.name), ("config", "code", "inputs")
    if before is None and _worked(stage_folder(run, stage.name)):
        before, parts = _mark(run, stage.name, BEGUN, {"config", "inputs"}), ("config", "inputs")
    now = {"config": plain(stage.made_from), "code": dict(stage.code), "inputs": inputs}
    for part in parts:
        if before is None or now[part] is None:
            continue
        difference = first_difference(before[part], now[part])
        if difference:
            raise UserError(
                f"{stage_folder(run, stage.name)} {told(part, *difference)}; run with --redo "
                f"{stage.name} to make this stage and the later ones anew, or choose another "
                "run.name"
            )


def versions() -> dict[str, str]:
    """Of Python and the packages that numbers depend on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _mark(run: Path, name: str, file: str, keys: set[str]) -> dict[str, Any] | None:
    """begun.json or done.json of a stage, or None where there is none."""
    path = stage_folder(run, name) / file
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict) or not keys <= value.keys():
        raise UserError(
            f"{path}: damaged, lacks {sorted(keys - set(value))[0]!r}; run with --redo {name} to "
            "make this stage and the later ones anew"
        )
    return value


def _worked(folder: Path) -> bool:
    """Whether an unfinished stage has left anything that may go on being used."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return any(path.name != BEGUN and path.suffix != ".partial" for path in files)


def _is_output(path: Path, folder: Path) -> bool:
    """Marks are none; checkpoints and TensorBoard files are by-products: they may be deleted."""
    first = path.relative_to(folder).parts[0]
    by_product = first in (BEGUN, DONE, "tensorboard") or first.startswith("checkpoint-")
    return not by_product and path.suffix != ".partial"


def _inputs(run: Path, stage: Stage) -> dict[str, dict[str, str]]:
    """sha256 of every file that the earlier stages recorded."""
    found = {}
    for name in stage.reads:
        record = done(run, name)
        if record is None:
            raise UserError(
                f"{stage_folder(run, name)}: stage {name!r} has not run, but {stage.name!r} "
                f"reads it; run `craftune {name}` or `craftune run` first"
            )
        found[name] = record["outputs"]
    return found


def _verify_inputs(run: Path, stage: Stage) -> None:
    """Refuse input files that are missing or no longer what their stage wrote."""
    for name in stage.reads:
        folder = stage_folder(run, name)
        for file, digest in (done(run, name) or {})["outputs"].items():
            path = folder / file
            if not path.is_file() or sha256(path) != digest:
                state = "was changed after" if path.is_file() else "is missing since"
                raise UserError(
                    f"{path}: {state} stage {name!r} wrote it; delete the file and run again "
                    f"(only it is made anew), or run with --redo {name}"
                )
