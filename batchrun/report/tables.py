"""What the terminal shows of a plan, of a run and of bad lines: plain aligned text, at most 80 columns wide.

All that came with a job is escaped and never read as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from batchrun.report.records import KvUse, Report, TokenCounts
from batchrun.report.wording import duration, outcome, percent, plural, printable, rate, stages
from batchrun.request import LineFault

if TYPE_CHECKING:
    from batchrun.formats.plan import PlanFile

WIDTH = 80

_LABEL_WIDTH = 10
_GROUPS_IN_PLAN, _GROUPS_IN_SUMMARY = 10, 3
_CODES_SHOWN = 6
_WARNINGS_SHOWN = 5


class _Row(NamedTuple):
    """A figure and what it counts. Without a figure the words begin in its place."""

    value: str
    words: str


class _Section(NamedTuple):
    """Rows that belong together, under one label."""

    label: str
    rows: Sequence[_Row]
    style: str = ""


def print_summary(console: Console, report: Report, run_dir: Path) -> None:
    """Show what a run did, its outcome first.

    Args:
        console: where to.
        report: of the run.
        run_dir: the directory that its files are in.
    """
    counts, seconds, throughput = report.request_counts, report.seconds, report.throughput
    style = "bold red" if counts.failed else "bold yellow" if counts.remaining else "bold green"
    times = [_Row(duration(spent), stage) for stage, spent in stages(seconds)]
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
    groups = [
        _Row(f"{group.requests:,}", f"requests share their first {plural(group.prefix_tokens, 'token')}")
        for group in report.groups[:_GROUPS_IN_SUMMARY]
    ]
    warnings = [
        _Row(f"{warned.count:,}", printable(f"{warned.code}: {warned.message}", limit=240))
        for warned in report.warnings[:_WARNINGS_SHOWN]
    ]
    if (more := len(report.warnings) - _WARNINGS_SHOWN) > 0:
        warnings.append(_Row("", f"and {plural(more, 'more warning')} in report.html"))
    files = ["results.jsonl", "errors.jsonl", "report.html"] if counts.failed else ["results.jsonl", "report.html"]

    _print(console, Text(outcome(counts), style=style))
    _print(console, Text())
    _print_sections(
        console,
        [
            _Section("Tokens", _token_rows(report.tokens, report.saving, "output")),
            _Section("Time", times),
            _Section("Speed", [_Row(rate(value), unit) for value, unit in rates if value is not None]),
            _Section("Steps", [_Row(f"{report.steps:,}", f"on {report.device} in {report.dtype}")]),
            _Section("KV", [_kv_row(report.kv)]),
            _Section("Lost", [_Row(f"{report.idle_rows:,}", lost)]),
            _Section("Groups", groups),
            _Section("Answers", _count_rows(report.finish_reasons)),
            _Section("Errors", _count_rows(report.errors), "red"),
            _Section("Warnings", warnings, "yellow"),
            _Section("Files", [_Row("", printable(str(run_dir / name), limit=4096)) for name in files]),
        ],
    )


def print_plan(console: Console, plan: PlanFile, *, total_lines: int, faults: int, previews: Sequence[str]) -> None:
    """Show what a run would do.

    Args:
        console: where to.
        plan: the plan.
        total_lines: lines of the job, bad ones included.
        faults: how many of them are bad.
        previews: the first words of the own tokens of each of `plan.groups`.
    """
    title = f"Plan: {plural(plan.requests, 'request')} from {plural(total_lines, 'line')}"
    time = _Row(duration(plan.expected.seconds), "expected")
    if faults:
        title += f", {faults:,} of them bad"
    _print(console, Text(title, style="bold yellow" if faults else "bold"))
    _print(console, Text())
    _print_sections(
        console,
        [
            _Section("Tokens", _token_rows(plan.tokens, plan.saving, "output, expected")),
            _Section("Steps", [_Row(f"{plan.steps:,}", f"filled up to {plural(plan.step_tokens, 'token')} each")]),
            _Section("KV", [_kv_row(plan.kv)]),
            _Section("Order", [_Row("", f"{plan.schedule_order}, grouping {plan.grouping}")]),
            _Section("Model", [_Row("", printable(f"{plan.model} in {plan.dtype}"))]),
            _Section("Time", [time]),
        ],
    )
    if plan.groups:
        _print(console, Text())
        _print_groups(console, plan, previews)


def print_faults(console: Console, faults: Sequence[LineFault], limit: int = 10, *, more_in: str | None = None) -> None:
    """Show the bad lines of a job, the first `limit` of them; nothing where there are none.

    Args:
        console: where to.
        faults: the bad lines.
        limit: how many to show.
        more_in: the file that has the others too, where there is one.
    """
    if not faults:
        return
    _print(console, Text(f"{plural(len(faults), 'bad line')}:", style="bold yellow"))
    shown = faults[:limit]
    digits = max((len(str(fault.number)) for fault in shown), default=0)
    for fault in shown:
        head = Text(f"  line {fault.number:>{digits}}  ")
        _print_hanging(console, head, printable(f"{fault.code}: {fault.message}"))
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


def _print_sections(console: Console, sections: Iterable[_Section]) -> None:
    """Labels to the left, figures flush right in one column, words after them; no section without rows."""
    sections = [section for section in sections if section.rows]
    width = max(len(row.value) for section in sections for row in section.rows)
    for section in sections:
        for index, row in enumerate(section.rows):
            head = Text((section.label if index == 0 else "").ljust(_LABEL_WIDTH), style="bold")
            if row.value:
                head.append(f"{row.value:>{width}}  ", style=section.style or "not bold")
            _print_hanging(console, head, row.words, section.style)


def _print_groups(console: Console, plan: PlanFile, previews: Sequence[str]) -> None:
    groups = plan.groups[:_GROUPS_IN_PLAN]
    cells = [("group", "tokens", "requests")]
    cells += [(f"{group.id:,}", f"{group.prefix_tokens:,}", f"{group.requests:,}") for group in groups]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = ["own part begins", *(" ".join(preview.split()) for preview in previews[: len(groups)])]
    words += [""] * (len(cells) - len(words))
    for index, (row, text) in enumerate(zip(cells, words, strict=True)):
        line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + "  "
        line += _cut(_encodable(console, printable(text)), _width(console) - len(line))
        _print(console, Text(line.rstrip(), style="bold" if index == 0 else ""))
    if len(plan.groups) > len(groups):
        _print(console, Text(f"and {len(plan.groups) - len(groups):,} smaller ones"))


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
