"""An unfinished run is ended for good: every line has an outcome, without a model, and wherever that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kills import killed_before
from test_pipeline import Watcher, read_lines, snapshot, write_job
from test_retry import LINES, SLOWLY, batchrun, choices, codes, counts, stopped_after

from batchrun import close
from batchrun.cli import app
from batchrun.config import load_config
from batchrun.errors import ExitCode
from batchrun.pipeline import run_job


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stopped(here, model_dir) -> Callable[..., None]:
    """`stopped(finished)`: `jobs.run` with a bad line and so many results at least, stopped before all were there."""

    def call(finished: int, **config: Any) -> None:
        write_job(here / "jobs.jsonl", [*LINES[:3], "{bad", *LINES[3:]])
        watcher = stopped_after(finished) if finished else Watcher(stop=lambda: True)
        outcome = run_job("jobs.jsonl", load_config(model=str(model_dir()), **(SLOWLY | config)), watcher)
        assert outcome.exit_code is ExitCode.STOPPED

    return call


@pytest.mark.parametrize(("flags", "code"), [([], "batch_cancelled"), (["--expired"], "batch_expired")])
def test_what_remains_fails_and_the_run_is_finished(flags, code, stopped, here, model_dir):
    stopped(2, results_order="input")
    results = sorted((here / "jobs.run" / "results.jsonl").read_bytes().splitlines())
    done = batchrun("close", "jobs.run", *flags)
    assert done.exit_code == ExitCode.SOME_FAILED
    assert "This run is closed" in done.stdout
    total, completed, failed, remaining = counts(here / "jobs.run")
    assert (total, remaining) == (7, 0)
    assert completed == len(results) >= 2
    assert sorted((here / "jobs.run" / "results.jsonl").read_bytes().splitlines()) == results
    answered = set(choices(here / "jobs.run"))
    assert codes(here / "jobs.run") == {"line-4": "invalid_json_line"} | {
        line["id"]: code for line in LINES if line["id"] not in answered
    }
    errors = read_lines(here / "jobs.run" / "errors.jsonl")
    assert [line["batchrun"]["line"] for line in errors] == sorted(line["batchrun"]["line"] for line in errors)
    closed = [line for line in errors if line["error"]]
    assert {(line["response"], line["batchrun"]["attempts"]) for line in closed} == {(None, 0)}
    assert all("closed" in line["error"]["message"] for line in closed)
    run = json.loads((here / "jobs.run" / "run.json").read_bytes())
    assert (run["status"], run["exit_code"], run["errors"][code]) == ("cancelled", 3, len(closed))
    assert run["completed_at"] >= run["created_at"]
    report = json.loads((here / "jobs.run" / "report.json").read_bytes())
    assert report["errors"] == run["errors"]
    assert report["tokens"]["output"] > 0  # of the start that was stopped
    assert [w["code"] for w in report["warnings"] if w["code"] in ("closed", "stopped_early")] == ["closed"]
    page = (here / "jobs.run" / "report.html").read_text(encoding="utf-8")
    assert f"{failed} failed" in page
    assert "Rows of each step" in page and "Planned and measured" in page  # of that start too
    assert batchrun("status", "jobs.run").exit_code == ExitCode.SOME_FAILED

    before = snapshot(here)
    again = batchrun("close", "jobs.run")
    assert again.exit_code == ExitCode.SOME_FAILED
    assert "finished already" in again.stdout
    same = batchrun("run", "jobs.jsonl", "--model", str(model_dir()))
    assert same.exit_code == ExitCode.SOME_FAILED
    assert "finished already" in same.stdout
    assert snapshot(here) == before


def test_a_run_without_any_result_or_report_can_be_closed(stopped, here, model_dir):
    stopped(0)
    for name in ("report.json", "report.html"):  # as where its process was killed
        (here / "jobs.run" / name).unlink()
    done = batchrun("close", "jobs.run", "--json")
    assert done.exit_code == ExitCode.NOTHING_RUNNABLE
    assert json.loads(done.stdout) == json.loads((here / "jobs.run" / "report.json").read_bytes())
    assert counts(here / "jobs.run") == (7, 0, 7, 0)
    same = batchrun("run", "jobs.jsonl", "--model", str(model_dir()), "-q")
    assert (same.exit_code, same.stdout) == (ExitCode.NOTHING_RUNNABLE, "")


def test_a_run_that_has_all_its_lines_is_not_cancelled_by_closing(here, model_dir):
    """As one that was killed while it wrote its report."""
    write_job(here / "jobs.jsonl", LINES)
    run_job("jobs.jsonl", load_config(model=str(model_dir())))
    file = here / "jobs.run" / "run.json"
    run = json.loads(file.read_bytes())
    file.write_text(json.dumps(run | {"status": "finalizing", "exit_code": None, "completed_at": None}))
    assert batchrun("close", "jobs.run", "-q").exit_code == ExitCode.OK
    assert json.loads(file.read_bytes())["status"] == "completed"


def test_lines_of_a_closed_run_are_run_again(stopped, here, model_dir):
    write_job(here / "jobs.jsonl", [*LINES[:3], "{bad", *LINES[3:]])
    run_job("jobs.jsonl", load_config(model=str(model_dir()), out="whole.run"))
    stopped(2)
    assert batchrun("close", "jobs.run", "-q").exit_code == ExitCode.SOME_FAILED
    closed = codes(here / "jobs.run")
    done = batchrun("retry", "jobs.run", "--code", "batch_cancelled")
    assert done.exit_code == ExitCode.SOME_FAILED
    assert choices(here / "jobs.run") == choices(here / "whole.run")
    assert counts(here / "jobs.run") == (7, 6, 1, 0)
    assert {line["batchrun"]["attempts"] for line in read_lines(here / "jobs.run" / "results.jsonl")} == {1}
    assert len(read_lines(here / "jobs.run" / "replaced.jsonl")) == len(closed) - 1
    run = json.loads((here / "jobs.run" / "run.json").read_bytes())
    assert (run["status"], run["exit_code"]) == ("completed", 3)


def test_another_job_closes_nothing(stopped, here):
    stopped(1)
    before = snapshot(here / "jobs.run")
    job = (here / "jobs.jsonl").read_bytes()
    write_job(here / "jobs.jsonl", LINES[:2])
    done = batchrun("close", "jobs.run")
    assert done.exit_code == ExitCode.RUN_DIR
    assert "job is" in done.stderr
    assert snapshot(here / "jobs.run") == before
    (here / "moved.jsonl").write_bytes(job)
    assert batchrun("close", "jobs.run", "--job", "moved.jsonl", "-q").exit_code == ExitCode.SOME_FAILED


def test_wherever_closing_is_killed_closing_again_ends_it(stopped, here, monkeypatch):
    stopped(2)
    start = snapshot(here / "jobs.run")
    results = (here / "jobs.run" / "results.jsonl").read_bytes()
    lived, call = False, 0
    while not lived:
        for file in (here / "jobs.run").iterdir():
            file.unlink()
        for name, (_, content) in start.items():
            (here / "jobs.run" / name).write_bytes(content)
        writes = [(os, "write"), (os, "fsync"), (os, "ftruncate"), (Path, "replace")]
        lived = killed_before(call, writes, close_line_by_line)
        call += 1
        assert batchrun("close", "jobs.run", "-q").exit_code == ExitCode.SOME_FAILED
        assert (here / "jobs.run" / "results.jsonl").read_bytes() == results
        assert counts(here / "jobs.run")[::3] == (7, 0)
        assert json.loads((here / "jobs.run" / "run.json").read_bytes())["status"] == "cancelled"
        assert len(codes(here / "jobs.run")) + len(choices(here / "jobs.run")) == 7
    assert call > 5


def close_line_by_line() -> None:
    close._FLUSH_LINES = 1
    app(["close", "jobs.run", "-q"])


def test_closing_loads_no_model_and_no_torch(stopped, here):
    stopped(1)
    code = (
        "import sys\n"
        "from batchrun.cli import app\n"
        "try:\n"
        "    app(['close', 'jobs.run', '-q'])\n"
        "finally:\n"
        "    heavy = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.SOME_FAILED, "", "")
