"""bench/gpu.py runs from end to end on tiny networks, so that a GPU's time is not wasted."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from craftune.models.published import PUBLISHED

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"


def test_the_gpu_bench_runs_at_tiny_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(out.read_text())
    assert found["tiny"]
    assert found["device"].endswith("CPU")
    models = {name: found[name] for name in PUBLISHED if name in found}
    for model, updates in zip(models.values(), (120, 200), strict=True):
        tuned, drawn = model["fine-tuning"], model["drawing"]
        assert tuned["gpu_seconds"] == pytest.approx(tuned["seconds_per_update"] * updates)
        assert tuned["samples_per_s"] == pytest.approx(4 / tuned["seconds_per_update"])
        assert tuned["micro_batch"] in (1, 2)
        assert set(tuned["samples_per_s_by_micro_batch"]) == {"1", "2"}
        assert 0 < tuned["mfu"] < 1
        assert drawn["images_per_s"] > 0
