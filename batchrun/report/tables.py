"""What the terminal shows of a job, a plan and a run: plain aligned text, at most 80 columns wide.

All that came with a job is escaped and never read as markup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from batchrun.report.plots import Float, Glyphs, course, framed, glyphs, plot
from batchrun.report.records import KvUse, OrderTried, Report, TokenCounts, Warned
from batchrun.report.wording import (
    KIND_NAMES,
    bench_notes,
    bench_title,
    beside_execute,
    check_title,
    duration,
    estimated_from,
    explained,
    found,
    group_rows,
    limited_by,
    nothing_found,
    outcome,
    percent,
    plan_title,
    planned_and_measured,
    plural,
    printable,
    progress_title,
    quoted,
    rate,
    sharing,
    stages,
    standing,
    start_rows,
    time_left,
    times,
    unlisted,
    unmeasured,
)
from batchrun.request import LineFault

if TYPE_CHECKING:
    from batchrun.bench import Bench, Benched, Timed
    from batchrun.check import Checked
    from batchrun.diff import Difference, DiffSide, RunDiff
    from batchrun.formats.plan import PlanFile
    from batchrun.pipeline import Planned
    from batchrun.prefix.doctor import Diagnosis
    from batchrun.prefix.explain import Explanation, SharedRuns
    from batchrun.review import Review
    from batchrun.status import RunProgress

WIDTH = 80

_LABEL_WIDTH, _FIGURE_WIDTH = 10, 7  # at least, so that figures of small jobs stand in one place
_RUNS_IN_PLAN, _GROUPS_IN_SUMMARY = 12, 3
_PLOT_WIDTH, _PLOT_HEIGHT = 64, 5
_TOO_LARGE = "context_length_exceeded"
_CODES_SHOWN = 6
_FAULTS_IN_CHECK = 20
_WARNINGS_SHOWN = 5
_SLOWEST_SHOWN = _GROUPS_SHOWN = 10


class _Row(NamedTuple):
    """A figure and what it counts. Without a figure the words begin in its place."""

    value: str
    words: str


class _Section(NamedTuple):
    """Rows that belong together, under one label."""

    label: str
    rows: Sequence[_Row]
    style: str = ""


def print_summary(console: Console, report: Report, run_dir: Path, results: str | None = None) -> None:
    """Show what a run did, its outcome first.

    Args:
        console: where to.
        report: of the run.
        run_dir: the directory that its files are in.
        results: the file elsewhere that a finished run's answers are in; None: there is none.
    """
    counts, seconds, throughput = report.request_counts, report.seconds, report.throughput
    style = "bold red" if counts.failed else "bold yellow" if counts.remaining else "bold green"
    times = [_Row(duration(spent), stage) for stage, spent in stages(seconds)]
    if (beside := beside_execute(report)) is not None:
        times.append(_Row("", beside))
    if seconds.total is not None:
        times.append(_Row(duration(seconds.total), "total"))
    rates = (
        (throughput.requests_per_second, "requests/s"),
        (throughput.input_tokens_per_second, "input tokens/s"),
        (throughput.output_tokens_per_second, "output tokens/s"),
    )
    lost = (
        f"idle rows, {report.padded_rows:,} padded rows, {plural(report.preemptions, 'preemption')}, "
        f"{plural(report.prefix_evictions, 'eviction')}"
    )
    if report.memory_retries:
        lost += f", {plural(report.memory_retries, 'step')} cut for memory"
    if report.worker_restarts:
        lost += f", {plural(report.worker_restarts, 'worker restart')}"
    groups = [
        _Row(f"{group.requests:,}", f"requests share their first {plural(group.prefix_tokens, 'token')}")
        for group in report.groups[:_GROUPS_IN_SUMMARY]
    ]
    warnings = _warning_rows(report.warnings[:_WARNINGS_SHOWN])
    if (more := len(report.warnings) - _WARNINGS_SHOWN) > 0:
        warnings.append(_Row("", f"and {plural(more, 'more warning')} in report.html"))
    names = ["results.jsonl", "errors.jsonl", "report.html"] if counts.failed else ["results.jsonl", "report.html"]
    files = [str(run_dir / name) for name in names]
    if results is not None and not counts.remaining:
        files.append(results)

    _print(console, Text(outcome(counts), style=style))
    _print(console, Text())
    _print_sections(
        console,
        [
            _Section("Tokens", _token_rows(report.tokens, report.saving, "output")),
            _Section("Duplicates", _duplicate_rows(report.duplicates)),
            _Section("Time", times),
            _Section("Speed", [_Row(rate(value), unit) for value, unit in rates if value is not None]),
            _Section("Steps", [_Row(f"{report.steps:,}", f"on {report.device} in {report.dtype}")]),
            _Section("KV", [_kv_row(report.kv)]),
            _Section("Lost", [_Row(f"{report.idle_rows:,}", lost)]),
            _Section("Groups", groups),
            _Section("Answers", _count_rows(report.finish_reasons)),
            _Section("Errors", _count_rows(report.errors), "red"),
            _Section("Warnings", warnings, "yellow"),
            _Section("Files", [_Row("", printable(file, limit=4096)) for file in files]),
        ],
    )


def print_report(console: Console, review: Review, steps: npt.NDArray[np.void]) -> None:
    """Show what a run came to: the summary, what limited it, where its time went, what was planned, its course.

    Args:
        console: where to.
        review: what its directory tells.
        steps: of its latest start, `[steps]` as in `StepLog.columns`; may be empty.
    """
    report = review.report
    for warned in report.warnings:
        if warned.code == "outdated":
            _print_hanging(console, Text(), f"{warned.message[0].upper()}{warned.message[1:]}.", "bold yellow")
            _print(console, Text())
    print_summary(console, report, Path(review.run_dir))
    if review.limited_by is not None:
        _print(console, Text())
        _print_hanging(console, Text(), printable(review.limited_by.words))
    parts = times(report)
    whole = sum(spent for _, spent in parts)
    if whole:
        _print(console, Text())
        rows = [(duration(spent), percent(spent / whole)) for _, spent in parts]
        _print_table(console, ("time", "share"), rows, ["went to", *(KIND_NAMES.get(name, name) for name, _ in parts)])
    if review.plan is not None:
        _print(console, Text())
        compared = planned_and_measured(report, review.plan)
        rows = [(planned, measured) for _, planned, measured in compared]
        _print_table(console, ("planned", "measured"), rows, ["", *(name for name, _, _ in compared)])
    if len(review.starts) > 1:
        _print(console, Text())
        head, lines = start_rows(review.starts)
        _print_table(console, head, lines, [""] * (len(lines) + 1))
    if steps.size:
        _print(console, Text())
        _print_plots(console, steps, report.kv, glyphs(console.encoding), requests=True)
    if report.groups:
        _print(console, Text())
        head, lines = group_rows(report.groups[:_GROUPS_SHOWN], report.tokens.prompt_logical)
        _print_table(console, head[1:], [line[1:] for line in lines], ["largest groups", *(line[0] for line in lines)])
    if report.slowest:
        _print(console, Text())
        requests = [
            (
                duration(slow.seconds),
                f"{slow.first_step:,}",
                f"{slow.last_step:,}",
                f"{slow.prompt_tokens:,}",
                "-" if slow.output_tokens is None else f"{slow.output_tokens:,}",
            )
            for slow in report.slowest[:_SLOWEST_SHOWN]
        ]
        names = ("time", "first step", "last", "prompt", "output")
        ids = [printable(slow.custom_id) for slow in report.slowest[:_SLOWEST_SHOWN]]
        _print_table(console, names, requests, ["slowest requests", *ids])
    _print(console, Text())
    _print(console, Text("Not measured", style="bold"))
    for words in unmeasured(report):
        _print_hanging(console, Text("- "), printable(words, limit=1000))


def print_diff(console: Console, diff: RunDiff) -> None:
    """Show what is different between two runs."""
    total = diff.equal + diff.different
    title = (
        f"{diff.different:,} of {plural(total, 'line')} differ."
        if diff.different
        else f"All {total:,} lines are equal."
    )
    _print(console, Text(title, style="bold yellow" if diff.different else "bold green"))
    _print(console, Text())
    names = {"only_a": "only in A", "only_b": "only in B", "finish_reason": "finish reason"}
    kinds = [_Row(f"{count:,}", names.get(kind, kind)) for kind, count in diff.kinds.items()]
    _print_sections(
        console,
        [
            _Section("A", [_Row("", printable(diff.a.run_dir, limit=4096))]),
            _Section("B", [_Row("", printable(diff.b.run_dir, limit=4096))]),
            _Section("Equal", [_Row(f"{diff.equal:,}", "lines: status, texts, finish reasons")]),
            _Section("Differ", kinds, "yellow"),
        ],
    )
    _print(console, Text())
    figures = list(zip(_side_figures(diff.a), _side_figures(diff.b), strict=True))
    rows = [(a, b) for (_, a), (_, b) in figures]
    _print_table(console, ("A", "B"), rows, ["", *(name for (name, _), _ in figures)])
    if not diff.differences:
        return
    _print(console, Text())
    for difference in diff.differences:
        head = f"line {difference.line:,}  {printable(difference.custom_id, limit=60)}: "
        _print_hanging(console, Text("  "), head + _differs(difference))
        for name, words in (("A", difference.text_a), ("B", difference.text_b)):
            if words is not None:
                _print_hanging(console, Text(f"    {name} "), quoted(words))
    if (more := diff.different - len(diff.differences)) > 0:
        _print_hanging(console, Text("  "), f"and {more:,} more; --show N shows more of them")
    if diff.tokens is not None:
        _print_hanging(console, Text(), printable(f"Places are characters, not tokens: {diff.tokens}"))


def _differs(difference: Difference) -> str:
    """What is different in a line, and where."""
    if difference.a is None or difference.b is None:
        return f"only in {'A' if difference.b is None else 'B'} ({printable(str(difference.a or difference.b))})"
    words = ", ".join(kind.replace("_", " ") for kind in difference.kinds)
    if difference.a != difference.b:
        words += f" ({printable(difference.a)} against {printable(difference.b)})"
    if difference.equal_characters is None:
        return words
    choice = f" of choice {difference.choice}" if difference.choice else ""
    if difference.equal_tokens is not None:
        return f"{words}{choice}, from token {difference.equal_tokens + 1:,} on"
    return f"{words}{choice}, from character {difference.equal_characters + 1:,} on"


def _side_figures(side: DiffSide) -> list[tuple[str, str]]:
    seconds, throughput, kv = side.seconds, side.throughput, side.kv

    def known(value: float | None, show: Callable[[float], str]) -> str:
        return "-" if value is None else show(value)

    counts = side.request_counts
    return [
        ("status", str(side.status)),
        ("model", printable(side.model, limit=24)),
        ("answered", f"{counts.completed:,}"),
        ("failed", f"{counts.failed:,}"),
        ("remaining", f"{counts.remaining:,}"),
        ("saving", known(side.saving, percent)),
        ("total time", known(seconds.total if seconds is not None else None, duration)),
        ("time of steps", known(seconds.execute if seconds is not None else None, duration)),
        ("requests/s", known(throughput.requests_per_second if throughput is not None else None, rate)),
        ("input tokens/s", known(throughput.input_tokens_per_second if throughput is not None else None, rate)),
        ("output tokens/s", known(throughput.output_tokens_per_second if throughput is not None else None, rate)),
        ("steps", known(side.steps, "{:,}".format)),
        ("KV pages at peak", known(kv.peak_pages if kv is not None else None, "{:,}".format)),
    ]


def print_plan(console: Console, planned: Planned) -> None:
    """Show what a run would do: figures, what is shared most, the orders tried, and its course over time."""
    plan, expected = planned.plan, planned.plan.expected
    _print(console, Text(plan_title(planned), style="bold yellow" if planned.faults else "bold"))
    _print(console, Text())
    too_large = [fault.number for fault in planned.faults if fault.code == _TOO_LARGE]
    _print_sections(
        console,
        [
            _Section("Tokens", _token_rows(plan.tokens, plan.saving, "output, expected")),
            _Section("Duplicates", _duplicate_rows(plan.duplicates)),
            _Section("Steps", [_Row(f"{plan.steps:,}", f"filled up to {plural(plan.step_tokens, 'token')} each")]),
            _Section("KV", [_kv_row(plan.kv)]),
            _Section("Order", [_Row("", f"{plan.schedule_order}, grouping {plan.grouping}")]),
            _Section("Model", [_Row("", printable(f"{plan.model} in {plan.dtype}"))]),
            _Section(
                "Time",
                [
                    _Row(
                        duration(expected.seconds), f"expected: {duration(expected.low)} to {duration(expected.high)}"
                    ),
                    _Row(duration(expected.bound), "at the least, by the peaks of the device"),
                    _Row("", printable(limited_by(expected))),
                    _Row("", printable(estimated_from(expected, plan.requests))),
                ],
            ),
            _Section("Too large", [_Row(f"{len(too_large):,}", _numbers(too_large))] if too_large else [], "yellow"),
        ],
    )
    _print(console, Text())
    drawn = glyphs(console.encoding)
    _print_runs(console, planned.runs.largest(_RUNS_IN_PLAN), plan, drawn)
    _print_hanging(console, Text(), sharing(planned))
    if len(plan.orders) > 1:
        _print(console, Text())
        _print_orders(console, plan.orders)
    if planned.steps.size:
        _print(console, Text())
        part = " (the part that was simulated)" if plan.expected.requests < plan.requests else ""
        _print_plots(console, planned.steps, plan.kv, drawn, part=part)
    if planned.explanation is not None:
        _print(console, Text())
        _print_explanation(console, planned.explanation)
    if planned.diagnosis is not None:
        _print(console, Text())
        _print_diagnosis(console, planned.diagnosis)


def _print_explanation(console: Console, explanation: Explanation) -> None:
    """Show what is planned for one line."""
    title = f"Line {explanation.line:,}: {explanation.custom_id}"
    _print_hanging(console, Text(), printable(title), "bold")
    _print(console, Text())
    _print_sections(
        console,
        [
            _Section(label, [_Row(value, printable(words, limit=1000)) for _, value, words in rows])
            for label, rows in groupby(explained(explanation), key=itemgetter(0))
        ],
    )


def _print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Show why prompts that look alike do not share."""
    _print(console, Text("Prompts that look alike and do not share", style="bold"))
    for number, finding in enumerate(diagnosis.findings, start=1):
        _print_hanging(console, Text(f"{number}. "), printable(found(finding), limit=1000))
    if not diagnosis.findings:
        _print_hanging(console, Text(), nothing_found(diagnosis))


