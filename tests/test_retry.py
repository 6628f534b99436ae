"""Lines are run again: only those that are asked for, with other settings, and nothing is lost or there twice on the
way, wherever it is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import build_faulty_engine
from kills import killed_before
from test_cli import batchrun_process
from test_pipeline import PAGE_BYTES, Watcher, read_lines, snapshot, write_job
from typer.testing import CliRunner, Result

from batchrun import pipeline
from batchrun.cli import app
from batchrun.config import load_config
from batchrun.errors import ExitCode
from batchrun.formats.rundir import RunDir, RunFile, read_document
from batchrun.pipeline import run_job
from batchrun.retry import retry_run

LINES = [
    {"id": f"r{i}", "prompt": f"one two {i}", "max_tokens": 4 + i % 3, "ignore_eos": True, "temperature": 0}
    for i in range(6)
]
BAD = ["{bad", {"id": "x", "prompt": "apple", "tools": [1]}]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, model_dir) -> Callable[..., Any]:
    """`run(lines, **config)`: a run of a job in `jobs.run`; without lines, of the job that is there."""

    def call(lines: list[Any] | None = None, observer: Watcher | None = None, **config: Any) -> Any:
        if lines is not None:
            write_job(here / "jobs.jsonl", lines)
        return run_job("jobs.jsonl", load_config(model=str(model_dir()), **config), observer)

    return call


def batchrun(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


def retry(*args: str) -> Result:
    return batchrun("retry", "jobs.run", *args)


def faults(monkeypatch: pytest.MonkeyPatch, wanted: dict[int, tuple[str, int]]) -> None:
    monkeypatch.setenv("FAULTS", json.dumps(wanted))
    monkeypatch.setattr(pipeline, "build_engine", build_faulty_engine)


def choices(run_dir: Path) -> dict[str, Any]:
    return {
        line["custom_id"]: [(c["text"], c["finish_reason"]) for c in line["response"]["body"]["choices"]]
        for line in read_lines(run_dir / "results.jsonl")
    }


def choices_of_chats(run_dir: Path) -> dict[str, str]:
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in read_lines(run_dir / "results.jsonl")
    }


def codes(run_dir: Path) -> dict[str, str]:
    found = {}
    for line in read_lines(run_dir / "errors.jsonl"):
        assert line["custom_id"] not in found
        found[line["custom_id"]] = (line["error"] or line["response"]["body"]["error"])["code"]
    return found


def attempts(run_dir: Path) -> dict[str, int]:
    return {
        line["custom_id"]: line["batchrun"]["attempts"]
        for name in ("results.jsonl", "errors.jsonl")
        for line in read_lines(run_dir / name)
    }


def counts(run_dir: Path) -> tuple[int, int, int, int]:
    """Of `run.json`, which are those of the report and of the lines."""
    run = json.loads((run_dir / "run.json").read_bytes())
    assert run["request_counts"] == json.loads((run_dir / "report.json").read_bytes())["request_counts"]
    found = tuple(run["request_counts"][name] for name in ("total", "completed", "failed", "remaining"))
    assert found[1:3] == (len(choices(run_dir)), len(codes(run_dir)))
    assert sum(run["errors"].values()) == found[2]
    return found  # type: ignore[return-value]


# --- lines that failed


@pytest.mark.parametrize(
    ("kind", "code", "tried", "settings"),
    [
        ("nan", "engine_quarantined", 2, {}),
        ("slow", "request_timeout", 1, {"limits": {"request_timeout": 0.5}, "scheduler": {"step_tokens": 8}}),
    ],
)
def test_what_failed_is_run_again_and_has_the_answer_of_an_undisturbed_run(
    kind, code, tried, settings, run, here, monkeypatch
):
    run(LINES, out="sound.run", **settings | {"limits": {}})
    with monkeypatch.context() as patched:
        faults(patched, {2: (kind, 1)})
        assert run(**settings).exit_code is ExitCode.SOME_FAILED
    failed = codes(here / "jobs.run")
    assert failed["r2"] == code
    assert set(failed.values()) == {code}
    old_results = (here / "jobs.run" / "results.jsonl").read_bytes()
    old_errors = (here / "jobs.run" / "errors.jsonl").read_bytes()

    done = retry("--request-timeout", "1h")
    assert done.exit_code == ExitCode.OK, done.stderr
    assert choices(here / "jobs.run") == choices(here / "sound.run")
    assert counts(here / "jobs.run") == (6, 6, 0, 0)
    assert (here / "jobs.run" / "results.jsonl").read_bytes().startswith(old_results)
    assert (here / "jobs.run" / "replaced.jsonl").read_bytes() == old_errors
    assert attempts(here / "jobs.run") == {f"r{i}": tried + 1 if f"r{i}" in failed else 1 for i in range(6)}
    noted = read_document(here / "jobs.run" / "run.json", RunFile)
    assert (noted.status, noted.exit_code, len(noted.retries)) == ("completed", 0, 1)
    assert noted.retries[0].lines == len(failed)
    assert noted.retries[0].changed == {"limits.request_timeout": "1h"}
    assert noted.retries[0].at >= noted.created_at

    before = snapshot(here / "jobs.run")
    again = retry()
    assert again.exit_code == ExitCode.OK
    assert "Nothing to retry in jobs.run." in again.stderr
    assert "no line has failed" in again.stderr
    assert "6 of 6 requests answered" in again.stdout
    assert "finished already" in batchrun("run", "jobs.jsonl", "--model", noted.settings["model"]).stdout
    assert snapshot(here / "jobs.run") == before


def test_what_fails_again_has_one_error_line(run, here, monkeypatch):
    faults(monkeypatch, {2: ("nan", 1)})
    run(LINES)
    monkeypatch.setenv("FAULTS", json.dumps({0: ("nan", 1)}))  # the only request of the retry
    for tried in (4, 6):
        assert retry("-q").exit_code == ExitCode.SOME_FAILED
        assert codes(here / "jobs.run") == {"r2": "engine_quarantined"}
        assert attempts(here / "jobs.run")["r2"] == tried
        assert counts(here / "jobs.run") == (6, 5, 1, 0)
    assert [line["batchrun"]["attempts"] for line in read_lines(here / "jobs.run" / "replaced.jsonl")] == [2, 4]


def test_lines_that_are_bad_in_the_job_stay_as_they_are(run, here):
    run([*LINES[:2], *BAD])
    before = snapshot(here)
    done = retry()
    assert done.exit_code == ExitCode.SOME_FAILED
    assert "Nothing to retry in jobs.run." in done.stderr
    assert "failed lines that are bad in the job itself, which is the same: 2" in done.stderr
    assert "2 of 4 requests answered, 2 failed" in done.stdout
    assert json.loads(retry("--json", "-q").stdout)["request_counts"]["failed"] == 2
    assert retry("--code", "unsupported_field", "-q").stderr == ""
    assert snapshot(here) == before


def test_lines_are_chosen_by_code_and_memory_may_differ(run, here, monkeypatch):
    faults(monkeypatch, {1: ("nan", 1)})
    large = {"id": "large", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    run([*LINES[:2], large, *BAD], kv_memory=4 * PAGE_BYTES)
    monkeypatch.setenv("FAULTS", "{}")
    assert sorted(codes(here / "jobs.run").values()) == [
        "context_length_exceeded",
        "engine_quarantined",
        "invalid_json_line",
        "unsupported_field",
    ]
    no_such = retry("--code", "request_timeout")
    assert no_such.exit_code == ExitCode.SOME_FAILED
    assert "no line has failed with request_timeout" in no_such.stderr

    assert retry("--code", "context_length_exceeded", "-q").exit_code == ExitCode.SOME_FAILED  # the memory is the same
    assert codes(here / "jobs.run")["large"] == "context_length_exceeded"
    done = retry("--code", "context_length_exceeded", "--code", "request_timeout", "--kv-memory", "1MiB")
    assert done.exit_code == ExitCode.SOME_FAILED
    assert sorted(codes(here / "jobs.run").values()) == ["engine_quarantined", "invalid_json_line", "unsupported_field"]
    assert counts(here / "jobs.run") == (5, 2, 3, 0)
    noted = read_document(here / "jobs.run" / "run.json", RunFile)
    assert [(each.codes, each.changed) for each in noted.retries] == [
        (["context_length_exceeded"], {}),
        (["context_length_exceeded", "request_timeout"], {"kv_memory": "1MiB"}),
    ]
    assert retry("-q").exit_code == ExitCode.SOME_FAILED  # the rest, but for the lines that are bad in the job
    assert sorted(codes(here / "jobs.run").values()) == ["invalid_json_line", "unsupported_field"]
    assert read_lines(here / "jobs.run" / "replaced.jsonl")[-1]["error"]["code"] == "engine_quarantined"


# --- answers that were cut short

CUT = [
    {"id": "short", "prompt": "one two", "max_tokens": 3, "temperature": 0},
    {"id": "many", "prompt": ["pear", "plum apple"], "max_tokens": 4, "ignore_eos": True, "temperature": 0},
    {"id": "silent", "prompt": "Numbers: 0 1 2", "ignore_eos": True, "temperature": 1.3},
    {"id": "stops", "prompt": "one two", "max_tokens": 90, "temperature": 0, "stop": ["e", "a", "o", " "]},
    {"id": "full", "prompt": [7] * 505, "max_tokens": 500, "ignore_eos": True},
    *BAD,
]


def test_answers_that_were_cut_short_get_more_tokens(run, here):
    longer = [line | {"max_tokens": 24} if isinstance(line, dict) and "tools" not in line else line for line in CUT]
    run(longer, out="longer.run")
    assert run(CUT, results_order="input").exit_code is ExitCode.SOME_FAILED
    before = {line["custom_id"]: line for line in read_lines(here / "jobs.run" / "results.jsonl")}
    failed = (here / "jobs.run" / "errors.jsonl").read_bytes()
    assert choices(here / "jobs.run")["stops"][0][1] == "stop"

    done = retry("--finish-reason", "length", "--max-tokens", "24")
    assert done.exit_code == ExitCode.SOME_FAILED
    assert "answers that ended by length and fill the model's context: 1" in done.stderr
    found, expected = choices(here / "jobs.run"), choices(here / "longer.run")
    taken = {"short", "many", "silent"}
    assert {name: found[name] for name in taken} == {name: expected[name] for name in taken}
    after = {line["custom_id"]: line for line in read_lines(here / "jobs.run" / "results.jsonl")}
    assert {name: after[name] for name in ("stops", "full")} == {name: before[name] for name in ("stops", "full")}
    assert list(after) == [line["id"] for line in CUT[:5]]  # in the order of the input, as the run was asked for
    assert {line["custom_id"]: line for line in read_lines(here / "jobs.run" / "replaced.jsonl")} == {
        name: before[name] for name in taken
    }
    assert all(after[name]["batchrun"]["attempts"] == 2 for name in taken)
    assert after["silent"]["batchrun"]["seed"] == before["silent"]["batchrun"]["seed"]
    assert (here / "jobs.run" / "errors.jsonl").read_bytes() == failed
    assert counts(here / "jobs.run") == (7, 5, 2, 0)
    noted = read_document(here / "jobs.run" / "run.json", RunFile)
    assert noted.fingerprint["max_tokens"] is None
    assert (noted.retries[0].finish_reason, noted.retries[0].changed) == ("length", {"max_tokens": 24})

    untouched = snapshot(here)
    same = retry("--finish-reason", "length", "--max-tokens", "24")  # all that could be longer is
    assert same.exit_code == ExitCode.USAGE
    assert "--max-tokens 24 raises no limit" in same.stderr
    assert snapshot(here) == untouched


def test_answers_that_memory_has_cut_are_not_lost_for_a_limit_beyond_it(run, here):
    """They get as many tokens as there is memory for, as before."""
    lines = [{"id": "silent", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "temperature": 0}]
    run(lines, kv_memory=4 * PAGE_BYTES)
    before = choices_of_chats(here / "jobs.run")
    done = retry("--finish-reason", "length", "--max-tokens", "400", "--json")
    assert done.exit_code == ExitCode.OK
    assert choices_of_chats(here / "jobs.run") == before
    assert "max_tokens_clipped_to_memory" in {warning["code"] for warning in json.loads(done.stdout)["warnings"]}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--finish-reason", "length"], "--max-tokens N"),
        (["--finish-reason", "stop", "--max-tokens", "9"], "--finish-reason length"),
        (["--finish-reason", "length", "--max-tokens", "3"], "have as many tokens: 2."),
        (["--max-tokens", "0"], "--max-tokens: max_tokens = 0 is wrong"),
        (["--kv-memory", "plenty"], "--kv-memory"),
        (["--request-timeout", "soon"], "--request-timeout"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_a_wrong_command_line_is_refused_and_nothing_is_touched(flags, words, run, here):
    run([CUT[0], CUT[1], BAD[0]])
    before = snapshot(here)
    done = retry(*flags)
    assert done.exit_code == ExitCode.USAGE
    assert words in done.stderr
    assert snapshot(here) == before


def test_a_limit_for_lines_that_failed_takes_the_place_of_their_own(run, here):
    large = {"id": "large", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    run([large], kv_memory=4 * PAGE_BYTES)
    assert retry("--max-tokens", "20", "-q").exit_code == ExitCode.OK
    [line] = read_lines(here / "jobs.run" / "results.jsonl")
    assert line["response"]["body"]["usage"]["completion_tokens"] == 20
    assert line["batchrun"]["attempts"] == 1  # it was never tried before


# --- runs that are not finished


def stopped_after(finished: int) -> Watcher:
    watcher = Watcher()
    watcher.stop = lambda: watcher.finished >= finished
    return watcher


SLOWLY = {"scheduler": {"step_tokens": 8}, "output": {"flush_results": 1}}


def test_what_remains_is_run_too_and_keeps_its_own_limit(run, here):
    run(LINES, out="whole.run")
    assert run(LINES, stopped_after(2), **SLOWLY).exit_code is ExitCode.STOPPED
    kept = set(choices(here / "jobs.run"))
    assert 0 < len(kept) < len(LINES)
    assert retry("--finish-reason", "length", "--max-tokens", "9", "-q").exit_code == ExitCode.OK
    found, whole = choices(here / "jobs.run"), choices(here / "whole.run")
    for name, [(text, _)] in found.items():
        [(expected, _)] = whole[name]
        assert text.startswith(expected)
        assert (len(text) > len(expected)) is (name in kept)
    assert attempts(here / "jobs.run") == {name: 2 if name in kept else 1 for name in found}
    assert counts(here / "jobs.run") == (6, 6, 0, 0)


@pytest.mark.parametrize("then", ["retry", "run"])
def test_a_retry_that_is_stopped_is_gone_on_with(then, run, here):
    run([line | {"max_tokens": 20} for line in LINES], out="longer.run")
    run(LINES, out="whole.run")
    run(LINES, **SLOWLY)
    lengths = {"finish_reason": "length", "max_tokens": 20}
    stopped = retry_run(Path("jobs.run"), **lengths, observer=stopped_after(2))
    assert (stopped.outcome.exit_code, stopped.lines) == (ExitCode.STOPPED, 6)
    report = stopped.outcome.report.request_counts
    assert report.remaining > 0
    assert (report.total, report.failed) == (6, 0)
    kept = (here / "jobs.run" / "results.jsonl").read_bytes()
    first = set(choices(here / "jobs.run"))

    if then == "retry":
        gone_on = retry_run(Path("jobs.run"), **lengths)
        assert (gone_on.outcome.exit_code, gone_on.lines) == (ExitCode.OK, 0)
    else:
        assert run(**SLOWLY).exit_code is ExitCode.OK
    assert (here / "jobs.run" / "results.jsonl").read_bytes().startswith(kept)  # none is run a third time
    longer, whole = choices(here / "longer.run"), choices(here / "whole.run")
    assert choices(here / "jobs.run") == {
        name: longer[name] if then == "retry" or name in first else whole[name] for name in whole
    }
    assert set(attempts(here / "jobs.run").values()) == {2}
    assert counts(here / "jobs.run") == (6, 6, 0, 0)
    assert len(read_document(here / "jobs.run" / "run.json", RunFile).retries) == 1


def test_limits_of_the_run_are_not_those_of_a_retry(run, here, monkeypatch):
    with monkeypatch.context() as patched:
        faults(patched, {2: ("nan", 1)})
        run([*LINES, BAD[0]], limits={"max_errors": 2, "timeout": "1h", "until": "2099-01-01T00:00"})
    stopped = retry("--timeout", "0.001")
    assert stopped.exit_code == ExitCode.STOPPED
    assert "The same command again goes on" in stopped.stderr
    assert counts(here / "jobs.run") == (7, 5, 1, 1)
    assert retry("-q").exit_code == ExitCode.SOME_FAILED
    assert counts(here / "jobs.run") == (7, 6, 1, 0)


# --- killed


@pytest.fixture
def half_bad(run, here, monkeypatch) -> dict[str, Any]:
    """`jobs.run` with a line that failed and answers that were cut short; what a retry of all makes of it."""
    run([line | {"max_tokens": 9} for line in LINES], out="longer.run")
    with monkeypatch.context() as patched:
        faults(patched, {2: ("nan", 1)})
        run([*LINES, BAD[0]])
    return choices(here / "longer.run")


ALL = ["--finish-reason", "length", "--code", "engine_quarantined", "--max-tokens", "9", "-q"]


def take_out() -> None:
    pipeline.Run.execute = lambda self: os._exit(0)  # type: ignore[method-assign,assignment,return-value]
    app(["retry", "jobs.run", *ALL])


def test_wherever_the_taking_out_is_killed_nothing_is_lost_and_the_same_command_goes_on(half_bad, here):
    untouched = snapshot(here / "jobs.run")
    old = [
        raw
        for name in ("results.jsonl", "errors.jsonl")
        for raw in (here / "jobs.run" / name).read_bytes().splitlines(True)
    ]
    bad = old[-1] if b"invalid_json_line" in old[-1] else old[-2]

    def restore() -> None:
        for file in (here / "jobs.run").iterdir():
            file.unlink()
        for name, (_, content) in untouched.items():
            (here / "jobs.run" / name).write_bytes(content)

    for call in range(40):
        restore()
        lived = killed_before(call, [(os, "fsync"), (Path, "replace")], take_out)
        there = b"".join(file.read_bytes() for file in (here / "jobs.run").glob("re*.jsonl"))
        there += (here / "jobs.run" / "errors.jsonl").read_bytes()
        assert [raw for raw in old if raw not in there] == []
        if call % 5 == 4:  # whoever comes next does the rest of the taking out
            plain = batchrun("run", "jobs.jsonl", "--model", model_of(here), "-q")
            assert plain.exit_code == ExitCode.SOME_FAILED
            assert counts(here / "jobs.run")[2:] in ((1, 0), (2, 0))
        done = retry(*ALL)
        assert done.exit_code == ExitCode.SOME_FAILED, done.stderr
        assert choices(here / "jobs.run") == half_bad
        assert codes(here / "jobs.run") == {"line-7": "invalid_json_line"}
        assert counts(here / "jobs.run") == (7, 6, 1, 0)
        replaced = (here / "jobs.run" / "replaced.jsonl").read_bytes().splitlines(True)
        if call % 5 != 4:
            assert sorted(replaced) == sorted(raw for raw in old if raw != bad)
        if lived:
            assert call > 10
            return
    raise AssertionError("it never came to an end")


def model_of(here: Path) -> str:
    return json.loads((here / "jobs.run" / "run.json").read_bytes())["settings"]["model"]


@pytest.mark.own_process
@pytest.mark.parametrize("then", ["retry", "run"])
def test_a_retry_that_is_killed_while_it_runs_is_gone_on_with(then, run, here):
    lines = [line | {"id": f"r{i}", "prompt": f"one {i}"} for i, line in enumerate(LINES * 3)]
    longer = {"max_tokens": 40}
    run([line | longer for line in lines], out="longer.run", in_process=True)
    run(lines, kv_memory="30KiB", in_process=True, **SLOWLY)
    old = (here / "jobs.run" / "results.jsonl").read_bytes()
    args = ["retry", "jobs.run", "--finish-reason", "length", "--max-tokens", "40", "-q"]
    process = batchrun_process(here, *args, start_new_session=True)
    results = here / "jobs.run" / "results.jsonl"
    while process.poll() is None and not (
        0 < results.stat().st_size < len(old) and (here / "jobs.run/replaced.jsonl").exists()
    ):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    assert (here / "jobs.run" / "replaced.jsonl").read_bytes() == old
    status = batchrun("status", "jobs.run")
    assert status.exit_code == ExitCode.STOPPED
    assert "Killed or crashed" in status.stdout
    kept = results.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 0 < kept.count(b"\n") < len(lines)

    if then == "retry":
        assert batchrun(*args).exit_code == ExitCode.OK
        assert choices(here / "jobs.run") == choices(here / "longer.run")
    else:
        assert run(kv_memory="30KiB", in_process=True).exit_code is ExitCode.OK
    assert results.read_bytes().startswith(kept)
    assert counts(here / "jobs.run") == (len(lines), len(lines), 0, 0)
    assert set(attempts(here / "jobs.run").values()) == {2}


# --- whose run it is


@pytest.fixture
def failed(run, here, monkeypatch) -> Iterator[None]:
    """`jobs.run` with a line that failed and can be run again."""
    with monkeypatch.context() as patched:
        faults(patched, {2: ("nan", 1)})
        run(LINES)
    yield


def test_another_job_or_model_is_refused_and_one_that_was_moved_is_found(failed, here, model_dir, tmp_path_factory):
    before = snapshot(here / "jobs.run")
    job = (here / "jobs.jsonl").read_bytes()
    write_job(here / "jobs.jsonl", LINES[:3])
    changed = retry()
    assert changed.exit_code == ExitCode.RUN_DIR
    assert "belongs to another run: job is" in changed.stderr
    assert "batchrun run" in changed.stderr
    other = retry("--model", str(model_dir("llama-mha")))
    assert other.exit_code == ExitCode.RUN_DIR
    assert "model is" in other.stderr

    (here / "jobs.jsonl").unlink()
    (here / "moved.jsonl").write_bytes(job)
    gone = retry()
    assert gone.exit_code == ExitCode.USAGE
    assert "no longer at" in gone.stderr
    assert "--job" in gone.stderr
    assert snapshot(here / "jobs.run") == before

    moved = tmp_path_factory.mktemp("moved") / "model"
    moved.symlink_to(model_dir())
    assert retry("--job", "moved.jsonl", "--model", str(moved)).exit_code == ExitCode.OK
    lines = read_lines(here / "jobs.run" / "results.jsonl")
    assert len({line["response"]["body"]["model"] for line in lines}) == 1  # it keeps the name that it was given by


def test_it_works_from_any_place(here, model_dir, monkeypatch, tmp_path_factory):
    (here / "tiny").symlink_to(model_dir())
    (here / "own.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    write_job(here / "jobs.jsonl", [*LINES, {"id": "chat", "messages": [{"role": "user", "content": "apple"}]}])
    with monkeypatch.context() as patched:
        faults(patched, {6: ("nan", 1)})
        args = ["run", "jobs.jsonl", "--model", "tiny", "--chat-template", "own.jinja", "--max-tokens", "4", "-q"]
        assert batchrun(*args).exit_code == ExitCode.SOME_FAILED
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert batchrun("retry", str(here / "jobs.run"), "-q").exit_code == ExitCode.OK
    models = {line["response"]["body"]["model"] for line in read_lines(here / "jobs.run" / "results.jsonl")}
    assert models == {"tiny"}


def test_a_run_of_an_earlier_version_says_what_to_do(failed, here):
    model = model_of(here)
    file = here / "jobs.run" / "run.json"
    document = json.loads(file.read_bytes())
    noted = {name: document.pop(name) for name in ("job", "settings", "retries")}
    file.write_text(json.dumps(document))
    for command in ("retry", "close"):
        if command == "close":
            file.write_text(json.dumps(document | {"status": "stopped", "exit_code": 75, "completed_at": None}))
        done = batchrun(command, "jobs.run")
        assert done.exit_code == ExitCode.USAGE
        assert "an earlier version wrote it" in done.stderr
        assert "`batchrun run` command of this run once more" in done.stderr
    file.write_text(json.dumps(document))
    before = (here / "jobs.run" / "results.jsonl").read_bytes()
    assert "finished already" in batchrun("run", "jobs.jsonl", "--model", model).stdout
    assert (here / "jobs.run" / "results.jsonl").read_bytes() == before
    found = json.loads(file.read_bytes())
    assert {name: found[name] for name in noted} == noted
    assert retry("-q").exit_code == ExitCode.OK


def test_settings_that_were_broken_by_hand_are_a_usage_error(failed, here):
    file = here / "jobs.run" / "run.json"
    document = json.loads(file.read_bytes())
    for change, words in (({"model": 5}, "model = 5"), ({"limits": "none"}, "limits"), ({"colour": 1}, "colour")):
        file.write_text(json.dumps(document | {"settings": document["settings"] | change}))
        done = retry()
        assert done.exit_code == ExitCode.USAGE
        assert "jobs.run/run.json" in done.stderr
        assert words in done.stderr


@pytest.mark.parametrize("command", ["retry", "close"])
def test_there_must_be_a_run_that_nobody_works_on(command, failed, here):
    nothing = batchrun(command, "none.run", "--json")
    assert nothing.exit_code == ExitCode.USAGE
    assert "There is no run" in json.loads(nothing.stdout)["error"]["message"]
    assert not (here / "none.run").exists()
    with RunDir.reopen(here / "jobs.run"):
        held = batchrun(command, "jobs.run")
        assert held.exit_code == ExitCode.RUN_DIR
        assert f"process {os.getpid()}" in held.stderr


def test_a_job_from_standard_input_is_run_again(here, model_dir, monkeypatch):
    data = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    with monkeypatch.context() as patched:
        faults(patched, {2: ("nan", 1)})
        done = CliRunner().invoke(app, ["run", "-", "-o", "jobs.run", "--model", str(model_dir()), "-q"], input=data)
        assert done.exit_code == ExitCode.SOME_FAILED
    (here / "jobs.run").rename(here / "moved.run")
    assert batchrun("retry", "moved.run", "-q").exit_code == ExitCode.OK
    assert set(choices(here / "moved.run")) == {line["id"] for line in LINES}


def test_json_is_the_report(failed, here):
    done = retry("--json", "-q")
    assert done.exit_code == ExitCode.OK
    assert json.loads(done.stdout) == json.loads((here / "jobs.run" / "report.json").read_bytes())
    assert "6 of 6 requests answered" in (here / "jobs.run" / "report.html").read_text(encoding="utf-8")
    assert "6 completed, 0 failed, 0 remaining" in (here / "jobs.run" / "run.log").read_text()
