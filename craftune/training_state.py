"""Checkpoints of the loop: everything stateful, written whole or not at all.

checkpoint-N/{state.pt, done.json}: written to a partial folder, the mark last, then renamed.
Batches, randomness and the learning rate are functions of the step, so the step's number is their
whole state.
"""

import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from craftune.errors import UserError
from craftune.records import read_json, require_space, sha256, write_json


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


@dataclass(frozen=True)
class Average:
    """The running mean of what training changes: these weights alone, not a second network."""

    weights: dict[str, torch.Tensor]
    decay: float

    @staticmethod
    def of(network: nn.Module, decay: float) -> "Average":
        """Starts as the network is."""
        trained = {k: p for k, p in network.named_parameters() if p.requires_grad}
        return Average({k: p.detach().clone() for k, p in trained.items()}, decay)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """mean <- decay * mean + (1 - decay) * weight."""
        now = dict(network.named_parameters())
        for name, mean in self.weights.items():
            mean.lerp_(now[name], 1 - self.decay)

    @torch.no_grad()
    def put_into(self, network: nn.Module) -> None:
        """Overwrite the network's weights with their means."""
        now = dict(network.named_parameters())
        for name, mean in self.weights.items():
            now[name].copy_(mean)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The means by name."""
        return self.weights

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put the means back; every one must be there."""
        assert state.keys() == self.weights.keys(), "the checkpoint is of another network"
        for name, mean in self.weights.items():
            mean.copy_(state[name])


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """SIGTERM (preemption) and SIGINT are only noted here, and take effect in the end.

    Yields the numbers of the signals that came. The second one takes effect at once: who asks
    twice does not want to wait for a checkpoint.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        for again, handler in before.items():
            signal.signal(again, handler)

    # Python lets the main thread alone handle signals.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):  # nohup ignores SIGINT
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
        raise KeyboardInterrupt  # where the handler of before did not: training is not finished


def save(folder: Path, step: int, stateful: Mapping[str, Any]) -> None:
    """Write the state_dict of every stateful object.

    Raises:
        UserError: not enough disk space; nothing was written.
    """
    state = {name: thing.state_dict() for name, thing in stateful.items()}
    size = sum(t.numel() * t.element_size() for t in _tensors(state))
    require_space(folder.parent, size, "a checkpoint")
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


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, list, tuple)):
        return [tensor for child in children for tensor in _tensors(child)]
    return []
