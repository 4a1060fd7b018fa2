"""The report says what the tables hold, the same bytes each time, and obeys no prompt."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import FAKE, HELD_OUT, SELECT, TRAINING, Fake, fake_run, with_report
from PIL import Image

from craftune.config import ReportConfig
from craftune.errors import UserError
from craftune.reporting import charts, diagrams, wording
from craftune.reporting.read import read_run
from craftune.selection import SelectConfig
from craftune.stages.report import report

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "{{ 7 * 7 }} {% raw %} </style></title><!-- &lt; \u202e",
    "javascript:alert(4)",
    "long " * 2000,
)


class Page(HTMLParser):
    """Elements with their attributes, the text, and what is inside <script>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def made(folder: Path, fake: Fake = FAKE) -> tuple[dict[str, Any], Page]:
    out = fake_run(folder, fake) / "8-report"
    report(folder, out)
    html = (out / "report.html").read_text(encoding="utf-8")
    return json.loads((out / "report.json").read_text()), Page(html)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    fake_run(folder)
    report(folder, folder / "8-report")
    return folder


@pytest.fixture
def summary(demo: Path) -> dict[str, Any]:
    return json.loads((demo / "8-report" / "report.json").read_text())


@pytest.fixture
def page(demo: Path) -> Page:
    return Page((demo / "8-report" / "report.html").read_text(encoding="utf-8"))


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


def test_the_funnels_add_up(demo: Path, summary: dict[str, Any], page: Page) -> None:
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
    lost = [step.lost for step in diagrams.candidate_funnel(status, recipe["select"]) if step.lost]
    assert f"60 = {' + '.join(map(str, lost))} + 8" in page.text


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


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    for tag, attrs in page.tags:
        assert not {"srcset", "action", "formaction", "background"} & attrs.keys(), tag
        target = attrs.get("src") or attrs.get("href") or "#"
        assert target.startswith(("data:", "#")), (tag, target)
    assert not re.search(r"@import|url\(", page.text)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert (policy or "").startswith("default-src 'none'")
    anchors = {a["href"] for a in page.all("a")}
    assert anchors <= {f"#{attrs['id']}" for _, attrs in page.tags if "id" in attrs}


def test_every_picture_and_table_says_what_it_shows(page: Page) -> None:
    assert len(page.all("img")) > 50
    assert all((attrs["alt"] or "").strip() for attrs in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.all("svg"))
    for attrs in page.all("div"):
        if "scroll" in (attrs.get("class") or ""):
            assert attrs["tabindex"] == "0"


def test_prompts_cannot_write_into_the_page(tmp_path: Path) -> None:
    _, page = made(tmp_path / "run", Fake(texts=HOSTILE, test_prompts=12))
    (clean,) = (page.scripts,) if len(page.all("script")) == 1 else ([],)
    assert "alert" not in "".join(clean)
    assert clean
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert not [attrs for attrs in page.all("img") if not (attrs["src"] or "").startswith("data:")]
    for text in HOSTILE:
        assert text in page.text or text[:100] in page.text
    assert len(page.all("title")) == len(page.all("style")) == 1


def test_names_cannot_write_into_the_page(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    with_report(folder, ReportConfig(title="<b>mine</b>"))
    path = folder / "7-evaluate" / "scores-base-00000.parquet"
    for path in folder.glob("7-evaluate/scores-*.parquet"):
        table = pq.read_table(path)
        names = [n.replace("shapes-i", "m:<svg onload=x>") for n in table["reward"].to_pylist()]
        at = table.schema.get_field_index("reward")
        pq.write_table(table.set_column(at, "reward", pa.array(names)), path)
    report(folder, folder / "8-report")
    page = Page((folder / "8-report" / "report.html").read_text(encoding="utf-8"))
    assert "<b>mine</b>" in page.text
    assert "m:<svg onload=x>" in page.text
    assert all(
        set(attrs) <= {"class", "viewbox", "role", "aria-label"} for attrs in page.all("svg")
    )


def test_a_bare_evaluation_says_what_is_missing(tmp_path: Path) -> None:
    found, page = made(tmp_path / "run", Fake(images=1, held_out=(), categories=False))
    assert "two images per prompt" in found["diversity"]["absent"]
    assert "no categories" in found["categories"]["absent"]
    assert [e["role"] for e in found["rewards"]] == ["training"] * 3
    assert "No held-out reward" in page.text
    assert "Not measured: it needs at least two images per prompt" in page.text


def test_one_prompt_gives_no_interval_and_no_verdict(tmp_path: Path) -> None:
    found, page = made(tmp_path / "run", Fake(test_prompts=1))
    assert found["composite"]["difference"]["low"] is None
    assert {e["verdict"] for e in found["rewards"]} == {"no clear change"}
    assert "one prompt gives no interval" in page.text


def test_few_prompts_are_called_few(tmp_path: Path) -> None:
    _, page = made(tmp_path / "run", Fake(test_prompts=8))
    assert "too narrow to trust" in page.text


def test_a_worse_model_is_called_worse(tmp_path: Path) -> None:
    found, page = made(tmp_path / "run", Fake(gain=-1.5))
    assert found["composite"]["verdict"] == "worse"
    assert "The tuned model is worse on the composite reward, shapes-i and strict." in page.text


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


def test_large_pictures_are_made_small(tmp_path: Path) -> None:
    fake = Fake(train_prompts=6, test_prompts=6, size=400)
    _, page = made(tmp_path / "run", fake)
    for attrs in page.all("img"):
        kind, _, data = (attrs["src"] or "").partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/jpeg"
        assert max(image.size) <= 320
        assert attrs.get("class") != "pixelated"


def test_tiny_pictures_keep_their_pixels(page: Page) -> None:
    for attrs in page.all("img"):
        _, _, data = (attrs["src"] or "").partition(";base64,")
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)
        assert (attrs["width"], attrs["class"]) == ("128", "pixelated")


def test_the_page_shows_as_many_as_the_recipe_asks_for(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    with_report(folder, ReportConfig(grid=7, gallery=3))
    report(folder, folder / "8-report")
    page = Page((folder / "8-report" / "report.html").read_text(encoding="utf-8"))
    cards = [attrs for attrs in page.all("article")]
    refused = page.text.count("not selected:")
    assert len(cards) == 7 + 6 + 3 + refused
    assert page.text.count("selected: rank") - page.text.count("not selected: rank") == 3


def test_seeds_that_differ_are_refused(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    path = folder / "7-evaluate" / "images-tuned-00000.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("seed")
    seeds = pa.array([s + 1 for s in table["seed"].to_pylist()], pa.int64())
    pq.write_table(table.set_column(at, "seed", seeds), path)
    with pytest.raises(UserError, match="same prompts, samples and seeds"):
        report(folder, folder / "8-report")


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
