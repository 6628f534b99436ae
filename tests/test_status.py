"""`batchrun status`: what it tells of a run that runs, was stopped, was killed, is finished, or never was; and that
looking changes nothing."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner, Result

import batchrun.status
from batchrun.cli import app
from batchrun.errors import ExitCode, RunDirError, UsageError
from batchrun.formats import rundir, watch
from batchrun.formats.results import error_line, result_line
from batchrun.formats.rundir import RunDir, RunStatus
from batchrun.report.records import RequestCounts
from batchrun.report.tables import print_status
from batchrun.request import Endpoint, FinishReason, LineFault, Usage
from batchrun.request import Result as Answer
from batchrun.status import State, read_status

LINES = 30
STARTED = 1_700_000_000  # seconds of Unix time


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file, the lock included."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def a_result(line: int, created: int = STARTED, text: str = "text") -> bytes:
    answer = Answer(0, text, np.array([1], np.int32), FinishReason.STOP, Usage(1, 0, 1))
    return result_line(
        [answer],
        custom_id=f"r{line}",
        line=line,
        endpoint=Endpoint.CHAT,
        model="m",
        created=created,
        seed=0,
        group=None,
    )


def an_error(line: int, code: str = "invalid_request") -> bytes:
    return error_line(LineFault(line, f"r{line}", code, "wrong"))


@pytest.fixture
def status() -> Callable[..., Result]:
    """`status(run_dir, *flags)`: the command, in this process."""
    return lambda run_dir, *flags: CliRunner().invoke(app, ["status", str(run_dir), *flags], catch_exceptions=False)


# --- real runs


@pytest.fixture
def job(tmp_path, model_dir) -> list[str]:
    """The command that runs a job of many steps: its memory holds one or two requests at a time."""
    lines = [{"prompt": f"apple {i}", "max_tokens": 40, "ignore_eos": True} for i in range(LINES)]
    lines.insert(7, {"prompt": ""})
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tmp_path / "slow.toml"
    config.write_text("kv_memory = '30KiB'\n[output]\nflush_results = 1\n")
    command = [sys.executable, "-m", "batchrun.cli", "run", str(path), "--model", str(model_dir())]
    return [*command, "--config", str(config), "--quiet"]


@pytest.fixture
def begin(job) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the command of `job`; whatever is left of it at the end of the test is killed."""
    begun: list[subprocess.Popen[bytes]] = []

    def call() -> subprocess.Popen[bytes]:
        begun.append(subprocess.Popen(job, stderr=subprocess.PIPE, start_new_session=True))
        return begun[-1]

    yield call
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def wait_for_results(process: subprocess.Popen[bytes], results: Path, count: int) -> None:
    while whole_lines(results) < count:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)


def end(process: subprocess.Popen[bytes]) -> int:
    _, errors = process.communicate(timeout=110)
    assert b"Traceback" not in errors, errors
    return process.returncode


