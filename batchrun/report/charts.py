"""Charts of steps over time on a page, drawn by uPlot, which the page carries with it.

What is drawn is data of the page, numbers and our own words alone. Of many steps some are drawn as one: areas are their
means over time and lines the most of them, so that no peak is lost.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.report.markup import legend, note, section, table, text
from batchrun.report.plots import course
from batchrun.report.records import KvUse
from batchrun.report.wording import duration, percent, rate

COLUMNS = 2000  # of a chart, at most
_SLICES = 12  # of the table that says the same

Float = npt.NDArray[np.float64]


def scripts() -> list[str]:
    """What a page with charts runs."""
    folder = files("batchrun.report")
    return [
        (folder / "uplot" / "uPlot.iife.min.js").read_text("utf-8"),
        (folder / "charts.js").read_text("utf-8"),
    ]


def head() -> str:
    """What a page with charts has in its head: uPlot's style, and its licence, which goes where it goes."""
    folder = files("batchrun.report") / "uplot"
    return (
        f"<!--\nuPlot\n\n{(folder / 'LICENSE').read_text('utf-8')}-->\n"
        f"<style>{(folder / 'uPlot.min.css').read_text('utf-8')}</style>"
    )


def step_charts(steps: npt.NDArray[np.void], kv: KvUse, *, remark: str = "") -> list[str]:
    """Rows, KV pages, and requests under way and waiting, over the time of the steps; and the same as a table.

    Args:
        steps: as in `StepLog.columns`.
        kv: the pool.
        remark: what else is said of them.
    """
    if not steps.size:
        return [section("Steps", note("No step was run, or they were not logged."))]
    drawn = _columns(steps)
    peak, pool = int(steps["pages_used"].max()), kv.pages
    # A pool far above the peak would press the curve flat: then the scale is that of the peak.
    shown = pool <= 6 * peak
    merged = int(drawn["steps"].max())
    words = [
        *([f"Each point is {merged:,} steps at most: areas are their mean, lines the most of them."] * (merged > 1)),
        *([remark] if remark else []),
    ]
    payload: dict[str, Any] = {name: _short(column) for name, column in drawn.items()}
    payload["total"] = float(f"{steps['seconds'].sum():.6g}")
    if shown:
        payload["pool"] = pool
    rows = f"Rows of a step over time: {int(steps['rows'].max()):,} at most"
    pages = f"KV pages over time: {peak:,} at most, of {pool:,}" + (f" ({percent(peak / pool)})" if pool else "")
    running, waiting = (int(steps[name].max()) for name in ("running", "waiting"))
    requests = f"Requests over time: {running:,} under way and {waiting:,} waiting at most"
    colours = [
        ("orange", f"decode: {steps['decode_rows'].sum():,}"),
        ("blue", f"prefill: {steps['prefill_rows'].sum():,}"),
    ]
    limit = "Dashed: the pool." if shown else "The pool is far above this scale."
    return [
        section("Rows of each step", _chart("rows", rows) + legend(colours) + note(" ".join(words))),
        section("KV pages used", _chart("pages", pages) + note(f"{pages}. {limit}")),
        section(
            "Requests",
            _chart("requests", requests)
            + legend([("blue", "under way"), ("violet", "waiting")])
            + note(f"{requests}."),
        ),
        _as_table(steps),
        f'<script type="application/json" id="course">{_json(payload)}</script>',
    ]


def _chart(name: str, label: str) -> str:
    return (
        f'<div class="chart" data-chart="{name}" role="img" tabindex="0" aria-label="{text(label)}">'
        "<noscript>Charts need JavaScript. The table below has the figures.</noscript></div>"
    )


def _columns(steps: npt.NDArray[np.void]) -> dict[str, npt.NDArray[Any]]:
    """Columns of equally many steps, more or less."""
    edges = np.linspace(0, steps.size, min(steps.size, COLUMNS) + 1).round().astype(np.int64)
    first, count = edges[:-1], np.diff(edges)
    seconds = steps["seconds"] if float(steps["seconds"].sum()) > 0 else np.ones(steps.size)
    ends = np.concatenate(([0.0], np.cumsum(seconds)))[edges]

    def mean(name: str) -> Float:
        return np.add.reduceat(steps[name] * seconds, first) / np.maximum(np.add.reduceat(seconds, first), 1e-300)

    def most(name: str) -> npt.NDArray[np.int64]:
        return np.maximum.reduceat(steps[name], first)

    return {
        "ends": ends,  # one more than the others: where the first begins
        "first": first,
        "steps": count,
        "prefill": mean("prefill_rows"),
        "decode": mean("decode_rows"),
        "rows": most("rows"),
        "pages": most("pages_used"),
        "running": most("running"),
        "waiting": most("waiting"),
    }


def _short(column: npt.NDArray[Any]) -> list[float] | list[int]:
    """Six digits of times and means, and every digit of what is whole."""
    if column.dtype.kind == "i":
        return column.tolist()
    scale = 10.0 ** (5 - np.floor(np.log10(np.maximum(np.abs(column), 1e-12))))
    values = np.round(np.round(column * scale) / scale, 12)
    return [int(value) if value == int(value) else value for value in values.tolist()]


def _json(value: Any) -> str:
    """JSON that ends no script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _as_table(steps: npt.NDArray[np.void]) -> str:
    """The charts in figures, for those who cannot see them."""
    over = course(steps, min(_SLICES, steps.size))
    edges = np.linspace(0, over.seconds, over.decode.size + 1).tolist()
    rows = [
        (
            duration(begin),
            duration(end),
            rate(prefill),
            rate(decode),
            f"{pages:,.0f}",
            f"{running:,.0f}",
            f"{waiting:,.0f}",
        )
        for begin, end, prefill, decode, pages, running, waiting in zip(
            edges[:-1],
            edges[1:],
            over.prefill.tolist(),
            over.decode.tolist(),
            over.pages.tolist(),
            over.running.tolist(),
            over.waiting.tolist(),
            strict=True,
        )
    ]
    head = ("from", "to", "prefill rows", "decode rows", "KV pages", "under way", "waiting")
    shown = table(("number",) * 7, head, rows, len(rows))
    words = note("Rows of a step are means over time; pages and requests the most at any time.")
    return f"<section>\n<details><summary>The charts in figures</summary>\n{shown}{words}</details>\n</section>"
