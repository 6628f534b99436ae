"""Parts of an HTML page that needs nothing else: no font, no picture, no script from elsewhere.

All that came with a job is escaped, and a page's own policy allows the script that is part of it and no other.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

import numpy as np
import numpy.typing as npt

from batchrun.report.records import KvUse, TokenCounts, Warned
from batchrun.report.wording import duration, percent, printable, rate

ROWS_OPEN = 8  # of a table, at most; the others unfold

# A chart in units of its view box.
_WIDTH, _HEIGHT = 960, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 8, 12, 22
_ROOM, _FLOOR = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
_WIDEST_COLUMN = 40.0

Float = npt.NDArray[np.float64]


def render(
    *, title: str, tone: str, subject: str, tiles: Iterable[str], sections: Iterable[str], script: str | None = None
) -> str:
    """A page.

    Args:
        title: its heading, as plain text.
        tone: `good`, `warn` or `bad`: the colour of the heading.
        subject: a line below it, as plain text.
        tiles, sections: HTML.
        script: name of a file of this package: the one script that the page may run.
    """
    folder = files("batchrun.report")
    code = (folder / script).read_text("utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return Template((folder / "page.html").read_text("utf-8")).substitute(
        title=text(title),
        tone=tone,
        subject=text(subject),
        tiles="\n".join(tiles),
        sections="\n".join(sections),
        policy="default-src 'none'; style-src 'unsafe-inline'" + (f"; script-src 'sha256-{digest}'" if script else ""),
        script=f"<script>{code}</script>\n" if script else "",
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


# --- charts ---


def step_charts(
    steps: npt.NDArray[np.void], kv: KvUse, columns: int, *, over_time: bool = False, remark: str = ""
) -> Iterable[str]:
    """Rows and KV pages of each step.

    Args:
        steps: as in `StepLog.columns`.
        kv: the pool.
        columns: that are drawn at most; of more steps some are drawn as one.
        over_time: whether columns are as wide as their steps take time; such charts can be zoomed.
        remark: what else is said below them.
    """
    if not steps.size:
        yield section("Steps", note("No step was run."))
        return
    edges = np.linspace(0, steps.size, min(steps.size, columns) + 1).round().astype(np.int64)
    first, count = edges[:-1], np.diff(edges)
    prefill = np.add.reduceat(steps["prefill_rows"], first) / count
    decode = np.add.reduceat(steps["decode_rows"], first) / count
    pages = np.maximum.reduceat(steps["pages_used"], first).astype(np.float64)
    spans = [
        f"step {start:,}" if start + 1 == end else f"steps {start:,} to {end - 1:,}"
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    place, unit = edges.astype(np.float64), "step"
    if over_time and float(steps["seconds"].sum()) > 0:
        seconds = np.concatenate(([0.0], np.cumsum(steps["seconds"])))[edges]
        spans = [
            f"{span}, {duration(begin)} to {duration(end)}"
            for span, begin, end in zip(spans, seconds[:-1].tolist(), seconds[1:].tolist(), strict=True)
        ]
        unit, length = next(
            (unit, length)
            for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 0.001))
            if seconds[-1] >= 3 * length or unit == "ms"
        )
        place = seconds / length
    merged = steps.size > columns

    each = ", a mean" if merged else ""
    colours = [
        ("orange", f"decode: {steps['decode_rows'].sum():,}"),
        ("blue", f"prefill: {steps['prefill_rows'].sum():,}"),
    ]
    titles = [
        f"{span}: {rate(p)} prefill, {rate(d)} decode{each}"
        for span, p, d in zip(spans, prefill.tolist(), decode.tolist(), strict=True)
    ]
    words = f"Each column is the mean of {count.min():,} to {count.max():,} steps. " if merged else ""
    layers = [(decode, "orange"), (prefill, "blue")]
    drawn = _chart(place, unit, layers, titles, "Prefill and decode rows of each step", zoom=over_time)
    yield section("Rows of each step", f"{drawn}\n{legend(colours)}{note((words + remark).strip())}")

    # A pool far above the peak would press the curve flat: then the scale is that of the peak.
    shown = kv.pages <= 6 * pages.max()
    titles = [f"{span}: {int(used):,} pages" for span, used in zip(spans, pages.tolist(), strict=True)]
    limit = kv.pages if shown else None
    drawn = _chart(place, unit, [(pages, "teal")], titles, "KV pages used in each step", limit=limit, zoom=over_time)
    words = "dashed: the pool" if shown else "the pool is far above this scale"
    share = f", {percent(kv.peak_pages / kv.pages)}" if kv.pages else ""
    words = f"Peak {kv.peak_pages:,} of {kv.pages:,} pages{share}; {words}. {remark}".strip()
    yield section("KV pages used", drawn + note(words))


def _chart(
    edges: Float,
    unit: str,
    layers: Sequence[tuple[Float, str]],
    titles: Sequence[str],
    label: str,
    *,
    limit: int | None = None,
    zoom: bool = False,
) -> str:
    """Columns, the layers one on the other.

    Args:
        edges: float64 `[columns + 1]`, where the columns begin, and the end.
        unit: what these count.
        layers: heights, float64 `[columns]`, and colour of each, the lowest first.
        titles: what is said of each column under the pointer.
        label: what the chart shows, for readers who cannot see it.
        limit: where to draw a dashed line.
        zoom: whether it is one that a script zooms.
    """
    highest = float(np.sum([heights for heights, _ in layers], axis=0).max())
    ticks = _ticks(max(highest, limit or 0, 1))
    top = max(ticks[-1], highest, limit or 0)
    widest = _WIDEST_COLUMN if unit == "step" else np.inf
    x = _LEFT + edges * min(_ROOM / edges[-1], widest)

    def y(value: float) -> float:
        return _FLOOR - (_FLOOR - _TOP) * value / top

    def across(kind: str, value: float) -> str:
        return f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'

    kind = ' class="zoom"' if zoom else ""
    parts = [f'<svg{kind} viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    for tick in ticks:
        parts.append(across("grid", tick))
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,}</text>')
    # Zooming stretches what is inside, and nothing else.
    parts.append(
        f'<svg class="plot" x="{_LEFT}" y="0" width="{_ROOM}" height="{_HEIGHT}" '
        f'viewBox="{_LEFT} 0 {_ROOM} {_HEIGHT}" preserveAspectRatio="none">'
    )
    low = np.zeros(edges.size - 1)
    for heights, colour in layers:
        parts.append(f'<path class="{colour}" d="{_outline(x, _FLOOR, (_FLOOR - _TOP) / top, low, low + heights)}"/>')
        low = low + heights
    for left, right, title in zip(x[:-1].tolist(), x[1:].tolist(), titles, strict=True):
        parts.append(
            f'<rect class="hit" x="{left:.2f}" y="{_TOP}" width="{right - left:.2f}" height="{_FLOOR - _TOP}">'
            f"<title>{title}</title></rect>"
        )
    parts.append("</svg>")
    if limit is not None:
        parts.append(across("limit", limit))
    parts.append(f'<g class="ticks" data-span="{edges[-1] * _ROOM / (x[-1] - _LEFT):.6g}">')
    for tick in _ticks(edges[-1]):
        place = _LEFT + tick * (x[-1] - _LEFT) / edges[-1]
        if tick < edges[-1] and place < _WIDTH - 100:
            parts.append(f'<text x="{place:.1f}" y="{_FLOOR + 15}">{tick:,}</text>')
    parts.append(f'</g><text x="{_WIDTH - _RIGHT}" y="{_FLOOR + 15}" text-anchor="end">{unit}</text>')
    parts.append("</svg>")
    return "\n".join(parts)


def _outline(x: Float, floor: float, scale: float, low: Float, high: Float) -> str:
    """The path around columns that stand between `low` and `high`: along their tops, back along their feet."""
    corners = np.repeat(x, 2)[1:-1]
    over = zip(corners.tolist(), np.repeat(floor - scale * high, 2).tolist(), strict=True)
    under = zip(corners[::-1].tolist(), np.repeat(floor - scale * low, 2)[::-1].tolist(), strict=True)
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in [*over, *under]) + "Z"


def _ticks(highest: float) -> list[int]:
    """From 0 up to `highest`: three to six round whole numbers, fewer where there are not so many."""
    rough = highest / 5
    power = 10 ** max(math.floor(math.log10(rough)), 0) if rough > 1 else 1
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return list(range(0, int(highest) + 1, step))
