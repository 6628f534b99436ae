"""Requests that must have the same answer are computed once, and every line that asks for it gets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faulty import build_faulty_engine

import batchrun
from batchrun import pipeline
from batchrun.config import load_config
from batchrun.pipeline import plan_job, run_job

FOX, DOG = "The quick brown fox jumps", "The lazy dog sleeps"
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
DRAWN = {"temperature": 1.5, "max_tokens": 6, "ignore_eos": True}
JOB = [
    {"id": "fox", "prompt": FOX, **GREEDY},
    {"id": "dog", "prompt": DOG, **GREEDY},
    {"id": "fox again", "prompt": FOX, **GREEDY, "seed": 5},
    {"id": "longer", "prompt": FOX, **GREEDY | {"max_tokens": 9}},
    {"id": "drawn", "prompt": FOX, **DRAWN},
    {"id": "drawn anew", "prompt": FOX, **DRAWN},
    {"id": "seeded", "prompt": FOX, **DRAWN, "seed": 3},
    {"id": "seeded again", "prompt": FOX, **DRAWN, "seed": 3},
    {"id": "both", "prompt": [DOG, FOX], **GREEDY},
    {"id": "one of its own", "prompt": [FOX, "Numbers: 1 2 3"], **GREEDY},
    {"id": "twice", "prompt": ["Numbers: 4 5", "Numbers: 4 5"], **GREEDY},
    {
        "custom_id": "chat",
        "url": "/v1/completions",
        "method": "POST",
        "body": {"prompt": FOX, **GREEDY},
    },
]
DUPLICATE_OF = {"fox again": "fox", "seeded again": "seeded", "both": "dog", "chat": "fox"}
COMPUTED_TWICE = 7  # fox again, seeded again, both (2), one of its own (1), twice (1), chat


def write_job(folder: Path, lines: list[dict[str, Any]] = JOB) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(run_dir: Path, name: str = "results.jsonl") -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def test_every_line_gets_the_answer_that_it_gets_alone(model_dir, tmp_path):
    job = write_job(tmp_path)
    report = batchrun.run(job, model=str(model_dir()), out=tmp_path / "once.run")
    each = batchrun.run(job, model=str(model_dir()), out=tmp_path / "each.run", scheduler={"deduplicate": False})
    once, separately = read(tmp_path / "once.run"), read(tmp_path / "each.run")
    assert set(once) == set(separately) == {line.get("id", "chat") for line in JOB}
    for name, line in once.items():
        body, other = line["response"]["body"], separately[name]["response"]["body"]
        assert body["choices"] == other["choices"]
        assert body["id"] == other["id"]
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert body["usage"][count] == other["usage"][count]
        assert line["batchrun"]["seed"] == separately[name]["batchrun"]["seed"]
        assert line["batchrun"]["dedup_of"] == DUPLICATE_OF.get(name)
        assert separately[name]["batchrun"]["dedup_of"] is None
    assert once["drawn"]["response"]["body"]["choices"] != once["drawn anew"]["response"]["body"]["choices"]
    copied = once["fox again"]["response"]["body"]["usage"]
    assert copied["prompt_tokens_details"]["cached_tokens"] == copied["prompt_tokens"]

    assert (report.duplicates, each.duplicates) == (COMPUTED_TWICE, 0)
    assert report.request_counts == each.request_counts
    assert report.finish_reasons == each.finish_reasons
    assert report.tokens.prompt_logical == each.tokens.prompt_logical
    assert report.tokens.output < each.tokens.output
    assert report.tokens.prompt_computed < each.tokens.prompt_computed


def test_the_plan_counts_what_the_run_does(model_dir, tmp_path):
    job = write_job(tmp_path)
    report = batchrun.run(job, model=str(model_dir()), out=tmp_path / "a.run")
    planned = batchrun.plan(job, model=str(model_dir()))
    assert (planned.requests, planned.duplicates) == (15 - COMPUTED_TWICE, COMPUTED_TWICE)
    assert planned.tokens.prompt_logical == report.tokens.prompt_logical
    assert planned.tokens.output == report.tokens.output
    assert planned.saving == report.saving
    explained = plan_job(str(job), load_config(model=str(model_dir())), explain_line="both").explanation
    assert [request.duplicate_of for request in explained.requests] == ["dog", "fox"]
    assert [request.answers for request in explained.requests] == [2, 5]


def test_a_run_that_is_gone_on_with_gives_the_rest_the_same(model_dir, tmp_path):
    job = write_job(tmp_path)
    batchrun.run(job, model=str(model_dir()), out=tmp_path / "whole.run")

    class Stop(pipeline._Silent):
        stop = False

        def step(self, rows: int, sampled: int, finished: int) -> None:
            self.stop |= finished > 0  # when the answers of six tokens are there, and the longer one is not

        def should_stop(self) -> bool:
            return self.stop

    config = load_config(model=str(model_dir()), out=str(tmp_path / "a.run"))
    first = run_job(str(job), config, Stop()).report.request_counts
    assert 0 < first.completed < first.total
    second = run_job(str(job), config).report.request_counts
    assert (second.completed, second.remaining) == (first.total, 0)
    whole, again = read(tmp_path / "whole.run"), read(tmp_path / "a.run")
    for name, line in whole.items():
        assert line["response"]["body"]["choices"] == again[name]["response"]["body"]["choices"]


@pytest.mark.own_process
def test_what_brings_the_worker_down_fails_for_every_line_that_asks_for_it(model_dir, tmp_path, monkeypatch):
    job = write_job(tmp_path, [line for line in JOB if line.get("id") not in ("seeded", "seeded again")])
    monkeypatch.setenv("FAULTS", json.dumps({0: ["nan", 2]}))
    monkeypatch.setattr(pipeline, "build_engine", build_faulty_engine)
    report = batchrun.run(job, model=str(model_dir()), out=tmp_path / "a.run")
    errors, results = read(tmp_path / "a.run", "errors.jsonl"), read(tmp_path / "a.run")
    assert set(errors) == {"fox", "fox again", "both", "one of its own", "chat"}
    assert {error["error"]["code"] for error in errors.values()} == {"engine_quarantined"}
    assert set(results) == {"dog", "longer", "drawn", "drawn anew", "twice"}
    assert report.errors == {"engine_quarantined": 5}
    assert report.request_counts.failed == 5
