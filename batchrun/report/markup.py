"""Parts of an HTML page that needs nothing else: no font, no picture, no script from elsewhere.

All that came with a job is escaped, and a page's own policy allows the script that is part of it and no other.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from batchrun.report.records import TokenCounts, Warned
from batchrun.report.wording import percent, printable

ROWS_OPEN = 8  # of a table, at most; the others unfold


def render(
    *,
    title: str,
    tone: str,
    subject: str,
    tiles: Sequence[str],
    sections: Iterable[str],
    head: str = "",
    scripts: Sequence[str] = (),
) -> str:
    """A page.

    Args:
        title: its heading, as plain text.
        tone: `good`, `warn` or `bad`: the colour of the heading.
        subject: a line below it, as plain text.
        tiles, sections: HTML.
        head: HTML that goes into the head.
        scripts: all that the page may run.
    """
    digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return Template((files("batchrun.report") / "page.html").read_text("utf-8")).substitute(
        title=text(title),
        tone=tone,
        subject=text(subject),
        columns=5 if len(tiles) % 5 == 0 else 4,
        tiles="\n".join(tiles),
        sections="\n".join(sections),
        head=head,
        policy="default-src 'none'; style-src 'unsafe-inline'" + (f"; script-src {allowed}" if scripts else ""),
        scripts="".join(f"<script>{code}</script>\n" for code in scripts),
    )


def text(words: str) -> str:
    """Plain text as HTML."""
    return escape(printable(words, limit=2000))


# --- parts of a page ---


def tile(value: str, words: str) -> str:
    """A figure and what it counts."""
    return f'<div class="tile"><b>{value}</b><span>{words}</span></div>'


def section(title: str, body: str) -> str:
    """A part of the page under a heading."""
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def warnings(warned: Sequence[Warned]) -> str:
    """Warnings, if there are any."""
    rows = [(f"{warning.count:,}", text(warning.code), text(warning.message)) for warning in warned]
    return section("Warnings", table(("number", "name", ""), ("places", "code", "message"), rows)) if rows else ""


def token_bars(tokens: TokenCounts, saving: float, computed: str) -> str:
    """Prompt tokens before and after sharing.

    Args:
        computed: what the computed ones are.
    """
    bars = (
        ("logical", tokens.prompt_logical, "grey"),
        ("physical", tokens.prompt_physical, "teal"),
        ("computed", tokens.prompt_computed, "blue"),
    )
    longest = max(1, *(count for _, count, _ in bars))
    rows = "".join(
        f"<span>{name}</span>"
        f'<div><i class="{colour}" style="width:{100 * count / longest:.2f}%"></i></div><b>{count:,}</b>\n'
        for name, count, colour in bars
    )
    words = f"Logical: all prompts as they are. Physical: each shared prefix once. Computed: {computed}."
    return section(
        f"Prompt tokens: {percent(saving)} saved by sharing", f'<div class="bars">\n{rows}</div>' + note(words)
    )


def pairs(named: Iterable[tuple[str, str]]) -> str:
    """A table of names and values, given as plain text."""
    rows = "".join(f'<tr><td class="name">{text(name)}</td><td>{text(value)}</td></tr>\n' for name, value in named)
    return f"<table>\n{rows}</table>"


def table(
    classes: Sequence[str], head: Sequence[str], rows: Sequence[Sequence[str]], rows_open: int = ROWS_OPEN
) -> str:
    """A table of HTML, without a head if that is empty; the rows after the first `rows_open` in one that unfolds."""

    def line(tag: str, cells: Sequence[str]) -> str:
        inside = (f'<{tag} class="{name}">{cell}</{tag}>' for name, cell in zip(classes, cells, strict=True))
        return f"<tr>{''.join(inside)}</tr>\n"

    def part(rows: Sequence[Sequence[str]]) -> str:
        top = line("th", head) if any(head) else ""
        return f"<table>\n{top}{''.join(line('td', row) for row in rows)}</table>"

    more = rows[rows_open:]
    folded = f"<details><summary>{len(more):,} more</summary>\n{part(more)}</details>" if more else ""
    return part(rows[:rows_open]) + folded


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """What colours mean."""
    items = "".join(f'<li><i class="{colour}"></i>{text(words)}</li>' for colour, words in entries)
    return f'<ul class="legend">{items}</ul>'


def note(words: str) -> str:
    """A remark, given as plain text."""
    return f'\n<p class="note">{text(words)}</p>' if words else ""
