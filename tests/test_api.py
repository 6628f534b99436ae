"""The Python API: what its examples show, and failures as exceptions that carry the command's exit code."""

from __future__ import annotations

import doctest
import json

import pytest

import batchrun
from batchrun import pipeline
from batchrun.config import configs_dir
from batchrun.errors import BatchrunError, ExitCode, NothingRunnable, OutputError, RunDirError, UsageError
from batchrun.formats.plan import PlanFile
from batchrun.report.records import Report


@pytest.mark.parametrize("function", [pipeline.run, pipeline.plan], ids=["run", "plan"])
def test_the_examples_hold(function, tmp_path, monkeypatch):
    """They speak of the bundled job and the bundled model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.jsonl").write_bytes((configs_dir() / "demo" / "job.jsonl").read_bytes())
    [example] = doctest.DocTestFinder(recurse=False).find(function, globs={})
    assert len(example.examples) >= 3
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=failures.append)
    assert not failures, "".join(failures)


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text(json.dumps({"prompt": "apple pear", "max_tokens": 3}) + "\n{bad\n")
    return path


def test_run_and_plan_are_the_commands(job, model_dir):
    planned = batchrun.plan(job, model=str(model_dir()))
    assert isinstance(planned, PlanFile)
    assert list(job.parent.iterdir()) == [job]
    report = batchrun.run(job, model=str(model_dir()))
    assert isinstance(report, Report)
    assert (report.request_counts.completed, report.request_counts.failed) == (1, 1)
    assert (job.parent / "jobs.run" / "results.jsonl").exists()
    assert report.tokens.prompt_logical == planned.tokens.prompt_logical


def test_options_are_those_of_the_configuration(job, model_dir, tmp_path):
    config = tmp_path / "batchrun.toml"
    config.write_text("[scheduler]\ngrouping = 'none'\n")
    planned = batchrun.plan(job, model=str(model_dir()), config_file=config, schedule_order="input", limit=1)
    assert (planned.grouping, planned.schedule_order) == ("none", "input")


def test_failures_carry_the_exit_code_of_the_command(job, model_dir, tmp_path):
    model = str(model_dir())
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n  \n")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "pear", "max_tokens": 1}\n')
    batchrun.run(other, model=model, out=tmp_path / "other.run")
    for call, kind, code in (
        (lambda: batchrun.run(tmp_path / "none.jsonl", model=model), UsageError, ExitCode.USAGE),
        (lambda: batchrun.plan(job, model="no-such-model"), UsageError, ExitCode.USAGE),
        (lambda: batchrun.plan(job, model=model, colour="red"), UsageError, ExitCode.USAGE),
        (lambda: batchrun.run(blank, model=model), NothingRunnable, ExitCode.NOTHING_RUNNABLE),
        (lambda: batchrun.plan(job, model=model, strict=True), NothingRunnable, ExitCode.NOTHING_RUNNABLE),
        (lambda: batchrun.run(job, model=model, out=blank), OutputError, ExitCode.OUTPUT),
        (lambda: batchrun.run(job, model=model, out=tmp_path / "other.run"), RunDirError, ExitCode.RUN_DIR),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, BatchrunError)
        assert caught.value.exit_code is code
        assert caught.value.message


def test_only_run_and_plan_are_promised():
    assert set(batchrun.__all__) == {"__version__", "plan", "run"}
    assert not [name for name in batchrun.__all__ if not hasattr(batchrun, name)]
    with pytest.raises(AttributeError, match="no_such_name"):
        batchrun.no_such_name  # noqa: B018
