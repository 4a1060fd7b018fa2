"""The report in a real browser: nothing breaks or overflows, light and dark, wide and narrow."""

import shutil
from collections.abc import Iterator

import pytest
from fake_run import Fake, fake_run
from playwright import sync_api

from craftune.stages.report import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.browser
if CHROMIUM is None:
    pytest.skip("no chromium here (Debian: apt-get install chromium)", allow_module_level=True)

WIDTHS = (1280, 390)
LONG = ("a " + "very " * 2000 + "long prompt", "unbroken" * 300, "<script>alert(1)</script>")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as driver:
        # No sandbox: containers that run as root cannot have one, and the page is our own.
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    fake_run(folder, Fake(texts=LONG, test_prompts=24))
    report(folder, folder / "8-report")
    return (folder / "8-report" / "report.html").as_uri()


@pytest.fixture
def opened(browser: sync_api.Browser, address: str) -> Iterator[sync_api.Page]:
    """The page; whatever it complains about fails the test."""
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    page.on("request", lambda r: complaints.append(r.url) if not is_local(r.url, address) else None)
    page.goto(address)
    yield page
    page.close()
    assert complaints == []


def is_local(url: str, address: str) -> bool:
    return url == address or url.startswith("data:")


def background(page: sync_api.Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_all_pictures_are_decoded(opened: sync_api.Page) -> None:
    widths = opened.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(widths) > 40
    assert min(widths) > 0


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_never_scrolls_sideways(opened: sync_api.Page, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 900})
    opened.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    # Nor is anything cut off: only what scrolls by itself may be wider than the page.
    wide = opened.evaluate(
        """[...document.querySelectorAll('main *')].filter(e =>
            e.getBoundingClientRect().right > innerWidth + 1
            && !e.closest('.scroll, pre, .hidden')).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert wide == []


def test_text_is_large_enough_and_stands_out(opened: sync_api.Page) -> None:
    """Body text against its background by WCAG's contrast, in both schemes."""
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        for selector in (".lead", ".meta", ".intro", ".card .quiet", ".chip.up", ".lines .up"):
            contrast = opened.evaluate(CONTRAST, selector)
            assert contrast >= 4.5, (scheme, selector, contrast)
    sizes = "[...document.querySelectorAll('main p, main td, main th, main span')]"
    smallest = opened.evaluate(
        f"Math.min(...{sizes}.map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 10


def test_both_colour_schemes_follow_the_system_and_the_button(opened: sync_api.Page) -> None:
    opened.emulate_media(color_scheme="light")
    light = background(opened)
    opened.emulate_media(color_scheme="dark")
    dark = background(opened)
    assert light != dark
    button = opened.get_by_role("button", name="Switch between light and dark")
    button.focus()
    opened.keyboard.press("Enter")
    assert background(opened) == light
    opened.reload()
    assert background(opened) == light
    button.click()
    opened.emulate_media(color_scheme="light")
    assert background(opened) == dark


def test_without_scripts_everything_is_there(browser: sync_api.Browser, address: str) -> None:
    page = browser.new_page(java_script_enabled=False, viewport={"width": 1280, "height": 900})
    page.goto(address)
    assert page.locator("#theme").is_hidden()
    assert page.locator("article").first.is_visible()
    assert page.locator("svg.chart").first.is_visible()
    page.close()


def test_charts_have_colours(opened: sync_api.Page) -> None:
    """Classes that the style sheet does not know would leave black shapes."""
    style = "e => { const s = getComputedStyle(e); return [s.fill, s.stroke]; }"
    for kind in ("base", "tuned"):
        fill, stroke = opened.locator(f".chart .area.{kind}").first.evaluate(style)
        assert "rgb(0, 0, 0)" not in (fill, stroke)
    assert opened.locator(".chart .smooth").first.evaluate(style)[0] == "none"


CONTRAST = """selector => {
  const paint = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = colour => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const element = document.querySelector(selector);
  let behind = element;
  while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
    .map(colour => light(rgb(colour)));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
