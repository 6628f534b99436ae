"""What the terminal shows is plain, at most 80 columns wide, adds up, and lets no job speak for itself."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import plans
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import ESTIMATE, a_diagnosis, a_plan, a_planned, an_explanation, shared_run, some_steps
from rich.cells import cell_len
from rich.console import Console

from batchrun.prefix.doctor import CAUSES, Diagnosis, Finding
from batchrun.prefix.explain import PrefixRead, SharedRuns
from batchrun.report.records import (
    BoundSeconds,
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
from batchrun.report.wording import duration, outcome, printable, rate, size
from batchrun.request import LineFault

KV = KvUse(page_size=16, pages=4096, peak_pages=3120)
GROUPS = tuple(GroupSummary(number, 512 - number, 60) for number in range(14))
HOSTILE = "\x1b[31m[red]\u202e[/red]<script>\x00\x9b\ud800" + "x" * 150 + "漢字" * 90


def a_report(**changes) -> Report:
    of_tables = {
        "seconds": Seconds(total=250.3, load=1.23, tokenize=0.31, plan=0.048, execute=247.2),
        "step_seconds": None,
        "steps": 1204,
        "kv": KV,
        "slowest": (),
        "environment": {},
    }
    return plans.a_report(**of_tables | changes)


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


def test_the_summary_of_a_finished_run_has_what_was_expected_beside_what_was_measured():
    expected = Estimate(210.0, 190.0, 240.0, 61.8, 30.0, 10.0, "cpu", "here", calibrated=True, requests=478)
    bound = BoundSeconds(61.8, 30.0, 10.0)
    text = shown(print_summary, a_report(expected=expected, bound=bound), Path("a.run"))
    assert "expected 3 min 30 s; at the device's peaks 1 min 2 s, 25.0 % of it" in text
    assert_plain_and_narrow(text)
    stopped = a_report(expected=expected, request_counts=RequestCounts(480, 470, 2, 8))
    closed = a_report(expected=expected, warnings=(Warned("closed", 8, "8 lines got no answer"),))
    for report in (stopped, closed):
        text = shown(print_summary, report, Path("a.run"))
        assert "expected" not in text and "at the device's peaks 45.0 s, 18.2 % of it" in text


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
        "5  idle rows, 12 padded rows, 3 preemptions, 1 eviction, 2",
        "  steps cut for memory, 4 worker restarts",
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
    chain = tuple(shared_run(10**9 + n, 10**9 + n - 1 if n else -1, text=HOSTILE) for n in range(12))
    reads = tuple(PrefixRead(0, 0, 10**9, 10**9, (HOSTILE,) * 3, HOSTILE, 1, 1) for _ in range(3))
    line = an_explanation(custom_id=HOSTILE, faults=(LineFault(3, HOSTILE, HOSTILE, HOSTILE),))
    planned = a_planned(
        a_plan(
            model=HOSTILE,
            requests=10**9,
            expected=replace(ESTIMATE, hardware=HOSTILE, device=HOSTILE, seconds=1e9, high=1e12),
            orders=(OrderTried(HOSTILE, 1e9, 10**12, 10**12, 10**12, 10**12),) * 2,
            kv=KvUse(16, 10**12, 10**12),
        ),
        faults=[LineFault(10**12 + n, HOSTILE, "context_length_exceeded", HOSTILE) for n in range(9)],
        total_lines=10**12,
        runs=SharedRuns(chain, 10**9, 5),
        explanation=replace(line, requests=(replace(line.requests[0], reads=reads),) * 2),
        diagnosis=Diagnosis(
            tuple(Finding(cause, 10**9, 10**9, 10**9, (HOSTILE,) * 2, (HOSTILE, "x"), 1, 0.5) for cause in CAUSES), 1, 1
        ),
    )
    fault = LineFault(10**9, HOSTILE, "invalid_request", HOSTILE)
    texts = (
        shown(print_summary, report, Path("dir") / HOSTILE.replace("\x00", ""), encoding=encoding),
        shown(print_plan, planned, encoding=encoding),
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


def test_a_narrow_terminal_gets_a_narrow_plan():
    narrow = io.StringIO()
    planned = a_planned(explanation=an_explanation(), diagnosis=a_diagnosis())
    print_plan(Console(file=narrow, width=50), planned)
    assert max(map(cell_len, narrow.getvalue().splitlines())) <= 50


def test_a_plan_shows_its_figures():
    text = shown(print_plan, a_planned())
    assert_plain_and_narrow(text)
    assert text.splitlines()[0] == "Plan: 480 requests from 482 lines, 2 of them bad"
    for part in (
        "31,220  prompt, physical: 87.6 % saved",
        "7,680  output, expected",
        "1,204  filled up to 256 tokens each",
        "3,120  pages of 16 tokens each at peak",
        "dfs, grouping tree",
        "10.0 s  expected: 8.0 s to 12.5 s",
        "6.0 s  at the least, by the peaks of the device",
        "Computing limits it: 6.0 s at the peaks of cpu, against 2.5 s of",
        "From steps measured on cpu (a processor).",
        "Too large       1  cannot fit into the context or the KV memory: line 7",
        "And 4 smaller ones with 1.0 % more.",
        "7 of 9 shared runs computed once, by grouping tree; to share the others would",
    ):
        assert part in text, part
    assert "calibrated" not in text


def test_the_forest_is_a_tree_of_its_largest_runs():
    lines = shown(print_plan, a_planned()).splitlines()
    first = next(index for index, line in enumerate(lines) if line.split()[:3] == ["saved", "tokens", "requests"])
    assert lines[first + 1 : first + 6] == [
        "0.4 %      50        21  You answer questions",
        "0.4 %      51        21  ├─ You answer questions",
        "0.4 %      52        21  │  └─ You answer questions",
        "0.4 %      55        21  └─ You answer questions",
        "0.4 %      57        21  You answer questions",
    ]


def test_a_wide_forest_shows_its_twelve_largest_runs():
    runs = SharedRuns(tuple(shared_run(n, 0 if n else -1, spared=1000 + n, text=f"run {n}") for n in range(30)), 70, 0)
    text = shown(print_plan, a_planned(runs=runs))
    assert len(re.findall(r"run \d+$", text, re.MULTILINE)) == 12
    assert "run 29\n" in text
    assert "run 17\n" not in text
    assert "And 88 smaller ones" in text


def test_runs_begin_with_words_on_one_line():
    text = shown(print_plan, a_planned(runs=SharedRuns((shared_run(0, text="a\n\n b\x1b[31m" + "go on " * 90),), 0, 0)))
    assert "  a b\\x1b[31mgo on go on" in text
    assert "..." in text
    assert "smaller" not in text


def test_without_anything_shared_there_is_no_tree():
    text = shown(print_plan, a_planned(runs=SharedRuns((), 0, 0), computed_once=0))
    assert "shared run begins" not in text
    assert "No two prompts begin alike." in text


def test_orders_that_were_compared_are_a_table():
    lines = shown(print_plan, a_planned()).splitlines()
    head = next(index for index, line in enumerate(lines) if line.endswith("  order"))
    assert [line.split() for line in lines[head + 1 : head + 3]] == [
        ["10.0", "s", "1,204", "31,500", "3,120", "0", "dfs"],
        ["12.3", "s", "1,398", "45,678", "4,096", "17", "input"],
    ]
    alone = shown(print_plan, a_planned(a_plan(orders=a_plan().orders[:1])))
    assert "evictions" not in alone


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"calibrated": False, "low": 6.0, "high": 6.0 / 0.35},
            "cpu is not calibrated: the range is 35 % to 100 % of its data sheet's peaks (a processor).",
        ),
        (
            {"bound_compute": 1.0, "bound_memory": 7.0},
            "Memory limits it: weights and KV take 7.0 s at the peaks of cpu,",
        ),
        ({"requests": 100}, "100 of 480 requests were simulated, and figures scaled to the job."),
    ],
)
def test_what_an_estimate_stands_on_is_said(changes, words):
    planned = a_planned(a_plan(expected=replace(ESTIMATE, **changes)))
    text = " ".join(shown(print_plan, planned).split())
    assert words in text
    assert ("(the part that was simulated)" in text) == ("requests" in changes)


def test_a_plan_is_drawn_in_ascii_where_the_console_has_no_more():
    planned = a_planned(explanation=an_explanation(), diagnosis=a_diagnosis())
    ascii_text = shown(print_plan, planned, encoding="ascii")
    assert ascii_text.isascii()
    assert "\\u" not in ascii_text
    assert "|  `- You answer questions" in ascii_text
    assert "# decode, . prefill" in ascii_text
    text = shown(print_plan, planned)
    assert "█ decode, ░ prefill" in text
    assert len(text.splitlines()) == len(ascii_text.splitlines())


def test_a_job_that_was_not_simulated_has_no_plots():
    assert "prefill" not in shown(print_plan, a_planned(steps=some_steps(0)))


def test_a_line_is_explained():
    text = " ".join(shown(print_plan, a_planned(explanation=an_explanation())).split())
    for part in (
        "Line 7: robin-001 Prompt 219 tokens 213 that some other prompt begins with too 212 read from shared prefixes",
        "1 more with the very same prompt",
        "Shares 13 tokens with 479 other requests (avocet-002, robin-003, robin-004, ...): 'You answer'",
        "199 tokens with 1 other request (robin-003): 'Robin.\\nEach'",
        "Answer 16 tokens expected, 32 at most",
        "Runs 233 is its place in the order 16 steps, from 3 to 18: 46 ms to 1.5 s after the start",
        "KV 2 pages of its own at its end (64.0 KiB) 22 pages times steps that it holds them",
        "131 the same for its share of the prefixes that it reads 153 in all, of 32.0 KiB each",
    ):
        assert part in text, part
    assert "Line 7" not in shown(print_plan, a_planned())


def test_of_a_line_without_requests_the_fault_is_said():
    fault = LineFault(7, "seven", "empty_prompt", "the prompt has no tokens")
    bad = an_explanation(custom_id="seven", requests=(), faults=(fault,))
    text = shown(print_plan, a_planned(explanation=bad))
    assert "Bad line  line 7: empty_prompt: the prompt has no tokens" in text


def test_every_prompt_of_a_line_is_explained_and_what_is_not_known_is_not_said():
    [request] = an_explanation().requests
    alone = replace(request, reads=(), steps=None, seconds=None, identical=0)
    text = " ".join(shown(print_plan, a_planned(explanation=an_explanation(requests=(request, alone)))).split())
    first, second = text.split("Request 2")
    assert "Request 1 of 2 that this line makes" in first
    assert "nothing that is computed once for several" in second
    assert "not among the requests that were simulated" in second
    assert "very same prompt" not in second


def test_findings_are_sentences():
    text = " ".join(shown(print_plan, a_planned(diagnosis=a_diagnosis())).split())
    assert (
        "1. 3,912 requests share 480 tokens and part at token 481: '2026-11-0' against '2026-11-1' (a date), in a and "
        "b. Then 812 tokens are the same again. Moving it behind the shared text would save 61.0 % of all prompt "
        "tokens."
    ) in text
    assert (
        "2. 250 requests share 1 token, and then have the same lines in different orders (93 tokens; q1 and q2 begin "
        "with '- jars' and '- ropes'). One order for all would save 4.4 % of all prompt tokens."
    ) in text
    assert (
        "3. 12 requests share nothing and part at token 1: ' You' against 'You' (white space), in w1 and w2. Then 99 "
        "tokens are the same again. The same white space everywhere would save 1.0 % of all prompt tokens, or more."
    ) in text
    nothing = " ".join(shown(print_plan, a_planned(diagnosis=Diagnosis((), 4392, 1))).split())
    assert "Nothing to gain" in nothing
    assert "(4,392 prompts and 1 branch point looked at)" in nothing


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


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (10**9, "953.7 MiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_sizes_have_one_place(count, text):
    assert size(count) == text


def test_outcome_counts_what_remains():
    assert outcome(RequestCounts(1500, 1200, 0, 300)) == "1,200 of 1,500 requests answered, 0 failed, 300 remaining"


@given(st.text())
def test_printable_text_is_printable_and_else_as_it_was(text):
    assert printable(text).isprintable()
    if text.isprintable() and len(text) <= 400:
        assert printable(text) == text


def test_long_text_is_cut():
    assert printable("x" * 500) == "x" * 397 + "..."
