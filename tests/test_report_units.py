"""HPS is stored raw and read times 100: in every table, under a name that says so."""

import json
import re
from pathlib import Path

import pytest
from fake_run import Fake
from report_page import made

from craftune.commands import _print_outcome
from craftune.exporting.card import evaluation_table
from craftune.reporting import units, wording
from craftune.rewards import REWARDS, display_scale

HPS = "hpsv2.1 \N{MULTIPLICATION SIGN} 100"
HPS_LIKE = "shapes-h \N{MULTIPLICATION SIGN} 100"


def cells(run: Path, name: str) -> list[float]:
    """Base and tuned (or baseline and candidate) in every table row of a measure."""
    html = (run / "8-report" / "report.html").read_text().replace("<wbr>", "")
    head = rf'<th scope="row">{re.escape(name)}(?: <span[^<]*</span>)?</th>'
    found = re.findall(head + "<td>([^<]*)</td><td>([^<]*)</td>", html)
    numbers = (text.replace(wording.MINUS, "-").replace(",", "") for row in found for text in row)
    return [float(number) for number in numbers]


def test_which_rewards_have_another_unit_in_tables() -> None:
    scaled = {name: display_scale(name) for name in REWARDS if display_scale(name) != 1}
    assert scaled == {"hpsv2.1": 100, "hpsv2.0": 100}
    assert display_scale("mine:reward") == 1


def test_the_file_is_raw_and_what_is_read_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, page = made(tmp_path / "run", Fake(held_out=("hpsv2.1", "strict")))
    (raw,) = (entry for entry in summary["rewards"] if entry["name"] == "hpsv2.1")
    (pairs,) = (line for line in summary["headline"] if line.startswith("hpsv2.1"))
    assert abs(raw["base"]) < 5
    assert pairs.startswith(f"hpsv2.1: {wording.level(raw['base'], raw)} ")

    shown = units.in_tables(summary)
    entry = next(entry for entry in shown["rewards"] if entry["name"] == HPS)
    for model in ("base", "tuned"):
        assert entry[model] == pytest.approx(100 * raw[model])
        expected = [100 * x for x in raw["quantiles"][model]]
        assert entry["quantiles"][model] == pytest.approx(expected)
    for key, value in raw["difference"].items():
        assert entry["difference"][key] == pytest.approx(100 * value)
    for key in ("effect", "relative", "win_rate", "verdict"):
        assert entry[key] == raw[key]
    for row, before in zip(shown["categories"]["rows"], summary["categories"]["rows"], strict=True):
        cell, was = row["measures"][HPS], before["measures"]["hpsv2.1"]
        assert cell["tuned"] == pytest.approx(100 * was["tuned"])
        assert cell["difference"]["low"] == pytest.approx(100 * was["difference"]["low"])
        assert row["measures"]["strict"] == before["measures"]["strict"]

    html = (tmp_path / "run/8-report/report.html").read_text()
    assert f'<th scope="row">{HPS} ' in html
    assert f"<td>{wording.level(entry['base'], entry)}</td>" in html
    tables = page.text.split("How to read")[0].replace(HPS, "")
    assert "hpsv2.1" not in tables.split("Settings")[0]

    _print_outcome(tmp_path / "run", None)
    assert wording.sentence(entry) in capsys.readouterr().out
    assert json.loads((tmp_path / "run/8-report/report.json").read_text()) == summary


def test_the_gallery_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reward that chose the pool: single candidates beside their baselines."""
    made(tmp_path / "raw")
    scale = {"shapes-h": 100.0}
    monkeypatch.setattr(units, "display_scale", lambda name: scale.get(name, 1.0))
    made(tmp_path / "shown")
    raw, shown = (cells(tmp_path / "raw", "shapes-h"), cells(tmp_path / "shown", HPS_LIKE))
    assert len(shown) == len(raw) > 60
    assert shown == pytest.approx([100 * x for x in raw], abs=0.6)
    others = [cells(tmp_path / folder, "shapes-p") for folder in ("raw", "shown")]
    assert others[0] == others[1]


def test_the_model_card_reads_the_same(tmp_path: Path) -> None:
    summary, _ = made(tmp_path / "run", Fake(held_out=("hpsv2.1",)))
    table = evaluation_table(summary)
    assert f"| {HPS} | held-out |" in table
    assert "| hpsv2.1 |" not in table
