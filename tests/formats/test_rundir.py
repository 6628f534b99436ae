"""A run directory has one owner, one job, and lines that are whole: after a crash, on a full disk, in any order."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import orjson
import pytest

from batchrun.errors import ExitCode, OutputError, RunDirError
from batchrun.formats.results import error_line, result_line, unrun_line
from batchrun.formats.rundir import (
    DiskEstimate,
    Recovered,
    ResultSink,
    Retry,
    RunDir,
    RunState,
    RunStatus,
    check_disk,
    cut_torn_tail,
    document,
    estimate_disk,
    failed_lines,
    sort_results,
    write_json_atomic,
)
from batchrun.report.records import RequestCounts
from batchrun.request import Endpoint, FinishReason, LineFault, Result, Usage

FINGERPRINT = {"job": "sha256:aa", "model": "demo", "temperature": 0.7, "seed": 0, "template": None}
NOTHING = Recovered(np.empty(0, np.int64), np.empty(0, np.int64), {})


def a_result(line: int, text: str = "text") -> bytes:
    result = Result(0, text, np.array([1], np.int32), FinishReason.STOP, Usage(1, 0, 1))
    return result_line(
        [result], custom_id=f"r{line}", line=line, endpoint=Endpoint.CHAT, model="m", created=0, seed=0, group=None
    )


def an_error(line: int, code: str = "invalid_request") -> bytes:
    return error_line(LineFault(line, f"r{line}", code, "wrong"))


def start(run_dir: RunDir, total: int = 3) -> None:
    run_dir.start(RequestCounts(total, 0, 0, total), model="demo", environment={"python": "3.11"})


# --- states ---


def test_a_run_goes_from_new_to_unfinished_to_finished(tmp_path):
    path = tmp_path / "deep" / "jobs.run"
    with RunDir.open(path, FINGERPRINT) as run_dir:
        assert run_dir.state is RunState.NEW
        start(run_dir)
        first = run_dir.run
    with RunDir.open(path, FINGERPRINT) as run_dir:
        assert run_dir.state is RunState.UNFINISHED
        assert run_dir.run == first
        start(run_dir)
        assert first and run_dir.run
        assert (run_dir.run.id, run_dir.run.created_at) == (first.id, first.created_at)
        run_dir.update(RunStatus.STOPPED, RequestCounts(3, 1, 0, 2), errors={}, exit_code=ExitCode.STOPPED)
    with RunDir.open(path, FINGERPRINT) as run_dir:
        assert run_dir.state is RunState.UNFINISHED
        counts = RequestCounts(3, 2, 1, 0)
        run_dir.update(RunStatus.COMPLETED, counts, errors={"empty_prompt": 1}, exit_code=ExitCode.SOME_FAILED)
    with RunDir.open(path, FINGERPRINT) as run_dir:
        assert run_dir.state is RunState.FINISHED
        assert run_dir.run and run_dir.run.exit_code == 3
    document = orjson.loads((path / "run.json").read_bytes())
    assert document["schema_version"] == 1
    assert document["object"] == "batch"
    assert document["status"] == "completed"
    assert document["request_counts"] == {"total": 3, "completed": 2, "failed": 1, "remaining": 0}
    assert document["errors"] == {"empty_prompt": 1}
    assert document["fingerprint"] == FINGERPRINT
    assert document["completed_at"] >= document["in_progress_at"] >= document["created_at"] > 0


@pytest.mark.parametrize("counts", [(3, 1, 1, 0), (3, 4, 0, -1), (0, 0, 0, 1)])
def test_counts_that_do_not_add_up_cannot_be_written_or_read(tmp_path, counts):
    with pytest.raises(ValueError, match="must be completed \\+ failed \\+ remaining"):
        RequestCounts(*counts)
    with RunDir.open(tmp_path, FINGERPRINT) as run_dir:
        start(run_dir)
    document = orjson.loads((tmp_path / "run.json").read_bytes())
    document["request_counts"] = dict(zip(("total", "completed", "failed", "remaining"), counts, strict=True))
    (tmp_path / "run.json").write_bytes(orjson.dumps(document))
    with pytest.raises(RunDirError, match="request_counts"):
        RunDir.open(tmp_path, FINGERPRINT)


def test_a_finished_run_has_nothing_remaining_and_an_exit_code(tmp_path):
    with RunDir.open(tmp_path, FINGERPRINT) as run_dir:
        start(run_dir)
        with pytest.raises(ValueError, match="no remaining lines"):
            run_dir.update(RunStatus.COMPLETED, RequestCounts(3, 2, 0, 1), errors={}, exit_code=ExitCode.OK)
        with pytest.raises(ValueError, match="exit code"):
            run_dir.update(RunStatus.COMPLETED, RequestCounts(3, 3, 0, 0), errors={})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(schema_version=2), "schema_version 2"),
        (lambda d: d.pop("schema_version"), "schema_version"),
        (lambda d: d.pop("status"), "status"),
        (lambda d: d.update(status="resting"), "status"),
        (lambda d: d.update(created_at="now"), "created_at"),
    ],
)
def test_an_unsound_run_json_is_refused_with_the_field_named(tmp_path, change, named):
    with RunDir.open(tmp_path, FINGERPRINT) as run_dir:
        start(run_dir)
    document = orjson.loads((tmp_path / "run.json").read_bytes())
    change(document)
    (tmp_path / "run.json").write_bytes(orjson.dumps(document))
    with pytest.raises(RunDirError, match=named) as caught:
        RunDir.open(tmp_path, FINGERPRINT)
    assert "--fresh" in (caught.value.hint or "")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\x00\x00"])
def test_a_run_json_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunDirError, match=r"run\.json"):
        RunDir.open(tmp_path, FINGERPRINT)


def test_results_of_an_unknown_run_are_never_appended_to(tmp_path):
    (tmp_path / "results.jsonl").write_bytes(a_result(1))
    with pytest.raises(RunDirError, match=r"results\.jsonl but no run\.json"):
        RunDir.open(tmp_path, FINGERPRINT)
    assert (tmp_path / "results.jsonl").read_bytes() == a_result(1)


# --- fingerprints ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "llama"}, "model is 'demo' there and 'llama' now"),
        ({"temperature": 1.0}, "temperature is 0.7 there and 1.0 now"),
        ({"template": "x"}, "template is None there and 'x' now"),
        ({"top_p": 0.5}, "top_p is not set there and 0.5 now"),
        ({"model": "llama", "seed": 1}, "model is 'demo' there and 'llama' now; seed is 0 there and 1 now"),
    ],
)
def test_another_job_is_refused_with_both_values_named(tmp_path, change, said):
    with RunDir.open(tmp_path, FINGERPRINT) as run_dir:
        start(run_dir)
    with pytest.raises(RunDirError) as caught:
        RunDir.open(tmp_path, {**FINGERPRINT, **change})
    assert said in caught.value.message
    assert caught.value.exit_code == 76
    assert "--fresh" in (caught.value.hint or "") and "-o" in (caught.value.hint or "")
    RunDir.open(tmp_path, FINGERPRINT).close()  # the refusal gave the lock back


def test_long_values_are_shown_where_they_differ(tmp_path):
    with RunDir.open(tmp_path, {"template": "x" * 5000 + "old" + "y" * 5000}) as run_dir:
        start(run_dir)
    with pytest.raises(RunDirError) as caught:
        RunDir.open(tmp_path, {"template": "x" * 5000 + "new" + "y" * 5000})
    assert "old" in caught.value.message and "new" in caught.value.message
    assert len(caught.value.message) < 400


def test_a_fingerprint_with_a_file_name_that_is_no_unicode_equals_itself(tmp_path):
    for _ in range(2):
        with RunDir.open(tmp_path, {"job": "caf\udce9.jsonl"}) as run_dir:
            start(run_dir)


# --- fresh ---


def test_fresh_moves_the_old_run_beside_and_starts_anew(tmp_path):
    path = tmp_path / "jobs.run"
    for model in ("a", "b", "c"):
        with RunDir.open(path, {"model": model}, fresh=True) as run_dir:
            assert run_dir.state is RunState.NEW
            start(run_dir)
            with ResultSink(path, run_dir.recover()) as sink:
                sink.write_result(a_result(1, model))
    (path / "notes.txt").write_text("mine")
    RunDir.open(path, {"model": "d"}, fresh=True).close()
    for number, model in ((1, "a"), (2, "b"), (3, "c")):
        aside = tmp_path / f"jobs.run.{number}"
        assert (aside / "results.jsonl").read_bytes() == a_result(1, model)
        assert orjson.loads((aside / "run.json").read_bytes())["fingerprint"] == {"model": model}
    assert sorted(file.name for file in path.iterdir()) == ["lock", "notes.txt"]


def test_fresh_moves_aside_what_a_plain_start_refuses(tmp_path):
    path = tmp_path / "jobs.run"
    path.mkdir()
    (path / "run.json").write_bytes(b"{")
    with RunDir.open(path, FINGERPRINT, fresh=True) as run_dir:
        assert run_dir.state is RunState.NEW
    assert (tmp_path / "jobs.run.1" / "run.json").read_bytes() == b"{"


# --- the lock ---

HOLDER = """
import sys, time
from pathlib import Path
from batchrun.formats.rundir import RunDir
run_dir = RunDir.open(Path(sys.argv[1]), {"model": "demo"})
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def another_process_holding(path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_start_says_who_holds_the_directory_and_a_dead_holder_holds_nothing(tmp_path):
    with another_process_holding(tmp_path) as holder:
        for fresh in (False, True):
            with pytest.raises(RunDirError, match=f"in use by process {holder.pid} on .*, since 2") as caught:
                RunDir.open(tmp_path, {"model": "demo"}, fresh=fresh)
            assert caught.value.exit_code == 76
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert str(holder.pid) in (tmp_path / "lock").read_text()  # the stale content is there, and no obstacle
        with RunDir.open(tmp_path, {"model": "demo"}):
            assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} ")


