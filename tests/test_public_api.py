"""The public names, and a command line that answers at once."""

import importlib
import resource
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType

import craftune

HEAVY = ["torch", "diffusers", "transformers", "accelerate", "peft", "scipy", "pyarrow", "pandas"]


def test_all_is_sorted_unique_and_importable() -> None:
    assert craftune.__all__
    assert len(set(craftune.__all__)) == len(craftune.__all__)
    assert [name for name in craftune.__all__ if not hasattr(craftune, name)] == []


def test_nothing_public_is_missing_from_all() -> None:
    public = {
        name
        for name, value in vars(craftune).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public - set(craftune.__all__) == set()


def test_version_is_the_installed_one() -> None:
    assert craftune.__version__ == version("craftune")


def test_the_console_script_is_the_command_line() -> None:
    (script,) = entry_points(group="console_scripts", name="craftune")
    assert script.load() is importlib.import_module("craftune.cli").main


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, craftune.cli; print(*[m for m in {HEAVY} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.split() == [], answer.stderr


def test_help_answers_at_once() -> None:
    """Processor time of the fastest of three, so that a busy machine does not fail it."""
    command = [Path(sys.executable).with_name("craftune"), "--help"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert answer.returncode == 0, answer.stderr
        assert "run" in answer.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