def test_a_run_that_runs_then_is_stopped_then_is_finished(begin, status, tmp_path):
    out = tmp_path / "jobs.run"
    process = begin()
    wait_for_results(process, out / "results.jsonl", 2)
    os.killpg(process.pid, signal.SIGSTOP)  # held for a moment, so that what is told can be compared with what is there
    os.waitpid(process.pid, os.WUNTRACED)
    before = snapshot(out)
    shown = status(out)
    found = json.loads(status(out, "--json").stdout)
    done = whole_lines(out / "results.jsonl")
    assert snapshot(out) == before
    assert shown.exit_code == ExitCode.OK
    assert (found["state"], found["status"], found["exit_code"]) == ("running", "in_progress", None)
    assert found["request_counts"] == {
        "total": LINES + 1,
        "completed": done,
        "failed": 1,
        "remaining": LINES - done,
    }
    assert found["errors"] == {"empty_prompt": 1}
    assert (found["process"]["pid"], found["process"]["host"]) == (process.pid, socket.gethostname())
    assert found["results_per_second"] > 0
    assert found["started_at"] <= found["last_result_at"] <= found["looked_at"]
    assert shown.stdout.startswith("Running, ")
    assert f"{done} of {LINES + 1} requests answered, 1 failed, {LINES - done} remaining" in shown.stdout
    assert f"process {process.pid} on" in shown.stdout
    assert shown.stderr == ""
    assert max(map(len, shown.stdout.splitlines())) <= 80
    os.killpg(process.pid, signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert end(process) == ExitCode.STOPPED

    stopped = status(out)
    done = whole_lines(out / "results.jsonl")
    assert stopped.exit_code == ExitCode.STOPPED
    assert stopped.stdout.startswith("Stopped early, ")
    assert f"{done} of {LINES + 1} requests answered" in stopped.stdout
    assert "it has ended early, with exit code 75; the same command goes on" in " ".join(stopped.stdout.split())
    assert "results/s" not in stopped.stdout

    assert end(begin()) == ExitCode.SOME_FAILED
    before = snapshot(out)
    finished = status(out)
    assert finished.exit_code == ExitCode.SOME_FAILED  # the run's own
    assert finished.stdout.startswith(f"Completed: {LINES} of {LINES + 1} requests answered, 1 failed\n")
    assert "exit code 3" in finished.stdout
    assert snapshot(out) == before


def test_a_run_that_was_killed_says_so_and_goes_on(begin, status, tmp_path):
    out = tmp_path / "jobs.run"
    process = begin()
    wait_for_results(process, out / "results.jsonl", 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = whole_lines(out / "results.jsonl")
    with (out / "results.jsonl").open("ab") as file:
        file.write(a_result(31)[:-20])  # what the kill may leave as well
    before = snapshot(out)
    shown = status(out)
    assert snapshot(out) == before
    assert shown.exit_code == ExitCode.STOPPED
    assert shown.stdout.startswith("Killed or crashed, ")
    words = " ".join(shown.stdout.split())
    assert f"{done} of {LINES + 1} requests answered, 1 failed, {LINES - done} remaining" in words
    assert f"process {process.pid} on {socket.gethostname()} was killed or crashed" in words
    assert "the same command goes on with the run" in words
    found = json.loads(status(out, "--json").stdout)
    assert (found["state"], found["status"], found["seconds_left"]) == ("died", "in_progress", None)

    assert end(begin()) == ExitCode.SOME_FAILED
    assert status(out).exit_code == ExitCode.SOME_FAILED


def test_neither_torch_nor_transformers_is_loaded(tmp_path):
    with a_run(tmp_path):
        code = (
            "import sys\n"
            "from batchrun.cli import app\n"
            "try:\n"
            "    app(sys.argv[1:])\n"
            "finally:\n"
            "    assert not {'torch', 'transformers'} & set(sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "status", str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Running")


# --- no run


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "there is no directory"),
        ("empty", "has no run.json"),
        ("jobs.jsonl", "is a file, not a run directory"),
    ],
)
def test_where_there_is_no_run(name, words, status, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "jobs.jsonl").write_text("{}\n")
    done = status(tmp_path / name, "--json")
    assert done.exit_code == ExitCode.USAGE
    assert words in json.loads(done.stdout)["error"]["message"]
    assert not list((tmp_path / "empty").iterdir())


def test_a_run_that_is_just_being_started(tmp_path):
    with RunDir.open(tmp_path, {}), pytest.raises(UsageError, match="just being started"):
        read_status(tmp_path)


def test_a_run_file_that_is_not_sound(status, tmp_path):
    (tmp_path / "run.json").write_text("{")
    assert status(tmp_path).exit_code == ExitCode.RUN_DIR


def test_more_lines_than_the_job_has(tmp_path):
    with a_run(tmp_path, total=2), pytest.raises(RunDirError, match="3 results and errors of 2 lines"):
        (tmp_path / "results.jsonl").write_bytes(a_result(1) + a_result(2) + a_result(3))
        read_status(tmp_path)


# --- who works on it


def a_run(path: Path, total: int = 500, *, started_at: int = STARTED) -> RunDir:
    """A run that this process holds the lock of, as it is right after its start."""
    run_dir = RunDir.open(path, {})
    run_dir.start(RequestCounts(total, 0, 0, total), model="m", environment={})
    run_file = json.loads((path / "run.json").read_bytes())
    (path / "run.json").write_text(json.dumps(run_file | {"in_progress_at": started_at}))
    return run_dir


