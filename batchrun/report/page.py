"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

All that came with a job is escaped, and the page's own policy forbids scripts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

import numpy as np
import numpy.typing as npt

from batchrun.report.records import GroupSummary, KvUse, Report, Seconds, TokenCounts, Warned
from batchrun.report.wording import duration, outcome, percent, plural, printable, rate, stages

COLUMNS = 600  # of a chart, at most
ROWS_OPEN = 8  # of a table, at most; the others unfold

# A chart in units of its view box.
_WIDTH, _HEIGHT = 960, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 8, 12, 22
_WIDEST_COLUMN = 40.0

_STAGE_COLOURS = {"load": "violet", "tokenize": "teal", "plan": "orange", "execute": "blue", "other": "grey"}

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


def render_page(report: Report, steps: npt.NDArray[np.void]) -> str:
    """The HTML page of a run.

    Args:
        report: of the run.
        steps: its steps, `[steps]` as in `StepLog.columns`; may be empty.
    """
    counts = report.request_counts
    tone = "bad" if counts.failed else "warn" if counts.remaining else "good"
    return Template((files("batchrun.report") / "page.html").read_text("utf-8")).substitute(
        outcome=_text(outcome(counts)),
        tone=tone,
        subject=_text(f"{report.model} on {report.device} in {report.dtype}, {report.schedule_order} order"),
        tiles="\n".join(_tiles(report)),
        sections="\n".join(
            [
                _warnings(report.warnings),
                _errors(report.errors),
                _tokens(report.tokens, report.saving),
                _time(report.seconds),
                *_charts(steps, report.kv),
                _groups(report.groups),
                _details(report),
            ]
        ),
    )


def _text(text: str) -> str:
    return escape(printable(text, limit=2000))


# --- parts of the page ---


def _tiles(report: Report) -> Iterable[str]:
    tokens, total, throughput, kv = report.tokens, report.seconds.total, report.throughput, report.kv
    yield _tile(f"{tokens.prompt_logical:,}", "prompt tokens")
    yield _tile(percent(report.saving), "of them saved by sharing")
    yield _tile(f"{tokens.output:,}", "output tokens")
    yield _tile("–" if total is None else duration(total), f"in all, {plural(report.steps, 'step')}")
    yield _tile(_known(throughput.requests_per_second), "requests/s")
    yield _tile(_known(throughput.input_tokens_per_second), "input tokens/s")
    yield _tile(_known(throughput.output_tokens_per_second), "output tokens/s")
    yield _tile(f"{kv.peak_pages:,}", f"KV pages at peak, of {kv.pages:,}")


def _tile(value: str, words: str) -> str:
    return f'<div class="tile"><b>{value}</b><span>{words}</span></div>'


def _known(value: float | None) -> str:
    return "–" if value is None else rate(value)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _warnings(warnings: Sequence[Warned]) -> str:
    rows = [(f"{warned.count:,}", _text(warned.code), _text(warned.message)) for warned in warnings]
    return _section("Warnings", _table(("number", "name", ""), ("places", "code", "message"), rows)) if rows else ""


def _errors(errors: Mapping[str, int]) -> str:
    rows = [(f"{count:,}", _text(code)) for code, count in _most_first(errors)]
    if not rows:
        return ""
    table = _table(("number", ""), ("lines", "code"), rows)
    return _section("Errors", table + _note("Each failed line, with its reason, is in errors.jsonl."))


def _tokens(tokens: TokenCounts, saving: float) -> str:
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
    body = f'<div class="bars">\n{rows}</div>'
    note = (
        "Logical: all prompts as they are. Physical: each shared prefix once. Computed: what was run, "
        "with what had to be computed again."
    )
    return _section(f"Prompt tokens: {percent(saving)} saved by sharing", body + _note(note))


def _time(seconds: Seconds) -> str:
    parts = stages(seconds)
    spent = sum(part for _, part in parts)
    if seconds.total is not None and seconds.total > spent:
        parts.append(("other", seconds.total - spent))
    whole = sum(part for _, part in parts)
    if not whole:
        return ""
    stack = "".join(
        f'<i class="{_STAGE_COLOURS[name]}" style="width:{100 * part / whole:.2f}%"></i>' for name, part in parts
    )
    legend = [(_STAGE_COLOURS[name], f"{name} {duration(part)} ({percent(part / whole)})") for name, part in parts]
    return _section(f"Time: {duration(whole)}", f'<div class="stack">{stack}</div>\n{_legend(legend)}')


def _groups(groups: Sequence[GroupSummary]) -> str:
    if not groups:
        return ""
    rows = [
        (f"{group.id:,}", f"{group.prefix_tokens:,}", f"{group.requests:,}", f"{spared:,}", "")
        for group in groups
        for spared in [group.prefix_tokens * (group.requests - 1)]
    ]
    head = ("group", "prefix tokens", "requests", "tokens spared", "")
    note = _note("Where one group is part of another, what the two have in common counts for both.")
    return _section("Largest prefix-sharing groups", _table(("number",) * 4 + ("",), head, rows) + note)