def test_a_closed_directory_can_be_opened_again_by_the_same_process(tmp_path):
    with RunDir.open(tmp_path, FINGERPRINT), pytest.raises(RunDirError, match=f"process {os.getpid()} "):
        RunDir.open(tmp_path, FINGERPRINT)
    RunDir.open(tmp_path, FINGERPRINT).close()
    assert (tmp_path / "lock").read_text() == ""


def test_a_path_that_cannot_be_a_directory_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot write") as caught:
            RunDir.open(path, FINGERPRINT)
        assert caught.value.exit_code == 73


# --- recovery ---


def recover(path):
    with RunDir.open(path, FINGERPRINT) as run_dir:
        if run_dir.run is None:
            start(run_dir)
        return run_dir.recover()


def test_a_tail_torn_at_any_byte_is_cut_and_no_whole_line_is_lost(tmp_path, monkeypatch):
    recover(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # thousands of cuts; none of them meets a power cut
    lines = [a_result(2, "grüße\n"), a_result(7, ""), a_result(1, "\u2028")]
    content = b"".join(lines)
    ends = np.cumsum([len(line) for line in lines])
    with RunDir.open(tmp_path, FINGERPRINT) as run_dir:
        for size in range(len(content) + 1):
            (tmp_path / "results.jsonl").write_bytes(content[:size])
            whole = int((ends <= size).sum())
            recovered = run_dir.recover()
            assert recovered.results.tolist() == sorted([2, 7, 1][:whole]), size
            assert (tmp_path / "results.jsonl").read_bytes() == b"".join(lines[:whole]), size


def test_a_torn_error_line_is_cut_and_codes_are_counted(tmp_path):
    recover(tmp_path)
    whole = an_error(5, "empty_prompt") + an_error(3) + unrun_line("x", 9, "batch_cancelled", "closed")
    (tmp_path / "errors.jsonl").write_bytes(whole + an_error(4)[:-1])
    recovered = recover(tmp_path)
    assert recovered.errors.tolist() == [3, 5, 9]
    assert recovered.error_codes == {"empty_prompt": 1, "invalid_request": 1, "batch_cancelled": 1}
    assert recovered.results.size == 0
    assert (tmp_path / "errors.jsonl").read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\x00" * 70_000, b"\x00\x00\n", b"{}\n", b"half a li\n", b"x" * 200_000, b"\n"])
def test_whatever_a_crash_left_at_the_end_is_cut(tmp_path, tail):
    recover(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(a_result(1) + tail)
    assert recover(tmp_path).results.tolist() == [1]
    assert (tmp_path / "results.jsonl").read_bytes() == a_result(1)


def test_damage_before_the_last_line_is_refused_and_nothing_is_cut(tmp_path):
    recover(tmp_path)
    content = a_result(1) + b"damage\n" + a_result(2)
    (tmp_path / "results.jsonl").write_bytes(content)
    with pytest.raises(RunDirError, match=f"line at byte {len(a_result(1))} is not sound"):
        recover(tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == content


def test_a_line_that_is_answered_twice_is_refused(tmp_path):
    recover(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(a_result(4) + a_result(2) + a_result(4))
    with pytest.raises(RunDirError, match="line 4 of the job is there twice"):
        recover(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(a_result(4))
    (tmp_path / "errors.jsonl").write_bytes(an_error(4))
    with pytest.raises(RunDirError, match=r"line 4 of the job is in results\.jsonl and in errors\.jsonl"):
        recover(tmp_path)


def test_cutting_a_tail_finds_the_last_newline_across_blocks(tmp_path):
    path = tmp_path / "steps.jsonl"
    for head in (b"", b"\n", b"a\n", b"a" * 65_535 + b"\n", b"a" * 65_536 + b"\n", b"b\n" * 50_000):
        for tail in (b"", b"t", b"t" * 65_535, b"t" * 65_536, b"t" * 65_537, b"t" * 200_000):
            path.write_bytes(head + tail)
            cut_torn_tail(path)
            assert path.read_bytes() == head


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_rundir as t
path = Path(sys.argv[1])
with t.RunDir.open(path, t.FINGERPRINT) as run_dir:
    if run_dir.run is None:
        t.start(run_dir, 100_000)
    recovered = run_dir.recover()
    done = set(recovered.results.tolist())
    with t.ResultSink(path, recovered, flush_results=3) as sink:
        for line in range(1, 100_001):
            if line not in done:
                sink.write_result(t.a_result(line, "x" * (line % 5000)))
"""


def test_after_kills_each_start_goes_on_and_no_result_is_there_twice(tmp_path):
    path = tmp_path / "jobs.run"
    results = path / "results.jsonl"
    kept = 0
    for _ in range(3):
        size = results.stat().st_size if results.exists() else 0
        command = [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)]
        process = subprocess.Popen(command)
        while process.poll() is None and (not results.exists() or results.stat().st_size < size + 100_000):
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        lines = recover(path).results.tolist()
        assert lines == list(range(1, len(lines) + 1))
        assert len(lines) > kept
        kept = len(lines)


# --- lines that are taken out, to be run again ---


def finished_run(path) -> None:
    """Five lines of which two failed, out of order."""
    with RunDir.open(path, FINGERPRINT, job="/jobs.jsonl", settings={"model": "demo"}) as run_dir:
        start(run_dir, 5)
        with ResultSink(path, run_dir.recover()) as sink:
            for line in (4, 1, 3):
                sink.write_result(a_result(line))
            for line, attempts in ((5, 3), (2, 1)):
                sink.write_error(unrun_line(f"r{line}", line, "request_timeout", "late", attempts=attempts))
        counts = RequestCounts(5, 3, 2, 0)
        run_dir.update(RunStatus.COMPLETED, counts, errors={"request_timeout": 2}, exit_code=ExitCode.SOME_FAILED)


def a_retry(**fields) -> Retry:
    return Retry(7, 0, ["request_timeout"], None, {"max_tokens": 9}, **fields)


def test_lines_that_are_taken_out_remain_and_are_kept_aside(tmp_path):
    finished_run(tmp_path)
    old = {name: (tmp_path / name).read_bytes().splitlines(True) for name in ("results.jsonl", "errors.jsonl")}
    with RunDir.reopen(tmp_path) as run_dir:
        recovered = run_dir.take_out(np.array([5, 3]), a_retry())
        assert run_dir.state is RunState.UNFINISHED
        assert (recovered.results.tolist(), recovered.errors.tolist()) == ([1, 4], [2])
        assert recovered.error_codes == {"request_timeout": 1}
        assert recovered.attempts_of(np.array([1, 3, 5, 9], dtype=np.int32)).tolist() == [0, 1, 3, 0]
    assert (tmp_path / "results.jsonl").read_bytes() == old["results.jsonl"][0] + old["results.jsonl"][1]
    assert (tmp_path / "errors.jsonl").read_bytes() == old["errors.jsonl"][1]
    replaced = (tmp_path / "replaced.jsonl").read_bytes()
    assert replaced == old["results.jsonl"][2] + old["errors.jsonl"][0]

    with RunDir.open(tmp_path, FINGERPRINT) as run_dir:  # what an earlier start has noted stays
        start(run_dir, 5)
        assert run_dir.run and (run_dir.run.job, run_dir.run.settings) == ("/jobs.jsonl", {"model": "demo"})
        assert run_dir.run.retries == (dataclasses.replace(a_retry(), lines=2, size=len(replaced), taken=True),)
        with ResultSink(tmp_path, run_dir.recover()) as sink:
            sink.write_error(unrun_line("r5", 5, "request_timeout", "late", attempts=4))
            sink.write_result(a_result(3, "again"))
        again = run_dir.take_out(np.array([5]), a_retry())  # once more, and the largest number of attempts counts
        assert again.attempts_of(np.array([3, 5], dtype=np.int32)).tolist() == [1, 4]
        assert again.results.tolist() == [1, 3, 4]


def test_what_a_retry_left_behind_before_it_was_noted_is_written_over(tmp_path):
    finished_run(tmp_path)
    with RunDir.reopen(tmp_path) as run_dir:
        run_dir.take_out(np.array([5]), a_retry())
        noted = (tmp_path / "replaced.jsonl").read_bytes()
        (tmp_path / "replaced.jsonl").write_bytes(noted + a_result(1) + b'{"torn')
        assert run_dir.recover().replaced.tolist() == [5]
        run_dir.take_out(np.array([2]), a_retry())
        after = (tmp_path / "replaced.jsonl").read_bytes()
        assert after.startswith(noted)
        assert run_dir.recover().replaced.tolist() == [2, 5]
        assert after.count(b"\n") == 2


def test_a_retry_that_was_noted_is_ended_by_whoever_comes_next(tmp_path):
    finished_run(tmp_path)
    with RunDir.reopen(tmp_path) as run_dir:
        old = [(tmp_path / name).read_bytes() for name in ("results.jsonl", "errors.jsonl")]
        run_dir.take_out(np.array([5, 4]), a_retry())
        new = [(tmp_path / name).read_bytes() for name in ("results.jsonl", "errors.jsonl")]
        assert run_dir.run
        run = dataclasses.replace(run_dir.run, retries=(dataclasses.replace(run_dir.run.retries[0], taken=False),))
    for results, errors in ((old[0], old[1]), (new[0], old[1]), (old[0], new[1]), (new[0], new[1])):
        write_json_atomic(tmp_path / "run.json", document(run))
        (tmp_path / "results.jsonl").write_bytes(results)
        (tmp_path / "errors.jsonl").write_bytes(errors)
        recover(tmp_path)
        assert [(tmp_path / name).read_bytes() for name in ("results.jsonl", "errors.jsonl")] == new
    write_json_atomic(tmp_path / "run.json", document(run))
    (tmp_path / "replaced.jsonl").unlink()
    with pytest.raises(RunDirError, match="it has not the 2 lines that were to be run again"):
        recover(tmp_path)


def test_lines_that_were_kept_aside_may_be_removed_once_they_are_out(tmp_path):
    finished_run(tmp_path)
    with RunDir.reopen(tmp_path) as run_dir:
        run_dir.take_out(np.array([5]), a_retry())
        (tmp_path / "replaced.jsonl").unlink()
        assert run_dir.recover().replaced.size == 0
        assert run_dir.take_out(np.array([2]), a_retry()).replaced.tolist() == [2]


def test_taking_out_needs_memory_for_an_index_and_not_for_the_lines(tmp_path):
    with RunDir.open(tmp_path, FINGERPRINT) as run_dir:
        start(run_dir, 3000)
        with (tmp_path / "results.jsonl").open("wb") as file:
            for line in range(1, 3001):
                file.write(a_result(line, "x" * 10_000))
        tracemalloc.start()
        recovered = run_dir.take_out(np.arange(1, 3001, 2), a_retry())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (recovered.results.size, recovered.replaced.size) == (1500, 1500)
    assert peak < 2_000_000


def test_failed_lines_are_found_by_code(tmp_path):
    assert failed_lines(tmp_path).size == 0
    (tmp_path / "errors.jsonl").write_bytes(an_error(9, "empty_prompt") + an_error(3) + an_error(4))
    assert failed_lines(tmp_path).tolist() == [9, 3, 4]
    assert failed_lines(tmp_path, ["invalid_request"]).tolist() == [3, 4]
    assert failed_lines(tmp_path, ["empty_prompt", "none"]).tolist() == [9]


# --- the sink ---


def test_lines_are_on_disk_once_they_are_many_or_old_and_counters_are_lines(tmp_path):
    results, errors = tmp_path / "results.jsonl", tmp_path / "errors.jsonl"
    with ResultSink(tmp_path, NOTHING, flush_seconds=3600, flush_results=3) as sink:
        sink.write_result(a_result(1))
        sink.write_error(an_error(2))
        sink.poll()
        assert (results.read_bytes(), errors.read_bytes()) == (b"", b"")
        assert (sink.completed, sink.failed) == (0, 0)
        sink.write_result(a_result(3))
        assert results.read_bytes() == a_result(1) + a_result(3)
        assert errors.read_bytes() == an_error(2)
        assert (sink.completed, sink.failed) == (2, 1)
        sink.write_error(an_error(4))
    assert errors.read_bytes() == an_error(2) + an_error(4)
    assert (sink.completed, sink.failed) == (2, 2)

    recovered = Recovered(np.array([1, 3]), np.array([2, 4]), {"invalid_request": 2})
    with ResultSink(tmp_path, recovered, flush_seconds=0, flush_results=1000) as sink:
        assert (sink.completed, sink.failed) == (2, 2)
        sink.write_result(a_result(5))
        assert results.read_bytes() == a_result(1) + a_result(3) + a_result(5)
        assert (sink.completed, sink.failed) == (3, 2)


def test_a_device_that_is_full_is_an_output_error_and_the_other_file_goes_on(tmp_path):
    (tmp_path / "results.jsonl").symlink_to("/dev/full")
    sink = ResultSink(tmp_path, NOTHING, flush_seconds=3600)
    sink.write_result(a_result(1))
    sink.write_error(an_error(2))
    with pytest.raises(OutputError, match=r"results\.jsonl: No space left on device \(.* free") as caught:
        sink.flush()
    assert caught.value.exit_code == 73
    assert "same command again" in (caught.value.hint or "")
    sink.close()
    assert sink.completed == 0
    assert (tmp_path / "errors.jsonl").read_bytes() == an_error(2)
    assert sink.failed == 1


def write_until_refused(path) -> int:
    """Write results below `path` until that fails; returns how many the sink says are kept."""
    with RunDir.open(path, FINGERPRINT) as run_dir:
        start(run_dir, 1000)
        sink = ResultSink(path, run_dir.recover(), flush_seconds=3600, flush_results=7)
        line = 0
        with pytest.raises(OutputError):
            for line in range(1, 1001):
                sink.write_result(a_result(line, "x" * 999))
        sink.close()
        assert sink.completed < line
        return sink.completed


def assert_whole_and_resumable(path, kept):
    content = (path / "results.jsonl").read_bytes()
    assert content == b"".join(a_result(line, "x" * 999) for line in range(1, kept + 1))
    assert recover(path).results.tolist() == list(range(1, kept + 1))


def test_on_a_full_disk_whole_lines_stay_and_no_half_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        kept = write_until_refused(disk)
        assert kept > 7
        with RunDir.open(disk, FINGERPRINT) as run_dir:
            old = (disk / "run.json").read_bytes()
            with pytest.raises(OutputError, match=r"run\.json"):
                run_dir.start(RequestCounts(1000, 0, 0, 1000), model="m" * 100_000, environment={})
            assert (disk / "run.json").read_bytes() == old
            assert not (disk / "run.json.tmp").exists()
        assert_whole_and_resumable(disk, kept)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_at_a_file_size_limit_whole_lines_stay_and_no_half_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        kept = write_until_refused(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept == 40_000 // len(a_result(10, "x" * 999))
    assert_whole_and_resumable(tmp_path, kept)


def test_a_directory_that_cannot_hold_the_files_is_an_output_error(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"results\.jsonl: Is a directory"):
        ResultSink(tmp_path, NOTHING)


def test_what_fails_to_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert orjson.loads(path.read_bytes()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


# --- order ---


def test_sorting_by_line_equals_sorted(tmp_path):
    numbers = list(range(1, 3001))
    random.Random(5).shuffle(numbers)
    for name, make in (("results.jsonl", a_result), ("errors.jsonl", an_error)):
        path = tmp_path / name
        path.write_bytes(b"".join(make(n) for n in numbers))
        sort_results(path)
        assert path.read_bytes() == b"".join(make(n) for n in sorted(numbers))
        inode = path.stat().st_ino
        sort_results(path)  # what is sorted is left alone
        assert path.stat().st_ino == inode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["errors.jsonl", "results.jsonl"]


def test_sorting_takes_memory_for_the_index_and_not_for_the_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    with path.open("wb") as file:
        for line in range(3000, 0, -1):
            file.write(a_result(line, "x" * 10_000))
    assert path.stat().st_size > 30_000_000
    tracemalloc.start()
    sort_results(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    with path.open("rb") as file:
        assert [orjson.loads(raw)["batchrun"]["line"] for raw in file] == list(range(1, 3001))


def test_sorting_refuses_a_damaged_file_and_passes_over_a_missing_one(tmp_path):
    path = tmp_path / "results.jsonl"
    sort_results(path)
    assert not path.exists()
    content = a_result(2) + b"damage\n" + a_result(1)
    path.write_bytes(content)
    with pytest.raises(RunDirError, match="not sound"):
        sort_results(path)
    assert path.read_bytes() == content


# --- space ---


def test_the_estimate_holds_the_lines_that_are_written():
    short = [a_result(n, "") for n in range(1, 10)]
    full = [a_result(n, "word, " * 32) for n in range(1, 10)]
    estimate = estimate_disk(np.full(9, 32, np.int32), lines=9)
    assert estimate.least <= sum(map(len, short)) < sum(map(len, full)) <= estimate.most
    one = Result(0, "word, " * 32, np.array([], np.int32), FinishReason.STOP, Usage(1, 0, 1))
    many = result_line(
        [one] * 200, custom_id="r", line=1, endpoint=Endpoint.COMPLETIONS, model="m", created=0, seed=0, group=None
    )
    assert len(many) <= estimate_disk(np.full(200, 32, np.int32), lines=1).most


def test_the_estimate_of_a_huge_job_does_not_overflow():
    assert estimate_disk(np.full(100_000, 131_072, np.int32), lines=100_000).most > 2**35


def test_space_is_warned_of_where_it_may_lack_and_refused_where_it_must(tmp_path):
    path = tmp_path / "not" / "there" / "yet"
    assert check_disk(path, DiskEstimate(least=0, most=1)) is None
    warning = check_disk(path, DiskEstimate(least=0, most=10**18))
    assert warning and "up to 1000000.0 TB" in warning and f"{path} has " in warning
    with pytest.raises(OutputError, match=r"at least 1000000\.0 TB") as caught:
        check_disk(path, DiskEstimate(least=10**18, most=10**18))
    assert caught.value.exit_code == 73
