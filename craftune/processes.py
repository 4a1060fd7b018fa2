"""The processes of one launch: who draws which piece of work, who waits for whom, what is summed.

`accelerate launch` and `torchrun` start one process per GPU and hold a key-value store that all of
them reach. The queue of work is a counter in that store: whoever is free draws the next item, so a
fast GPU draws more, and nothing on disk has to be taken back from a process that died. Waiting is
asking for a key: it has no time limit and holds no CPU. Only gradients need more, a process group,
which is made when training first sums.

All processes must make the same calls in the same order: the n-th call of one meets the n-th call
of the others.
"""

import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from craftune.errors import EndedElsewhere, UserError

Item = TypeVar("Item")

LATE = 120.0
"""Seconds until a file of another machine must show here; NFS may hold back a name for 60."""
BUCKET = 2**26
"""Numbers that are summed at once: 256 MB of float32, so that the copy costs little memory."""
STEP_TIMEOUT = timedelta(hours=2)
"""How long a sum waits for the others: the main process may be writing a checkpoint."""
FAILED = "failed"


@dataclass(frozen=True)
class Processes:
    """This process among those of its launch; as made by default, the only one.

    Attributes:
        rank: from 0; 0 is the main process, which writes marks, metrics, models and output.
        count: of all processes, on all machines.
        local_rank: from 0 on each machine: the number of this process's GPU.
        store: torch.distributed.Store; None for one process.
        calls: numbers the calls, the same in all processes.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: Any = None
    calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def told(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the main process, in all of them; it must be plain JSON."""
        if self.count == 1:
            return make()
        key = self._key("told")
        if self.main:
            self.store.set(key, json.dumps(make()))
        self._wait(key)
        return json.loads(self.store.get(key))

    def follow(self) -> None:
        """Wait until the main process has come here."""
        self.told(bool)

    def share(self, items: Sequence[Item]) -> Iterator[Item]:
        """Draw from one queue: each item goes to one process, to the first that is free.

        Args:
            items: the same in all processes, see `told`.
        """
        if self.count == 1:
            yield from items
            return
        queue = self._key("queue")
        while (place := self.store.add(queue, 1) - 1) < len(items):
            self._end_with_others()
            yield items[place]

    def settle(self, files: Iterable[Path] = ()) -> None:
        """In the main process: wait until all have come here, and until these files show.

        Raises:
            UserError: another machine wrote a file that does not show here.
        """
        if self.count == 1:
            return
        key = self._key("settled")
        if self.store.add(key, 1) == self.count:
            self.store.set(f"{key}/all", "")
        if self.main:
            self._wait(f"{key}/all")
            for path in files:
                _show(path)

    def require_same(self, folder: Path) -> None:
        """See that all processes mean the same folder.

        Raises:
            UserError: this machine does not see what the main process wrote.
        """
        if self.count == 1:
            return
        # A new name each time: a machine remembers for a while which names were missing.
        name = self.told(lambda: f".launch-{socket.gethostname()}-{time.time_ns()}")
        if self.main:
            (folder / name).touch()
        self.follow()
        _show(folder / name)
        self.settle()
        if self.main:
            (folder / name).unlink()

    def part(self, size: int) -> range:
        """The rows of a batch of this size that are this process's."""
        return range(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which get the same bits.

        Raises:
            UserError: another process ended.
        """
        if self.count > 1:
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                self._all_reduce(flat)
                sums = flat.split([tensor.numel() for tensor in bucket])
                for tensor, total in zip(bucket, sums, strict=True):
                    tensor.copy_(total.view_as(tensor))

    def totals(self, values: dict[str, float]) -> dict[str, float]:
        """Each number's sum over all processes; the names are the same in all."""
        if self.count == 1:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64)
        self._all_reduce(numbers)
        return dict(zip(values, numbers.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.totals({"flag": float(flag)})["flag"] > 0

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Within it only the main process's output is shown."""
        if self.main:
            yield
            return
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield

    def speaks(self, error: BaseException) -> bool:
        """Whether this process says why the launch ends: the first that fails does.

        A signal goes to all processes, so the main one speaks, unless another has failed before.
        """
        stopped = isinstance(error, KeyboardInterrupt)
        if isinstance(error, EndedElsewhere) or (stopped and not self.main):
            return False
        try:
            return self.store.compare_set(FAILED, "", str(self.rank)).decode() == str(self.rank)
        except RuntimeError:  # the store is gone, and with it the launcher
            return self.main

    def _key(self, kind: str) -> str:
        return f"{next(self.calls)}/{kind}"

    def _wait(self, key: str) -> None:
        pause = 0.001
        while not self.store.check([key]):
            self._end_with_others()
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _end_with_others(self) -> None:
        if self.store.check([FAILED]):
            raise EndedElsewhere

    def _all_reduce(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        try:
            if not dist.is_initialized():
                store = dist.PrefixStore("group", self.store)
                dist.init_process_group(
                    store=store, rank=self.rank, world_size=self.count, timeout=STEP_TIMEOUT
                )
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise _lost(error) from error


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this launch; `ALONE` where no launcher started this one.

    Raises:
        EndedElsewhere: another process has said, or will say, why the launch ends.
        UserError: the launcher or another process is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        yield ALONE
        return
    import torch.distributed as dist

    store, rank, count = next(iter(dist.rendezvous("env://")))
    processes = Processes(rank, count, int(os.environ["LOCAL_RANK"]), store)
    try:
        yield processes
        processes.settle()  # the store may live in the main process
    except BaseException as error:
        for number in (signal.SIGTERM, signal.SIGINT):  # of a launcher that sees the first one fail
            signal.signal(number, signal.SIG_IGN)
        if not processes.speaks(error):
            raise EndedElsewhere from error
        if isinstance(error, dist.DistError):
            raise _lost(error) from error
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _lost(error: RuntimeError) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"lost the other processes of this launch ({reason}); finished work is kept, run the same "
        "command again"
    )


def _show(path: Path) -> None:
    """Wait until a file that another machine wrote is there."""
    deadline = time.monotonic() + LATE
    while not path.is_file():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: another process wrote it, but machine {socket.gethostname()} does not "
                "see it; run.out must be a folder that all machines share"
            )
        time.sleep(0.2)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of about `BUCKET` numbers."""
    bucket, held = [], 0
    for tensor in tensors:
        bucket.append(tensor)
        held += tensor.numel()
        if held >= BUCKET:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket
