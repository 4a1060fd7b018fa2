"""Progress: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def track(
    items: Iterable[Item], label: str, total: int, unit: str, step: int = 1
) -> Iterator[Item]:
    """Pass the items on and show rate and time left, on standard error.

    Args:
        label: what is being done.
        total: how many units there are in all.
        unit: of the rate, e.g. "image".
        step: units that each item counts for (the last may count for less).
    """
    if sys.stderr.isatty():
        with tqdm(
            total=total, desc=f"  {label}", unit=unit, leave=False, dynamic_ncols=True
        ) as bar:
            for item in items:
                yield item
                bar.update(min(step, total - bar.n))
        return
    started = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done = min(total, done + step)
        now = time.monotonic()
        if now - last >= 10 and done < total:
            rate = done / (now - started)
            left = (total - done) / rate
            print(
                f"  {label}: {done}/{total} {unit}s, {rate:.3g}/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            last = now