def print_check(console: Console, checked: Checked) -> None:
    """Show what a check of a job found: figures, then the first bad lines."""
    lengths = checked.lengths
    prompts = []
    if lengths is not None:
        prompts = [
            _Row(f"{lengths.total:,}", f"tokens in {plural(lengths.requests, 'prompt')}"),
            _Row(f"{lengths.shortest:,}", "in the shortest"),
            _Row(f"{lengths.median:,.1f}".removesuffix(".0"), "in the median"),
            _Row(f"{lengths.longest:,}", f"in the longest; the context has {lengths.max_context:,}"),
            _Row(f"{lengths.too_long:,}", "too long: the prompt leaves no room for an answer"),
        ]
    models = _count_rows(checked.models)
    if checked.other_model is not None and models:
        models.append(_Row(f"{checked.other_model:,}", f"other than {printable(str(checked.model), limit=200)}"))
    _print_hanging(console, Text(), check_title(checked), "bold yellow" if checked.faults else "bold green")
    if checked.total:
        _print(console, Text())
        _print_sections(
            console,
            [
                _Section("Lines", [_Row(f"{checked.sound:,}", "can run"), _Row(f"{len(checked.faults):,}", "bad")]),
                _Section("Errors", _count_rows(checked.errors), "red"),
                _Section("Models", models),
                _Section("Prompts", prompts),
                _Section("Warnings", _warning_rows(checked.warnings), "yellow"),
            ],
        )
    if checked.faults:
        _print(console, Text())
        print_faults(console, checked.faults, _FAULTS_IN_CHECK, more_in="--json", ids=True)


