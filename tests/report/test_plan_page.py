"""The page of a plan: well formed, self-contained, runs its own script alone, and says what the terminal does."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files

import pytest
from html_page import HOSTILE, Page, assert_self_contained, course_of, without_scripts
from plans import ESTIMATE, a_diagnosis, a_plan, a_planned, an_explanation, shared_run, some_steps

from batchrun.prefix.doctor import CAUSES, Diagnosis, Finding
from batchrun.prefix.explain import SharedRuns
from batchrun.report.charts import COLUMNS, scripts
from batchrun.report.plan_page import render_plan_page
from batchrun.report.records import KvUse, OrderTried, Warned
from batchrun.request import LineFault

ALL = a_planned(explanation=an_explanation(), diagnosis=a_diagnosis())


@pytest.mark.parametrize("count", [0, 1, 2, 300, COLUMNS, COLUMNS + 1, 20_000])
def test_the_page_is_well_formed_and_runs_its_own_scripts_alone(count):
    html = render_plan_page(replace(ALL, steps=some_steps(count)))
    assert_self_contained(html, scripts())
    assert len(Page(html).all("div", "chart")) == (3 if count else 0)
    if count:
        assert len(course_of(html)["rows"]) == min(count, COLUMNS)


def test_the_script_finds_what_it_looks_for():
    """The places and the columns that it goes by are on the page."""
    script = (files("batchrun.report") / "charts.js").read_text("utf-8")
    html = render_plan_page(ALL)
    assert 'querySelectorAll(".chart")' in script
    assert {attrs["data-chart"] for attrs in Page(html).all("div", "chart")} == {"rows", "pages", "requests"}
    assert set(re.findall(r"\bcourse\.(\w+)", script)) == set(course_of(html))


def test_what_the_terminal_says_is_there():
    text = Page(render_plan_page(ALL)).text
    for part in (
        "Plan: 480 requests from 482 lines, 2 of them bad",
        "demo in float32, dfs order, grouping tree",
        "10.0 s expected, 8.0 s to 12.5 s",
        "6.0 s is the least at the device's peaks",
        "87.6 % of the prompt tokens saved by sharing",
        "3,120 KV pages at peak, of 4,096",
        "1,204 steps, filled up to 256 tokens",
        "Computing limits it: 6.0 s at the peaks of cpu",
        "From steps measured on cpu (a processor).",
        "3 max_tokens_default they have no max_tokens",
        "7 seven context_length_exceeded: the prompt has 3000 tokens",
        "physical 31,220",
        "0.4 % 52 21 You answer questions",
        "And 4 smaller ones with 1.0 % more. 7 of 9 shared runs computed once",
        "input 12.3 s 1,398 45,678 4,096 17",
        "Line 7: robin-001",
        "13 tokens with 479 other requests (avocet-002, robin-003, robin-004, ...): 'You answer'",
        "3,912 requests share 480 tokens and part at token 481: '2026-11-0' against '2026-11-1' (a date)",
    ):
        assert part in text, part
    plain = Page(render_plan_page(a_planned(a_plan(orders=()), faults=[], warnings=[]))).text
    for part in ("Line 7", "look alike", "Orders tried", "bad line", "Warnings"):
        assert part not in plain


def test_charts_of_a_part_say_so():
    part = a_planned(a_plan(expected=replace(ESTIMATE, requests=100)))
    assert Page(render_plan_page(part)).text.count("Of 100 requests that were simulated.") == 1
    assert "that were simulated" not in Page(render_plan_page(ALL)).text


def test_charts_go_over_the_time_of_the_steps():
    steps = some_steps(3).copy()
    steps["seconds"] = [1.0, 0.5, 2.5]
    assert course_of(render_plan_page(a_planned(steps=steps)))["ends"] == [0, 1, 1.5, 4]
    steps["seconds"] = 0
    course = course_of(render_plan_page(a_planned(steps=steps)))
    assert (course["ends"], course["total"]) == ([0, 1, 2, 3], 0)


def test_runs_stand_below_those_that_they_go_on_from():
    html = render_plan_page(ALL)
    assert re.findall(r"padding-left:([\d.]+)em", html) == ["0.0", "1.5", "3.0", "1.5", "0.0"]


def test_what_a_job_says_is_only_text():
    request = an_explanation().requests[0]
    read = replace(request.reads[0], with_lines=(HOSTILE,), text=HOSTILE)
    hostile = a_planned(
        a_plan(model=HOSTILE, orders=(OrderTried(HOSTILE, 1.0, 1, 1, 1, 1),) * 2, kv=KvUse(16, 0, 0)),
        faults=[LineFault(n, HOSTILE, HOSTILE, HOSTILE) for n in range(200)],
        warnings=[Warned(HOSTILE, 1, HOSTILE)],
        runs=SharedRuns((shared_run(0, text=HOSTILE),), 0, 0),
        explanation=an_explanation(custom_id=HOSTILE, requests=(replace(request, reads=(read,)),)),
        diagnosis=Diagnosis(
            tuple(Finding(cause, 2, 3, 4, (HOSTILE, HOSTILE), (HOSTILE, "x"), 5, 0.5) for cause in CAUSES), 6, 7
        ),
    )
    html = render_plan_page(hostile)
    page, plain = Page(html), Page(render_plan_page(ALL))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {"details", "summary"}
    assert html.count("<script") == 3
    assert page.text.count(r"<script>alert(1)</script>\x1b[31m\x00\ud800\u202e") > 10
    assert "And 100 more." in page.text
    assert all(letter.isprintable() or letter == "\n" for letter in without_scripts(html))
    html.encode()  # no lone surrogates
