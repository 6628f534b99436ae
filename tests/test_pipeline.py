"""A whole run on a real model, from the job file to the run directory: every line once, counters that add up, the
steps that were planned."""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard

from batchrun.config import RunConfig, derive_seed, load_config
from batchrun.engine.torch_worker import TorchWorker
from batchrun.errors import ExitCode, NothingRunnable, OutputError, RunDirError, UsageError
from batchrun.execution.loop import run_loop
from batchrun.execution.simulate import SimulatedWorker
from batchrun.formats.job import open_job, read_job
from batchrun.formats.plan import read_plan
from batchrun.formats.report import encode_step, read_report, read_steps
from batchrun.formats.rundir import RUN_FILES, RunFile, read_document
from batchrun.pipeline import Outcome, plan_job, run_job
from batchrun.planning.order import ORDERS
from batchrun.prepare import prepare
from batchrun.report.records import Report
from batchrun.request import JobLine, LineFault
from batchrun.schedule.scheduler import Scheduler
from batchrun.subject import Subject

PAGE_BYTES = 16 * 2 * 2 * 2 * 12 * 4  # of the tiny models: 16 tokens, K and V, 2 layers, 2 heads of 12, float32
TABLE = "Answer questions about the table: apple 1 pear 2 plum 3 stock 4 price 5. "