def print_status(console: Console, progress: RunProgress) -> None:
    """Show how far a run is."""
    styles = {"running": "bold", "finished": "bold green", "unknown": "bold yellow", "stopped": "bold yellow"}
    times = []
    if progress.seconds is not None:
        until = "to its end" if progress.state == "finished" else "until now"
        times.append(_Row(duration(progress.seconds), f"from its latest start {until}"))
    if progress.state != "finished" and progress.last_result_at is not None:
        times.append(_Row(duration(max(progress.looked_at - progress.last_result_at, 0)), "since its latest result"))
    left = time_left(progress)
    if left is not None:
        times.append(_Row(*left))
    speeds = []
    if progress.recent_results_per_second is not None and progress.recent_seconds is not None:
        words = f"results/s in the last {duration(progress.recent_seconds)}"
        speeds.append(_Row(rate(progress.recent_results_per_second), words))
    if progress.results_per_second is not None:
        speeds.append(_Row(rate(progress.results_per_second), "results/s since its latest start, loading included"))
    _print_hanging(console, Text(), progress_title(progress), styles.get(progress.state, "bold red"))
    _print(console, Text())
    _print_sections(
        console,
        [
            _Section("Process", [_Row("", printable(standing(progress), limit=1000))]),
            _Section("Time", times),
            _Section("Speed", speeds),
            _Section("Errors", _count_rows(progress.errors), "red"),
        ],
    )


