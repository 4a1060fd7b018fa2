"""Images and prompts -> scores of several rewards, batch by batch.

Each image is decoded once, and resized once for all rewards that see it alike. Threads do so for
the next batch while the networks look at the present one.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from craftune.errors import UserError
from craftune.images import decode
from craftune.types import Inputs, Reward

Tag = TypeVar("Tag")

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that decode and resize; more than the networks can use up."""


@dataclass(frozen=True)
class Item:
    """One image to score, not opened yet.

    Attributes:
        name: of the image, for messages and tables.
        prompt: None where there is none.
        data: a file, its bytes, or the picture itself; None where there is nothing to open.
    """

    name: str
    prompt: str | None
    data: Path | bytes | Image.Image | None


@dataclass(frozen=True)
class Rejection:
    """An image without scores, and why."""

    image: str
    reason: str


@dataclass(frozen=True)
class Scored:
    """A batch's outcome: the items with a score from every reward, and the others.

    Attributes:
        values: reward name -> float32, one per item.
    """

    items: list[Item]
    values: dict[str, Tensor]
    rejected: list[Rejection]


@dataclass(frozen=True)
class _Ready:
    """An opened image: the picture, where a reward needs it, and what the networks see of it."""

    item: Item
    size: tuple[int, int]
    picture: Image.Image | None
    inputs: dict[Any, Tensor]


@dataclass(frozen=True)
class Batch(Generic[Tag]):
    """Items that are scored together; the tag comes back with their scores."""

    tag: Tag
    items: Sequence[Item]


def score_batches(
    loaded: Sequence[Reward], batches: Iterable[Batch[Tag]], *, reject: bool
) -> Iterator[tuple[Tag, Scored]]:
    """Score batch after batch, in order, one batch ahead of the networks.

    Args:
        reject: whether an image that cannot be opened or scored is put aside, with the reason, so
            that the others go on; False makes it an error.

    Raises:
        UserError: such an image; or a batch of which a reward scored no image at all.
    """
    # Workers that kept torch's own threads would crowd the networks' out: with more threads than
    # cores OpenMP's no longer wait awake, and each pass takes a fifth longer.
    torch_threads = torch.get_num_threads()
    with ThreadPoolExecutor(WORKERS, "decode", torch.set_num_threads, (1,)) as threads:
        waiting: list[tuple[Batch[Tag], list[Future[_Ready | Rejection]]]] = []
        try:
            for batch in batches:
                waiting.append((batch, _opening(threads, loaded, batch.items)))
                if len(waiting) > 1:
                    yield _finish(loaded, *waiting.pop(0), reject=reject)
            while waiting:
                yield _finish(loaded, *waiting.pop(0), reject=reject)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(torch_threads)  # else threads that begin later have one, too


def _opening(
    threads: ThreadPoolExecutor, loaded: Sequence[Reward], items: Sequence[Item]
) -> list[Future[_Ready | Rejection]]:
    inputs = [r.inputs for r in loaded if r.inputs and r.score_inputs]
    keep = any(r.inputs is None or r.score_inputs is None for r in loaded)
    needing = [reward.name for reward in loaded if reward.uses_prompt]
    return [threads.submit(_open, item, inputs, keep, needing) for item in items]


def _open(
    item: Item, inputs: Sequence[Inputs], keep: bool, needing: Sequence[str]
) -> _Ready | Rejection:
    if needing and item.prompt is None:
        return Rejection(item.name, f"no prompt, which {' and '.join(needing)} need")
    try:
        picture = _picture(item.data)
        made: dict[Any, Tensor] = {}
        for kind in inputs:
            plan = kind.plan(picture.size)
            if plan not in made:
                made[plan] = plan(picture)
    except Exception as error:  # whatever lies in a file from outside
        return Rejection(item.name, f"no readable image: {_described(error)}")
    return _Ready(item, picture.size, picture if keep else None, made)


def _picture(data: Path | bytes | Image.Image | None) -> Image.Image:
    if data is None:
        raise ValueError("empty")
    if isinstance(data, Image.Image):
        return data
    return decode(data if isinstance(data, bytes) else data.read_bytes())


def _described(error: Exception) -> str:
    """One line; without the address of the buffer that Pillow would name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.UnidentifiedImageError):
        return "of no known format, or damaged"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _finish(
    loaded: Sequence[Reward],
    batch: Batch[Tag],
    opening: Sequence[Future[_Ready | Rejection]],
    *,
    reject: bool,
) -> tuple[Tag, Scored]:
    opened = [future.result() for future in opening]
    ready = [one for one in opened if isinstance(one, _Ready)]
    rejected = [one for one in opened if isinstance(one, Rejection)]
    if rejected and not reject:
        raise UserError(f"image {rejected[0].image}: {rejected[0].reason}")
    if not ready:
        return batch.tag, Scored([], {r.name: torch.zeros(0) for r in loaded}, rejected)
    try:
        values = _scores(loaded, ready)
    except UserError as error:
        if not reject:
            raise
        ready, values, more = _one_by_one(loaded, ready, error)
        rejected += more
    return batch.tag, Scored([one.item for one in ready], values, rejected)


def _one_by_one(
    loaded: Sequence[Reward], ready: Sequence[_Ready], first: UserError
) -> tuple[list[_Ready], dict[str, Tensor], list[Rejection]]:
    """Find the images that a batch failed for; where it is all of them, the reward is at fault."""
    good: list[_Ready] = []
    values: list[dict[str, Tensor]] = []
    rejected = []
    for one in ready:
        try:
            values.append(_scores(loaded, [one]))
        except UserError as error:
            rejected.append(Rejection(one.item.name, str(error)))
        else:
            good.append(one)
    if not good:
        raise first
    return good, {r.name: torch.cat([v[r.name] for v in values]) for r in loaded}, rejected


def _scores(loaded: Sequence[Reward], ready: Sequence[_Ready]) -> dict[str, Tensor]:
    names = [one.item.name for one in ready]
    prompts = [one.item.prompt or "" for one in ready]
    return {
        reward.name: checked(reward, lambda r=reward: _score(r, ready, prompts), names, prompts)
        for reward in loaded
    }


def _score(reward: Reward, ready: Sequence[_Ready], prompts: list[str]) -> Tensor:
    """By the inputs that rewards share, where this one has such."""
    if reward.inputs is None or reward.score_inputs is None:
        return reward.score([one.picture for one in ready if one.picture], prompts)
    seen = [one.inputs[reward.inputs.plan(one.size)] for one in ready]
    return reward.score_inputs(torch.stack(seen), prompts)


@torch.no_grad()
def checked(
    reward: Reward, score: Callable[[], Tensor], names: Sequence[str], prompts: Sequence[str]
) -> Tensor:
    """A reward's scores, `[b]`, as `score` gives them.

    Raises:
        UserError: a prompt that the reward cannot judge, or not one finite number per image; names
            the reward and the image.
    """
    try:
        values = score()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"reward {reward.name!r} cannot score: {error}") from None
    if values.shape != (len(names),):
        raise UserError(
            f"reward {reward.name!r} returned shape {tuple(values.shape)} for {len(names)} "
            "images; it must return one number per image"
        )
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"reward {reward.name!r} returned {values[bad[0]].item()} for image {names[bad[0]]} "
            f"(prompt {prompts[bad[0]]!r}); mend the reward or leave it out, and run again"
        )
    return values.float()
