"""The report of a run as one HTML page, which runs no script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from batchrun.report.markup import (
    legend,
    note,
    pairs,
    render,
    section,
    step_charts,
    table,
    text,
    tile,
    token_bars,
    warnings,
)
from batchrun.report.records import GroupSummary, Report, Seconds
from batchrun.report.wording import as_expected, duration, outcome, percent, plural, rate, stages

COLUMNS = 600  # of a chart, at most

_STAGE_COLOURS = {"load": "violet", "tokenize": "teal", "plan": "orange", "execute": "blue", "other": "grey"}


def render_page(report: Report, steps: npt.NDArray[np.void]) -> str:
    """The HTML page of a run.

    Args:
        report: of the run.
        steps: its steps, `[steps]` as in `StepLog.columns`; may be empty.
    """
    counts = report.request_counts
    return render(
        title=outcome(counts),
        tone="bad" if counts.failed else "warn" if counts.remaining else "good",
        subject=f"{report.model} on {report.device} in {report.dtype}, {report.schedule_order} order",
        tiles=_tiles(report),
        sections=[
            warnings(report.warnings),
            _errors(report.errors),
            token_bars(report.tokens, report.saving, "what was run, with what had to be computed again"),
            _time(report.seconds),
            *step_charts(steps, report.kv, COLUMNS),
            _groups(report.groups),
            _details(report),
        ],
    )


def _tiles(report: Report) -> Iterable[str]:
    tokens, total, throughput, kv = report.tokens, report.seconds.total, report.throughput, report.kv
    yield tile(f"{tokens.prompt_logical:,}", "prompt tokens")
    yield tile(percent(report.saving), "of them saved by sharing")
    yield tile(f"{tokens.output:,}", "output tokens")
    yield tile("–" if total is None else duration(total), f"in all, {plural(report.steps, 'step')}")
    yield tile(_known(throughput.requests_per_second), "requests/s")
    yield tile(_known(throughput.input_tokens_per_second), "input tokens/s")
    yield tile(_known(throughput.output_tokens_per_second), "output tokens/s")
    yield tile(f"{kv.peak_pages:,}", f"KV pages at peak, of {kv.pages:,}")


def _known(value: float | None) -> str:
    return "–" if value is None else rate(value)


def _errors(errors: Mapping[str, int]) -> str:
    rows = [(f"{count:,}", text(code)) for code, count in _most_first(errors)]
    if not rows:
        return ""
    counted = table(("number", ""), ("lines", "code"), rows)
    return section("Errors", counted + note("Each failed line, with its reason, is in errors.jsonl."))


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
    colours = [(_STAGE_COLOURS[name], f"{name} {duration(part)} ({percent(part / whole)})") for name, part in parts]
    return section(f"Time: {duration(whole)}", f'<div class="stack">{stack}</div>\n{legend(colours)}')


def _groups(groups: Sequence[GroupSummary]) -> str:
    if not groups:
        return ""
    rows = [
        (f"{group.id:,}", f"{group.prefix_tokens:,}", f"{group.requests:,}", f"{spared:,}", "")
        for group in groups
        for spared in [group.prefix_tokens * (group.requests - 1)]
    ]
    head = ("group", "prefix tokens", "requests", "tokens spared", "")
    words = note("Where one group is part of another, what the two have in common counts for both.")
    return section("Largest prefix-sharing groups", table(("number",) * 4 + ("",), head, rows) + words)


def _details(report: Report) -> str:
    kv = report.kv
    run = [
        (
            "finish reasons",
            ", ".join(f"{name} {count:,}" for name, count in _most_first(report.finish_reasons)) or "–",
        ),
        *(
            [("expected", as_expected(report.expected, report.seconds.execute))]
            if report.expected is not None and report.seconds.execute is not None
            else []
        ),
        ("KV memory", f"{plural(kv.pages, 'page')} of {plural(kv.page_size, 'token')}"),
        ("duplicates, not computed", f"{report.duplicates:,}"),
        ("idle rows", f"{report.idle_rows:,}"),
        ("padded rows", f"{report.padded_rows:,}"),
        ("preemptions", f"{report.preemptions:,}"),
        ("steps cut for memory", f"{report.memory_retries:,}"),
        ("worker restarts", f"{report.worker_restarts:,}"),
        ("prefix evictions", f"{report.prefix_evictions:,}"),
    ]
    environment = [
        (name, "–" if value is None else value if isinstance(value, str) else json.dumps(value, default=str))
        for name, value in report.environment.items()
    ]
    parts = [section("Run", pairs(run))]
    if environment:
        parts.append(section("Environment", pairs(environment)))
    return f'<div class="pair">\n{"".join(parts)}\n</div>'


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
