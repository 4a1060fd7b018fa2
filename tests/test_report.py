"""report.json says what the tables hold, the same bytes each time."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import HELD_OUT, SELECT, TRAINING, Fake, fake_run
from PIL import Image
from report_page import made

from craftune.errors import UserError
from craftune.reporting import diagrams
from craftune.reporting.read import read_run
from craftune.select_config import SelectConfig
from craftune.stages.report import report


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    fake_run(folder)
    report(folder, folder / "8-report")
    return folder


@pytest.fixture
def summary(demo: Path) -> dict[str, Any]:
    return json.loads((demo / "8-report" / "report.json").read_text())


def test_the_numbers_are_those_of_the_tables(demo: Path, summary: dict[str, Any]) -> None:
    means: dict[str, dict[tuple[str, str], list[float]]] = {"base": {}, "tuned": {}}
    for model, found in means.items():
        table = pq.read_table(demo / "7-evaluate" / f"scores-{model}-00000.parquet")
        for row in table.to_pylist():
            found.setdefault((row["reward"], row["prompt_id"]), []).append(row["value"])
    for entry in summary["rewards"]:
        for model, found in means.items():
            per_prompt = [np.mean(v) for (name, _), v in found.items() if name == entry["name"]]
            assert entry[model] == pytest.approx(np.mean(per_prompt), rel=1e-5)
        difference = entry["difference"]
        assert difference["mean"] == pytest.approx(entry["tuned"] - entry["base"], rel=1e-3)
        assert difference["low"] < difference["mean"] < difference["high"]
        assert entry["verdict"] == "improved"
    assert {e["name"]: e["role"] for e in summary["rewards"]} == dict.fromkeys(
        TRAINING, "training"
    ) | dict.fromkeys(HELD_OUT, "held-out")
    assert [e["kind"] for e in summary["rewards"]] == ["score"] * 4 + ["share"]
    assert summary["prompts"] == 30


def test_the_composite_is_on_the_scale_of_the_selection(
    demo: Path, summary: dict[str, Any]
) -> None:
    selection = json.loads((demo / "5-select" / "selection.json").read_text())
    by_name = {entry["name"]: entry for entry in summary["rewards"]}
    expected = sum(
        weight * (by_name[name]["tuned"] - by_name[name]["base"]) / selection["scales"][name][1]
        for name, weight in selection["weights"].items()
    )
    assert set(selection["weights"]) == set(TRAINING)
    assert summary["composite"]["difference"]["mean"] == pytest.approx(expected, rel=1e-3)


def test_diversity_is_measured_on_the_reduced_images(demo: Path, summary: dict[str, Any]) -> None:
    table = pq.read_table(demo / "7-evaluate" / "images-base-00000.parquet").to_pylist()
    groups: dict[str, list[np.ndarray]] = {}
    for row in table:
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        array = np.asarray(image, dtype=float).reshape(32, 2, 32, 2, 3).mean((1, 3)) / 255
        groups.setdefault(row["prompt_id"], []).append(array)
    distance = np.mean([np.abs(a - b).mean() for a, b in groups.values()])
    assert summary["diversity"]["base"] == pytest.approx(distance, abs=1e-3)  # rounded to 8 bits
    assert 0.8 < summary["diversity"]["ratio"]["mean"] < 1.2


def test_categories_split_the_prompts(summary: dict[str, Any]) -> None:
    rows = summary["categories"]["rows"]
    assert [row["category"] for row in rows] == ["color", "position", "single"]
    assert sum(row["prompts"] for row in rows) == summary["prompts"]
    for entry in [summary["composite"], *summary["rewards"]]:
        parts = [row["prompts"] * row["measures"][entry["name"]]["tuned"] for row in rows]
        assert sum(parts) / summary["prompts"] == pytest.approx(entry["tuned"], rel=1e-3)


def test_the_funnels_add_up(demo: Path, summary: dict[str, Any]) -> None:
    status = summary["selection"]["status"]
    assert sum(status.values()) == summary["selection"]["candidates"] == 60
    assert status["selected"] == summary["selection"]["selected"] == 8
    recipe = json.loads((demo / "run.json").read_text())
    for steps in (
        diagrams.candidate_funnel(status, recipe["select"]),
        diagrams.prompt_funnel(summary["prompt_counts"]),
    ):
        assert steps[0].count == sum(step.lost for step in steps) + steps[-1].count
        assert steps[-1].count == steps[-2].count


def test_where_and_how_fast_it_ran_is_not_in_report_json(demo: Path, tmp_path: Path) -> None:
    other = fake_run(tmp_path / "elsewhere" / "again")
    for done in sorted(other.glob("*/done.json")):
        record = json.loads(done.read_text())
        done.write_text(json.dumps(record | {"seconds": record["seconds"] * 3, "device": "cuda"}))
    metrics = other / "6-train" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    slower = [line | {"seconds": 9.0} for line in lines]
    # A killed run went on from step 50: it logs the steps after its checkpoint once more.
    metrics.write_text("".join(json.dumps(x) + "\n" for x in [*slower[:70], *slower[50:]]))
    recipe = json.loads((other / "run.json").read_text())
    recipe["run"]["device"] = "cuda:1"
    recipe["model"]["path"] = str(tmp_path / "model")
    (other / "run.json").write_text(json.dumps(recipe))
    report(other, other / "8-report")

    first, second = ((f / "8-report" / "report.json").read_text() for f in (demo, other))
    assert second.replace('"path": "model"', '"path": "craftune:shapes/model"') == first
    for path in (demo.parent, tmp_path, Path.cwd()):
        assert str(path) not in second
        assert str(path) not in (other / "8-report" / "report.html").read_text(encoding="utf-8")
    costs = [json.loads((f / "8-report" / "costs.json").read_text()) for f in (demo, other)]
    assert costs[1]["seconds"] == pytest.approx(3 * costs[0]["seconds"])
    assert costs[1]["stages"][2]["device"] == "cuda"


def test_a_second_report_has_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    report(demo, tmp_path)
    for name in ("report.json", "report.html", "costs.json"):
        assert (tmp_path / name).read_bytes() == (demo / "8-report" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "costs.json",
        "report.html",
        "report.json",
    ]


def test_equal_models_show_no_clear_change(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", Fake())
    for kind in ("images", "scores"):
        base = pq.read_table(folder / "7-evaluate" / f"{kind}-base-00000.parquet")
        pq.write_table(base, folder / "7-evaluate" / f"{kind}-tuned-00000.parquet")
    report(folder, folder / "8-report")
    found = json.loads((folder / "8-report" / "report.json").read_text())
    for entry in [found["composite"], *found["rewards"]]:
        assert entry["difference"] == {"mean": 0, "low": 0, "high": 0}
        assert entry["win_rate"]["mean"] == 0.5
        assert entry["verdict"] == "no clear change"
    assert found["diversity"]["ratio"] == {"mean": 1, "low": 1, "high": 1}


@pytest.mark.parametrize("scale", ["rank", "group"])
def test_a_selection_without_a_scale_still_has_a_composite(tmp_path: Path, scale: Any) -> None:
    config = SelectConfig(roles=SELECT.roles, scale=scale, k=8)
    found, _ = made(tmp_path / "run", Fake(select=config))
    by_name = {entry["name"]: entry for entry in found["rewards"]}
    weights = found["selection"]["weights"]
    assert found["composite"]["base"] == pytest.approx(0, abs=1e-6)
    effects = [weights[name] * by_name[name]["effect"]["mean"] for name in weights]
    assert found["composite"]["tuned"] == pytest.approx(sum(effects), rel=1e-3)


def test_seeds_that_differ_are_refused(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    path = folder / "7-evaluate" / "images-tuned-00000.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("seed")
    seeds = pa.array([s + 1 for s in table["seed"].to_pylist()], pa.int64())
    pq.write_table(table.set_column(at, "seed", seeds), path)
    with pytest.raises(UserError, match="same prompts, samples and seeds"):
        report(folder, folder / "8-report")


@pytest.mark.parametrize("file", ["4-score/part-00000", "7-evaluate/scores-tuned-00000"])
def test_scores_measured_differently_are_refused(tmp_path: Path, file: str) -> None:
    """The composite is on the pool's scale: pool, base and tuned must be of one measure."""
    fake_run(tmp_path / "run")
    path = tmp_path / "run" / f"{file}.parquet"
    table = pq.read_table(path)
    texts = [text.replace("float32", "float16") for text in table["identity"].to_pylist()]
    at = table.schema.get_field_index("identity")
    kind = table.schema.field("identity").type
    pq.write_table(table.set_column(at, "identity", pa.array(texts).cast(kind)), path)
    with pytest.raises(UserError, match=r"two identities: dtype '.*' and '.*'; run with --redo"):
        read_run(tmp_path / "run")


def test_missing_scores_are_refused(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    path = folder / "7-evaluate" / "scores-tuned-00000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(UserError, match=r"scores-tuned-.*'shapes-h' has no finite score"):
        report(folder, folder / "8-report")


def test_an_unfinished_stage_is_named(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    (folder / "6-train" / "done.json").unlink()
    with pytest.raises(UserError, match=r"6-train: stage 'train' has not run"):
        report(folder, folder / "8-report")


def test_base_and_tuned_are_joined_by_prompt_and_sample(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    before = read_run(folder).evaluation
    for path in folder.glob("7-evaluate/*-tuned-*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.take(list(range(table.num_rows))[::-1]), path)
    after = read_run(folder).evaluation
    for name in before.tuned:
        np.testing.assert_array_equal(after.tuned[name], before.tuned[name])
