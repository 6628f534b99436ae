"""The report of a run as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from batchrun.report.charts import head, scripts, step_charts
from batchrun.report.limit import what_limited
from batchrun.report.markup import (
    legend,
    note,
    pairs,
    render,
    section,
    table,
    text,
    tile,
    token_bars,
    warnings,
)
from batchrun.report.records import GroupSummary, Report, SlowRequest, StartSummary
from batchrun.report.wording import (
    KIND_NAMES,
    duration,
    group_rows,
    outcome,
    percent,
    planned_and_measured,
    plural,
    rate,
    start_rows,
    times,
    unmeasured,
)

if TYPE_CHECKING:
    from batchrun.formats.plan import PlanFile

_COLOURS = {
    "load": "violet",
    "tokenize": "pink",
    "plan": "brown",
    "execute": "blue",
    "prefill": "blue",
    "mixed": "teal",
    "decode": "orange",
    "tail": "yellow",
    "host": "red",
    "recovery": "soft",
    "other": "grey",
}


def render_page(
    report: Report,
    steps: npt.NDArray[np.void],
    plan: PlanFile | None = None,
    starts: Sequence[StartSummary] = (),
) -> str:
    """The HTML page of a run.

    Args:
        report: of the run.
        steps: its steps, `[steps]` as in `StepLog.columns`; may be empty.
        plan: that it followed, if it is known.
        starts: what the steps of each of its starts did; this one is the last of them.
    """
    counts = report.request_counts
    limited = what_limited(report, plan)
    return render(
        title=outcome(counts),
        tone="bad" if counts.failed else "warn" if counts.remaining else "good",
        subject=f"{report.model} on {report.device} in {report.dtype}, {report.schedule_order} order"
        + ("; tokens, times and steps are those of the latest start" if report.warned_of("resumed") else ""),
        tiles=list(_tiles(report)),
        sections=[
            section("What limited the run", f"<p>{text(limited.words)}</p>") if limited is not None else "",
            warnings(report.warnings),
            _errors(report.errors),
            _time(report),
            _planned(report, plan),
            _starts(starts),
            *step_charts(steps, report.kv),
            token_bars(report.tokens, report.saving, "what was run, with what had to be computed again"),
            _groups(report.groups, report.tokens.prompt_logical),
            _slowest(report.slowest),
            _details(report),
            section(
                "Not measured", "<ul>" + "".join(f"<li>{text(words)}</li>" for words in unmeasured(report)) + "</ul>"
            ),
        ],
        head=head(),
        scripts=scripts(),
    )


def _tiles(report: Report) -> Iterable[str]:
    counts, tokens, total = report.request_counts, report.tokens, report.seconds.total
    throughput, kv, share = report.throughput, report.kv, report.bound_share
    yield tile(f"{counts.completed:,}", f"requests answered, of {counts.total:,}")
    yield tile(f"{tokens.prompt_logical:,}", "prompt tokens")
    yield tile(percent(report.saving), "of them saved by sharing")
    yield tile(f"{tokens.output:,}", "output tokens")
    yield tile("–" if total is None else duration(total), f"in all, {plural(report.steps, 'step')}")
    yield tile(_known(throughput.requests_per_second), "requests/s")
    yield tile(_known(throughput.input_tokens_per_second), "input tokens/s")
    yield tile(_known(throughput.output_tokens_per_second), "output tokens/s")
    yield tile("–" if share is None else percent(share), "of the bound: the device's peaks for these steps")
    yield tile(f"{kv.peak_pages:,}", f"KV pages at peak, of {kv.pages:,}")


def _known(value: float | None) -> str:
    return "–" if value is None else rate(value)


def _errors(errors: Mapping[str, int]) -> str:
    rows = [(f"{count:,}", text(code)) for code, count in _most_first(errors)]
    if not rows:
        return ""
    counted = table(("number", ""), ("lines", "code"), rows)
    return section("Errors", counted + note("Each failed line, with its reason, is in errors.jsonl."))


def _time(report: Report) -> str:
    parts = times(report)
    whole = sum(part for _, part in parts)
    if not whole:
        return ""
    stack = "".join(f'<i class="{_COLOURS[name]}" style="width:{100 * part / whole:.2f}%"></i>' for name, part in parts)
    colours = [
        (_COLOURS[name], f"{KIND_NAMES.get(name, name)} {duration(part)} ({percent(part / whole)})")
        for name, part in parts
    ]
    words = ""
    if report.step_seconds is not None:
        words = (
            "Prefill to tail: steps by what they did. Tail: nothing waits any more, and less than half of the most "
            f"requests are under way. In {duration(report.step_seconds.held_back)} of the steps requests waited for "
            "KV pages."
        )
    return section(f"Time: {duration(whole)}", f'<div class="stack">{stack}</div>\n{legend(colours)}{note(words)}')


def _planned(report: Report, plan: PlanFile | None) -> str:
    if plan is None or plan.expected != report.expected:
        return ""
    rows = [
        (text(name), text(planned), text(measured)) for name, planned, measured in planned_and_measured(report, plan)
    ]
    shown = table(("name", "number", "number"), ("", "planned", "measured"), rows, len(rows))
    stopped = "The plan is of all requests, and not all of them have run." if report.request_counts.remaining else ""
    return section("Planned and measured", shown + note(stopped))


def _starts(starts: Sequence[StartSummary]) -> str:
    if len(starts) < 2:
        return ""
    head, rows = start_rows(starts)
    words = note(
        "As far as the starts have logged their steps. All else on this page is of the last one, but for the numbers "
        "of requests and of errors."
    )
    return section(plural(len(starts), "start"), table(("name", *("number",) * 6), head, rows, len(rows)) + words)


def _groups(groups: Sequence[GroupSummary], prompt_tokens: int) -> str:
    if not groups:
        return ""
    head, rows = group_rows(groups, prompt_tokens)
    words = note(
        "Saved: of all prompt tokens. Where one group is part of another, what they have in common counts twice."
    )
    return section("Largest prefix-sharing groups", table(("number",) * 5, head, rows) + words)


def _slowest(slowest: Sequence[SlowRequest]) -> str:
    if not slowest:
        return ""
    rows = [
        (
            duration(request.seconds),
            text(request.custom_id),
            f"{request.line:,}",
            f"{request.prompt_tokens:,}",
            "–" if request.output_tokens is None else f"{request.output_tokens:,}",
            f"{request.first_step:,} to {request.last_step:,}",
        )
        for request in slowest
    ]
    head = ("time", "custom_id", "line", "prompt", "output", "steps")
    shown = table(("number", "", "number", "number", "number", "number"), head, rows)
    return section(
        "Slowest requests",
        shown + note("From the first step of each to its last, by the time of the steps; prompt and output in tokens."),
    )


def _details(report: Report) -> str:
    kv = report.kv
    run = [
        (
            "finish reasons",
            ", ".join(f"{name} {count:,}" for name, count in _most_first(report.finish_reasons)) or "–",
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