def print_bench(console: Console, bench: Bench) -> None:
    """Show what the workloads computed, and what time they took."""
    _print_hanging(console, Text(), printable(bench_title(bench), limit=4096), "bold")
    rows, words = [], []
    for benched in bench.workloads:
        for timed in (benched.shared, benched.unshared):
            rows.append((timed, benched.speedup if timed is benched.shared else None, benched.requests))
            words.append(benched.name if timed is benched.shared else "  not shared")
    computed = [
        (
            f"{requests:,}",
            f"{timed.report.tokens.prompt_logical:,}",
            f"{timed.report.tokens.prompt_computed:,}",
            f"{timed.report.tokens.output:,}",
            f"{timed.report.kv.peak_pages:,}",
        )
        for timed, _, requests in rows
    ]
    _print(console, Text())
    columns = ("requests", "prompt tokens", "computed", "output", "KV pages")
    _print_table(console, columns, computed, ["workload", *words])
    times = [
        (
            *_times(timed),
            f"{timed.tokens_per_second:,.0f}",
            f"{speedup:.2f}x" if speedup is not None else "",
            percent(timed.bound_share),
        )
        for timed, speedup, _ in rows
    ]
    _print(console, Text())
    head = ("time", "spread", "expected", "tokens/s", "speed-up", "of bound")
    _print_table(console, head, times, ["workload", *words])
    for benched in bench.workloads:
        if benched.orders:
            _print_measured_orders(console, benched)
    _print(console, Text())
    for note in bench_notes(bench):
        _print_hanging(console, Text(), printable(note, limit=1000))


