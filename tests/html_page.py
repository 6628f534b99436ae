"""A reader of our HTML pages that takes no broken tag."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "</td></table><script>alert(1)</script>\x1b[31m\x00\ud800\u202e\"' onload=x & $outcome [red]"


class Page(HTMLParser):
    """Checks that every tag is closed in its turn; keeps the tags, their attributes and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and kind in (None, attrs.get("class"))]


def without_scripts(html: str) -> str:
    """A page without uPlot, its style and its licence, and without what it draws."""
    html = re.sub(r"<script\b.*?</script>", "", html, flags=re.DOTALL)
    return re.sub(r"<!--.*?-->", "", html, flags=re.DOTALL)


def assert_self_contained(html: str, scripts: list[str]) -> None:
    """Nothing comes from elsewhere, and nothing but `scripts` may run: each has its hash in the page's policy."""
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?:|url\(|@import|\bnan\b|\binf\b", without_scripts(html))
    page = Page(html)
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "href")]
    assert re.findall(r"<script>(.*?)</script>", html, re.DOTALL) == scripts
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policies = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    assert policies == [f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"]
    assert "prefers-color-scheme: dark" in html


def course_of(html: str) -> dict[str, Any]:
    """What the charts of a page draw."""
    [data] = re.findall(r'<script type="application/json" id="course">(.*?)</script>', html)
    return json.loads(data)
