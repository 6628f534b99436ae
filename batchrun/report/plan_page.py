"""A plan as one HTML page: the same as on the terminal, with charts that can be zoomed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from batchrun.report.charts import head, scripts, step_charts
from batchrun.report.markup import note, render, section, table, text, tile, token_bars, warnings
from batchrun.report.records import OrderTried
from batchrun.report.wording import (
    duration,
    estimated_from,
    explained,
    found,
    limited_by,
    nothing_found,
    percent,
    plan_title,
    plural,
    sharing,
    unlisted,
)
from batchrun.request import LineFault

if TYPE_CHECKING:
    from batchrun.pipeline import Planned
    from batchrun.prefix.doctor import Diagnosis
    from batchrun.prefix.explain import Explanation

_FAULTS, _RUNS = 100, 30


def render_plan_page(planned: Planned) -> str:
    """The HTML page of a plan."""
    plan = planned.plan
    part = plan.expected.requests < plan.requests
    return render(
        title=plan_title(planned),
        tone="warn" if planned.faults else "good",
        subject=f"{plan.model} in {plan.dtype}, {plan.schedule_order} order, grouping {plan.grouping}",
        tiles=list(_tiles(planned)),
        sections=[
            *([_explanation(planned.explanation)] if planned.explanation is not None else []),
            *([_diagnosis(planned.diagnosis)] if planned.diagnosis is not None else []),
            _time(planned),
            warnings(planned.warnings),
            _faults(planned.faults),
            *step_charts(
                planned.steps,
                plan.kv,
                remark=f"Of {plan.expected.requests:,} requests that were simulated." if part else "",
            ),
            token_bars(plan.tokens, plan.saving, "what would be run, with what has to be computed again"),
            _forest(planned),
            _orders(plan.orders),
        ],
        head=head(),
        scripts=scripts(),
    )


def _tiles(planned: Planned) -> Iterable[str]:
    plan = planned.plan
    expected = plan.expected
    yield tile(duration(expected.seconds), f"expected, {duration(expected.low)} to {duration(expected.high)}")
    yield tile(duration(expected.bound), "is the least at the device's peaks")
    yield tile(percent(plan.saving), "of the prompt tokens saved by sharing")
    yield tile(f"{plan.kv.peak_pages:,}", f"KV pages at peak, of {plan.kv.pages:,}")
    yield tile(f"{plan.tokens.prompt_logical:,}", "prompt tokens")
    yield tile(f"{plan.tokens.prompt_computed:,}", "of them computed")
    yield tile(f"{plan.tokens.output:,}", "output tokens, expected")
    yield tile(f"{plan.steps:,}", f"steps, filled up to {plural(plan.step_tokens, 'token')}")


def _time(planned: Planned) -> str:
    expected = planned.plan.expected
    words = f"<p>{text(limited_by(expected))}</p>" + note(estimated_from(expected, planned.plan.requests))
    return section(f"Time: {duration(expected.low)} to {duration(expected.high)} expected", words)


def _explanation(explanation: Explanation) -> str:
    rows = [
        (text(label if number == 0 else ""), text(value), text(words))
        for label, group in groupby(explained(explanation), key=itemgetter(0))
        for number, (_, value, words) in enumerate(group)
    ]
    title = f"Line {explanation.line:,}: {explanation.custom_id}"
    return section(text(title), table(("label", "number", ""), ("", "", ""), rows, len(rows)))


def _diagnosis(diagnosis: Diagnosis) -> str:
    items = "".join(f"<li>{text(found(finding))}</li>\n" for finding in diagnosis.findings)
    body = f'<ul class="findings">\n{items}</ul>' if items else f"<p>{text(nothing_found(diagnosis))}</p>"
    return section("Prompts that look alike and do not share", body)


def _faults(faults: Sequence[LineFault]) -> str:
    if not faults:
        return ""
    rows = [
        (f"{fault.number:,}", text(fault.custom_id), text(f"{fault.code}: {fault.message}"))
        for fault in faults[:_FAULTS]
    ]
    words = f"And {len(faults) - _FAULTS:,} more." if len(faults) > _FAULTS else ""
    shown = table(("number", "name", ""), ("line", "custom_id", "why"), rows)
    return section(plural(len(faults), "bad line"), shown + note(words))


def _forest(planned: Planned) -> str:
    runs, plan = planned.runs.largest(_RUNS), planned.plan
    level: dict[int, int] = {-1: -1}
    rows = []
    for run in runs.listed:
        level[run.node] = level[run.parent] + 1
        words = text(" ".join(run.text.split()))
        words = f'<span class="run" style="padding-left:{1.5 * level[run.node]:.1f}em">{words}</span>'
        share = percent(run.spared / plan.tokens.prompt_logical)
        rows.append((share, f"{run.tokens:,}", f"{run.requests:,}", words))
    head = ("saved", "tokens", "requests", "shared run begins with")
    shown = table(("number", "number", "number", ""), head, rows, len(rows)) if rows else ""
    return section("Largest shared runs", shown + note(f"{unlisted(runs, plan)} {sharing(planned)}".strip()))


def _orders(orders: Sequence[OrderTried]) -> str:
    if len(orders) < 2:
        return ""
    rows = [
        (
            text(order.name),
            duration(order.seconds),
            f"{order.steps:,}",
            f"{order.prompt_computed:,}",
            f"{order.peak_pages:,}",
            f"{order.evictions:,}",
        )
        for order in orders
    ]
    head = ("order", "expected", "steps", "prompt tokens computed", "peak KV pages", "evictions")
    shown = table(("",) + ("number",) * 5, head, rows)
    return section("Orders tried", shown + note("The first one is taken."))
