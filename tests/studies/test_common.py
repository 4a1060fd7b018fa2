"""Means over seeds, and the differences that a study reports."""

from pathlib import Path

import pytest

from craftune.records import read_json, write_json
from craftune.studies.common import against_base


def test_differences_are_paired_by_seed() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, and t(0.975, 2) = 4.3027 over the root of 3."""
    rows = {
        "base": [{"x": v} for v in (10.0, 0.0, 5.0)],
        "arm": [{"x": v} for v in (11.0, 2.0, 8.0)],
    }
    found = against_base(rows)
    assert set(found["over base"]) == {"arm"}
    assert found["arms"]["base"]["x"]["mean"] == 5
    half = 4.302653 / 3**0.5
    wanted = {"mean": 2, "low": 2 - half, "high": 2 + half, "seeds": 3}
    assert found["over base"]["arm"]["x"] == pytest.approx(wanted)


def test_one_seed_has_no_interval_and_its_table_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / "t.json", against_base({"base": [{"x": 1.0}], "arm": [{"x": 3.0}]}))
    found = read_json(tmp_path / "t.json")["over base"]["arm"]["x"]
    assert found == {"mean": 2.0, "low": None, "high": None, "seeds": 1}
