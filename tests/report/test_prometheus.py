"""Metrics are read by Prometheus' own parser, and say what the report says."""

from __future__ import annotations

import re

import pytest
from html_page import HOSTILE
from plans import ESTIMATE, a_report
from prometheus_client.parser import text_string_to_metric_families

from batchrun.report.prometheus import render_metrics
from batchrun.report.records import RequestCounts
from batchrun.status import RunProgress, State

PROGRESS = RunProgress(
    state=State.FINISHED,
    status="completed",
    exit_code=3,
    request_counts=RequestCounts(480, 478, 2, 0),
    errors={"empty_prompt": 1, "request_timeout": 1},
    process=None,
    looked_at=1_700_000_300.0,
    started_at=1_700_000_000,
    last_result_at=1_700_000_240,
    seconds=250.0,
)


def samples(text: str) -> dict[tuple[str, str], float]:
    """Value by name and by the value of the label beside `run`."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            assert sample.timestamp is None
            assert (family.type == "counter") == sample.name.endswith("_total")
            assert re.fullmatch(r"batchrun_[a-z_]+", sample.name)
            label = next((value for name, value in sample.labels.items() if name != "run"), "")
            assert (sample.name, label) not in found
            found[sample.name, label] = sample.value
    return found


def test_a_parser_reads_what_the_report_says():
    found = samples(render_metrics("/jobs/a.run", PROGRESS, a_report(expected=ESTIMATE)))
    for name, value in {
        ("batchrun_run_state", "finished"): 1,
        ("batchrun_run_state", "died"): 0,
        ("batchrun_exit_code", ""): 3,
        ("batchrun_lines", "completed"): 478,
        ("batchrun_line_errors", "empty_prompt"): 1,
        ("batchrun_start_timestamp_seconds", ""): 1_700_000_000,
        ("batchrun_stage_seconds", "execute"): 225,
        ("batchrun_step_seconds", "tail"): 15,
        ("batchrun_duration_seconds", ""): 250,
        ("batchrun_prompt_tokens_total", "computed"): 31_500,
        ("batchrun_output_tokens_total", ""): 7680,
        ("batchrun_bound_ratio", ""): 45 / 225,
        ("batchrun_lost_total", "preemption"): 3,
        ("batchrun_kv_pages_peak", ""): 3120,
        ("batchrun_answers_total", "stop"): 470,
    }.items():
        assert found[name] == pytest.approx(value), name


def test_what_is_not_known_is_left_out():
    found = samples(render_metrics("/jobs/a.run", PROGRESS, None))
    assert ("batchrun_lines", "failed") in found
    assert not [name for name, _ in found if name.startswith("batchrun_kv")]
    assert "batchrun_expected_seconds" not in render_metrics("r", PROGRESS, a_report())


def test_labels_are_escaped():
    for hostile in (HOSTILE, 'a"b\\c\nd', "{x='y'}\\n"):
        text = render_metrics(hostile, PROGRESS, a_report(model=hostile, finish_reasons={hostile: 3}))
        text.encode()
        expected = hostile.encode("utf-8", "backslashreplace").decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        [info] = families["batchrun_run_info"].samples
        assert info.labels["model"] == info.labels["run"] == expected
        assert families["batchrun_answers"].samples[0].labels["reason"] == expected


def test_every_series_has_its_run_and_every_metric_its_words_once():
    text = render_metrics("r", PROGRESS, a_report(expected=ESTIMATE))
    lines = text.splitlines()
    assert text.endswith("\n")
    assert all('{run="r"' in line for line in lines if not line.startswith("#"))
    helps = [line.split()[2] for line in lines if line.startswith("# HELP")]
    assert helps == [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(helps) == len(set(helps))
