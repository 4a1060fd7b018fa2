"""`craftune doctor`: is this machine ready? Each finding says what would mend it."""

import importlib.metadata
import os
import shutil
import sys
import tempfile
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

LIBRARIES = ("accelerate", "diffusers", "peft", "safetensors", "transformers")
OPTIONAL = {
    "bitsandbytes": "8-bit AdamW, for GPUs of 24 GB",
    "datasets": "prompts from a data set of the hub",
    "openai": "rewriting prompts by an OpenAI-compatible endpoint",
}
"""Library -> what it is for."""
GPU_GIB = 16
"""Free memory under which SD1.5 does not train in full."""
DISK_GB = 20
"""Free space under which an SD1.5 run may not end."""
HUB_SECONDS = 3.0
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was seen, and what would mend it.

    Attributes:
        state: "ok"; "note", where something will be missing; "wrong", where nothing will run.
    """

    state: Literal["ok", "note", "wrong"]
    what: str
    seen: str
    mend: str = ""


def examine(out: Path) -> list[Finding]:
    """Look at everything; takes a few seconds where the hub does not answer.

    Args:
        out: the folder that will hold run folders; it need not exist.
    """
    return [
        _python(),
        *map(_library, LIBRARIES),
        *_gpu(),
        _disk("runs", out),
        _disk("HF_HOME", hub_cache()),
        _hub(),
        *(_optional(name, use) for name, use in OPTIONAL.items()),
    ]


def page(findings: list[Finding]) -> str:
    """The findings for a terminal, and a last line that says how it stands."""
    columns = min(shutil.get_terminal_size().columns, 100)
    lines = []
    for finding in findings:
        first = f"{finding.state:<6}{finding.what:<14}"
        lines += _wrapped(finding.seen, first, columns)
        if finding.mend:
            lines += _wrapped(finding.mend, f"{'':18}> ", columns)
    wrong = sum(finding.state == "wrong" for finding in findings)
    notes = sum(finding.state == "note" for finding in findings)
    verdict = f"{wrong} to mend first" if wrong else "ready"
    return "\n".join([*lines, "", f"{verdict}, {notes} note{'s' * (notes != 1)}"])


def _wrapped(text: str, first: str, columns: int) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=first,
        subsequent_indent=" " * 20,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _python() -> Finding:
    return Finding("ok", "python", ".".join(map(str, sys.version_info[:3])))


def _library(name: str) -> Finding:
    try:
        return Finding("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding("wrong", name, "not installed", f"pip install {name}")


def _optional(name: str, use: str) -> Finding:
    found = _library(name)
    if found.state == "ok":
        return found
    return Finding("note", name, f"not installed; only for {use}", f"pip install {name}")


def _gpu() -> Iterator[Finding]:
    """PyTorch, and each GPU that it sees."""
    yield Finding("ok", "torch", torch.__version__)
    if not torch.cuda.is_available():
        yield _no_gpu(shutil.which("nvidia-smi") is not None, torch.version.cuda)
        return
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
            name = torch.cuda.get_device_name()
            yield gpu(number, name, free, total, torch.cuda.is_bf16_supported())


def _no_gpu(driver: bool, cuda: str | None) -> Finding:
    """PyTorch sees none; is that the machine's or PyTorch's doing?"""
    if driver and cuda is None:
        mend = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
        return Finding("wrong", "GPU", "there is a driver, but this PyTorch is for the CPU", mend)
    if driver:
        mend = (
            f"compare the driver (nvidia-smi) with this PyTorch's CUDA {cuda}; "
            f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"
        )
        return Finding("wrong", "GPU", "there is a driver, but PyTorch cannot use it", mend)
    return Finding(
        "note", "GPU", "none; the embedded model needs none", "published models need one"
    )


def gpu(number: int, name: str, free: int | float, total: int | float, bfloat16: bool) -> Finding:
    """One GPU, memory in GiB."""
    what, seen = f"GPU {number}", f"{name}, {free:.0f} of {total:.0f} GiB free"
    if not bfloat16:
        mend = 'it has no bfloat16: set model.dtype = "float16" and train.precision = "float32"'
        return Finding("note", what, f"{seen}, no bfloat16", mend)
    if free < GPU_GIB:
        mend = (
            "end what else runs there (nvidia-smi), or train adapters: train.lora.rank = 32 with "
            "train.gradient_checkpointing = true"
        )
        return Finding("note", what, f"{seen}, bfloat16", mend)
    return Finding("ok", what, f"{seen}, bfloat16")


def _disk(what: str, folder: Path) -> Finding:
    """Whether a folder can be written, and the space on its disk."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        mend = "choose another folder: " + ("HF_HOME" if what == "HF_HOME" else "run.out")
        return Finding("wrong", what, f"{there}: cannot be written ({error.strerror})", mend)
    free = shutil.disk_usage(there).free / GB
    seen = f"{folder}, {free:.0f} GB free"
    if free < DISK_GB:
        mend = "`craftune plan` says what a recipe needs; free some, or set " + (
            "HF_HOME to another disk" if what == "HF_HOME" else "run.out to another disk"
        )
        return Finding("note", what, seen, mend)
    return Finding("ok", what, seen)


def hub_cache() -> Path:
    """Where downloads are kept, as huggingface_hub has it."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)


def _hub() -> Finding:
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    if is_offline_mode():
        return Finding(
            "note",
            "hub",
            "switched off by HF_HUB_OFFLINE; only what is in HF_HOME already can be loaded",
            "unset HF_HUB_OFFLINE to download",
        )
    return hub(ENDPOINT, HUB_SECONDS)


def hub(endpoint: str, seconds: int | float) -> Finding:
    """Whether the hub answers in time; looking up its name counts, too."""
    answers: list[str] = []

    def ask() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                answers.append("")
        except urllib.error.HTTPError:
            answers.append("")  # it answers, if only to refuse
        except (OSError, ValueError) as error:
            answers.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if answers == [""]:
        return Finding("ok", "hub", f"{endpoint} answers")
    why = answers[0] if answers else f"no answer in {seconds:g} s"
    mend = (
        "give local folders and files, or set HTTPS_PROXY, or HF_ENDPOINT to a mirror; what is in "
        "HF_HOME already works with HF_HUB_OFFLINE=1"
    )
    return Finding("note", "hub", f"{endpoint}: {why}", mend)
