"""What the terminal shows is plain, at most 80 columns wide, adds up, and lets no job speak for itself."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from batchrun.formats.plan import PlanFile
from batchrun.report.records import (
    Estimate,
    GroupSummary,
    KvUse,
    OrderTried,
    Report,
    RequestCounts,
    Seconds,
    Throughput,
    TokenCounts,
    Warned,
)
from batchrun.report.tables import print_faults, print_plan, print_summary
from batchrun.report.wording import duration, outcome, printable, rate
from batchrun.request import LineFault

TOKENS = TokenCounts(prompt_logical=251_904, prompt_physical=31_220, prompt_computed=31_500, output=7_680)
KV = KvUse(page_size=16, pages=4096, peak_pages=3120)
GROUPS = tuple(GroupSummary(number, 512 - number, 60) for number in range(14))
HOSTILE = "\x1b[31m[red]\u202e[/red]<script>\x00\x9b\ud800" + "x" * 150 + "漢字" * 90


def a_report(**changes) -> Report:
    report = Report(
        request_counts=RequestCounts(480, 478, 2, 0),
        tokens=TOKENS,
        saving=TOKENS.saving,
        seconds=Seconds(total=250.3, load=1.23, tokenize=0.31, plan=0.048, execute=247.2),
        throughput=Throughput(1.94, 1019.3, 31.07),
        steps=1204,
        kv=KV,
        idle_rows=5,
        padded_rows=12,
        preemptions=3,
        prefix_evictions=1,
        finish_reasons={"stop": 470, "length": 8},
        errors={"empty_prompt": 1, "context_length_exceeded": 1},
        warnings=(Warned("max_tokens_default", 3, "they have no max_tokens"),),
        groups=GROUPS,
        schedule_order="dfs",
        model="demo",
        device="cpu",
        dtype="float32",
        environment={},
    )
    return replace(report, **changes)


def a_plan(**changes) -> PlanFile:
    plan = PlanFile(
        requests=480,
        tokens=TOKENS,
        saving=TOKENS.saving,
        groups=GROUPS,
        schedule_order="dfs",
        grouping="tree",
        steps=1204,
        step_tokens=256,
        kv=KV,
        expected=Estimate(10.0, 8.0, 12.5, 6.0, 2.5, "cpu", "a processor", True, 480),
        orders=(OrderTried("dfs", 10.0, 53, 4000, 90, 0),),
        model="demo",
        dtype="float32",
        fingerprint={},
    )
    return replace(plan, **changes)


def shown(show, *args, encoding: str = "utf-8", **kwargs) -> str:
    """What `show(console, ...)` writes into a pipe."""
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    show(Console(file=pipe, width=80), *args, **kwargs)
    pipe.seek(0)
    return pipe.read()


def assert_plain_and_narrow(text: str) -> None:
    for line in text.splitlines():
        assert cell_len(line) <= 80, line
        assert line.isprintable(), line
        assert line == line.rstrip()


def test_the_summary_says_the_outcome_first_and_has_every_figure():
    text = shown(print_summary, a_report(), Path("jobs.run"))
    assert_plain_and_narrow(text)
    assert text.isascii()
    assert text.splitlines()[0] == "478 of 480 requests answered, 2 failed"
    for part in (
        "251,904  prompt, logical",
        "31,220  prompt, physical: 87.6 % saved",
        "31,500  prompt, computed",
        "7,680  output",
        "1.2 s  load",
        "310 ms  tokenize",
        "48 ms  plan",
        "4 min 7 s  execute",
        "4 min 10 s  total",
        "1.94  requests/s",
        "1,019  input tokens/s",
        "31.1  output tokens/s",
        "1,204  on cpu in float32",
        "3,120  pages of 16 tokens each at peak; the pool has 4,096",
        "5  idle rows, 12 padded rows, 3 preemptions, 1 eviction",
        "470  stop",
        "1  empty_prompt",
        "3  max_tokens_default: they have no max_tokens",
        "60  requests share their first 512 tokens",
        "jobs.run/results.jsonl",
        "jobs.run/errors.jsonl",
        "jobs.run/report.html",
    ):
        assert part in text, part


def test_figures_stand_flush_right_in_one_column():
    lines = shown(print_summary, a_report(), Path("jobs.run")).splitlines()
    ends = {match.end(1) for line in lines[2:] if (match := re.match(r"(?:[A-Z]\w*)? +(\d[\d,.]*(?: \w+)*)  \S", line))}
    assert len(ends) == 1


def test_what_did_not_happen_is_left_out():
    counts = RequestCounts(7, 0, 0, 7)
    nothing = a_report(
        request_counts=counts,
        tokens=TokenCounts(0, 0, 0, 0),
        saving=0.0,
        seconds=Seconds(),
        throughput=Throughput(),
        steps=0,
        kv=KvUse(16, 0, 0),
        finish_reasons={},
        errors={},
        warnings=(),
        groups=(),
    )
    text = shown(print_summary, nothing, Path("jobs.run"))
    assert text.splitlines()[0] == "0 of 7 requests answered, 0 failed, 7 remaining"
    for label in ("Time", "Speed", "Answers", "Errors", "Warnings", "Groups", "errors.jsonl", "None", "nan"):
        assert label not in text


def test_error_counts_shown_add_up_however_many_codes_there_are():
    errors = {f"code_{number}": number for number in range(1, 21)}
    failed = sum(errors.values())
    text = shown(print_summary, a_report(request_counts=RequestCounts(300, 90, failed, 0), errors=errors), Path("out"))
    lines = text[text.index("Errors") : text.index("Warnings")].splitlines()
    assert 2 < len(lines) < 10
    assert sum(int(line.removeprefix("Errors").split()[0]) for line in lines) == failed
    assert "20  code_20" in lines[0]


def test_only_the_first_warnings_and_the_number_of_the_others():
    warnings = tuple(Warned(f"warning_{number}", number, "message") for number in range(1, 21))
    text = shown(print_summary, a_report(warnings=warnings), Path("out"))
    named = len(re.findall(r"warning_\d+", text))
    assert f"and {20 - named} more warnings in report.html" in text
    assert 0 < named < 20


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_hostile_contents_are_escaped_and_stay_within_80_columns(encoding):
    report = a_report(
        warnings=tuple(Warned("unknown_field", 10**14, f"field {HOSTILE * repeat}") for repeat in (1, 2, 9)),
        errors={HOSTILE: 2},
        finish_reasons={HOSTILE: 478},
        tokens=TokenCounts(10**18, 10**17, 10**17, 10**16),
    )
    plan = a_plan(groups=tuple(GroupSummary(10**12 + n, 10**9, 10**9) for n in range(12)), model=HOSTILE)
    fault = LineFault(10**9, HOSTILE, "invalid_request", HOSTILE)
    texts = (
        shown(print_summary, report, Path("dir") / HOSTILE.replace("\x00", ""), encoding=encoding),
        shown(print_plan, plan, total_lines=10**9, faults=10**8, previews=[HOSTILE] * 12, encoding=encoding),
        shown(print_faults, [fault] * 12, more_in=HOSTILE, encoding=encoding),
    )
    for text in texts:
        assert_plain_and_narrow(text)
        assert r"\x1b[31m[red]" in text


@given(text=st.text(max_size=300), number=st.integers(1, 10**15))
def test_any_message_stays_within_80_printable_columns(text, number):
    assert_plain_and_narrow(shown(print_faults, [LineFault(number, "id", "invalid_request", text)]))


@pytest.mark.parametrize("color_system", [None, "truecolor"])
def test_colour_is_for_terminals_alone(color_system, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = io.StringIO()
    console = Console(file=terminal, width=80, force_terminal=color_system is not None, color_system=color_system)
    print_summary(console, a_report(), Path("out"))
    assert ("\x1b" in terminal.getvalue()) == (color_system is not None)
    plain = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert plain == shown(print_summary, a_report(), Path("out"))


def test_a_narrow_terminal_gets_narrow_lines():
    narrow = io.StringIO()
    print_summary(Console(file=narrow, width=50), a_report(), Path("out"))
    assert max(map(cell_len, narrow.getvalue().splitlines())) <= 50


def test_a_plan_shows_its_figures_and_its_ten_largest_groups():
    previews = ["You answer\n\nquestions about the table below, and " + "go on " * 30, "\x1b[31mred"]
    text = shown(print_plan, a_plan(), total_lines=482, faults=2, previews=previews)
    assert_plain_and_narrow(text)
    assert text.isascii()
    assert text.splitlines()[0] == "Plan: 480 requests from 482 lines, 2 of them bad"
    for part in (
        "31,220  prompt, physical: 87.6 % saved",
        "7,680  output, expected",
        "1,204  filled up to 256 tokens each",
        "3,120  pages of 16 tokens each at peak",
        "dfs, grouping tree",
        "not calibrated",
        "0     512        60  You answer questions about the table",
        r"1     511        60  \x1b[31mred",
        "9     503        60\n",
        "and 4 smaller ones",
    ):
        assert part in text, part
    assert "502" not in text


def test_a_plan_of_a_calibrated_device_without_groups_or_bad_lines():
    text = shown(
        print_plan,
        a_plan(expected=Estimate(7500.0, 7000.0, 8000.0, 1.0, 2.0, "cpu", "a processor", True, 480), groups=()),
        total_lines=480,
        faults=0,
        previews=[],
    )
    assert "2 h 5 min  expected" in text
    assert "bad" not in text
    assert "own part begins" not in text


def test_faults_have_line_code_and_message_and_the_rest_is_counted():
    faults = [LineFault(number, "id", "empty_prompt", "the prompt is empty") for number in range(3, 20)]
    lines = shown(print_faults, faults, limit=4, more_in="errors.jsonl").splitlines()
    assert lines == [
        "17 bad lines:",
        "  line 3  empty_prompt: the prompt is empty",
        "  line 4  empty_prompt: the prompt is empty",
        "  line 5  empty_prompt: the prompt is empty",
        "  line 6  empty_prompt: the prompt is empty",
        "  and 13 more in errors.jsonl",
    ]
    assert shown(print_faults, faults).splitlines()[-1] == "  and 7 more"
    assert shown(print_faults, faults[:1]).splitlines() == ["1 bad line:", lines[1]]
    assert shown(print_faults, []) == ""


def test_a_long_message_goes_on_below_itself():
    fault = LineFault(7, "id", "invalid_request", "words " * 30)
    first, *more = shown(print_faults, [fault]).splitlines()[1:]
    column = first.index("invalid_request")
    assert len(more) == 2
    assert all(line[:column].isspace() and line[column:].startswith("words") for line in more)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.00042, "0.4 ms"),
        (0.0351, "35 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (3.21, "3.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (250.3, "4 min 10 s"),
        (3599.6, "1 h 0 min"),
        (7500.0, "2 h 5 min"),
        (86399.9, "1 d 0 h"),
        (275_000.0, "3 d 4 h"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0312, "0.0312"), (4.068, "4.07"), (9.999, "10.0"), (99.97, "100"), (1204.4, "1,204")],
)
def test_rates_have_three_digits(value, text):
    assert rate(value) == text


def test_outcome_counts_what_remains():
    assert outcome(RequestCounts(1500, 1200, 0, 300)) == "1,200 of 1,500 requests answered, 0 failed, 300 remaining"


@given(st.text())
def test_printable_text_is_printable_and_else_as_it_was(text):
    assert printable(text).isprintable()
    if text.isprintable() and len(text) <= 400:
        assert printable(text) == text


def test_long_text_is_cut():
    assert printable("x" * 500) == "x" * 397 + "..."
