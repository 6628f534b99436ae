"""What ends a run early leaves it resumable; what ends a request leaves the others alone."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import build_faulty_engine

import batchrun
from batchrun import pipeline
from batchrun.config import load_config, parse_duration, parse_share, parse_until
from batchrun.errors import ExitCode, UsageError
from batchrun.execution import limits
from batchrun.execution.limits import Limits
from batchrun.formats.rundir import RunFile, read_document


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), (90, 90), (0.5, 0.5), ("8h", 28800), ("1h30m", 5400), ("1d 2h", 93600), ("1.5 m", 90), ("2H", 7200)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "8 o'clock", "1h30", "m", "30m1h", "nan", "1e5", "99999d"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_a_time_of_day_is_the_next_such_time():
    now = datetime(2026, 11, 20, 22, 30)
    assert parse_until("06:00", now) == datetime(2026, 11, 21, 6).timestamp()
    assert parse_until("22:31", now) == datetime(2026, 11, 20, 22, 31).timestamp()
    assert parse_until("22:30", now) == datetime(2026, 11, 21, 22, 30).timestamp()
    assert parse_until("2026-12-01T06:00", now) == datetime(2026, 12, 1, 6).timestamp()
    assert parse_until("2026-12-01T06:00Z", now) == datetime(2026, 12, 1, 6, tzinfo=UTC).timestamp()
    for text in ("6", "25:00", "tomorrow", "2026-13-01T06:00", ""):
        with pytest.raises(ValueError, match="no time"):
            parse_until(text, now)


def test_numbers_and_shares():
    assert [parse_share(text, 250) for text in ("10", 10, "0", "5%", "0.4%", "100 %", "0.1%")] == [
        10, 10, 0, 12, 1, 250, 0,
    ]  # fmt: skip
    for text in ("-1", "1.5", "101%", "many", ""):
        with pytest.raises(ValueError, match="number of lines"):
            parse_share(text, 250)


@pytest.mark.parametrize(
    "limit", [{"until": "noon"}, {"timeout": "soon"}, {"max_errors": "some"}, {"request_timeout": "0"}]
)
def test_a_limit_that_cannot_be_read_is_a_usage_error(limit):
    with pytest.raises(UsageError, match=next(iter(limit))):
        load_config(model="demo", limits=limit)


def test_a_change_of_the_clock_counts_for_a_time_of_day_and_not_for_a_duration(monkeypatch):
    wall, steady = 1000.0, 50.0
    monkeypatch.setattr(limits.time, "time", lambda: wall)
    monkeypatch.setattr(limits.time, "perf_counter", lambda: steady)
    until = Limits(until=1600, timeout=None, max_errors=None, began=steady)
    timeout = Limits(until=None, timeout=600, max_errors=None, began=steady)
    wall = 9000.0
    assert until.reached(0)
    assert not timeout.reached(0)
    wall, steady = 0.0, 700.0
    assert not until.reached(0)
    assert timeout.reached(0)


def write_job(folder: Path, bad: int = 0) -> Path:
    lines = [{"id": f"r{i}", "prompt": f"one two {i}", "max_tokens": 12, "temperature": 0} for i in range(12)]
    lines[2:2] = [{"id": f"bad{i}", "prompt": 5} for i in range(bad)]
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ids(run_dir: Path, name: str = "results.jsonl") -> list[str]:
    return [json.loads(line)["custom_id"] for line in (run_dir / name).read_text().splitlines()]


def slow(monkeypatch: pytest.MonkeyPatch, request: int) -> None:
    """Steps with a request in them take a while."""
    monkeypatch.setenv("FAULTS", json.dumps({request: ["slow", 0]}))
    monkeypatch.setattr(pipeline, "build_engine", build_faulty_engine)


def test_a_run_that_is_out_of_time_stops_and_is_gone_on_with(model_dir, tmp_path, monkeypatch):
    slow(monkeypatch, 0)
    job, out = write_job(tmp_path), tmp_path / "a.run"
    config = {"model": str(model_dir()), "out": out, "in_process": True}
    calls = iter(range(10**6))
    # Out of time at the fifth look.
    monkeypatch.setattr(Limits, "reached", lambda self, failed: "it is late" if next(calls) > 4 else None)
    outcome = pipeline.run_job(str(job), load_config(**{**config, "out": str(out)}))
    assert outcome.exit_code is ExitCode.STOPPED
    assert [w.message for w in outcome.report.warnings if w.code == "stopped_early"] == [
        "stopped because it is late; the same command goes on"
    ]
    run = read_document(out / "run.json", RunFile)
    assert run.status == "stopped"
    assert run.request_counts.remaining > 0
    monkeypatch.undo()
    report = batchrun.run(job, **config)
    assert report.request_counts.completed == 12
    assert sorted(ids(out)) == sorted(f"r{i}" for i in range(12))


@pytest.mark.parametrize(
    "limit", [{"until": "2020-01-01T00:00"}, {"timeout": 0.001}, {"max_errors": 2}, {"max_errors": "10%"}]
)
def test_each_limit_ends_a_run_and_leaves_no_line_that_did_not_run_failed(model_dir, tmp_path, limit):
    job, out = write_job(tmp_path, bad=3), tmp_path / "a.run"
    outcome = pipeline.run_job(
        str(job), load_config(model=str(model_dir()), out=str(out), limits=limit, in_process=True)
    )
    assert outcome.exit_code is ExitCode.STOPPED
    counts = outcome.report.request_counts
    assert (counts.completed, counts.failed, counts.remaining) == (0, 3, 12)
    if "max_errors" in limit:  # the same command goes on: what failed before counts for that start
        shutil.copytree(out, tmp_path / "b.run")
        again = batchrun.run(job, model=str(model_dir()), out=tmp_path / "b.run", in_process=True, limits=limit)
        assert (again.request_counts.completed, again.request_counts.failed) == (12, 3)
    report = batchrun.run(job, model=str(model_dir()), out=out, in_process=True, limits={"max_errors": 3})
    assert (report.request_counts.completed, report.request_counts.failed) == (12, 3)


def test_time_counts_from_the_command_on_and_not_from_when_the_job_was_there(model_dir, tmp_path, monkeypatch):
    """Such as a job that took an hour to fetch: the next 06:00 is that after the command."""
    seen: list[datetime] = []
    parse = pipeline.parse_until

    def noted(value: str, now: datetime) -> float:
        seen.append(now)
        return parse(value, now)

    monkeypatch.setattr(pipeline, "parse_until", noted)
    lint = pipeline.lint_job

    def slowly(*args: Any) -> Any:
        time.sleep(0.6)
        return lint(*args)

    monkeypatch.setattr(pipeline, "lint_job", slowly)
    job, began = write_job(tmp_path), datetime.now()
    config = load_config(model=str(model_dir()), limits={"until": "23:59:59", "timeout": 0.5}, in_process=True)
    assert pipeline.run_job(str(job), config).exit_code is ExitCode.STOPPED
    assert abs((seen[0] - began).total_seconds()) < 0.5


def test_a_request_that_takes_too_long_fails_alone(model_dir, tmp_path, monkeypatch):
    slow(monkeypatch, 3)
    job, out = write_job(tmp_path), tmp_path / "a.run"
    # One request a step or two: the others are not slowed down by the slow one.
    options = {"scheduler": {"step_tokens": 8}, "limits": {"request_timeout": 1.0}}
    report = batchrun.run(job, model=str(model_dir()), out=out, in_process=True, **options)
    late = ids(out, "errors.jsonl")
    assert "r3" in late
    assert report.errors == {"request_timeout": len(late)}
    assert sorted([*ids(out), *late]) == sorted(f"r{i}" for i in range(12))
    assert report.request_counts.completed >= 3
    error = json.loads((out / "errors.jsonl").read_text().splitlines()[0])
    assert error["response"] is None
    assert "--request-timeout" in error["error"]["message"]


def test_a_clock_for_requests_starts_with_their_first_step(monkeypatch):
    from types import SimpleNamespace

    now = 10.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    clock = limits.RequestClock(5, 3.0)
    step = SimpleNamespace(request=np.array([-1, 0, 1, 4], dtype=np.int32))
    assert clock.late(step, np.array([0, 1], dtype=np.int32)) == []
    now = 12.0
    assert clock.late(SimpleNamespace(request=np.array([0, 2], dtype=np.int32)), np.array([0, 2])) == []
    now = 13.5
    assert clock.late(SimpleNamespace(request=np.array([0, 1, 2], dtype=np.int32)), np.array([0, 2])) == [0]
    clock.forget()  # the worker was lost: nobody's time goes on while another is started
    now = 99.0
    assert clock.late(step, np.array([0, 1], dtype=np.int32)) == []
    now = 102.5
    assert clock.late(step, np.array([0, 1], dtype=np.int32)) == [0, 1]
