"""What the report is made of: words, charts, and the rules by which pictures are picked."""

import re
from typing import Any

import numpy as np
import pytest
from fake_run import fake_run

from craftune.reporting import charts, comparison, examples, wording
from craftune.reporting.read import Run, read_run


def entry(kind: str, low: float | None, high: float | None, mean: float = 0.05) -> dict[str, Any]:
    difference = {"mean": mean, "low": low, "high": high}
    found = wording.verdict(difference)
    return {"name": "r", "role": "held-out", "kind": kind, "base": 0.52, "tuned": 0.52 + mean,
            "difference": difference, "verdict": found}  # fmt: skip


def test_sentences_are_honest() -> None:
    share = wording.sentence(entry("share", 0.02, 0.08)).replace("\u202f", " ")
    assert share == "Images that pass r: 52.0 % → 57.0 %, +5.0 points [+2.0, +8.0]: improved"
    unclear = wording.sentence(entry("score", -0.01, 0.11))
    assert unclear == "r: 0.52 → 0.57, +0.05 [\u22120.01, +0.11]: no clear change"
    assert wording.sentence(entry("score", None, None)).endswith("+0.050: no clear change")
    assert entry("score", -0.3, -0.001)["verdict"] == "worse"
    assert entry("score", 0.0, 0.2)["verdict"] == "no clear change"


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(1234.5, 1, "+1,234.5"), (-0.04, 1, "\u22120.0"), (0.0, 2, "0.00"), (None, 1, "\u2013")],
)
def test_signs_are_true(value: float | None, decimals: int, text: str) -> None:
    assert wording.signed(value, decimals) == text


def test_durations_read_well() -> None:
    texts = [wording.duration(s).replace("\u202f", " ") for s in (4.21, 192.0, 7500.0)]
    assert texts == ["4.2 s", "3 min 12 s", "2 h 05 min"]


def test_ticks_are_round_and_within() -> None:
    for low, high in ((0.0, 1.0), (-3.2, 4.1), (20.9, 23.4), (1e-5, 5e-5)):
        marks = charts.ticks(low, high)
        assert 3 <= len(marks) <= 6
        assert low <= marks[0] + 1e-12
        assert marks[-1] <= high + 1e-12
    assert [charts.tick_label(t, [0.0, 0.25, 0.5]) for t in (0.0, 0.25)] == ["0.00", "0.25"]


def test_the_moving_average_keeps_a_line() -> None:
    line = np.arange(20.0)
    smooth = charts.moving_average(line, 3)
    np.testing.assert_allclose(smooth[3:-3], line[3:-3])
    assert smooth[0] == pytest.approx(1.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(fake_run(tmp_path_factory.mktemp("runs") / "demo"))


def test_the_grid_takes_the_first_of_each_category(run: Run) -> None:
    evaluation = run.evaluation
    for count in (3, 9, 15, 24):
        shown = examples.balanced(evaluation, count)
        for category in ("color", "position", "single"):
            members = [p for p, c in enumerate(evaluation.categories) if c == category]
            assert [p for p in shown if p in members] == members[: count // 3]
    assert list(evaluation.ids) == sorted(evaluation.ids)
    assert len(examples.balanced(evaluation, 99)) == 30


def test_extremes_are_the_largest_of_different_prompts(run: Run) -> None:
    base, tuned = comparison.measures(run)["composite"]
    gains, losses = examples.extremes(run.evaluation, tuned - base)
    best = [max((tuned - base)[run.evaluation.prompt == p]) for p in range(30)]
    rest = set(range(30)) - {int(run.evaluation.prompt[i]) for i in gains}
    worst = [min((tuned - base)[run.evaluation.prompt == p]) for p in rest]
    assert [(tuned - base)[i] for i in gains] == sorted(best)[:-4:-1]
    assert [(tuned - base)[i] for i in losses] == sorted(worst)[:3]
    assert len({int(run.evaluation.prompt[i]) for i in [*gains, *losses]}) == 6


def test_the_gallery_spans_the_ranks(run: Run) -> None:
    rank, selected = (run.verdicts[k].to_pylist() for k in ("rank", "selected"))
    taken = sorted(r for r, s in zip(rank, selected, strict=True) if s)
    assert [rank[i] for i in examples.selected_rows(run, 99)] == taken
    assert [rank[i] for i in examples.selected_rows(run, 2)] == [taken[0], taken[-1]]


def test_the_best_of_each_refusal_are_shown(run: Run) -> None:
    table = run.verdicts.to_pylist()
    shown = [table[i] for i in examples.refused_rows(run)]
    kinds = ["removed_by_filter"] * 2 + ["cut_by_cap"] * 2 + ["cut_by_k"] * 2
    assert [row["status"] for row in shown] == kinds
    for first, second in zip(shown[::2], shown[1::2], strict=True):
        values = [r["composite"] for r in table if r["status"] == first["status"]]
        assert [first["composite"], second["composite"]] == sorted(values)[:-3:-1]


def test_a_verdict_stands_beside_its_own_baseline(run: Run) -> None:
    chosen = examples.selected_rows(run, 1)
    entry = {"name": "composite", "role": "composite", "kind": "score"}
    entry |= {"quantiles": {"base": [0.0, 1.0], "tuned": [0.0, 1.0]}}
    (shown,) = examples.verdicts(run, {"composite": entry}, chosen)
    table = run.verdicts.to_pylist()
    row = table[chosen[0]]
    (plain,) = (r for r in table if r["prompt_id"] == row["prompt_id"] and r["variant"] == 0)
    (line,) = shown.lines
    assert line.before == wording.number(plain["composite"], 2)
    assert line.after == wording.number(row["composite"], 2)
    assert line.better == 1
    assert shown.refined == row["refined_prompt"] != row["prompt"]


def test_long_names_can_wrap_and_stay_escaped() -> None:
    assert wording.breakable("package.module:fun") == "package.<wbr>module:<wbr>fun"
    assert wording.breakable("<b>") == "&lt;b&gt;"
    assert re.sub("<wbr>", "", wording.breakable("x" * 99)) == "x" * 99