def _details(report: Report) -> str:
    kv = report.kv
    run = [
        (
            "finish reasons",
            ", ".join(f"{name} {count:,}" for name, count in _most_first(report.finish_reasons)) or "–",
        ),
        ("KV memory", f"{plural(kv.pages, 'page')} of {plural(kv.page_size, 'token')}"),
        ("idle rows", f"{report.idle_rows:,}"),
        ("padded rows", f"{report.padded_rows:,}"),
        ("preemptions", f"{report.preemptions:,}"),
        ("prefix evictions", f"{report.prefix_evictions:,}"),
    ]
    environment = [
        (name, "–" if value is None else value if isinstance(value, str) else json.dumps(value, default=str))
        for name, value in report.environment.items()
    ]
    parts = [_section("Run", _pairs(run))]
    if environment:
        parts.append(_section("Environment", _pairs(environment)))
    return f'<div class="pair">\n{"".join(parts)}\n</div>'


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f'<tr><td class="name">{_text(name)}</td><td>{_text(value)}</td></tr>\n' for name, value in pairs)
    return f"<table>\n{rows}</table>"


def _table(classes: Sequence[str], head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the rows after the first `ROWS_OPEN` in one that unfolds."""

    def line(tag: str, cells: Sequence[str]) -> str:
        inside = (f'<{tag} class="{name}">{cell}</{tag}>' for name, cell in zip(classes, cells, strict=True))
        return f"<tr>{''.join(inside)}</tr>\n"

    def table(rows: Sequence[Sequence[str]]) -> str:
        return f"<table>\n{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"

    more = rows[ROWS_OPEN:]
    folded = f"<details><summary>{len(more):,} more</summary>\n{table(more)}</details>" if more else ""
    return table(rows[:ROWS_OPEN]) + folded


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{colour}"></i>{_text(words)}</li>' for colour, words in entries)
    return f'<ul class="legend">{items}</ul>'


def _note(words: str) -> str:
    return f'\n<p class="note">{words}</p>' if words else ""


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


# --- charts ---


def _charts(steps: npt.NDArray[np.void], kv: KvUse) -> Iterable[str]:
    """Rows and KV pages over the steps."""
    if not steps.size:
        yield _section("Steps", '<p class="note">No step was run.</p>')
        return
    edges = np.linspace(0, steps.size, min(steps.size, COLUMNS) + 1).round().astype(np.int64)
    first, count = edges[:-1], np.diff(edges)
    prefill = np.add.reduceat(steps["prefill_rows"], first) / count
    decode = np.add.reduceat(steps["decode_rows"], first) / count
    pages = np.maximum.reduceat(steps["pages_used"], first).astype(np.float64)
    spans = [
        f"step {start:,}" if start + 1 == end else f"steps {start:,} to {end - 1:,}"
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    merged = steps.size > COLUMNS

    each = ", a mean" if merged else ""
    legend = [
        ("orange", f"decode: {steps['decode_rows'].sum():,}"),
        ("blue", f"prefill: {steps['prefill_rows'].sum():,}"),
    ]
    titles = [
        f"{span}: {rate(p)} prefill, {rate(d)} decode{each}"
        for span, p, d in zip(spans, prefill.tolist(), decode.tolist(), strict=True)
    ]
    note = f"Each column is the mean of {count.min():,} to {count.max():,} steps." if merged else ""
    chart = _chart(edges, [(decode, "orange"), (prefill, "blue")], titles, "Prefill and decode rows of each step")
    yield _section("Rows of each step", f"{chart}\n{_legend(legend)}{_note(note)}")

    # A pool far above the peak would press the curve flat: then the scale is that of the peak.
    shown = kv.pages <= 6 * pages.max()
    titles = [f"{span}: {int(used):,} pages" for span, used in zip(spans, pages.tolist(), strict=True)]
    chart = _chart(edges, [(pages, "teal")], titles, "KV pages used in each step", limit=kv.pages if shown else None)
    words = "dashed: the pool" if shown else "the pool is far above this scale"
    share = f", {percent(kv.peak_pages / kv.pages)}" if kv.pages else ""
    note = f"Peak {kv.peak_pages:,} of {kv.pages:,} pages{share}; {words}."
    yield _section("KV pages used", chart + _note(note))


def _chart(
    edges: Int, layers: Sequence[tuple[Float, str]], titles: Sequence[str], label: str, *, limit: int | None = None
) -> str:
    """Columns over steps, the layers one on the other.

    Args:
        edges: int64 `[columns + 1]`, the steps where the columns begin, and the end.
        layers: heights, float64 `[columns]`, and colour of each, the lowest first.
        titles: what is said of each column under the pointer.
        label: what the chart shows, for readers who cannot see it.
        limit: where to draw a dashed line.
    """
    highest = float(np.sum([heights for heights, _ in layers], axis=0).max())
    ticks = _ticks(max(highest, limit or 0, 1))
    top = max(ticks[-1], highest, limit or 0)
    floor = _HEIGHT - _BOTTOM
    room = _WIDTH - _LEFT - _RIGHT
    x = _LEFT + edges * min(room / edges[-1], _WIDEST_COLUMN)

    def y(value: float) -> float:
        return floor - (floor - _TOP) * value / top

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,}</text>')
    low = np.zeros(edges.size - 1)
    for heights, colour in layers:
        parts.append(f'<path class="{colour}" d="{_outline(x, floor, (floor - _TOP) / top, low, low + heights)}"/>')
        low = low + heights
    if limit is not None:
        parts.append(
            f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>'
        )
    for tick in _ticks(int(edges[-1])):
        place = _LEFT + tick * (x[-1] - _LEFT) / edges[-1]
        if tick < edges[-1] and place < _WIDTH - 100:
            parts.append(f'<text x="{place:.1f}" y="{floor + 15}">{tick:,}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{floor + 15}" text-anchor="end">step</text>')
    for left, right, title in zip(x[:-1].tolist(), x[1:].tolist(), titles, strict=True):
        parts.append(
            f'<rect class="hit" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{floor - _TOP}">'
            f"<title>{title}</title></rect>"
        )
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
