"""Plant mistakes in the numeric core, one at a time, and see which test catches each.

    python tests/mutants.py            runs all, writes tests/PLANTED.md; about ten minutes
    python tests/mutants.py sampling   runs those whose name or file holds this word

The mistakes are in mutants.txt, each a replacement in one file of a copy of the package.
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
                return [f"NOT PLANTED: {text.count(mistake.right)} places"]
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


def main(words: list[str]) -> int:
    """Run the mistakes that hold a word, or all; returns how many went unnoticed."""
    chosen = [m for m in mistakes() if not words or any(w in m.what or w in m.file for w in words)]
    warm()
    log = Path(tempfile.mkdtemp()) / "log"  # its own: others may plant at the same time
    missed, lines = 0, []
    for number, mistake in enumerate(chosen, 1):
        started = time.monotonic()
        found = caught_by(mistake, mistake.tests, log)
        missed += not found or found[0].startswith("NOT PLANTED")
        by = ", ".join(f.replace("::", " ") for f in found) or "NOTHING"
        lines.append(f"| {number} | {mistake.what} | `{mistake.file}` | {by} |")
        print(lines[-1], f"{time.monotonic() - started:.1f} s", flush=True)
    if not words:
        head = (
            "# Planted mistakes\n\n"
            "One at a time, or several in unrelated modules at once, in a copy of the package;\n"
            "`python tests/mutants.py` plants them again and writes this table. "
            "The last column is the first test that fails.\n\n"
            f"{len(chosen) - missed} of {len(chosen)} are caught.\n\n"
            "| | mistake | file below `craftune/` | caught by |\n|---|---|---|---|\n"
        )
        (ROOT / "tests" / "PLANTED.md").write_text(head + "\n".join(lines) + "\n")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
