"""Pages as boxes with classes: synthetic documents, and how well a layout is set.

Axes: p pages; n boxes of a page, absent ones included; 4 = (center x, center y, width, height) in
shares of the page, (0, 0) the upper left corner.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

CLASSES = ("title", "text", "list", "figure", "table")
SLOTS = 8
"""Boxes of the fullest page."""
COUNTS = (3, 4, 5, 6, 7, 8)
MARGIN, GAP = 0.08, 0.03
ALIGNMENT_WEIGHT = 10.0
"""A box that is 0.01 of the page out of line costs as much as 0.1 of its area overlapping."""

_HEIGHTS = {
    "title": (0.04, 0.06),
    "text": (0.1, 0.2),
    "list": (0.1, 0.16),
    "figure": (0.14, 0.24),
    "table": (0.12, 0.2),
}
_ODDS = {"text": 0.45, "list": 0.15, "figure": 0.22, "table": 0.18}


@dataclass(frozen=True)
class Pages:
    """Layouts. Where `there` is false a slot is empty, and its class and box mean nothing."""

    boxes: Float[Tensor, "p n 4"]
    classes: Int[Tensor, "p n"]
    there: Bool[Tensor, "p n"]

    def __len__(self) -> int:
        return len(self.boxes)


def draw_pages(count: int, rng: random.Random) -> tuple[Pages, Int[Tensor, " p"]]:
    """Documents of one or two columns under a title, set without a fault; and boxes per page."""
    pages, counts = [], []
    while len(pages) < count:
        wanted = rng.choice(COUNTS)
        found = _draw(wanted, rng)
        if found is not None:
            pages.append(found)
            counts.append(wanted)
    boxes, classes = torch.zeros(count, SLOTS, 4), torch.zeros(count, SLOTS, dtype=torch.long)
    there = torch.zeros(count, SLOTS, dtype=torch.bool)
    for i, page in enumerate(pages):
        for j, (name, box) in enumerate(page):
            boxes[i, j], classes[i, j] = torch.tensor(box), CLASSES.index(name)
            there[i, j] = True
    return Pages(boxes, classes, there), torch.tensor(counts)


def _draw(count: int, rng: random.Random) -> list[tuple[str, list[float]]] | None:
    """One page; None where it does not fit."""
    columns = 1 if count <= 3 or (count <= 5 and rng.random() < 0.5) else 2
    width = (1 - 2 * MARGIN - GAP * (columns - 1)) / columns
    height = rng.uniform(*_HEIGHTS["title"])
    page = [("title", [0.5, MARGIN + height / 2, 1 - 2 * MARGIN, height])]
    top = MARGIN + height + GAP
    first = (count - 1 + columns - 1) // columns
    for column, many in enumerate((first, count - 1 - first)[:columns]):
        y = top
        for _ in range(many):
            name = rng.choices(list(_ODDS), list(_ODDS.values()))[0]
            height = rng.uniform(*_HEIGHTS[name])
            page.append((name, [MARGIN + column * (width + GAP) + width / 2, y + height / 2]))
            page[-1][1].extend([width, height])
            y += height + GAP
        if y - GAP > 1 - MARGIN:
            return None
    return page


def encode(pages: Pages) -> Float[Tensor, "p n 10"]:
    """Numbers of about unit size: the box about the page's middle, the class in one-hot form.

    The last class is "empty"; an empty slot's box is a point in the middle.
    """
    kinds = torch.where(pages.there, pages.classes, len(CLASSES))
    hot = F.one_hot(kinds, len(CLASSES) + 1) * 2.0 - 1
    boxes = torch.where(pages.there[..., None], (pages.boxes - 0.5) * 4, 0.0)
    return torch.cat([boxes, hot], -1)


def decode(rows: Float[Tensor, "p n 10"]) -> Pages:
    """The nearest page: the likeliest class, sides of at least 0.01."""
    kinds = rows[..., 4:].argmax(-1)
    there = kinds < len(CLASSES)
    boxes = rows[..., :4] / 4 + 0.5
    boxes = torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=0.01)], -1)
    return Pages(boxes, kinds.clamp(max=len(CLASSES) - 1), there)


def overlap(pages: Pages) -> Float[Tensor, " p"]:
    """Mean over boxes of the share of a box that others cover; twice covered counts twice.

    As in LayoutGAN (Li et al. 2019, arXiv:1901.06767). A page without boxes has none.
    """
    low, high = _corners(pages)
    shared = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(
        low[:, :, None], low[:, None]
    )
    area = shared.clamp(min=0).prod(-1)
    both = pages.there[:, :, None] & pages.there[:, None] & ~torch.eye(SLOTS, dtype=torch.bool)
    own = pages.boxes[..., 2:].prod(-1).clamp(min=1e-9)
    return _mean((area * both).sum(-1) / own, pages.there)


def misalignment(pages: Pages) -> Float[Tensor, " p"]:
    """Mean over boxes of the distance to the nearest line that another box has.

    Lines are the left, right and middle, top, bottom and centre of a box (Li et al. 2020,
    arXiv:2009.05284, without its logarithm), in shares of the page. A lone box is aligned.
    """
    low, high = _corners(pages)
    lines = torch.stack([low, (low + high) / 2, high], -1)
    distance = (lines[:, :, None] - lines[:, None]).abs().flatten(3).amin(-1)
    both = pages.there[:, :, None] & pages.there[:, None] & ~torch.eye(SLOTS, dtype=torch.bool)
    nearest = torch.where(both, distance, torch.inf).amin(-1)
    return _mean(torch.where(nearest.isfinite(), nearest, 0.0), pages.there)


def outside(pages: Pages) -> Float[Tensor, " p"]:
    """Mean over boxes of how far they reach over the page's edge."""
    low, high = _corners(pages)
    return _mean(((-low).clamp(min=0) + (high - 1).clamp(min=0)).sum(-1), pages.there)


def coverage(pages: Pages) -> Float[Tensor, " p"]:
    """Area of all boxes in shares of the page: a reward is easily earned by tiny boxes."""
    return (pages.boxes[..., 2:].prod(-1) * pages.there).sum(-1)


def reward(pages: Pages) -> Float[Tensor, " p"]:
    """-(overlap + 10 misalignment + 10 outside); 0 is a page set without a fault."""
    return -(overlap(pages) + ALIGNMENT_WEIGHT * (misalignment(pages) + outside(pages)))


def _corners(pages: Pages) -> tuple[Float[Tensor, "p n 2"], Float[Tensor, "p n 2"]]:
    center, size = pages.boxes[..., :2], pages.boxes[..., 2:]
    return center - size / 2, center + size / 2


def _mean(values: Float[Tensor, "p n"], there: Bool[Tensor, "p n"]) -> Float[Tensor, " p"]:
    return (values * there).sum(-1) / there.sum(-1).clamp(min=1)
