"""The grammar, the splits, the refiner."""

import random
from collections import Counter

import numpy as np
import pytest

from craftune.shapes import captions, prompts, refiner, world


@pytest.fixture(scope="module")
def specs() -> list[world.Spec]:
    return world.all_specs()


def test_specs_are_canonical_and_of_seven_categories(specs: list[world.Spec]) -> None:
    assert len(set(specs)) == len(specs)
    assert {spec.category for spec in specs} == set(world.CATEGORIES)


def test_parse_inverts_every_short_caption(specs: list[world.Spec]) -> None:
    for spec in specs[::3] + specs[:40]:
        for text in captions.short_captions(spec):
            assert captions.parse(text) == spec, text


def test_short_captions_have_one_meaning(specs: list[world.Spec]) -> None:
    texts = [text for spec in specs for text in captions.short_captions(spec)]
    assert len(set(texts)) == len(texts)


def test_random_short_captions_are_listed(specs: list[world.Spec]) -> None:
    rng = random.Random(0)
    for spec in specs[::7]:
        assert captions.short_caption(spec, rng) in captions.short_captions(spec)


@pytest.mark.parametrize(
    "text",
    ["", "a dog", "a red", "a red circle and a blue circle", "five circles", "a red circle and a"],
)
def test_parse_names_what_it_cannot_read(text: str) -> None:
    with pytest.raises(ValueError, match="not a prompt"):
        captions.parse(text)


def test_confusions_and_corruptions_mean_something_else(specs: list[world.Spec]) -> None:
    rng, known = random.Random(0), set(specs)
    for spec in specs:
        for change in (captions.confuse, captions.corrupt):
            wrong = change(spec, rng)
            assert wrong != spec
            assert wrong in known, (spec, wrong)


def test_scenes_show_their_spec_without_overlap(specs: list[world.Spec]) -> None:
    rng = random.Random(0)
    for spec in specs[::11]:
        placed = world.random_scene(spec, world.Style(), rng).placed
        wanted = Counter(thing.shape for thing in spec.required())
        assert Counter(thing.shape for thing in placed) == wanted
        for thing in placed:
            assert thing.radius <= thing.x <= world.SIZE - thing.radius


def test_render_is_seeded() -> None:
    scene = world.random_scene(world.all_specs()[0], world.Style(blurry=True), random.Random(3))
    first, second = (world.render(scene, np.random.default_rng(1)) for _ in range(2))
    assert first.shape == (64, 64, 3)
    assert (first == second).all()


def test_shipped_prompts_are_the_generated_ones() -> None:
    for split, rows in prompts.split_prompts().items():
        assert prompts.read(split) == rows


def test_splits_share_no_text_and_no_spec() -> None:
    splits = {split: prompts.read(split) for split in prompts.SIZES}
    texts = [text for rows in splits.values() for text, _ in rows]
    assert len(set(texts)) == len(texts)
    by_phrasing = ("single", "two")
    meanings = [
        {captions.parse(text) for text, category in rows if category not in by_phrasing}
        for rows in splits.values()
    ]
    assert not meanings[0] & meanings[1]
    assert not meanings[0] & meanings[2]
    assert not meanings[1] & meanings[2]


def test_splits_are_large_and_balanced() -> None:
    assert len(prompts.read("train")) >= 1200
    assert len(prompts.read("validation")) >= 200
    counts = Counter(category for _, category in prompts.read("test"))
    assert sum(counts.values()) >= 350
    assert set(counts) == set(world.CATEGORIES)
    assert len(set(counts.values())) == 1


def test_refine_writes_distinct_rewrites_and_is_seeded() -> None:
    for text, _ in prompts.read("validation")[::5]:
        first, second = (refiner.refine(text, 4, random.Random(7)) for _ in range(2))
        assert first == second
        assert len(set(first)) == 4
        assert text not in first


def test_refine_drifts_at_its_rate() -> None:
    rng = random.Random(0)
    spec = captions.parse("a red circle left of a blue square")
    kept = {
        captions.long_caption(spec, world.Style(background=background), random.Random(seed))
        for background in world.BACKGROUNDS
        for seed in range(1000)
    }
    rewrites = [
        text
        for _ in range(1500)
        for text in refiner.refine("a red circle left of a blue square", 1, rng)
    ]
    drift = np.mean([text not in kept for text in rewrites])
    assert drift == pytest.approx(refiner.DRIFT_RATE, abs=0.025)


def test_refine_refuses_other_worlds_and_too_many() -> None:
    with pytest.raises(ValueError, match="a dog"):
        refiner.refine("a dog", 2, random.Random(0))
    with pytest.raises(ValueError, match="rewrites"):
        refiner.refine("a circle", 10_000, random.Random(0))
