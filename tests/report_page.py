"""The report of a made-up run, taken apart for tests."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fake_run import FAKE, Fake, fake_run

from craftune.stages.report import report


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
