"""How a step is cut up to fit in memory: found by a trial, not guessed from a table.

The memory of a forward and backward pass grows by the same amount with every example, so passes
of one and of two examples, with gradients and optimizer state in place, tell how many fit.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn

ENOUGH = 4
"""Examples per pass from which recomputing activations costs more than it brings: it adds 26 % of
arithmetic (counted on SD1.5 and SDXL), while with fewer examples a GPU mostly waits for kernels to
be launched (SDXL adapters, one example, H100: 3 % of its arithmetic)."""

MARGIN = 0.9
"""Share of the free memory that is used: blocks of other sizes leave gaps, libraries take some."""

TEMPORARY = 2.0
"""On the CPU only what is kept for the backward pass is counted; the pass itself needs more."""

CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where a container's limit and use are told: version 2, version 1."""


@dataclass
class Fit:
    """Examples per pass, and whether activations are recomputed; "auto" until it is settled.

    It goes with the checkpoint, so that a resumed run adds up in the same order.
    """

    micro_batch: int | Literal["auto"]
    checkpointing: bool | Literal["auto"]
    movable: bool = field(init=False, compare=False)
    """Whether the micro-batch was left to us: it may then shrink."""

    def __post_init__(self) -> None:
        self.movable = self.micro_batch == "auto"

    def state_dict(self) -> dict[str, Any]:
        """What was settled."""
        return {"micro_batch": self.micro_batch, "checkpointing": self.checkpointing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was, save for what the recipe sets."""
        if self.micro_batch == "auto":
            self.micro_batch = state["micro_batch"]
        if self.checkpointing == "auto":
            self.checkpointing = state["checkpointing"]

    def halve(self) -> bool:
        """After an out-of-memory error: half the examples; False where that cannot be."""
        if not self.movable or self.micro_batch in ("auto", 1):
            return False
        self.micro_batch = self.micro_batch // 2
        print(f"  out of memory: micro-batch {self.micro_batch} from here", file=sys.stderr)
        return True

    def settle(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        attempt: Callable[[int], None],
        batch_size: int,
    ) -> None:
        """Fill in what is "auto" by trials, and switch checkpointing.

        Args:
            network: one that can recompute, as diffusers' can, is tried both ways.
            optimizer: fresh; it is fresh again afterwards, and no weight changes.
            attempt: forward and backward pass of so many examples, adding to the gradients.
        """
        choices = [self.checkpointing is True]
        if self.checkpointing == "auto" and hasattr(network, "enable_gradient_checkpointing"):
            choices = [False, True]
        if self.micro_batch == "auto" or len(choices) > 1:
            self._try(choices, network, optimizer, attempt, batch_size)
        else:
            self.checkpointing = choices[0]
        _switch(network, self.checkpointing is True)

    def _try(
        self,
        choices: list[bool],
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        attempt: Callable[[int], None],
        batch_size: int,
    ) -> None:
        """The first choice under which enough examples fit, else the last one."""
        device = next(network.parameters()).device
        wanted = min(ENOUGH if self.micro_batch == "auto" else self.micro_batch, batch_size)
        size = 0
        with _states_in_place(network, optimizer, attempt, choices[-1]):
            for self.checkpointing in choices:
                _switch(network, self.checkpointing)
                size = largest(attempt, batch_size, device)
                if size >= wanted:
                    break
        if self.micro_batch == "auto":
            # Parts of one size rather than a small rest.
            self.micro_batch = math.ceil(batch_size / math.ceil(batch_size / max(size, 1)))
        print(
            f"  micro-batch {min(self.micro_batch, batch_size)} of {batch_size}, gradient "
            f"checkpointing {'on' if self.checkpointing else 'off'}",
            file=sys.stderr,
        )


def largest(attempt: Callable[[int], None], limit: int, device: torch.device) -> int:
    """How many examples fit in one pass, at most `limit`; 0 where not even one does."""
    peaks: list[float] = []
    for n in range(1, min(limit, 2) + 1):
        try:
            peaks.append(_peak(attempt, n, device))
        except torch.OutOfMemoryError:
            return n - 1
    if limit == 1:
        return 1
    each = max(peaks[1] - peaks[0], 1.0)
    n = min(limit, 1 + max(0, int((_room(device) - peaks[0]) / each)))
    while n > 2 and device.type == "cuda":  # the CPU's out of memory is no exception
        try:
            attempt(n)
            break
        except torch.OutOfMemoryError:
            n //= 2
    return n


@contextlib.contextmanager
def _states_in_place(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    attempt: Callable[[int], None],
    checkpointing: bool,
) -> Iterator[None]:
    """Gradients and optimizer state lie in memory, as they will in every pass but the first."""
    _switch(network, checkpointing)
    attempt(1)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()  # a gradient that is not finite would spoil the weights
    optimizer.step()
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.state.clear()
        optimizer.zero_grad(set_to_none=True)


def _switch(network: Any, on: bool) -> None:
    if on:
        network.enable_gradient_checkpointing()
    elif hasattr(network, "disable_gradient_checkpointing"):
        network.disable_gradient_checkpointing()


def _peak(attempt: Callable[[int], None], n: int, device: torch.device) -> float:
    """Bytes in use at the height of a pass of n examples, of those that `_room` counts."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        attempt(n)
        return torch.cuda.max_memory_allocated(device)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attempt(n)
    return TEMPORARY * sum(kept.values())


def _room(device: torch.device) -> float:
    """Bytes that we may use at the most; on the CPU beyond those in use now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return MARGIN * (free + torch.cuda.memory_reserved(device))
    return MARGIN * available_ram()


def available_ram() -> int:
    """Bytes of main memory that this process may still take, within its container's limit."""
    free = psutil.virtual_memory().available
    for limit, used in CGROUP:
        # No such file: no container, or the other version; "max": no limit.
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(free, 0)