def _print_measured_orders(console: Console, benched: Benched) -> None:
    """The orders that a workload was run in, fastest first."""
    kv, taken = benched.shared.report.kv, benched.shared.report.schedule_order
    ranked = sorted((benched.shared, *benched.orders), key=lambda timed: timed.seconds)
    rows = [
        (*_times(timed), f"{timed.report.tokens.prompt_computed:,}", f"{timed.report.prefix_evictions:,}")
        for timed in ranked
    ]
    auto = benched.shared.schedule_order != taken  # it was not named
    names = [timed.report.schedule_order for timed in ranked]
    words = [f"{name} (auto takes it)" if auto and name == taken else name for name in names]
    memory = f"KV memory for {kv.pages * kv.page_size:,} tokens"
    _print(console, Text())
    _print_hanging(console, Text(), f"Orders of {benched.name}, {memory}", "bold")
    head = ("time", "spread", "expected", "prompt computed", "evictions")
    _print_table(console, head, rows, ["order", *words])


def _times(timed: Timed) -> tuple[str, str, str]:
    """How long a run took, how much that varied, and what was expected."""
    expected = timed.report.expected
    spread = percent(timed.spread) if len(timed.runs) > 1 else ""
    return duration(timed.seconds), spread, duration(expected.seconds) if expected is not None else ""


