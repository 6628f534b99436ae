"""`batchrun report`: of real runs, finished and stopped, what was measured adds up and is shown; and what it needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from html_page import Page, assert_self_contained, course_of
from plans import a_report
from prometheus_client.parser import text_string_to_metric_families
from rich.cells import cell_len
from typer.testing import CliRunner

from batchrun import pipeline
from batchrun.cli import app
from batchrun.config import load_config
from batchrun.formats.report import read_report, read_step_logs
from batchrun.pipeline import run_job
from batchrun.report.charts import scripts
from batchrun.report.records import RequestCounts
from batchrun.review import why_outdated

LINES = 14


@pytest.fixture(scope="module")
def done(tmp_path_factory, model_dir) -> Path:
    """A run that its limit of errors stopped, and that was gone on with."""
    folder = tmp_path_factory.mktemp("review")
    job = folder / "jobs.jsonl"
    lines = [{"id": f"q{k}", "prompt": f"one two three {k} four", "max_tokens": 3 + k} for k in range(LINES)]
    job.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    config = load_config(model=str(model_dir()), dtype="float32", kv_memory="64KiB", scheduler={"step_tokens": 40})

    class Stops:
        """Stops after some steps."""

        def __init__(self, steps: int) -> None:
            self.left = steps

        def faults(self, faults, total): ...
        def stage(self, name): ...
        def expected_rows(self, rows): ...

        def step(self, rows, sampled, finished):
            self.left -= 1

        def should_stop(self):
            return self.left <= 0

    assert run_job(str(job), config, Stops(9)).exit_code == 75
    assert run_job(str(job), config).exit_code == 3
    return folder / "jobs.run"


def call(*args: str):
    return CliRunner().invoke(app, ["report", *args], catch_exceptions=False)


def test_what_was_measured_adds_up(done):
    report = read_report(done / "report.json")
    first, last = read_step_logs(done / "steps.jsonl")
    assert (len(first), len(last)) == (9, report.steps)
    assert report.rows == last.columns["rows"].sum()
    assert last.columns["running"].max() >= 2
    assert last.columns["waiting"][-1] == 0
    steps = report.step_seconds
    assert steps is not None
    assert report.seconds.execute == pytest.approx(steps.device + steps.host)
    assert steps.recovery == 0
    assert steps.held_back == pytest.approx(last.columns["seconds"][last.columns["held_back"]].sum())
    assert 0 < report.bound_share < 1
    assert report.slowest
    assert report.slowest[0].seconds == max(slow.seconds for slow in report.slowest)
    assert all(0 <= slow.first_step <= slow.last_step < report.steps for slow in report.slowest)


def test_the_terminal_shows_it(done):
    told = call(str(done))
    assert told.exit_code == 0
    assert all(cell_len(line) <= 80 for line in told.output.splitlines())
    for part in ("limited it", "planned", "measured", "Requests waiting over time", "slowest requests", "Not measured"):
        assert part in told.output, part
    assert "resumed" in told.output
    # The starts and their sum.
    head = told.output.index("start  time of steps")
    assert [line.split()[0] for line in told.output[head:].splitlines()[1:4]] == ["1", "2", "all"]


def test_json_has_the_report_the_plan_and_the_starts(done):
    told = json.loads(call(str(done), "--json").output)
    assert told["schema_version"] == 1
    assert told["report"]["request_counts"]["completed"] == LINES
    assert told["plan"]["expected"] == told["report"]["expected"]
    assert told["progress"]["state"] == "finished"
    assert set(told["limited_by"]) == {"kind", "share", "words"}
    assert len(told["starts"]) == 2


def test_the_page_is_that_of_the_run(done, tmp_path):
    page = tmp_path / "again.html"
    assert call(str(done), "--html", str(page)).exit_code == 0
    html = page.read_text("utf-8")
    assert html == (done / "report.html").read_text("utf-8")
    assert_self_contained(html, scripts())
    assert sum(course_of(html)["steps"]) == read_report(done / "report.json").steps
    text = Page(html).text
    for part in ("2 starts", "What limited the run", "Planned and measured", "Slowest requests", "invalid_json_line"):
        assert part in text, part


def test_metrics_are_those_of_the_run(done, tmp_path):
    file = tmp_path / "job.prom"
    assert call(str(done), "--prometheus", str(file)).exit_code == 0
    values = {
        (sample.name, *(value for name, value in sample.labels.items() if name != "run")): sample.value
        for family in text_string_to_metric_families(file.read_text("utf-8"))
        for sample in family.samples
    }
    report = read_report(done / "report.json")
    assert values["batchrun_lines", "completed"] == LINES
    assert values["batchrun_steps_total",] == report.steps
    assert values["batchrun_step_seconds", "decode"] == report.step_seconds.decode
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_step_log_there_are_no_charts_and_all_else(done, tmp_path):
    copy = tmp_path / "copy.run"
    copy.mkdir()
    for name in ("run.json", "report.json", "plan.json", "results.jsonl", "errors.jsonl"):
        (copy / name).write_bytes((done / name).read_bytes())
    page = tmp_path / "page.html"
    told = call(str(copy), "--html", str(page))
    assert told.exit_code == 0
    assert "limited it" in told.output
    assert "Requests waiting over time" not in told.output
    assert "they were not logged" in Page(page.read_text("utf-8")).text


def test_a_run_without_a_report_says_so_and_has_metrics_still(done, tmp_path):
    copy = tmp_path / "copy.run"
    copy.mkdir()
    for name in ("run.json", "results.jsonl", "errors.jsonl"):
        (copy / name).write_bytes((done / name).read_bytes())
    file = tmp_path / "job.prom"
    told = call(str(copy), "--prometheus", str(file))
    assert told.exit_code == 2
    assert "has no report.json" in told.output
    assert "batchrun_lines" in file.read_text("utf-8")
    assert call(str(tmp_path / "nothing")).exit_code == 2


@pytest.mark.parametrize(
    ("state", "completed", "words"),
    [
        ("finished", 478, None),
        ("running", 478, "the run is going on"),
        ("died", 479, "ended without a report"),
        ("stopped", 479, "ended without a report"),
    ],
)
def test_a_report_of_a_start_before_the_latest_is_told_from_one_of_it(state, completed, words):
    report = replace(a_report(), request_counts=RequestCounts(490, 478, 2, 10))
    counts = RequestCounts(490, completed, 2, 488 - completed)
    why = why_outdated(report, SimpleNamespace(state=state, request_counts=counts))
    assert (why is None) == (words is None)
    assert words is None or words in why


def test_a_start_after_the_one_with_the_report_that_was_killed_is_told_of(done, tmp_path):
    """Its results are there, and its report is not."""
    copy = tmp_path / "copy.run"
    shutil.copytree(done, copy)
    report = json.loads((copy / "report.json").read_bytes())
    report["request_counts"]["completed"] -= 1
    report["request_counts"]["remaining"] += 1
    (copy / "report.json").write_text(json.dumps(report))
    told = call(str(copy))
    assert "A start after the one that this report is of ended without a report" in " ".join(told.output.split())
    assert call(str(copy), "--quiet", "--prometheus", str(tmp_path / "a.prom")).output == ""
    metrics = (tmp_path / "a.prom").read_text()
    assert "batchrun_lines" in metrics and "batchrun_prompt_tokens_total" not in metrics
    assert call(str(copy), "--html", str(tmp_path / "a.html")).exit_code == 0
    assert "ended without a report" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_start_that_finds_nothing_left_keeps_the_report(tmp_path, model_dir, monkeypatch):
    """As where the one before was killed when all answers were there, while results were put in order."""
    job = tmp_path / "jobs.jsonl"
    job.write_text("".join(json.dumps({"id": f"r{i}", "prompt": "one two", "max_tokens": 3}) + "\n" for i in range(4)))
    config = load_config(model=str(model_dir()), results_order="input", out=tmp_path / "jobs.run")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sort_results", killed)
        with pytest.raises(KeyboardInterrupt):
            run_job(str(job), config)
    before = read_report(tmp_path / "jobs.run" / "report.json")
    assert before.tokens.output == 3  # the others are duplicates
    assert run_job(str(job), config).report == before == read_report(tmp_path / "jobs.run" / "report.json")
    assert "Rows of each step" in (tmp_path / "jobs.run" / "report.html").read_text(encoding="utf-8")
