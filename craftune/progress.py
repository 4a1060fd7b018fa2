"""Progress: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

BAR = (
    "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt} of {total_fmt}{unit}, {rate_fmt}, "
    "{remaining} left"
)
EVERY = 10.0
"""Seconds between plain lines."""


def track(
    items: Iterable[Item],
    label: str,
    total: int,
    unit: str,
    step: int | Callable[[Item], int] = 1,
    done: int = 0,
) -> Iterator[Item]:
    """Pass the items on and show rate and time left, on standard error.

    Args:
        label: what is being done.
        total: how many units there are in all.
        unit: of the rate, e.g. "image".
        step: units that an item counts for, or each of them (the last may count for less).
        done: units that an earlier process finished.
    """
    size = step if callable(step) else lambda item: step
    if sys.stderr.isatty():
        with tqdm(
            total=total,
            desc=f"  {label}",
            unit=f" {unit}s",
            initial=done,
            leave=False,
            dynamic_ncols=True,
            bar_format=BAR,
        ) as bar:
            for item in items:
                yield item
                bar.update(min(size(item), total - bar.n))
        return
    if 0 < done < total:
        print(f"  {label}: {done} of {total} {unit}s are there already", file=sys.stderr)
    started = last = time.monotonic()
    here = done
    for item in items:
        yield item
        here = min(total, here + size(item))
        now = time.monotonic()
        if now - last >= EVERY and here < total:
            rate = (here - done) / (now - started)
            print(
                f"  {label}: {here} of {total} {unit}s, {rate:.3g}/s, "
                f"{(total - here) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            last = now
