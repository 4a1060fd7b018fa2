"""Plant mistakes in the numeric core, one at a time, and see which test catches each.

    python tests/mutants.py            runs all; about two hours on one core
    python tests/mutants.py sampling   runs those whose name or file holds this word
    python tests/mutants.py --new      runs those without a result in tests/PLANTED.md

The mistakes are in mutants.txt, each a replacement in one file of a copy of the package. Every
result is written to tests/PLANTED.md at once; those of other mistakes stay.
Libraries are imported once, then every mistake gets a process of its own.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLANTED = ROOT / "tests" / "PLANTED.md"
NOTHING, UNKNOWN, MISPLACED = "NOTHING", "not noted yet", "NOT PLANTED"
"""Caught by no test; not tried yet; the text to replace is not there once."""


@dataclass(frozen=True)
class Mistake:
    """One planted mistake.

    Attributes:
        what: in words.
        file: below craftune/.
        right: text that occurs there once.
        wrong: what it is replaced by.
        tests: the files that ought to notice, below tests/.
    """

    what: str
    file: str
    right: str
    wrong: str
    tests: str


def mistakes() -> list[Mistake]:
    """Those of mutants.txt: "@ file : tests", then blocks of a title, -|right and +|wrong lines."""
    found, file, tests = [], "", ""
    for block in (ROOT / "tests" / "mutants.txt").read_text().split("\n\n"):
        title, *lines = block.strip("\n").split("\n")
        if title.startswith("@ "):
            file, _, tests = title.removeprefix("@ ").partition(" : ")
            continue
        right, wrong = (
            "\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in ("-|", "+|")
        )
        found.append(Mistake(title, file, right, wrong, tests))
    return found


def warm() -> None:
    """Import the heavy libraries, so that every process below inherits them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import transformers

    torch.set_num_threads(1)
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UNet2DConditionModel"):
        getattr(diffusers, name)
    for name in ("AutoencoderKL", "AutoencoderTiny", "UniPCMultistepScheduler"):
        getattr(diffusers, name)
    for name in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"):
        getattr(diffusers, name)
    for name in ("CLIPModel", "T5EncoderModel", "AutoModelForCausalLM", "GenerationConfig"):
        getattr(transformers, name)


def caught_by(mistake: Mistake | None, tests: str, log: Path) -> list[str]:
    """The failing tests (with -x: the first) under a mistake, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("craftune", "tests"):
            shutil.copytree(ROOT / part, copy / part)  # with its bytecode: times stay the same
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mistake:
            path = copy / "craftune" / mistake.file
            text = path.read_text()
            if text.count(mistake.right) != 1:
                return [f"{MISPLACED}: {text.count(mistake.right)} places"]
            path.write_text(text.replace(mistake.right, mistake.wrong))
        child = os.fork()
        if child == 0:
            _run(copy, tests, log)
        os.waitpid(child, 0)
    found = re.findall(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[| - |$)", log.read_text(), re.M)
    return list(dict.fromkeys(found))


def _run(copy: Path, tests: str, log: Path) -> None:
    import pytest

    os.chdir(copy)
    sys.path.insert(0, str(copy))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        files = [f"tests/{test}" for test in tests.split()]
        flags = ["-x", "-q", "-m", "not slow", "--tb=line", "-p", "no:cacheprovider", "--no-header"]
        flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # imported by the parent
        flags += ["-o", "addopts="]  # without shape checks: faster, and the tests are on their own
        code = pytest.main([*flags, *files])
        sys.stdout.flush()
        os._exit(int(code))


def noted() -> dict[tuple[str, str], str]:
    """What tests/PLANTED.md holds: mistake and file -> what caught it."""
    rows = (line.strip("| ").split(" | ") for line in PLANTED.read_text().splitlines())
    return {(row[0], row[1].strip("`")): row[2] for row in rows if len(row) == 3 and "`" in row[1]}


def write_table(found: dict[tuple[str, str], str]) -> None:
    """tests/PLANTED.md, with a row per mistake of mutants.txt."""
    rows = [(m, found.get((m.what, m.file), UNKNOWN)) for m in mistakes()]
    count = {kind: sum(by == kind for _, by in rows) for kind in (NOTHING, UNKNOWN)}
    caught = len(rows) - sum(count.values()) - sum(by.startswith(MISPLACED) for _, by in rows)
    head = (
        "# Planted mistakes\n\nOne at a time in a copy of the package; `python tests/mutants.py` "
        "plants them again and writes this table.\nThe last column is the first test that fails."
        f"\n\n{caught} of {len(rows)} were caught when they were last planted, {count[NOTHING]} "
        f"were not ({NOTHING}); of {count[UNKNOWN]} no result is noted yet.\n\n"
        "| mistake | file below `craftune/` | caught by |\n|---|---|---|\n"
    )
    PLANTED.write_text(head + "".join(f"| {m.what} | `{m.file}` | {by} |\n" for m, by in rows))


def main(words: list[str]) -> int:
    """Run the mistakes that hold a word, or all; returns how many went unnoticed."""
    chosen = mistakes()
    if words == ["--new"]:
        chosen = [m for m in chosen if noted().get((m.what, m.file), UNKNOWN) == UNKNOWN]
    elif words:
        chosen = [m for m in chosen if any(w in m.what or w in m.file for w in words)]
    warm()
    log = Path(tempfile.mkdtemp()) / "log"  # its own: others may plant at the same time
    missed = 0
    for mistake in chosen:
        started = time.monotonic()
        found = caught_by(mistake, mistake.tests, log)
        missed += not found or found[0].startswith(MISPLACED)
        by = ", ".join(f.replace("::", " ") for f in found) or NOTHING
        write_table(noted() | {(mistake.what, mistake.file): by})
        print(
            f"{mistake.file}: {mistake.what}: {by}, {time.monotonic() - started:.1f} s", flush=True
        )
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
