"""What every training stage shares: pacing, checkpoints, logs."""

import ctypes
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pace:
    """How long a stage trains and how fast its learning rate moves."""

    steps: int
    learning_rate: float
    warmup: int = 100
    decay_from: float = 0.8
    """Share of the steps after which the rate falls linearly to 2 % of its peak."""

    def rate(self, step: int) -> float:
        """Learning rate at `step`, counted from 0."""
        decay = (1 - step / self.steps) / (1 - self.decay_from)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, max(0.02, decay))


class Trainer:
    """AdamW with pace, gradient clipping, checkpoints and a jsonl log, for one list of modules.

    The state (modules, optimizer, step, random state) is written every `save_every` seconds and
    at the end, and read back if it exists, so that a stage can be stopped and `steps` may grow.
    """

    def __init__(
        self, modules: dict[str, nn.Module], pace: Pace, folder: Path, *, save_every: float = 120
    ) -> None:
        self.modules, self.pace, self.save_every = modules, pace, save_every
        self.state_path, self.log_path = folder / "state.pt", folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.parameters = [
            p for module in modules.values() for p in module.parameters() if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=pace.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
        )
        self.step, self._saved = 0, time.monotonic()
        self._resume()

    def run(
        self, loss: Callable[[], Tensor], after_step: Callable[[int], None] | None = None
    ) -> None:
        """Minimise `loss`, a closure that draws its own batch, for the steps that remain."""
        for rate in self._rates():
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            value = loss()
            self.optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            if after_step:
                after_step(self.step)
            self._record(float(value.detach()), rate)
        self.save()

    def save(self) -> None:
        """Write the state, atomically."""
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            **{name: module.state_dict() for name, module in self.modules.items()},
        }
        partial = self.state_path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.state_path)
        self._saved = time.monotonic()

    def _rates(self) -> Iterator[float]:
        while self.step < self.pace.steps:
            yield self.pace.rate(self.step)

    def _resume(self) -> None:
        if not self.state_path.exists():
            return
        state: dict[str, Any] = torch.load(self.state_path, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]

    def _record(self, value: float, rate: float) -> None:
        if self.step % 20 == 0:
            row = {"step": self.step, "loss": round(value, 5), "rate": rate, "time": time.time()}
            with self.log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if time.monotonic() - self._saved > self.save_every:
            self.save()


def prepare(threads: int, seed: int) -> None:
    """Set threads and seed, and keep freed memory: page faults cost more than small convolutions.

    The allocator options (M_MMAP_MAX = 0, M_TRIM_THRESHOLD, M_TOP_PAD) exist in glibc only.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
        libc.mallopt(option, value)