@pytest.mark.parametrize(
    ("lock", "state", "code", "words"),
    [
        ("4711 {here} 2026-01-01T00:00:00+00:00\n", State.DIED, 75, "process 4711 on {here} was killed or crashed"),
        ("", State.DIED, 75, "its process was killed or crashed"),
        ("4711 {here}", State.DIED, 75, "its process was killed or crashed"),
        (
            "4711 elsewhere 2026-01-01T00:00:00+00:00\n",
            State.UNKNOWN,
            0,
            "process 4711 on elsewhere has worked on it since 2026-01-01T00:00:00+00:00; whether it lives cannot be "
            "told from here",
        ),
        (None, State.UNKNOWN, 0, "there is no lock to be read"),
    ],
)
def test_a_lock_that_nobody_holds(lock, state, code, words, status, tmp_path):
    a_run(tmp_path).close()
    if lock is None:
        (tmp_path / "lock").unlink()
    else:
        (tmp_path / "lock").write_text(lock.format(here=socket.gethostname()))
    before = snapshot(tmp_path)
    shown = status(tmp_path)
    assert snapshot(tmp_path) == before
    assert shown.exit_code == code
    assert words.format(here=socket.gethostname()) in " ".join(shown.stdout.split())
    assert read_status(tmp_path).state is state


def test_a_lock_that_is_held_is_believed_whatever_it_says(tmp_path):
    with a_run(tmp_path):
        (tmp_path / "lock").write_text("4711 elsewhere 2026-01-01T00:00:00+00:00\n")
        assert read_status(tmp_path).state is State.RUNNING


def test_those_who_look_are_not_in_the_way_of_each_other_or_of_a_start(tmp_path, monkeypatch):
    a_run(tmp_path).close()
    looking = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert watch.look_at_lock(tmp_path) == (False, None)
    monkeypatch.setattr(rundir.time, "sleep", lambda _: os.close(looking))
    with RunDir.open(tmp_path, {}):
        held, holder = watch.look_at_lock(tmp_path)
        assert held
        assert holder is not None
        assert (holder.pid, holder.host) == (os.getpid(), socket.gethostname())
        monkeypatch.undo()
        with pytest.raises(RunDirError, match="is in use"):
            RunDir.open(tmp_path, {})