def print_faults(
    console: Console, faults: Sequence[LineFault], limit: int = 10, *, more_in: str | None = None, ids: bool = False
) -> None:
    """Show the bad lines of a job, the first `limit` of them; nothing where there are none.

    Args:
        console: where to.
        faults: the bad lines.
        limit: how many to show.
        more_in: what has the others too, where there is something.
        ids: whether to show the custom_id of lines that have one.
    """
    if not faults:
        return
    _print(console, Text(f"{plural(len(faults), 'bad line')}:", style="bold yellow"))
    shown = faults[:limit]
    digits = max((len(str(fault.number)) for fault in shown), default=0)
    for fault in shown:
        head = Text(f"  line {fault.number:>{digits}}  ")
        named = ids and fault.custom_id != f"line-{fault.number}"
        custom_id = f"{printable(fault.custom_id, limit=60)}: " if named else ""
        _print_hanging(console, head, custom_id + printable(f"{fault.code}: {fault.message}"))
    if len(faults) > len(shown):
        place = f" in {more_in}" if more_in is not None else ""
        _print_hanging(console, Text("  "), printable(f"and {len(faults) - len(shown):,} more{place}"))


def _token_rows(tokens: TokenCounts, saving: float, output: str) -> list[_Row]:
    return [
        _Row(f"{tokens.prompt_logical:,}", "prompt, logical"),
        _Row(f"{tokens.prompt_physical:,}", f"prompt, physical: {percent(saving)} saved by sharing"),
        _Row(f"{tokens.prompt_computed:,}", "prompt, computed"),
        _Row(f"{tokens.output:,}", output),
    ]


def _duplicate_rows(duplicates: int) -> list[_Row]:
    return [_Row(f"{duplicates:,}", "answers taken from an equal request, not computed")] if duplicates else []


def _kv_row(kv: KvUse) -> _Row:
    each = plural(kv.page_size, "token")
    return _Row(f"{kv.peak_pages:,}", f"pages of {each} each at peak; the pool has {kv.pages:,}")


