"""The parts of the training that can be checked without training."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from craftune.shapes.captions import CONFUSION_RATE, parse
from craftune.shapes.measure import Draws, gates, sheet
from craftune.shapes.training.base import Captioner, Scenes
from craftune.shapes.training.common import Pace, Trainer
from craftune.shapes.training.curve import draw_curve
from craftune.shapes.training.data import draw_chunk
from craftune.shapes.training.judged import ranking_loss
from craftune.shapes.training.pictures import SEEN, seen_targets, told_targets
from craftune.shapes.world import (
    CATEGORIES,
    Style,
    random_scene,
    random_style,
    specs_by_category,
)


def test_pace_warms_up_stays_and_decays() -> None:
    pace = Pace(1000, 1.0, warmup=100, decay_from=0.8)
    assert pace.rate(0) == pytest.approx(0.01)
    assert pace.rate(99) == pace.rate(500) == pace.rate(800) == 1.0
    assert pace.rate(900) == pytest.approx(0.5)
    assert pace.rate(999) == pytest.approx(0.02)


def trained(folder: Path, *step_counts: int) -> torch.Tensor:
    model = nn.Linear(3, 1)
    for steps in step_counts:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        trainer = Trainer({"model": model}, Pace(steps, 0.1, warmup=1, decay_from=0.99), folder)
        trainer.run(lambda model=model: model(torch.randn(4, 3)).square().mean())
    return model.weight.detach()


def test_an_extended_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    pace_is_the_same = 40  # and constant until its last step
    whole = trained(tmp_path / "whole", pace_is_the_same)
    assert torch.equal(trained(tmp_path / "parts", pace_is_the_same, pace_is_the_same), whole)
    assert len((tmp_path / "whole/log.jsonl").read_text().splitlines()) == 2


def test_chunks_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("craftune.shapes.training.data.CHUNK", 4)
    (first, labels), (second, _) = draw_chunk(3), draw_chunk(3)
    assert first.shape == (4, 64, 64, 3)
    assert np.array_equal(first, second)
    assert len(labels) == 4


def test_captions_are_wrong_as_often_as_said() -> None:
    rng, groups = random.Random(0), specs_by_category()
    specs = [spec for group in groups.values() for spec in group]
    by_spec = {spec: [index] for index, spec in enumerate(specs)}
    styles = [random_style(rng) for _ in specs]
    captioner = Captioner(Scenes(torch.zeros(len(specs), 1), styles, by_spec), seed=1)
    wrong: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    for _ in range(4_000):
        index, caption = captioner.draw()
        try:
            asked = parse(caption)
        except ValueError:
            continue
        wrong[asked.category].append(asked != specs[index])
    for category, rate in CONFUSION_RATE.items():
        assert np.mean(wrong[category]) == pytest.approx(rate, abs=0.12)


def test_what_captions_tell_is_what_scenes_show() -> None:
    rng = random.Random(0)
    for group in specs_by_category().values():
        for spec in group[:20]:
            seen = np.array(seen_targets(random_scene(spec, Style(), rng)))
            told = np.array(told_targets(spec))
            assert len(seen) == len(told) == SEEN
            known = ~np.isnan(told)
            assert np.abs(seen - told)[known].max() < 0.75
            counts = known & (told == np.round(told))
            assert np.array_equal(np.round(seen[counts]), told[counts])


def test_ranking_loss_is_log_2_without_knowledge_and_0_without_pairs() -> None:
    scores = torch.zeros(4, requires_grad=True)
    shows = torch.tensor([True, True, False, False])
    assert ranking_loss(scores, shows).item() == pytest.approx(math.log(2))
    assert ranking_loss(scores, torch.ones(4, dtype=torch.bool)).item() == 0
    assert ranking_loss(torch.tensor([9.0, 9.0, -9.0, -9.0]), shows) < 1e-3


def test_gates_are_numbers_with_intervals_and_valid_json() -> None:
    rng = np.random.default_rng(0)
    correct = (rng.random((70, 5)) < 0.5).astype(float)
    scores = {name: correct + rng.normal(size=(70, 5)) for name in ("h", "p", "shapes-a")}
    categories = [CATEGORIES[i % 7] for i in range(70)]
    plain = Draws(correct, scores, [])
    better = Draws(np.ones((70, 5)), scores, [])
    measured: Any = gates(plain, better, categories)
    assert measured["strict"]["value"] == pytest.approx(correct.mean(), abs=1e-3)
    assert measured["refined_minus_plain"]["value"] == pytest.approx(1 - correct.mean(), abs=2e-3)
    assert measured["best_of_n_minus_one"]["value"] > 0.25
    assert measured["h~verifier"]["low"] < measured["h~verifier"]["value"] < 1
    assert measured["strict_by_category"]["two"]["refined"] == 1
    constant: Any = gates(Draws(np.zeros((70, 5)), scores, []), better, categories)
    assert constant["h~verifier"]["value"] is None
    json.dumps(constant, allow_nan=False)


def test_sheets_and_curves_are_pictures(tmp_path: Path) -> None:
    assert sheet([Image.new("RGB", (64, 64))] * 15).size == (14 * 66, 2 * 66)
    rows = [{"step": 20 * k, "loss": 1 / k} for k in range(1, 50)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curve(tmp_path / "log.jsonl", 64, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.size == (640, 300)
