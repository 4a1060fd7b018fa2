"""evaluate.scales: the tuning at several scales on the same prompts and noise, to the report."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import forks
from tiny import Tiny, call, results, tiny
from toy import load_sd

from craftune.config import EvaluateConfig
from craftune.recipes import load_recipe
from craftune.records import read_json, read_table
from craftune.reporting import charts, units
from craftune.stages.evaluate import evaluate

SETTINGS = ["evaluate.scales=[2.0, 0.5]", "evaluate.scale_prompts=3", "train.learning_rate=0.01"]
SETTINGS += ["train.warmup_steps=0", "train.save_dtype=float32"]
CHANGES = [argument for setting in SETTINGS for argument in ("--set", setting)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run with two scales, one of them beyond the tuned model; for looking at only."""
    found = tiny(tmp_path_factory.mktemp("scales"))
    answer = call(["run", found.recipe, *CHANGES], found.folder)
    assert answer.status == 0, answer.err
    assert "8 images of base, 8 of tuned; 12 images at other scales" in answer.err
    assert "Composite reward at scale 0.5: " in answer.out
    assert "; at 1: " in answer.out
    return found


def images(folder: Path, arm: str) -> dict[tuple[str, int, int], bytes]:
    rows = read_table(folder.glob(f"images-{arm}-*.parquet")).to_pylist()
    return {(r["prompt_id"], r["sample"], r["seed"]): r["image"]["bytes"] for r in rows}


def test_images_are_those_of_the_mixed_weights_on_the_base_s_noise(
    job: Tiny, tmp_path: Path
) -> None:
    """Half way: drawn again by hand with the mean of both models' weights, byte by byte."""
    base, half = (images(job.stage("evaluate"), arm) for arm in ("base", "scale-0.5"))
    assert len(half) == 6
    assert half.keys() <= base.keys()
    assert not set(half.values()) & {
        *base.values(), *images(job.stage("evaluate"), "tuned").values()
    }  # fmt: skip
    recipe = load_recipe(job.recipe)
    start, model = load_sd(Path(recipe.model.path)), load_sd(job.stage("train") / "model")
    with torch.no_grad():
        pairs = zip(
            model.denoiser.network.parameters(), start.denoiser.network.parameters(), strict=True
        )
        for weight, other in pairs:
            weight.copy_((weight + other) / 2)
    prompts = job.stage("prompts") / "evaluation.jsonl"
    evaluate(
        "mean", EvaluateConfig(), recipe.generate, model, ("jpeg-compressibility",), 0, prompts,
        tmp_path, count=3,
    )  # fmt: skip
    assert images(tmp_path, "mean") == half


def test_the_report_has_a_row_per_scale_and_base_and_tuned_on_the_same_images(job: Tiny) -> None:
    report = read_json(job.stage("report") / "report.json")
    found = report["scales"]
    assert found["prompts"] == 3
    assert [row["scale"] for row in found["rows"]] == [0, 0.5, 1, 2]
    names = ["composite", *(entry["name"] for entry in report["rewards"])]
    few = {
        r["prompt_id"]
        for r in read_table(job.stage("evaluate").glob("images-scale-2.0-*")).to_pylist()
    }
    means = {}
    for arm, scale in (("base", 0), ("scale-0.5", 0.5), ("tuned", 1), ("scale-2.0", 2)):
        scores = read_table(job.stage("evaluate").glob(f"scores-{arm}-*")).to_pylist()
        kept = [s["value"] for s in scores if s["reward"] == names[1] and s["prompt_id"] in few]
        assert len(kept) == 6
        means[scale] = sum(kept) / 6
    for row in found["rows"]:
        assert list(row["measures"]) == names
        cell = row["measures"][names[1]]
        assert cell["mean"] == pytest.approx(means[row["scale"]], rel=1e-4)
        change = means[row["scale"]] - means[0]
        assert cell["difference"]["mean"] == pytest.approx(change, abs=1e-4)
        assert cell["difference"]["low"] <= cell["difference"]["mean"] <= cell["difference"]["high"]
    assert found["rows"][0]["diversity"]["ratio"] == {"mean": 1, "low": 1, "high": 1}
    assert found["rows"][3]["diversity"]["ratio"]["mean"] != 1
    page = (job.stage("report") / "report.html").read_text()
    section = page.partition('<section id="scales"')[2].partition("</section>")[0]
    assert section.count("<circle") == 4 * len(names)
    assert [
        line for line in ("0", "0.5", "1", "2") if f'<th scope="row">{line}' not in section
    ] == []