def write_job(path: Path, lines: list[Any]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chat(custom_id: str, text: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": TABLE}, {"role": "user", "content": text}]
    url = "/v1/chat/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"messages": messages, **body}}


def answers(run_dir: Path) -> dict[str, Any]:
    """What a user gets for each custom_id: texts, reasons and token counts, or the error's code."""
    found: dict[str, Any] = {}
    for line in read_lines(run_dir / "results.jsonl"):
        body = line["response"]["body"]
        found[line["custom_id"]] = (
            [choice.get("text", choice.get("message", {}).get("content")) for choice in body["choices"]],
            [choice["finish_reason"] for choice in body["choices"]],
            body["usage"]["prompt_tokens"],
            body["usage"]["completion_tokens"],
            line["batchrun"]["seed"],
        )
    for line in read_lines(run_dir / "errors.jsonl"):
        code = line["response"]["body"]["error"]["code"]
        name = line["custom_id"] if code != "duplicate_custom_id" else f"second {line['custom_id']}"
        assert name not in found
        found[name] = code
    return found


def warned(report: Report) -> dict[str, int]:
    return {warning.code: warning.count for warning in report.warnings}


class Watcher:
    """An observer that keeps what it hears, and stops the run when `stop` says so."""

    def __init__(self, stop: Callable[[], bool] = lambda: False) -> None:
        self.stop = stop
        self.stages: list[str] = []
        self.heard: list[tuple[list[LineFault], int]] = []
        self.rows = self.sampled = self.finished = self.steps = 0
        self.expected: int | None = None
        self.at_load: list[LineFault] | None = None
        self.on_step: Callable[[], None] = lambda: None

    def faults(self, faults: list[LineFault], total: int) -> None:
        self.heard.append((faults, total))

    def stage(self, name: str) -> None:
        self.stages.append(name)
        if name == "load model":
            self.at_load = [fault for faults, _ in self.heard for fault in faults]

    def expected_rows(self, rows: int) -> None:
        self.expected = rows

    def step(self, rows: int, sampled: int, finished: int) -> None:
        self.steps += 1
        self.rows += rows
        self.sampled += sampled
        self.finished += finished
        self.on_step()

    def should_stop(self) -> bool:
        return self.stop()


@pytest.fixture
def run(model_dir, tmp_path):
    """`run(lines or path, observer, out=..., **config)`: an in-process run on a tiny model."""

    def call(job: list[Any] | Path, observer: Watcher | None = None, *, model: Path | None = None, **config: Any):
        path = job if isinstance(job, Path) else write_job(tmp_path / "jobs.jsonl", job)
        config.setdefault("out", str(tmp_path / "out.run"))
        return run_job(str(path), load_config(model=str(model or model_dir()), **config), observer)

    return call


# --- one run of a job that has everything

MIXED: list[Any] = [
    chat("c1", "What is the price of the apple?", max_tokens=6, model="another-model"),
    chat("c2", "What is the price of the pear?", max_tokens=6),
    "",
    "{bad",
    chat("c1", "the same id again", max_tokens=6),
    {"id": "plain", "prompt": "The quick brown fox", "max_tokens": 4, "ignore_eos": True},
    {"id": "many", "prompt": ["apple", "pear pear", "plum plum plum"], "max_tokens": 5, "ignore_eos": True},
    chat("odd", "What is in stock?", max_tokens=3, colour="red", model="another-model"),
    {"id": "long", "prompt": "x y " * 512, "max_tokens": 1},
    {"id": "clipped", "prompt": [7] * 500, "max_tokens": 500, "ignore_eos": True},
    "   ",
    {"id": "silent", "prompt": "Numbers: 0 1 2", "ignore_eos": True, "stream": False},
    {"id": "seeded", "prompt": "Numbers:", "seed": 99, "temperature": 1.5, "max_tokens": 8, "ignore_eos": True},
    {"id": "drawn", "prompt": "Numbers:", "temperature": 1.5, "max_tokens": 8, "ignore_eos": True},
    {"id": "streamed", "prompt": "x", "stream": True},
]
MIXED_CODES = {4: "invalid_json_line", 5: "duplicate_custom_id", 9: "context_length_exceeded", 15: "unsupported_field"}
MIXED_SOUND = {1, 2, 6, 7, 8, 10, 12, 13, 14}


@pytest.fixture(scope="module")
def mixed(model_dir, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("mixed")
    watcher = Watcher()
    outcome = run_job(str(write_job(folder / "jobs.jsonl", MIXED)), load_config(model=str(model_dir())), watcher)
    return SimpleNamespace(outcome=outcome, watcher=watcher, dir=folder / "jobs.run", report=outcome.report)


def test_the_run_directory_is_named_after_the_job_and_has_every_file(mixed):
    assert mixed.outcome.run_dir == mixed.dir
    names = {path.name for path in mixed.dir.iterdir()}
    assert names == {*RUN_FILES, "lock"} - {
        "job.jsonl",
        "columns.parquet",
        "replaced.jsonl",
    }  # of standard input, and of a retry


def test_every_line_has_one_outcome(mixed):
    results = [line["batchrun"]["line"] for line in read_lines(mixed.dir / "results.jsonl")]
    errors = {
        line["batchrun"]["line"]: line["response"]["body"]["error"]["code"]
        for line in read_lines(mixed.dir / "errors.jsonl")
    }
    assert sorted(results) == sorted(MIXED_SOUND)
    assert errors == MIXED_CODES
    assert len(read_lines(mixed.dir / "errors.jsonl")) == len(MIXED_CODES)


def test_the_counters_are_those_of_the_lines(mixed):
    run_file = read_document(mixed.dir / "run.json", RunFile)
    assert run_file.status == "completed"
    assert run_file.exit_code == mixed.outcome.exit_code == ExitCode.SOME_FAILED
    for counts in (run_file.request_counts, mixed.report.request_counts):
        assert (counts.total, counts.completed, counts.failed, counts.remaining) == (13, 9, 4, 0)
    assert run_file.errors == mixed.report.errors == dict.fromkeys(MIXED_CODES.values(), 1)
    assert run_file.completed_at is not None
    assert run_file.completed_at >= run_file.created_at


def test_bad_lines_are_told_before_the_model_is_loaded(mixed):
    assert mixed.watcher.stages == ["read", "load model", "run"]
    assert sorted(fault.number for fault in mixed.watcher.at_load) == sorted(MIXED_CODES)
    assert {total for _, total in mixed.watcher.heard} == {13}


def test_a_line_of_several_prompts_gives_its_choices_in_order(mixed, run, tmp_path):
    [line] = [line for line in read_lines(mixed.dir / "results.jsonl") if line["custom_id"] == "many"]
    choices = line["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert line["response"]["body"]["usage"]["completion_tokens"] == 15
    prompts = ["apple", "pear pear", "plum plum plum"]
    run([{"id": p, "prompt": p, "max_tokens": 5, "ignore_eos": True} for p in prompts])
    alone = answers(tmp_path / "out.run")
    assert [choice["text"] for choice in choices] == [alone[prompt][0][0] for prompt in prompts]
    assert len({choice["text"] for choice in choices}) > 1


def test_answers_say_why_they_ended_and_what_they_took(mixed):
    found = answers(mixed.dir)
    assert found["clipped"][1:4] == (["length"], 500, 12)  # 512 is the context
    assert found["silent"][3] == 16  # the API's default
    assert found["plain"][1:2] == (["length"],)
    [line] = [line for line in read_lines(mixed.dir / "results.jsonl") if line["custom_id"] == "c2"]
    usage = line["response"]["body"]["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_what_a_person_should_know_is_counted(mixed):
    assert warned(mixed.report) == {
        "unknown_field": 1,
        "model_mismatch": 2,
        "max_tokens_default": 1,
        "max_tokens_clipped": 1,
    }
    log = (mixed.dir / "run.log").read_text()
    for warning in mixed.report.warnings:
        assert warning.message in log


def test_seeds_of_the_lines(mixed):
    found = answers(mixed.dir)
    assert found["seeded"][4] == 99
    assert found["drawn"][4] == derive_seed(0, 14, 0, None)
    assert found["seeded"][0] != found["drawn"][0]


def test_the_report_is_on_disk_and_consistent_with_itself(mixed):
    report = read_report(mixed.dir / "report.json")
    assert report == mixed.report
    results = read_lines(mixed.dir / "results.jsonl")
    usages = [line["response"]["body"]["usage"] for line in results]
    assert report.tokens.prompt_logical == sum(usage["prompt_tokens"] for usage in usages)
    assert report.tokens.output == sum(usage["completion_tokens"] for usage in usages)
    assert report.tokens.prompt_physical <= report.tokens.prompt_computed < report.tokens.prompt_logical
    assert report.saving == pytest.approx(1 - report.tokens.prompt_physical / report.tokens.prompt_logical)
    assert sum(report.finish_reasons.values()) == 11  # one for each choice

    seconds, rates = report.seconds, report.throughput
    parts = (seconds.load, seconds.tokenize, seconds.plan, seconds.execute)
    assert all(part is not None and part > 0 for part in parts)
    assert seconds.total >= sum(parts)
    assert rates.requests_per_second == pytest.approx(report.request_counts.completed / seconds.execute)
    assert rates.input_tokens_per_second == pytest.approx(report.tokens.prompt_logical / seconds.execute)
    assert rates.output_tokens_per_second == pytest.approx(report.tokens.output / seconds.execute)

    assert report.kv.page_size == 16
    assert 0 < report.kv.peak_pages <= report.kv.pages
    assert (report.idle_rows, report.padded_rows, report.preemptions, report.prefix_evictions) == (0, 0, 0, 0)
    assert (report.device, report.dtype, report.schedule_order) == ("cpu", "float32", "dfs")
    assert {"batchrun", "torch", "transformers", "python", "cpus"} <= set(report.environment)
    assert max(group.requests for group in report.groups) == 3


def test_report_json_has_the_promised_names(mixed):
    document = json.loads((mixed.dir / "report.json").read_bytes())
    assert document["schema_version"] == 1
    assert set(document["request_counts"]) == {"total", "completed", "failed", "remaining"}
    assert set(document["tokens"]) == {"prompt_logical", "prompt_physical", "prompt_computed", "output"}
    assert set(document["seconds"]) == {"total", "load", "tokenize", "plan", "execute"}
    assert set(document["throughput"]) == {
        "requests_per_second",
        "input_tokens_per_second",
        "output_tokens_per_second",
    }
    assert set(document["kv"]) == {"page_size", "pages", "peak_pages"}
    assert {"saving", "steps", "idle_rows", "padded_rows", "preemptions", "environment"} <= set(document)


def test_the_step_log_is_what_was_computed(mixed):
    steps = list(read_steps(mixed.dir / "steps.jsonl"))
    assert [step["index"] for step in steps] == list(range(mixed.report.steps))
    rows = sum(sum(step["chunks"]["length"]) for step in steps)
    assert rows == mixed.watcher.rows
    assert sum(sum(step["chunks"]["samples"]) for step in steps) == mixed.report.tokens.output
    assert mixed.watcher.sampled == mixed.report.tokens.output
    # Each answer but its last token is computed as well.
    assert rows == mixed.report.tokens.prompt_computed + mixed.report.tokens.output - 11


def test_the_page_shows_the_run(mixed):
    page = (mixed.dir / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "context_length_exceeded" in page


def test_the_plan_in_the_run_directory_is_that_of_the_plan_command(mixed, model_dir):
    planned = plan_job(str(mixed.dir.parent / "jobs.jsonl"), load_config(model=str(model_dir())))
    assert read_plan(mixed.dir / "plan.json") == planned.plan
    assert planned.exit_code is ExitCode.SOME_FAILED
    assert {fault.number: fault.code for fault in planned.faults} == MIXED_CODES
    assert (planned.total_lines, planned.plan.requests) == (13, 11)
    assert {warning.code: warning.count for warning in planned.warnings} == warned(mixed.report)


def test_the_log_ends_with_the_run(mixed):
    assert not [h for h in logging.getLogger("batchrun").handlers if isinstance(h, logging.FileHandler)]
    assert "9 completed, 4 failed, 0 remaining" in (mixed.dir / "run.log").read_text()


# --- the same job in other clothes

SMALL = [
    chat("a", "What is the price of the apple?", max_tokens=9),
    {"id": "b", "prompt": "Zwölf Boxkämpfer 日本語", "max_tokens": 4},
    {"id": "c", "prompt": "apple", "max_tokens": 1, "temperature": 1.0},
    chat("d", "What is the price of the pear?", max_tokens=2),
]


@pytest.fixture(scope="module")
def small(model_dir, tmp_path_factory) -> dict[str, Any]:
    """The answers of `SMALL`."""
    folder = tmp_path_factory.mktemp("small")
    run_job(str(write_job(folder / "jobs.jsonl", SMALL)), load_config(model=str(model_dir())))
    return answers(folder / "jobs.run")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_job_runs_as_the_plain_one(suffix, run, small, tmp_path):
    plain = write_job(tmp_path / "plain", SMALL).read_bytes()
    job = tmp_path / f"jobs.jsonl{suffix}"
    job.write_bytes(gzip.compress(plain) if suffix == ".gz" else zstandard.compress(plain))
    outcome = run(job, out=None)
    assert outcome.run_dir == tmp_path / "jobs.run"
    assert answers(outcome.run_dir) == small


def test_standard_input_is_kept_so_that_the_run_can_be_gone_on_with(run, small, tmp_path, monkeypatch):
    def pipe() -> None:
        data = write_job(tmp_path / "plain", SMALL).read_bytes()
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    out = tmp_path / "deep" / "out.run"
    pipe()
    watcher = Watcher()
    watcher.stop = lambda: watcher.finished > 0
    stopped = run(Path("-"), watcher, out=str(out))
    assert stopped.exit_code is ExitCode.STOPPED
    assert (out / "job.jsonl").read_bytes() == (tmp_path / "plain").read_bytes()

    resumed = run(out / "job.jsonl", out=str(out))  # what was kept is a job like any other
    assert resumed.exit_code is ExitCode.OK
    assert answers(out) == small

    before = snapshot(out)
    pipe()
    again = run(Path("-"), out=str(out))  # and so is the same input again
    assert again.already_done
    assert snapshot(out) == before


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file but the lock, which says who held it last."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_standard_input_that_cannot_run_leaves_nothing_behind(run, tmp_path, monkeypatch):
    for data, config, error in (
        (b"\n", {}, NothingRunnable),
        (b"{bad\n", {"strict": True}, NothingRunnable),
        (b'{"prompt": "x"}\n', {"out": None}, UsageError),
    ):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        with pytest.raises(error):
            run(Path("-"), **config)
        assert list(tmp_path.iterdir()) == []


def test_a_job_in_its_own_run_directory_stays_where_it_is(run, small, tmp_path):
    job = write_job(tmp_path / "jobs.jsonl", SMALL)
    before = job.read_bytes()
    run(job, out=str(tmp_path))
    assert job.read_bytes() == before
    assert answers(tmp_path) == small


def test_files_that_no_run_has_brought_are_never_replaced(run, tmp_path, monkeypatch):
    folder = tmp_path / "experiment"
    folder.mkdir()
    job = write_job(folder / "job.jsonl", SMALL)
    before = job.read_bytes()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(before.splitlines(keepends=True)[0])))
    with pytest.raises(RunDirError, match=r"has a job\.jsonl that no run there has brought"):
        run(Path("-"), out=str(folder))
    assert job.read_bytes() == before

    run(job, out=str(folder))
    with pytest.raises(UsageError, match="--fresh would move the job itself"):
        run(job, out=str(folder), fresh=True)
    assert job.read_bytes() == before
    assert not (tmp_path / "experiment.1").exists()


def test_a_run_without_anything_left_to_compute_needs_no_model(run, small, tmp_path, monkeypatch):
    """Its answers could not be put where they were wanted: the same command does that, and nothing else."""
    (tmp_path / "taken").write_text("")
    wanted = {"output": {"results": str(tmp_path / "taken" / "all.jsonl")}}
    with pytest.raises(OutputError):
        run(SMALL, **wanted)
    assert answers(tmp_path / "out.run") == small
    (tmp_path / "taken").unlink()
    monkeypatch.setattr("batchrun.pipeline.start_engine", None)
    outcome = run(SMALL, **wanted)
    assert outcome.exit_code is ExitCode.OK
    assert len(read_lines(tmp_path / "taken" / "all.jsonl")) == len(small)


def test_a_finished_run_is_put_into_the_order_of_the_input_too(run, tmp_path):
    """The longest first, which ends last."""
    lines = [{"id": str(n), "prompt": "x", "max_tokens": n, "ignore_eos": True} for n in (9, 6, 3, 1)]
    run(lines)
    results = tmp_path / "out.run" / "results.jsonl"
    before = read_lines(results)
    assert [line["custom_id"] for line in before] == ["1", "3", "6", "9"]
    again = run(lines, results_order="input")
    assert again.already_done
    assert read_lines(results) == before[::-1]


def test_what_the_model_asks_for_in_vain_is_told(model_dir, run):
    asked = {"no_repeat_ngram_size": 3, "num_beams": 1, "max_new_tokens": None, "suppress_tokens": [7]}
    model = model_dir("llama", generation_config=asked)
    [told] = [warning for warning in run(SMALL, model=model).report.warnings if warning.code == "generation_config"]
    assert told.count == 2
    assert told.message.endswith("what is not applied: no_repeat_ngram_size = 3, suppress_tokens = [7]")
    ignored = run(SMALL, model=model, ignore_generation_config=True, fresh=True)
    assert "generation_config" not in warned(ignored.report)


def test_results_can_be_put_into_the_order_of_the_input(run, small, tmp_path):
    lines = [*SMALL, "{bad", {"id": "last", "prompt": "x", "max_tokens": 1}, {"prompt": ""}]
    run(lines, results_order="input")
    results = [line["custom_id"] for line in read_lines(tmp_path / "out.run" / "results.jsonl")]
    assert results == ["a", "b", "c", "d", "last"]
    errors = [line["batchrun"]["line"] for line in read_lines(tmp_path / "out.run" / "errors.jsonl")]
    assert errors == [5, 7]
    found = answers(tmp_path / "out.run")
    assert {name: found[name] for name in small} == small


def test_without_that_they_come_as_they_finish(run, tmp_path):
    run([{"id": str(n), "prompt": f"apple {n}", "max_tokens": n, "ignore_eos": True} for n in (30, 2, 9)])
    assert [line["custom_id"] for line in read_lines(tmp_path / "out.run" / "results.jsonl")] == ["2", "9", "30"]


def test_a_limit_takes_the_first_lines(run, small, tmp_path):
    outcome = run(["", *SMALL[:2], "{bad", *SMALL[2:]], limit=3)
    assert outcome.report.request_counts.total == 3
    found = answers(tmp_path / "out.run")
    assert set(found) == {"a", "b", "line-4"}
    assert found["a"][0] == small["a"][0]


def test_a_chat_needs_a_template(run, model_dir, tmp_path):
    bare = model_dir(chat_template=None)
    lines = [SMALL[0], SMALL[1]]
    without = run(lines, model=bare)
    assert without.exit_code is ExitCode.SOME_FAILED
    assert answers(tmp_path / "out.run")["a"] == "invalid_request"
    assert answers(tmp_path / "out.run")["b"][1]

    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    given = run(lines, model=bare, out=str(tmp_path / "given.run"), chat_template=str(template))
    assert given.exit_code is ExitCode.OK
    assert answers(tmp_path / "given.run")["a"][3] > 0


def test_no_sampling_defaults_of_the_model_where_they_are_not_wanted(run, tmp_path):
    lines = [{"id": str(i), "prompt": "Numbers:", "max_tokens": 12, "ignore_eos": True} for i in range(4)]
    run(lines)
    greedy = {found[0][0] for found in answers(tmp_path / "out.run").values()}
    run(lines, out=str(tmp_path / "drawn.run"), ignore_generation_config=True)
    drawn = {found[0][0] for found in answers(tmp_path / "drawn.run").values()}
    assert len(greedy) == 1  # do_sample is false in the model's generation_config.json
    assert len(drawn) > 1


def test_the_seed_of_the_run_changes_what_unseeded_lines_draw_and_nothing_else(run, tmp_path):
    lines = [
        {"id": "drawn", "prompt": "Numbers:", "max_tokens": 20, "temperature": 2.0, "ignore_eos": True},
        {"id": "seeded", "prompt": "Numbers:", "max_tokens": 20, "temperature": 2.0, "ignore_eos": True, "seed": 1},
        {"id": "greedy", "prompt": "Numbers:", "max_tokens": 20, "temperature": 0, "ignore_eos": True},
    ]
    found = {}
    for seed in (1, 2):
        run(lines, out=str(tmp_path / f"{seed}.run"), seed=seed)
        found[seed] = {name: answer[0] for name, answer in answers(tmp_path / f"{seed}.run").items()}
    assert found[1]["drawn"] != found[2]["drawn"]
    assert (found[1]["seeded"], found[1]["greedy"]) == (found[2]["seeded"], found[2]["greedy"])


# --- memory


def test_a_request_that_can_never_fit_is_the_fault_of_its_line_before_the_run(run, tmp_path):
    lines = [
        {"id": "large", "prompt": "x", "max_tokens": 200, "ignore_eos": True},
        {"id": "fits", "prompt": "x", "max_tokens": 20, "ignore_eos": True},
        {"id": "one of two", "prompt": ["x", "y " * 70], "max_tokens": 10, "ignore_eos": True},
    ]
    watcher = Watcher()
    outcome = run(lines, watcher, kv_memory=4 * PAGE_BYTES)
    found = answers(tmp_path / "out.run")
    assert found["large"] == found["one of two"] == "context_length_exceeded"
    assert found["fits"][3] == 20
    assert sorted(fault.number for fault in watcher.at_load or []) == [1, 3]
    messages = [line["response"]["body"]["error"]["message"] for line in read_lines(tmp_path / "out.run/errors.jsonl")]
    assert all("--kv-memory" in message and "64" in message for message in messages)
    assert outcome.exit_code is ExitCode.SOME_FAILED


def test_an_answer_that_nobody_limited_is_cut_to_the_pool_with_a_warning(run, tmp_path):
    lines = [
        {"id": "silent", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True},
        {"id": "small", "prompt": "x", "max_tokens": 2},
    ]
    outcome = run(lines, kv_memory=4 * PAGE_BYTES)
    assert warned(outcome.report) == {"max_tokens_default": 1, "max_tokens_clipped_to_memory": 1}
    _, reasons, prompt, completion, _ = answers(tmp_path / "out.run")["silent"]
    assert reasons == ["length"]
    assert prompt + completion == 4 * 16 + 1  # the last token needs no KV
    assert outcome.report.kv.peak_pages == outcome.report.kv.pages == 4


def test_no_memory_at_all_leaves_nothing_to_run(run, tmp_path):
    outcome = run(SMALL, kv_memory=1)
    assert outcome.exit_code is ExitCode.NOTHING_RUNNABLE
    assert len(read_lines(tmp_path / "out.run" / "errors.jsonl")) == len(SMALL)


def test_little_memory_changes_no_answer(run, tmp_path):
    lines = [chat(str(i), f"What is the price of {i}?", max_tokens=30) for i in range(6)]
    roomy = run(lines, out=str(tmp_path / "roomy.run"))
    # Lengths are guessed at 1, so that more is admitted than fits, and some must wait in the middle of an answer.
    tight = run(lines, kv_memory=10 * PAGE_BYTES, scheduler={"expected_tokens": 1, "step_tokens": 20})
    assert answers(tmp_path / "out.run") == answers(tmp_path / "roomy.run")
    assert tight.report.kv.peak_pages <= 10 < roomy.report.kv.peak_pages
    assert tight.report.preemptions > 0
    assert tight.report.steps > roomy.report.steps
    assert tight.report.tokens.prompt_computed > roomy.report.tokens.prompt_computed


# --- while it runs


def test_results_are_on_disk_while_the_job_runs(run, tmp_path):
    lines = [{"id": str(n), "prompt": f"apple {n}", "max_tokens": n, "ignore_eos": True} for n in (1, 5, 10, 40)]
    watcher = Watcher()
    seen: list[int] = []
    watcher.on_step = lambda: seen.append(len(read_lines(tmp_path / "out.run" / "results.jsonl")))
    run(lines, watcher, output={"flush_results": 1})
    assert seen == sorted(seen)
    assert {1, 2, 3} <= set(seen)
    assert seen.index(1) < 5
    assert watcher.expected == watcher.rows  # lengths are known, so that the end was foreseen to the row
    assert watcher.steps == len(seen)


def test_run_json_says_that_it_is_in_progress(run, tmp_path):
    watcher = Watcher()
    states = []
    watcher.on_step = lambda: states.append(read_document(tmp_path / "out.run" / "run.json", RunFile))
    run(SMALL, watcher)
    assert {state.status.value for state in states} == {"in_progress"}
    assert {state.exit_code for state in states} == {None}
    done = read_document(tmp_path / "out.run" / "run.json", RunFile)
    assert done.id == states[0].id
    assert done.status == "completed"


def test_the_log_of_steps_can_be_left_out(run, tmp_path):
    run(SMALL, output={"steps_log": False})
    assert not (tmp_path / "out.run" / "steps.jsonl").exists()
    assert (tmp_path / "out.run" / "report.json").exists()


# --- stopped, and gone on with


def test_a_run_that_is_stopped_and_gone_on_with_ends_like_one_that_was_not(run, tmp_path):
    lines = [*MIXED, *({"id": str(n), "prompt": f"plum {n}", "max_tokens": n} for n in range(1, 12))]
    run(lines, out=str(tmp_path / "whole.run"))
    starts = 0
    outcome: Outcome | None = None
    while outcome is None or outcome.exit_code is ExitCode.STOPPED:
        starts += 1
        watcher = Watcher()
        watcher.stop = lambda watcher=watcher: watcher.finished >= 4
        outcome = run(lines, watcher)
        counts = read_document(tmp_path / "out.run" / "run.json", RunFile).request_counts
        assert counts == outcome.report.request_counts
        assert counts.completed == len(read_lines(tmp_path / "out.run" / "results.jsonl"))
        assert counts.failed == len(read_lines(tmp_path / "out.run" / "errors.jsonl"))
    assert starts > 2
    assert outcome.exit_code is ExitCode.SOME_FAILED
    assert answers(tmp_path / "out.run") == answers(tmp_path / "whole.run")
    assert len(read_lines(tmp_path / "out.run" / "results.jsonl")) == len(MIXED_SOUND) + 11
    assert warned(outcome.report)["resumed"] > 0


def test_a_run_that_is_stopped_before_its_first_step_has_everything_to_do(run, tmp_path):
    outcome = run([*SMALL, "{bad"], Watcher(stop=lambda: True))
    assert outcome.exit_code is ExitCode.STOPPED
    counts = outcome.report.request_counts
    assert (counts.completed, counts.failed, counts.remaining) == (0, 1, 4)
    run_file = read_document(tmp_path / "out.run" / "run.json", RunFile)
    assert (run_file.status, run_file.exit_code, run_file.completed_at) == ("stopped", 75, None)


def test_a_failure_in_the_engine_is_no_end_of_the_world(run, small, tmp_path, monkeypatch):
    """It is not swallowed, keeps what is finished, and the same command goes on."""
    submit = TorchWorker.submit

    def fail(self: TorchWorker, step: Any) -> None:
        if step.index == 3:
            raise RuntimeError("out of luck")
        submit(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(TorchWorker, "submit", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            run(SMALL)
    kept = read_lines(tmp_path / "out.run" / "results.jsonl")
    assert 0 < len(kept) < len(SMALL)
    run_file = read_document(tmp_path / "out.run" / "run.json", RunFile)
    assert run_file.status == "stopped"
    counts = run_file.request_counts
    assert (counts.completed, counts.remaining) == (len(kept), len(SMALL) - len(kept))

    outcome = run(SMALL)
    assert outcome.exit_code is ExitCode.OK
    assert answers(tmp_path / "out.run") == small
    assert read_lines(tmp_path / "out.run" / "results.jsonl")[: len(kept)] == kept


# --- strict


def test_strict_refuses_what_only_the_tokenizer_finds_before_anything_is_written(run, tmp_path):
    with pytest.raises(NothingRunnable, match="line 2: context_length_exceeded"):
        run([SMALL[0], {"prompt": [7] * 600, "max_tokens": 1}], strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.jsonl"]
    assert run(SMALL, strict=True).exit_code is ExitCode.OK  # the mended job meets no trace of the other


# --- planned and run


def planned_steps(job: Path, config: RunConfig) -> list[dict[str, Any]]:
    """The steps of the plan, as `steps.jsonl` would have them."""
    subject = Subject.resolve(config, weights=False)
    prepared, _ = prepare(subject, (line for line in read_job(open_job(job)) if isinstance(line, JobLine)), config)
    steps: list[bytes] = []
    run_loop(
        Scheduler(prepared.plan, prepared.requests),
        SimulatedWorker(prepared.plan.expected_new_tokens),
        on_step=lambda step, output: steps.append(encode_step(step)),
    )
    return [json.loads(step) for step in steps]


@pytest.fixture(scope="module")
def exact_job(tmp_path_factory) -> Path:
    """Three levels of sharing, duplicates and loners, with lengths that are known beforehand."""
    random = np.random.default_rng(5)
    lines = []
    for i in range(24):
        table, question = i % 3, int(random.integers(0, 4))
        text = f"{TABLE * (table + 1)} Table {table}. Question {question}: what is the price of {i % 5}?"
        if i % 8 == 7:
            text = f"{i} quick foxes"
        lines.append({"prompt": text, "max_tokens": int(random.integers(1, 25)), "ignore_eos": True})
    return write_job(tmp_path_factory.mktemp("exact") / "jobs.jsonl", lines)


@pytest.mark.parametrize("pages", [None, 24])
@pytest.mark.parametrize("order", ORDERS)
def test_the_planned_steps_are_the_steps_that_run(order, pages, exact_job, model_dir, tmp_path):
    config = load_config(
        model=str(model_dir()),
        out=str(tmp_path / "out.run"),
        schedule_order=order,
        kv_memory=pages and pages * PAGE_BYTES,
        scheduler={"step_tokens": 60},
    )
    planned = planned_steps(exact_job, config)
    outcome = run_job(str(exact_job), config)
    executed = list(read_steps(tmp_path / "out.run" / "steps.jsonl"))
    assert all(step.pop("record") is not None for step in executed)
    assert all(step.pop("record") is None for step in planned)
    assert executed == planned
    said = plan_job(str(exact_job), config).plan
    assert (said.steps, said.kv, said.tokens) == (len(executed), outcome.report.kv, outcome.report.tokens)
    if pages:
        assert outcome.report.kv.pages == pages
        assert len(executed) > 40


def test_neither_order_nor_memory_changes_an_answer(exact_job, model_dir, tmp_path):
    found = []
    for name, options in (
        ("dfs", {}),
        ("shuffle", {"schedule_order": "shuffle", "scheduler": {"step_tokens": 7, "page_size": 3}}),
        ("none", {"kv_memory": 24 * PAGE_BYTES, "scheduler": {"grouping": "none"}}),
    ):
        run_job(str(exact_job), load_config(model=str(model_dir()), out=str(tmp_path / name), **options))
        found.append(answers(tmp_path / name))
    assert found[0] == found[1] == found[2]


def test_a_plan_needs_no_weights_and_a_run_does(model_dir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model_dir().iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    job = write_job(tmp_path / "jobs.jsonl", SMALL)
    planned = plan_job(str(job), load_config(model=str(bare)))
    assert planned.plan.requests == len(SMALL)
    with pytest.raises(UsageError, match="safetensors"):
        run_job(str(job), load_config(model=str(bare)))
    assert not (tmp_path / "jobs.run").exists()