@pytest.mark.parametrize("change", ["starts", "ends"])
def test_a_run_that_starts_or_ends_while_it_is_looked_at_has_not_died(change, tmp_path, monkeypatch):
    """What changes between the first look at the lock and the reading of run.json."""
    counts, code = RequestCounts(500, 500, 0, 0), ExitCode.OK
    run_dir = a_run(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(b"".join(map(a_result, range(1, 501))))
    if change == "starts":
        run_dir.close()
    opened: list[RunDir] = []
    read_document = rundir.read_document

    def change_and_read(path: Path, kind: type) -> Any:
        if change == "starts":
            opened.append(RunDir.open(tmp_path, {}))
        else:
            run_dir.update(RunStatus.COMPLETED, counts, errors={}, exit_code=code)
            run_dir.close()
        return read_document(path, kind)

    monkeypatch.setattr(batchrun.status, "read_document", change_and_read)
    assert read_status(tmp_path).state is (State.RUNNING if change == "starts" else State.FINISHED)
    for one in opened:
        one.close()


@pytest.mark.parametrize("code", [ExitCode.OK, ExitCode.SOME_FAILED, ExitCode.NOTHING_RUNNABLE])
def test_a_finished_run_gives_its_own_exit_code(code, status, tmp_path):
    with a_run(tmp_path, total=2) as run_dir:
        (tmp_path / "results.jsonl").write_bytes(a_result(1))
        (tmp_path / "errors.jsonl").write_bytes(an_error(2, "empty_prompt"))
        run_dir.update(RunStatus.COMPLETED, RequestCounts(2, 1, 1, 0), errors={"empty_prompt": 1}, exit_code=code)
    done = status(tmp_path)
    assert done.exit_code == code
    assert "Completed: 1 of 2 requests answered, 1 failed" in done.stdout
    assert "1  empty_prompt" in done.stdout


def test_a_run_that_failed_for_want_of_room_can_be_gone_on_with(status, tmp_path):
    with a_run(tmp_path, total=2) as run_dir:
        run_dir.update(RunStatus.STOPPED, RequestCounts(2, 0, 0, 2), errors={}, exit_code=ExitCode.OUTPUT)
        assert read_status(tmp_path).state is State.RUNNING  # it has not let go of the lock
        assert "starts it again" in status(tmp_path).stdout
    done = status(tmp_path)
    assert done.exit_code == ExitCode.STOPPED
    assert "exit code 73" in done.stdout


# --- rates


def test_rates_are_of_the_results_that_came_since_the_start(tmp_path):
    """50 results of an earlier start; then, after 100 s of loading, one a second."""
    with a_run(tmp_path, total=500) as run_dir:
        earlier = [a_result(line, STARTED - 60) for line in range(1, 51)]
        (tmp_path / "errors.jsonl").write_bytes(b"".join(an_error(line) for line in range(301, 401)))

        def look(results: int, now: float) -> batchrun.status.RunProgress:
            later = [a_result(51 + i, STARTED + 100 + i) for i in range(results)]
            (tmp_path / "results.jsonl").write_bytes(b"".join([*earlier, *later]))
            return read_status(tmp_path, now=STARTED + now)

        loading = look(0, 90)
        assert loading.results_per_second == 0
        assert (loading.recent_results_per_second, loading.seconds_left) == (None, None)

        early = look(3, 103)  # the first of them ended the loading
        assert early.results_per_second == pytest.approx(3 / 103)
        assert (early.recent_results_per_second, early.seconds_left) == (None, None)

        first_minute = look(60, 160)  # those of seconds 101 to 159
        assert first_minute.recent_results_per_second == pytest.approx(59 / 59)
        assert first_minute.recent_seconds == 59
        assert first_minute.seconds_left == pytest.approx(500 - 100 - 50 - 60)

        later = look(200, 300.5)  # those of seconds 181 to 299
        assert later.request_counts == RequestCounts(500, 250, 100, 150)
        assert later.results_per_second == pytest.approx(200 / 300.5)
        assert later.recent_seconds == pytest.approx(119.5)
        assert later.recent_results_per_second == pytest.approx(119 / 119.5)
        assert later.seconds_left == pytest.approx(150 * 119.5 / 119)
        assert later.last_result_at == STARTED + 299

        stalled = look(200, 1000)
        assert (stalled.recent_results_per_second, stalled.seconds_left) == (0, None)
        words = " ".join(shown(stalled).split())
        assert "11 min 41 s since its latest result" in words
        assert "no result in the last 2 min 0 s, so nobody can tell how much is left" in words

        run_dir.update(RunStatus.FINALIZING, RequestCounts(500, 250, 100, 150), errors={})
        assert read_status(tmp_path, now=STARTED + 1000).results_per_second is None


def test_a_run_shows_its_figures(tmp_path):
    with a_run(tmp_path, total=480):
        (tmp_path / "results.jsonl").write_bytes(b"".join(a_result(i + 1, STARTED + 10 + i) for i in range(100)))
        (tmp_path / "errors.jsonl").write_bytes(an_error(101) + an_error(102, "empty_prompt") + an_error(103))
        lines = shown(read_status(tmp_path, now=STARTED + 110)).splitlines()
    assert lines[0] == "Running, 21.5 %: 100 of 480 requests answered, 3 failed, 377 remaining"
    [first] = [number for number, line in enumerate(lines) if line.startswith("Time")]
    assert lines[2].startswith(f"Process   process {os.getpid()} on ")
    assert lines[first:] == [
        "Time      1 min 50 s  from its latest start until now",
        "               1.0 s  since its latest result",
        "          6 min 17 s  left, at the rate of the last 1 min 39 s",
        "Speed              1  results/s in the last 1 min 39 s",
        "               0.909  results/s since its latest start, loading included",
        "Errors             2  invalid_request",
        "                   1  empty_prompt",
    ]


def test_a_clock_that_is_behind_gives_no_nonsense(tmp_path):
    with a_run(tmp_path):
        (tmp_path / "results.jsonl").write_bytes(a_result(1, STARTED + 5))
        found = read_status(tmp_path, now=STARTED - 10)
    assert (found.seconds, found.results_per_second, found.seconds_left) == (0, None, None)
    assert "-" not in shown(found).split("Time")[1]


def shown(progress: batchrun.status.RunProgress, encoding: str = "utf-8") -> str:
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    print_status(Console(file=pipe, width=80, markup=False, highlight=False, emoji=False), progress)
    pipe.seek(0)
    return pipe.read()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_hostile_contents_are_escaped_and_stay_within_80_columns(encoding, tmp_path):
    hostile = "\x1b[31m[red]\u202e" + "x" * 150 + "漢字" * 90
    with a_run(tmp_path):
        (tmp_path / "lock").write_text(f"{10**20} {hostile} {hostile}\n", encoding="utf-8")
        (tmp_path / "errors.jsonl").write_bytes(an_error(1, hostile))
        text = shown(read_status(tmp_path), encoding)
    for line in text.splitlines():
        assert cell_len(line) <= 80, line
        assert line.isprintable(), line
    assert text.count(r"\x1b[31m[red]") == 3


# --- lines and times


def test_only_whole_lines_count(tmp_path):
    path = tmp_path / "results.jsonl"
    assert (watch.count_lines(path), watch.last_created(path), watch.count_since(path, 0)) == (0, None, (0, None))
    for content, lines in ((b"", 0), (b"torn", 0), (b"\n", 1), (b"a\nb\ntorn", 2)):
        path.write_bytes(content)
        assert watch.count_lines(path) == lines
        assert watch.last_created(path) is None
    path.write_bytes(b"x" * ((1 << 20) - 1) + b"\n" + b"\n" + b"y" * (1 << 20) + b"\n")  # around the ends of blocks
    assert [watch.count_lines(path, start) for start in (0, 1 << 20, (1 << 20) + 1)] == [3, 2, 1]


@pytest.mark.parametrize("text", ["short", "long" * (1 << 19)])
def test_the_time_of_the_last_whole_line(text, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(a_result(1, 5, text) + a_result(2, 7, text))
    assert watch.last_created(path) == 7
    path.write_bytes(path.read_bytes() + a_result(3, 9, text)[:-1])
    assert watch.last_created(path) == 7
    path.write_bytes(a_result(1, 5, text))
    assert watch.last_created(path) == 5


@pytest.mark.parametrize("seed", range(20))
def test_lines_since_a_moment_are_found_as_by_reading_all(seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "results.jsonl"
    created = sorted(rng.randrange(30) for _ in range(rng.choice((1, 2, 40))))
    lines = [a_result(i, time, "x" * rng.choice((0, 9, 5000))) for i, time in enumerate(created, start=1)]
    torn = a_result(99, rng.randrange(30))[: rng.choice((0, 1, 50, -1))]
    path.write_bytes(b"".join(lines) + torn)
    for moment in range(-1, 32):
        since = [time for time in created if time >= moment]
        assert watch.count_since(path, moment) == (len(since), since[0] if since else None)


def test_a_count_since_a_moment_reads_few_lines(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(a_result(i, i) for i in range(1, 5001)))
    read: list[int] = []
    read_created = watch.read_created
    monkeypatch.setattr(watch, "read_created", lambda raw: read.append(1) or read_created(raw))
    assert watch.count_since(path, 1234) == (5000 - 1233, 1234)
    assert len(read) < 30


def test_error_codes_are_those_of_the_sound_lines(tmp_path):
    path = tmp_path / "errors.jsonl"
    assert watch.count_error_codes(path) == {}
    path.write_bytes(an_error(1) + an_error(2, "empty_prompt") + an_error(3) + an_error(4)[:-9])
    assert watch.count_error_codes(path) == {"invalid_request": 2, "empty_prompt": 1}
