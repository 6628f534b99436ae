"""The page is well formed, needs nothing from elsewhere, runs nothing of a job's, and draws what was measured."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from html_page import HOSTILE, Page, assert_self_contained, course_of, without_scripts
from plans import ESTIMATE, a_plan, a_report

from batchrun.errors import OutputError
from batchrun.formats.rundir import write_text_atomic
from batchrun.report.charts import COLUMNS, scripts
from batchrun.report.page import render_page
from batchrun.report.records import (
    KvUse,
    RequestCounts,
    Seconds,
    SlowRequest,
    StartSummary,
    StepLog,
    StepRecord,
    Throughput,
    TokenCounts,
    Warned,
)


def some_steps(count: int, pages: int = 3000) -> np.ndarray:
    log = StepLog()
    for index in range(count):
        prefill, decode = 200 + index % 7, index % 60
        log.append(
            StepRecord(index, prefill + decode, decode, prefill, decode, pages + index % 100, 0.5, 0.0, decode, 60)
        )
    return log.columns


@pytest.mark.parametrize("count", [0, 1, 2, 300, COLUMNS, COLUMNS + 1, 20_000])
def test_the_page_is_well_formed_and_self_contained(count):
    assert_self_contained(render_page(a_report(steps=count), some_steps(count), a_plan()), scripts())


def test_a_run_of_half_a_million_steps_has_a_page_below_a_megabyte_that_hides_no_peak():
    steps = np.tile(some_steps(1000), 500)
    for name in ("pages_used", "running", "waiting", "rows"):
        steps[name][123_456] = 999_999
    html = render_page(a_report(steps=steps.size), steps)
    assert len(html.encode()) < 500_000
    course = course_of(html)
    assert len(course["pages"]) == COLUMNS
    assert sum(course["steps"]) == steps.size
    for name in ("pages", "running", "waiting", "rows"):
        assert max(course[name]) == 999_999
        assert sorted(course[name])[-2] < 99_999
    assert np.dot(course["prefill"], course["steps"]) == pytest.approx(steps["prefill_rows"].sum(), rel=1e-4)


def test_every_figure_is_there():
    page = Page(render_page(a_report(), some_steps(300)))
    for part in (
        "478 of 480 requests answered, 2 failed",
        "demo on cpu in float32, dfs order",
        "251,904 prompt tokens",
        "87.6 %",
        "7,680 output tokens",
        "4 min 10 s in all, 300 steps",
        "1.94 requests/s",
        "1,019 input tokens/s",
        "31.1 output tokens/s",
        "3,120 KV pages at peak, of 4,096",
        "1 empty_prompt",
        "3 max_tokens_default they have no max_tokens",
        "physical 31,220",
        "computed 31,500",
        "load 10.0 s (4.0 %)",
        "prefill 20.0 s (8.0 %)",
        "prefill and decode 1 min 40 s (40.0 %)",
        "tail 15.0 s (6.0 %)",
        "host and waiting for it 28.0 s (11.2 %)",
        "other 5.0 s (2.0 %)",
        "In 40.0 s of the steps requests waited for KV pages.",
        "0 512 60 30,208 12.0 %",
        "6 more",
        "2 min 3 s slow-one 17 900 64 3 to 250",
        "1.0 s cut 18 9 – 3 to 4",
        "Requests over time: 59 under way and 60 waiting at most",
        "Time saved by sharing: no run without it was made",
        "stop 470, length 8",
        "idle rows 5",
        "padded rows 12",
        "preemptions 3",
        "steps cut for memory 2",
        "worker restarts 4",
        "prefix evictions 1",
        "triton –",
        'gpus [{"name": "H"}]',
    ):
        assert part in page.text, part


def test_what_a_job_says_is_only_text():
    report = a_report(
        model=HOSTILE,
        device=HOSTILE,
        slowest=(SlowRequest(HOSTILE, 1, 1, 1, 0, 1, 1.0),),
        warnings=tuple(Warned(HOSTILE, number, HOSTILE * number) for number in range(1, 21)),
        errors={HOSTILE: 2},
        finish_reasons={HOSTILE: 478},
        environment={HOSTILE: HOSTILE, "list": [HOSTILE]},
    )
    html = render_page(report, some_steps(3))
    page = Page(html)
    plain = Page(render_page(a_report(), some_steps(3)))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert r"</td></table><script>alert(1)</script>\x1b[31m\x00\ud800\u202e" in page.text
    assert "$outcome [red]" in page.text
    assert html.count("<script") == 3  # uPlot, ours, and the data
    assert all(letter.isprintable() or letter == "\n" for letter in without_scripts(html))
    html.encode()  # no lone surrogates


def test_all_counts_are_there_and_add_up():
    errors = {f"code_{number}": number for number in range(1, 21)}
    html = render_page(a_report(request_counts=RequestCounts(300, 90, 210, 0), errors=errors), some_steps(3))
    rows = re.findall(r'<td class="number">([\d,]+)</td><td class="">code_\d+</td>', html)
    assert sum(map(int, rows)) == 210


@pytest.mark.parametrize(
    ("counts", "tone"),
    [
        (RequestCounts(5, 5, 0, 0), "good"),
        (RequestCounts(5, 4, 0, 1), "warn"),
        (RequestCounts(5, 4, 1, 0), "bad"),
        (RequestCounts(5, 3, 1, 1), "bad"),
    ],
)
def test_the_title_has_the_colour_of_the_outcome(counts, tone):
    assert Page(render_page(a_report(request_counts=counts), some_steps(1))).all("h1") == [{"class": tone}]


def test_a_job_that_never_ran_has_a_page():
    report = a_report(
        request_counts=RequestCounts(7, 0, 7, 0),
        tokens=TokenCounts(0, 0, 0, 0),
        saving=0.0,
        seconds=Seconds(),
        throughput=Throughput(),
        steps=0,
        kv=KvUse(16, 0, 0),
        groups=(),
        slowest=(),
        step_seconds=None,
        warnings=(),
        finish_reasons={},
        errors={"invalid_json_line": 7},
        environment={},
    )
    page = Page(render_page(report, some_steps(0)))
    assert "No step was run, or they were not logged." in page.text
    assert page.all("div", "chart") == []
    assert "What limited" not in page.text
    assert "– requests/s" in page.text


def test_a_step_is_drawn_as_it_was_where_there_are_few():
    log = StepLog()
    log.append(StepRecord(0, 100, 0, 100, 0, 10, 0.5, 0.0, 3, 7))
    log.append(StepRecord(1, 100, 25, 75, 25, 40, 1.5, 0.0, 9, 1))
    assert course_of(render_page(a_report(kv=KvUse(16, 80, 40)), log.columns)) == {
        "ends": [0, 0.5, 2],
        "first": [0, 1],
        "steps": [1, 1],
        "prefill": [100, 75],
        "decode": [0, 25],
        "rows": [100, 100],
        "pages": [10, 40],
        "running": [3, 9],
        "waiting": [7, 1],
        "total": 2,
        "pool": 80,
    }


def test_the_charts_are_there_in_figures_too():
    text = Page(render_page(a_report(), some_steps(2))).text
    assert "from to prefill rows decode rows KV pages under way waiting" in text
    assert "500 ms 1.0 s 201 1 3,001 1 60" in text


def test_a_pool_far_above_the_peak_does_not_press_the_curve_flat():
    html = render_page(a_report(kv=KvUse(16, 10**6, 3099)), some_steps(300))
    assert "pool" not in course_of(html)
    assert "3,099 at most, of 1,000,000 (0.3 %). The pool is far above this scale." in Page(html).text


def test_planned_stands_beside_measured():
    report = a_report(expected=ESTIMATE)
    text = Page(render_page(report, some_steps(3), a_plan())).text
    for part in (
        "time of the steps 10.0 s (8.0 s to 12.5 s) 3 min 45 s",
        "at the device's peaks 6.0 s 45.0 s",
        "steps 1,204 300",
        "rows 5,000 5,000",
        "output tokens 7,680 7,680",
        "20.0 % of the bound",
    ):
        assert part in text, part
    assert "Planned and measured" not in Page(render_page(report, some_steps(3))).text
    other = a_plan(expected=replace(ESTIMATE, seconds=1.0))  # of another start
    assert "Planned and measured" not in Page(render_page(report, some_steps(3), other)).text
    stopped = replace(report, request_counts=RequestCounts(480, 3, 0, 477))
    text = Page(render_page(stopped, some_steps(3), a_plan())).text
    assert "not all of them have run" in text
    assert "20.0 % of the bound" in text  # what was run, by the time that it took


def test_starts_are_added_up():
    starts = (StartSummary(10, 100, 20, 21, 30, 1.5), StartSummary(5, 50, 10, 11, 40, 2.5))
    text = Page(render_page(a_report(), some_steps(3), starts=starts)).text
    assert "2 starts" in text
    assert "all 4.0 s 15 150 30 32 40" in text
    assert "start time of steps" not in Page(render_page(a_report(), some_steps(3), starts=starts[:1])).text


def test_stages_that_overlap_fill_the_bar_and_no_more():
    report = a_report(seconds=Seconds(total=10.0, load=6.0, execute=9.0), step_seconds=None)
    page = Page(render_page(report, some_steps(1)))
    assert "load 6.0 s (40.0 %)" in page.text
    assert "other" not in page.text.split("Rows of each step")[0].split("Time:")[1].split("Not measured")[0]


def test_the_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    html = render_page(a_report(model="modèle 漢字"), some_steps(2))
    write_text_atomic(path, html)
    assert path.read_text("utf-8") == html
    with pytest.raises(OutputError, match=r"missing.report\.html"):
        write_text_atomic(tmp_path / "missing" / "report.html", html)
    assert list(tmp_path.iterdir()) == [path]