def without_evaluation(job: Tiny, folder: Path) -> tuple[Tiny, list[str]]:
    """A copy of the run as far as its training, and the command that goes on with it."""
    copy = replace(job, folder=folder)
    shutil.copytree(job.run, copy.run, ignore=shutil.ignore_patterns("7-*", "8-*"))
    (folder / job.rewards.name).write_bytes(job.rewards.read_bytes())
    return copy, ["run", str(job.recipe), *CHANGES, "--set", f"run.out={folder / 'runs'}"]


def test_killed_between_the_scales_it_goes_on_and_ends_the_same(job: Tiny, tmp_path: Path) -> None:
    copy, command = without_evaluation(job, tmp_path)
    with forks() as processes:
        place = (str(copy.stage("evaluate") / "images-scale-0.5"), 1)
        ended = processes.run(command, copy.folder, kill_at=place)
        assert ended.status == -signal.SIGKILL, ended
        made = set(copy.stage("evaluate").glob("images-*.parquet"))
        stamps = {path: path.stat().st_mtime_ns for path in made}
        ended = processes.run(command, copy.folder)
    assert ended.status == 0, ended.err
    assert {"images-scale-2.0-00000.parquet"} == {p.name for p in made if "scale" in p.name}
    assert {path: path.stat().st_mtime_ns for path in made} == stamps
    assert results(copy.run) == results(job.run)


@pytest.mark.timeout(300)
def test_two_processes_share_the_scales(job: Tiny, tmp_path: Path) -> None:
    copy, command = without_evaluation(job, tmp_path)
    with forks() as processes:
        ended = processes.together(2, command, copy.folder)
    assert [one.status for one in ended] == [0, 0], ended
    assert results(copy.run) == results(job.run)


def test_other_scales_are_other_settings_and_none_are_none(job: Tiny) -> None:
    other = [change.replace("[2.0, 0.5]", "[0.25]") for change in CHANGES]
    assert "evaluate.scales" in call(["run", job.recipe, *other], job.folder).complaint
    kept = read_json(job.stage("evaluate") / "done.json")["config"]["evaluate"]
    assert kept["scales"] == [2.0, 0.5]


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ("[0.5, 1.0]", "evaluate.scales: [0.5, 1.0] 1 is the tuned model"),
        ("[0.5, 0.5]", "names one twice"),
        ("[0.0]", "evaluate.scales.0: it should be greater than 0, got 0.0"),
        ('["half"]', "evaluate.scales.0"),
        ("0.5", "evaluate.scales"),
    ],
)
def test_scales_that_cannot_be_are_refused(tmp_path: Path, scales: str, message: str) -> None:
    job = tiny(tmp_path)
    answer = call(["check", job.recipe, "--set", f"evaluate.scales={scales}"], job.folder)
    assert message in answer.complaint


def test_the_curve_rises_where_the_measure_does() -> None:
    drawn = charts.sweep([0.0, 0.5, 1.0], [1.0, 2.0, 4.0], [(1.0, 5.0)] * 3, "r")
    points = [p.split(",") for p in drawn.partition('points="')[2].partition('"')[0].split()]
    across, up = [float(x) for x, _ in points], [float(y) for _, y in points]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert up[0] - up[1] == pytest.approx((up[1] - up[2]) / 2, abs=0.2)
    assert up[0] > up[2]


def test_tables_show_a_reward_s_scales_in_its_unit(job: Tiny) -> None:
    """HPS times 100, as in its other rows."""
    report = read_json(job.stage("report") / "report.json")
    entry = report["rewards"][0] | {"name": "hpsv2.1", "role": "held-out"}
    raw = report["scales"]["rows"][2]["measures"][report["rewards"][0]["name"]]
    rows = [{"scale": 1.0, "measures": {"composite": raw, "hpsv2.1": raw}}]
    changed = {"rewards": [entry], "categories": {}, "scales": report["scales"] | {"rows": rows}}
    found = units.in_tables(report | changed)["scales"]
    cell = found["rows"][0]["measures"][units.named("hpsv2.1")]
    assert cell["mean"] == pytest.approx(100 * raw["mean"])
    assert cell["difference"]["low"] == pytest.approx(100 * raw["difference"]["low"])
    assert found["sentences"][1].startswith(f"{units.named('hpsv2.1')} at scale 1: ")
