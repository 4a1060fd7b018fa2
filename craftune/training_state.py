"""Checkpoints of the loop: everything stateful, written whole or not at all.

checkpoint-N/{state.pt, done.json}: written to a partial folder, the mark last, then renamed.
Batches and randomness are functions of the step, so the step's number is their whole state.
"""

import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from craftune.errors import UserError
from craftune.records import read_json, sha256, write_json


@dataclass(frozen=True)
class Trainable:
    """What training changes in a network: adapters alone under LoRA, else everything."""

    network: nn.Module

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The network's, without frozen weights: they come from the checkpoint it started from."""
        frozen = {name for name, p in self.network.named_parameters() if not p.requires_grad}
        return {k: v for k, v in self.network.state_dict().items() if k not in frozen}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put the weights back; every one must be there."""
        assert state.keys() == self.state_dict().keys(), "the checkpoint is of another network"
        self.network.load_state_dict(state, strict=False)


def save(folder: Path, step: int, stateful: Mapping[str, Any]) -> None:
    """Write the state_dict of every stateful object.

    Raises:
        UserError: not enough disk space; nothing was written.
    """
    state = {name: thing.state_dict() for name, thing in stateful.items()}
    _require_space(folder.parent, state)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(state, partial / "state.pt")
    write_json(partial / "done.json", {"step": step, "sha256": sha256(partial / "state.pt")})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def latest(out: Path, stateful: Mapping[str, Any]) -> int:
    """Load the newest complete checkpoint into the objects; returns its step, 0 without one.

    A broken folder is passed over with a line on standard error.
    """
    for step, folder in reversed(_folders(out)):
        try:
            mark = read_json(folder / "done.json")
            if mark["sha256"] != sha256(folder / "state.pt"):
                raise UserError("state.pt is damaged")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, KeyError, UserError, RuntimeError) as error:
            print(f"  {folder} is incomplete ({error}); using an older one", file=sys.stderr)
            continue
        for name, thing in stateful.items():
            thing.load_state_dict(state[name])
        print(f"  going on from {folder.name}", file=sys.stderr)
        return step
    return 0


def prune(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    for _, folder in _folders(out)[: -keep or None] if keep else []:
        shutil.rmtree(folder)


def _write(state: Any, path: Path) -> None:
    """torch.save with the system's own error: torch hides a full disk behind one of its own."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _folders(out: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, oldest first; partial folders have another name."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in out.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _require_space(folder: Path, state: Any) -> None:
    need = sum(t.numel() * t.element_size() for t in _tensors(state))
    free = shutil.disk_usage(folder).free
    if free < 1.1 * need:
        raise UserError(
            f"{folder}: a checkpoint needs {need / 1e9:.2f} GB but {free / 1e9:.2f} GB are free; "
            "free some space and run again, training goes on from the last checkpoint"
        )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, list, tuple)):
        return [tensor for child in children for tensor in _tensors(child)]
    return []
