"""Processes of the command line that start at once: forked from one that has imported everything.

They are processes like any other: they get real signals, and what dies with them is gone. Run as
a program this file is the process that they are forked from.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Ended:
    """How a process ended; a negative status is the signal that killed it."""

    status: int
    err: str


@dataclass(frozen=True)
class Forks:
    """The process to fork from."""

    pipe_in: IO[str]
    pipe_out: IO[str]

    def run(
        self,
        arguments: list[str],
        where: Path,
        during: Callable[[int], None] = lambda pid: None,
        kill_at: tuple[str, int] | None = None,
    ) -> Ended:
        """Run `craftune` with these arguments in folder `where`.

        Args:
            during: is called with the process's number once it runs.
            kill_at: (folder, n): SIGKILL right before the n-th change of a file in that folder.
        """
        return self.together(1, arguments, where, lambda pids: during(pids[0]), kill_at)[0]

    def together(
        self,
        count: int,
        arguments: list[str],
        where: Path,
        during: Callable[[list[int]], None] = lambda pids: None,
        kill_at: tuple[str, int] | None = None,
    ) -> list[Ended]:
        """Run `count` processes as a launcher would: when one fails, the others get SIGTERM."""
        job = {
            "ranks": count,
            "port": free_port(),
            "arguments": arguments,
            "where": str(where),
            "kill_at": kill_at,
        }
        self.pipe_in.write(json.dumps(job) + "\n")
        self.pipe_in.flush()
        during([int(pid) for pid in self.pipe_out.readline().split()])
        statuses = [int(status) for status in self.pipe_out.readline().split()]
        return [
            Ended(status, (where / f"stderr-{rank}").read_text())
            for rank, status in enumerate(statuses)
        ]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def this_package() -> dict[str, str]:
    """The environment in which a new process imports the very package that is tested here."""
    import craftune

    assert craftune.__file__
    return {**os.environ, "PYTHONPATH": str(Path(craftune.__file__).parents[1])}


@contextmanager
def forks() -> Iterator[Forks]:
    """Start, and in the end stop, the process to fork from."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=this_package(),
    )
    assert process.stdin
    assert process.stdout
    with process:
        yield Forks(process.stdin, process.stdout)
        process.stdin.close()


def _serve() -> None:
    import diffusers
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers

    import craftune.commands
    import craftune.models.sd  # noqa: F401

    assert diffusers.StableDiffusionPipeline
    assert transformers.CLIPTextModel
    assert transformers.CLIPTokenizer
    for line in sys.stdin:
        job = json.loads(line)
        ranks, port = job.pop("ranks"), job.pop("port")
        pids = []
        for rank in range(ranks):
            pids.append(os.fork())
            if pids[-1] == 0:
                if ranks > 1:
                    _launched(rank, ranks, port)
                _child(rank, **job)
        print(*pids, flush=True)
        print(*_statuses(pids), flush=True)


def _statuses(pids: list[int]) -> list[int]:
    """How each process ended; one that fails takes the others with it."""
    found: dict[int, int] = {}
    while len(found) < len(pids):
        pid, status = os.wait()
        found[pid] = os.waitstatus_to_exitcode(status)
        if found[pid] and len(set(found.values())) == 1:
            for other in set(pids) - set(found):
                os.kill(other, signal.SIGTERM)
    return [found[pid] for pid in pids]


def _launched(rank: int, count: int, port: int) -> None:
    """The environment that a launcher gives to a process."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    os.environ.update({key: str(value) for key, value in found.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _child(rank: int, arguments: list[str], where: str, kill_at: tuple[str, int] | None) -> None:
    from craftune.cli import main

    os.chdir(where)
    for descriptor, name in ((1, f"stdout-{rank}"), (2, f"stderr-{rank}")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if kill_at:
        sys.addaudithook(_killer(*kill_at))
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def _killer(folder: str, n: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Kills its own process right before the n-th change under the folder."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not str(arguments[0]).startswith(folder):
            return
        reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        seen += not reading
        if seen == n and not reading:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


if __name__ == "__main__":
    _serve()
