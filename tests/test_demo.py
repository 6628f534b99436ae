"""The bundled job with the bundled model: answers are right, prefixes are shared, and the counts add up."""

from __future__ import annotations

import json

import pytest

import batchrun
from batchrun.config import configs_dir
from scripts.check_demo import ANSWERS, ENOUGH, count_right

JOB = configs_dir() / "demo" / "job.jsonl"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo.run"
    return batchrun.run(JOB, model="demo", out=out), out


def test_answers_are_right(ran):
    _, out = ran
    right, total = count_right(out / "results.jsonl", ANSWERS)
    assert total >= 400
    assert right >= ENOUGH * total


def test_most_of_the_prompts_is_shared(ran):
    report, _ = ran
    assert report.saving > 0.5
    assert len([group for group in report.groups if group.requests > 8]) >= 8  # a table each


def test_counts_add_up(ran):
    report, out = ran
    results = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    usage = [result["response"]["body"]["usage"] for result in results]
    prompt = sum(one["prompt_tokens"] for one in usage)
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usage)

    assert report.request_counts.total == report.request_counts.completed == len(results) == sum(1 for _ in JOB.open())
    assert sum(report.finish_reasons.values()) == len(results)
    assert report.tokens.prompt_logical == prompt
    assert report.tokens.output == sum(one["completion_tokens"] for one in usage)
    # What is computed is each request's own prompt tokens and each group's, once: nothing was preempted.
    assert report.preemptions == report.prefix_evictions == report.idle_rows == report.padded_rows == 0
    own = prompt - cached
    assert own <= report.tokens.prompt_computed < own + cached
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert report.steps == len(steps)
    rows = sum(sum(step["chunks"]["length"]) for step in steps)
    assert rows == report.tokens.prompt_computed + report.tokens.output - len(results)