def _count_rows(counts: Mapping[str, int]) -> list[_Row]:
    """Counts by name, the most first; the rare ones as one row, so that what is shown adds up."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    cut = _CODES_SHOWN if len(ranked) <= _CODES_SHOWN else _CODES_SHOWN - 1
    rows = [_Row(f"{count:,}", printable(name)) for name, count in ranked[:cut]]
    if rest := ranked[cut:]:
        rows.append(_Row(f"{sum(count for _, count in rest):,}", f"of {len(rest):,} other kinds"))
    return rows


def _warning_rows(warnings: Iterable[Warned]) -> list[_Row]:
    return [_Row(f"{warned.count:,}", printable(f"{warned.code}: {warned.message}", limit=240)) for warned in warnings]


def _print_sections(console: Console, sections: Iterable[_Section]) -> None:
    """Labels to the left, figures flush right in one column, words after them; no section without rows."""
    sections = [section for section in sections if section.rows]
    width = max(_FIGURE_WIDTH, *(len(row.value) for section in sections for row in section.rows))
    for section in sections:
        for index, row in enumerate(section.rows):
            head = Text((section.label if index == 0 else "").ljust(_LABEL_WIDTH), style="bold")
            if row.value:
                head.append(f"{row.value:>{width}}  ", style=section.style or "not bold")
            _print_hanging(console, head, row.words, section.style)


def _numbers(lines: Sequence[int]) -> str:
    """Lines that cannot fit."""
    shown = ", ".join(f"{line:,}" for line in lines[:6])
    more = f" and {len(lines) - 6:,} more" if len(lines) > 6 else ""
    return f"cannot fit into the context or the KV memory: line {shown}{more}"


def _print_runs(console: Console, runs: SharedRuns, plan: PlanFile, drawn: Glyphs) -> None:
    """The largest shared runs as a tree."""
    if not runs.listed:
        return
    rows = [
        (percent(run.spared / plan.tokens.prompt_logical), f"{run.tokens:,}", f"{run.requests:,}")
        for run in runs.listed
    ]
    words = [
        f"{lines}{printable(' '.join(run.text.split()))}"
        for run, lines in zip(runs.listed, _tree([(run.node, run.parent) for run in runs.listed], drawn), strict=True)
    ]
    _print_table(console, ("saved", "tokens", "requests"), rows, ["shared run begins with", *words])
    if more := unlisted(runs, plan):
        _print_hanging(console, Text(), more)


def _tree(nodes: Sequence[tuple[int, int]], drawn: Glyphs) -> Iterator[str]:
    """The lines of a tree in front of each node.

    Args:
        nodes: number and parent of each, depth first; the parent of a root is -1.
    """
    last = {parent: node for node, parent in nodes}
    before = {-1: ""}
    for node, parent in nodes:
        if parent < 0:
            before[node] = ""
            yield ""
        else:
            ends = last[parent] == node
            yield f"{before[parent]}{drawn.last if ends else drawn.branch} "
            before[node] = f"{before[parent]}{'  ' if ends else drawn.through} "


def _print_orders(console: Console, orders: Sequence[OrderTried]) -> None:
    """The orders that were compared."""
    rows = [
        (
            duration(order.seconds),
            f"{order.steps:,}",
            f"{order.prompt_computed:,}",
            f"{order.peak_pages:,}",
            f"{order.evictions:,}",
        )
        for order in orders
    ]
    head = ("expected", "steps", "prompt computed", "peak pages", "evictions")
    _print_table(console, head, rows, ["order", *(printable(order.name) for order in orders)])


def _print_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str]) -> None:
    """Figures flush right in columns, and words after them, cut where the line ends.

    Args:
        words: of the head and of each row.
    """
    cells = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for index, (row, text) in enumerate(zip(cells, words, strict=True)):
        line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + "  "
        line += _cut(_encodable(console, text), _width(console) - len(line))
        _print(console, Text(_cut(line.rstrip(), _width(console)), style="bold" if index == 0 else ""))


def _print_plots(
    console: Console, steps: npt.NDArray[np.void], kv: KvUse, drawn: Glyphs, *, part: str = "", requests: bool = False
) -> None:
    """Rows of a step and KV pages over time, and requests if they are asked for.

    Args:
        part: what is drawn, where it is not all.
    """
    margin = 7
    columns = max(min(_PLOT_WIDTH, _width(console) - margin - 2), 8)
    over = course(steps, columns)

    def show(title: str, layers: Sequence[Float], highest: float) -> None:
        _print_hanging(console, Text(), title, "bold")
        label = f"{highest:,.0f}"
        for line in framed(plot(layers, highest, _PLOT_HEIGHT, drawn), label, over.seconds, margin, drawn):
            _print(console, Text(line.rstrip()))

    rows = f"Rows of a step over time{part}: {drawn.fills[0]} decode, {drawn.fills[1]} prefill"
    show(rows, [over.decode, over.prefill], float((over.decode + over.prefill).max()))
    _print(console, Text())
    # A pool far above the peak would press the plot flat.
    highest = kv.pages if kv.pages <= 6 * kv.peak_pages else kv.peak_pages
    show(f"KV pages over time{part}: at most {kv.peak_pages:,} of {kv.pages:,}", [over.pages], highest)
    if requests:
        for name, column in (("under way", over.running), ("waiting", over.waiting)):
            _print(console, Text())
            show(f"Requests {name} over time: at most {column.max():,.0f}", [column], max(float(column.max()), 1.0))


def _print_hanging(console: Console, head: Text, words: str, style: str = "") -> None:
    """Print `head` and `words`; where the words go on, they go on right of the head."""
    indent = head.cell_len
    body = Text(_encodable(console, words), style=style)
    for index, line in enumerate(body.wrap(console, max(_width(console) - indent, 8), overflow="fold") or [Text()]):
        line.rstrip()
        _print(console, Text.assemble(head if index == 0 else " " * indent, line))


def _print(console: Console, line: Text) -> None:
    console.print(line, soft_wrap=True)


def _width(console: Console) -> int:
    return min(console.width, WIDTH)


def _encodable(console: Console, text: str) -> str:
    """What the console's encoding has no letter for, escaped."""
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _cut(text: str, width: int) -> str:
    """At most `width` columns of `text`."""
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 3, 0)).rstrip() + "..."
