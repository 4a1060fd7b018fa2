"""A whole run that takes two seconds: a random checkpoint, twelve prompts, two rewards.

`tiny(folder)` writes its files into an empty folder; `call(...)` is the command line in this
process; `command(...)` is the same for a process of its own.
"""

import contextlib
import hashlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toy import kept_checkpoint

import craftune.rewards
from craftune.cli import main
from craftune.runs import STAGES, stage_folder

PROMPTS = [f"{number} {thing}" for number in ("a red", "two", "a") for thing in ("dog", "cat")] + [
    f"a {thing} and a {other}" for thing in ("dog", "cat") for other in ("cup", "hat", "bus")
]

REWARDS = """
import numpy as np

def red(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]

def rough(images, prompts):
    return np.array([np.asarray(image, float).std() for image in images])
"""

RECIPE = """
[run]
name = "tiny"
out = {out!r}

[model]
path = {model!r}

[prompts]
source = {prompts!r}

[refine]
variants = 2

[generate]
num_steps = 2
guidance_scale = 1.0
shard_size = 8

[score]
rewards = ["{module}:red", "{module}:rough"]

[select]
roles = {{ h = "{module}:red", a = "{module}:rough" }}
filter = "I_h"
weights = {{ h = 0.5, a = 0.5 }}
k = 6

[train]
steps = 3
batch_size = 4
save_every = 1

[evaluate]
num_prompts = 4
resamples = 100
"""


@dataclass(frozen=True)
class Tiny:
    """The files of a tiny run."""

    folder: Path
    recipe: Path
    prompts: Path
    rewards: Path

    @property
    def module(self) -> str:
        """Of the rewards."""
        return self.rewards.stem

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / "tiny"

    def stage(self, name: str) -> Path:
        """A stage's folder."""
        return stage_folder(self.run, name)


def tiny(folder: Path, module: str = "") -> Tiny:
    """Write recipe, prompts and rewards; the rewards' module has a name of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    module = module or f"rewards_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    made = Tiny(folder, folder / "tiny.toml", folder / "prompts.txt", folder / f"{module}.py")
    made.prompts.write_text("\n".join(PROMPTS) + "\n")
    made.rewards.write_text(REWARDS)
    made.recipe.write_text(
        RECIPE.format(
            out=str(folder / "runs"),
            model=str(kept_checkpoint()),
            prompts=str(made.prompts),
            module=module,
        )
    )
    return made


@dataclass(frozen=True)
class Answer:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that says what is wrong; fails where there is not exactly one."""
        assert self.status == 2, self
        assert "Traceback" not in self.err, self.err
        lines = self.err.splitlines()
        (line,) = [line for line in lines if line.startswith("craftune: ")]
        assert lines[-1] == line, self.err
        return line


def call(arguments: Sequence[object], where: Path) -> Answer:
    """The command line, called in this process as if in folder `where`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _new_process(where):
        status = main([str(argument) for argument in arguments])
    return Answer(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _new_process(where: Path) -> Iterator[None]:
    """What a process of its own would have: modules of the user's read anew from its folder."""
    path, modules, bytecode = sys.path[:], set(sys.modules), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # two versions of a module within a second share its mark
    with contextlib.chdir(where):
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path[:], sys.dont_write_bytecode = path, bytecode
            for name in set(sys.modules) - modules:
                file = getattr(sys.modules[name], "__file__", None) or ""
                if file.startswith(str(where)):
                    del sys.modules[name]
            craftune.rewards.unload()


def files(folder: Path) -> dict[str, str]:
    """sha256 of every file under a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def results(run: Path) -> dict[str, str]:
    """sha256 of what a run is for: the weights and report.json."""
    found = files(run)
    return {
        name: digest
        for name, digest in found.items()
        if (name.startswith("6-train/model") and name.endswith(".safetensors"))
        or name == "8-report/report.json"
    }


__all__ = ["PROMPTS", "STAGES", "Answer", "Tiny", "call", "files", "results", "tiny"]
