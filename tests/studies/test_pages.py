"""What a layout's reward counts, worked by hand; and documents without a fault."""

import random

import torch

from craftune.studies.layouts import condition, draw, new_model
from craftune.studies.pages import (
    CLASSES,
    COUNTS,
    SLOTS,
    Pages,
    coverage,
    decode,
    draw_pages,
    encode,
    misalignment,
    outside,
    overlap,
    reward,
)


def page(*boxes: tuple[float, float, float, float]) -> Pages:
    """One page of boxes given as (left, top, right, bottom)."""
    found, there = torch.zeros(1, SLOTS, 4), torch.zeros(1, SLOTS, dtype=torch.bool)
    for i, (left, top, right, bottom) in enumerate(boxes):
        sides = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        found[0, i], there[0, i] = torch.tensor(sides), True
    return Pages(found, torch.zeros(1, SLOTS, dtype=torch.long), there)


def test_overlap_is_the_covered_share_of_each_box() -> None:
    """A quarter of the first lies under the second, which is twice as large: an eighth of it."""
    two = page((0.0, 0.0, 0.4, 0.4), (0.2, 0.2, 0.6, 1.0))
    torch.testing.assert_close(overlap(two), torch.tensor([(0.25 + 0.125) / 2]))
    three = page((0.0, 0.0, 0.4, 0.4), (0.2, 0.2, 0.6, 1.0), (0.7, 0.0, 1.0, 0.1))
    torch.testing.assert_close(overlap(three), torch.tensor([(0.25 + 0.125) / 3]))


def test_boxes_that_touch_do_not_overlap() -> None:
    assert overlap(page((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5))).item() == 0


def test_misalignment_is_the_distance_to_the_nearest_line() -> None:
    """Lefts are 0.02 apart, every other line further; the third shares its left with the first."""
    two = page((0.10, 0.1, 0.50, 0.2), (0.12, 0.5, 0.80, 0.9))
    torch.testing.assert_close(misalignment(two), torch.tensor([0.02]))
    three = page((0.10, 0.1, 0.50, 0.2), (0.12, 0.5, 0.80, 0.95), (0.10, 0.25, 0.97, 0.44))
    torch.testing.assert_close(misalignment(three), torch.tensor([0.02 / 3]))


def test_centres_align_with_centres_and_not_with_edges() -> None:
    """The centre of the second is where the left of the first is: no line of the same kind."""
    two = page((0.50, 0.0, 0.90, 0.1), (0.20, 0.5, 0.80, 0.95))
    torch.testing.assert_close(misalignment(two), torch.tensor([0.1]))


def test_boxes_about_one_axis_are_aligned() -> None:
    """Their left and right edges are 0.15 apart, their centres coincide."""
    two = page((0.20, 0.0, 0.80, 0.1), (0.35, 0.5, 0.65, 0.95))
    torch.testing.assert_close(misalignment(two), torch.tensor([0.0]), atol=1e-6, rtol=0)


def test_the_reward_adds_them_up() -> None:
    """0.05 over the right edge, 0.02 out of line, no overlap."""
    two = page((0.10, 0.1, 0.50, 0.2), (0.12, 0.5, 1.05, 0.9))
    torch.testing.assert_close(outside(two), torch.tensor([0.025]))
    torch.testing.assert_close(reward(two), -torch.tensor([10 * (0.02 + 0.025)]))
    torch.testing.assert_close(coverage(two), torch.tensor([0.04 + 0.93 * 0.4]))


def test_a_lone_box_and_an_empty_page_have_no_fault() -> None:
    assert reward(page((0.1, 0.1, 0.3, 0.3))).item() == 0
    assert reward(page()).item() == 0


def test_drawn_documents_are_set_without_a_fault() -> None:
    pages, counts = draw_pages(200, random.Random(3))
    assert reward(pages).min() > -1e-4
    assert torch.equal(pages.there.sum(1), counts)
    assert set(counts.tolist()) == set(COUNTS)
    assert pages.classes[:, 0].unique().tolist() == [CLASSES.index("title")]
    assert set(pages.classes[pages.there].tolist()) == set(range(len(CLASSES)))


def test_rows_are_pages_and_back() -> None:
    pages, _ = draw_pages(50, random.Random(4))
    back = decode(encode(pages))
    assert torch.equal(back.there, pages.there)
    assert torch.equal(back.classes[back.there], pages.classes[pages.there])
    torch.testing.assert_close(back.boxes[back.there], pages.boxes[pages.there])


def test_a_model_draws_as_many_of_each_count() -> None:
    rows, counts = draw(new_model(0), 12, torch.Generator().manual_seed(0))
    assert rows.shape == (12, SLOTS, 10)
    assert counts.bincount()[list(COUNTS)].tolist() == [2] * len(COUNTS)
    assert condition(counts).tensors["count"].argmax(1).tolist() == (counts - COUNTS[0]).tolist()
