"""The page is well formed, needs nothing from elsewhere, runs nothing of a job's, and draws what was measured."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from html_page import HOSTILE, Page

from batchrun.errors import OutputError
from batchrun.formats.rundir import write_text_atomic
from batchrun.report.page import COLUMNS, render_page
from batchrun.report.records import (
    GroupSummary,
    KvUse,
    Report,
    RequestCounts,
    Seconds,
    StepLog,
    StepRecord,
    Throughput,
    TokenCounts,
    Warned,
)

TOKENS = TokenCounts(prompt_logical=251_904, prompt_physical=31_220, prompt_computed=31_500, output=7_680)


def a_report(**changes) -> Report:
    report = Report(
        request_counts=RequestCounts(480, 478, 2, 0),
        tokens=TOKENS,
        saving=TOKENS.saving,
        seconds=Seconds(total=250.0, load=10.0, tokenize=5.0, plan=5.0, execute=225.0),
        throughput=Throughput(1.94, 1019.3, 31.07),
        expected=None,
        step_seconds=None,
        steps=300,
        rows=5000,
        kv=KvUse(page_size=16, pages=4096, peak_pages=3120),
        idle_rows=5,
        padded_rows=12,
        preemptions=3,
        memory_retries=2,
        worker_restarts=4,
        prefix_evictions=1,
        finish_reasons={"stop": 470, "length": 8},
        errors={"empty_prompt": 1, "context_length_exceeded": 1},
        warnings=(Warned("max_tokens_default", 3, "they have no max_tokens"),),
        groups=tuple(GroupSummary(number, 512 - number, 60) for number in range(14)),
        slowest=(),
        schedule_order="dfs",
        model="demo",
        device="cpu",
        dtype="float32",
        environment={"python": "3.11", "cpus": 2, "triton": None, "gpus": [{"name": "H"}]},
    )
    return replace(report, **changes)


def some_steps(count: int, pages: int = 3000) -> np.ndarray:
    log = StepLog()
    for index in range(count):
        prefill, decode = 200 + index % 7, index % 60
        log.append(StepRecord(index, prefill + decode, decode, prefill, decode, pages + index % 100, 0.5))
    return log.columns


@pytest.mark.parametrize("count", [0, 1, 2, 300, COLUMNS, COLUMNS + 1, 20_000])
def test_the_page_is_well_formed_and_self_contained(count):
    html = render_page(a_report(steps=count), some_steps(count))
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?:|url\(|@import|\bnan\b|\binf\b", html)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "href")]
    # Nothing could run even if an escape were forgotten.
    policies = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in html


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
        "execute 3 min 45 s (90.0 %)",
        "other 5.0 s (2.0 %)",
        "0 512 60 30,208",
        "6 more",
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
    assert all(letter.isprintable() or letter == "\n" for letter in html)
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
        warnings=(),
        finish_reasons={},
        errors={"invalid_json_line": 7},
        environment={},
    )
    page = Page(render_page(report, some_steps(0)))
    assert "No step was run." in page.text
    assert page.all("svg") == []
    assert "– requests/s" in page.text


def heights(html: str, colour: str) -> list[tuple[float, float]]:
    """The corners of the outline of a series."""
    (path,) = re.findall(rf'<path class="{colour}" d="M([^Z]*)Z"', html)
    return [tuple(map(float, corner.split())) for corner in path.split("L")]


def test_columns_stand_on_each_other_in_proportion():
    log = StepLog()
    log.append(StepRecord(0, 100, 0, 100, 0, 10, 0.5))
    log.append(StepRecord(1, 100, 25, 75, 25, 40, 0.5))
    html = render_page(a_report(kv=KvUse(16, 80, 40)), log.columns)
    decode, prefill, pages = heights(html, "orange"), heights(html, "blue"), heights(html, "teal")
    floor = max(y for _, y in decode)
    full = floor - min(y for _, y in prefill)
    assert [floor - y for _, y in decode[:4]] == pytest.approx([0, 0, full / 4, full / 4], abs=0.1)
    assert [floor - y for _, y in prefill] == pytest.approx([full, full, full, full, full / 4, full / 4, 0, 0], abs=0.1)
    assert [floor - y for _, y in pages[:4]] == pytest.approx([full / 8, full / 8, full / 2, full / 2], abs=0.1)
    # The pool is the dashed line.
    (limit,) = Page(html).all("line", "limit")
    assert floor - float(limit["y1"] or "nan") == pytest.approx(full, abs=0.1)


def test_many_steps_are_drawn_in_few_columns_with_their_sums_and_their_peak_kept():
    steps = some_steps(10 * COLUMNS + 7).copy()
    steps["pages_used"][4321] = 4096
    html = render_page(a_report(kv=KvUse(16, 4096, 4096)), steps)
    page = Page(html)
    assert len(page.all("rect", "hit")) == 2 * COLUMNS
    assert "Each column is the mean of 10 to 11 steps." in page.text
    assert f"prefill: {steps['prefill_rows'].sum():,}" in page.text
    (limit,) = page.all("line", "limit")
    assert min(y for _, y in heights(html, "teal")) == float(limit["y1"] or "nan")


def test_each_column_says_its_steps():
    page = Page(render_page(a_report(), some_steps(3)))
    assert "step 2: 202 prefill, 2 decode" in page.text
    assert "step 2: 3,002 pages" in page.text


def test_a_pool_far_above_the_peak_does_not_press_the_curve_flat():
    html = render_page(a_report(kv=KvUse(16, 10**6, 3099)), some_steps(300))
    page = Page(html)
    assert page.all("line", "limit") == []
    assert "Peak 3,099 of 1,000,000 pages, 0.3 %; the pool is far above this scale." in page.text
    teal = heights(html, "teal")
    assert max(y for _, y in teal) - min(y for _, y in teal) > 100


def test_stages_that_overlap_fill_the_bar_and_no_more():
    page = Page(render_page(a_report(seconds=Seconds(total=10.0, load=6.0, execute=9.0)), some_steps(1)))
    assert "load 6.0 s (40.0 %)" in page.text
    assert "other" not in page.text.split("Rows of each step")[0].split("Time:")[1]


def test_the_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    html = render_page(a_report(model="modèle 漢字"), some_steps(2))
    write_text_atomic(path, html)
    assert path.read_text("utf-8") == html
    with pytest.raises(OutputError, match=r"missing.report\.html"):
        write_text_atomic(tmp_path / "missing" / "report.html", html)
    assert list(tmp_path.iterdir()) == [path]
