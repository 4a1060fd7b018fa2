"""The page shows what it should, says what is missing, and obeys no prompt."""

import base64
import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import Fake, fake_run, with_report
from PIL import Image
from report_page import Page, made

from craftune.config import ReportConfig
from craftune.stages.report import report

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "{{ 7 * 7 }} {% raw %} </style></title><!-- &lt; \u202e",
    "javascript:alert(4)",
    "long " * 2000,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    fake_run(folder)
    report(folder, folder / "8-report")
    return folder


@pytest.fixture
def page(demo: Path) -> Page:
    return Page((demo / "8-report" / "report.html").read_text(encoding="utf-8"))


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
        names = [n.replace("shapes-i", 'm:"><svg onload=x>') for n in table["reward"].to_pylist()]
        at = table.schema.get_field_index("reward")
        pq.write_table(table.set_column(at, "reward", pa.array(names)), path)
    report(folder, folder / "8-report")
    page = Page((folder / "8-report" / "report.html").read_text(encoding="utf-8"))
    assert "<b>mine</b>" in page.text
    assert 'm:"><svg onload=x>' in page.text
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


def test_the_sum_of_the_funnel_is_written_out(page: Page) -> None:
    (total,) = re.findall(r"60 = ([\d +]+)", page.text)
    assert sum(map(int, total.split("+"))) == 60
    assert total.split("+")[-1].strip() == "8"
