"""What the stage asks of a refiner, and what a refiner gives back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Ask:
    """A prompt to rewrite; `stream` names the random stream of its rewrites."""

    prompt_id: str
    prompt: str
    stream: str


@dataclass(frozen=True)
class Rejected:
    """A text that is no usable rewrite, and why; `attempt` counts from 1."""

    attempt: int
    text: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """All that was got for one prompt.

    Attributes:
        refined: the rewrites, in order; fewer than asked for where no more could be had.
        requests: calls of a language model; `tokens_in` and `tokens_out` are what they cost.
    """

    prompt_id: str
    refined: tuple[str, ...]
    rejected: tuple[Rejected, ...] = ()
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


Refiner: TypeAlias = Callable[[Sequence[Ask]], Iterator[Answer]]
"""One answer per ask, in any order, each as soon as it is there."""
