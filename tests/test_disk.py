"""What the disk, the clock and other people do to a run while it lasts: it says so with its exit code, keeps what is
finished, and the same command goes on to every line once."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import batchrun
from batchrun.cli import app
from batchrun.config import load_config
from batchrun.errors import BatchrunError, ExitCode, OutputError
from batchrun.formats.rundir import ResultSink, RunDir, RunStatus
from batchrun.pipeline import run_job
from batchrun.report.records import RequestCounts
from batchrun.status import State, read_status

ROOT = Path(__file__).resolve().parent.parent
LINES = [{"id": f"r{i}", "prompt": f"apple {i}", "max_tokens": 34 - 3 * i, "ignore_eos": True} for i in range(10)]
BAD = {"id": "bad", "prompt": ""}
# Memory for one or two requests at a time makes many steps, so that what is done to a run meets it.
CONFIG = "kv_memory = '30KiB'\n[output]\nflush_results = 1\nflush_seconds = 0.0\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, with a job of some lines and a bad one, and its settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*LINES, BAD]))
    (tmp_path / "slow.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def args(model_dir) -> list[str]:
    return ["run", "jobs.jsonl", "--config", "slow.toml", "--model", str(model_dir())]


@pytest.fixture(scope="module")
def undisturbed(model_dir, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*LINES, BAD]))
    batchrun.run(folder / "jobs.jsonl", model=str(model_dir()))
    return answers(folder / "jobs.run")


def answers(run_dir: Path) -> dict[str, Any]:
    """By id what a line got; every line of the two files is whole, and none is there twice."""
    found: dict[str, Any] = {}
    for name in ("results.jsonl", "errors.jsonl"):
        content = (run_dir / name).read_bytes() if (run_dir / name).exists() else b""
        assert not content or content.endswith(b"\n")
        for raw in content.splitlines():
            line = json.loads(raw)
            assert line["custom_id"] not in found
            body = line["response"]["body"]
            found[line["custom_id"]] = body.get("choices") or body["error"]["code"]
    return found


def here_command(*args: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


@contextlib.contextmanager
def process(*args: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, as users have it; it does not outlive the block."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "COLUMNS": "200"}
    started = subprocess.Popen(
        [sys.executable, "-m", "batchrun.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"env": env, **options},
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def ended(started: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error of a command that meets trouble: no traceback, and no log of a broken log."""
    _, err = started.communicate(timeout=110)
    assert "Traceback" not in err, err
    assert "internal" not in err, err
    return started.returncode, err


def halt_at_results(started: subprocess.Popen[str], run_dir: Path, count: int = 2) -> None:
    """Wait for some results, and halt the command there: it is to be let go on, or killed."""
    results = run_dir / "results.jsonl"
    while not results.exists() or results.read_bytes().count(b"\n") < count:
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.005)
    started.send_signal(signal.SIGSTOP)


def goes_on(args: list[str], run_dir: Path, undisturbed: dict[str, Any]) -> None:
    """The same command again comes to the end of an undisturbed run, and once more says that it is there."""
    kept = answers(run_dir) if run_dir.exists() else {}
    assert kept.items() <= undisturbed.items()
    done = here_command(*args)
    assert done.exit_code == ExitCode.SOME_FAILED, done.stderr
    assert answers(run_dir) == undisturbed
    counts = {"total": len(LINES) + 1, "completed": len(LINES), "failed": 1, "remaining": 0}
    run, report = (json.loads((run_dir / name).read_bytes()) for name in ("run.json", "report.json"))
    assert run["request_counts"] == report["request_counts"] == counts
    assert (run["status"], run["exit_code"]) == ("completed", 3)
    assert not list(run_dir.glob("*.tmp"))
    again = here_command(*args)
    assert again.exit_code == ExitCode.SOME_FAILED
    assert "finished already" in again.stdout


class During:
    """Does something once, when so many requests of a run have got their answers."""

    def __init__(self, what: Callable[[], object], after: int = 3) -> None:
        self.what = what
        self.left = after

    def faults(self, faults: list[Any], total: int) -> None: ...

    def stage(self, name: str) -> None: ...

    def expected_rows(self, rows: int) -> None: ...

    def step(self, rows: int, sampled: int, finished: int) -> None:
        due, self.left = self.left > 0, self.left - finished
        if due and self.left <= 0:
            self.what()

    def should_stop(self) -> bool:
        return False


def run_during(what: Callable[[], object], model: Path, **options: Any) -> ExitCode:
    """Run the job in this process; its exit code."""
    config = load_config(Path("slow.toml"), model=str(model), **options)
    try:
        return run_job("jobs.jsonl", config, During(what)).exit_code
    except BatchrunError as error:
        return error.exit_code


# --- a full disk, and one that only lets read


@contextlib.contextmanager
def a_disk(path: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A small file system of its own, mounted at `path`; what is yielded mounts it anew with other options."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")

    def again(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", str(path)], check=True)


# The sizes end the run in different places: at its start, among its results, and when little is left to write.
@pytest.mark.parametrize(
    "size",
    ["24k", *(pytest.param(size, marks=pytest.mark.slow) for size in ("4k", "8k", "12k", "16k", "20k", "28k", "32k"))],
)
def test_a_full_disk_ends_the_run_and_room_on_it_goes_on(size, here, args, undisturbed):
    disk = here / "disk"
    with a_disk(disk, size) as again:
        args += ["-o", str(disk / "jobs.run")]
        with process(*args) as started:
            code, err = ended(started)
        assert code == ExitCode.OUTPUT, err
        assert "cannot write" in err or "results take at least" in err
        again("size=10m")
        goes_on(args, disk / "jobs.run", undisturbed)


def test_a_disk_too_small_for_standard_input_keeps_nothing_of_it(here, args):
    disk = here / "disk"
    with a_disk(disk, "40k"):
        command = [args[0], "-", *args[2:], "-o", str(disk / "jobs.run")]
        done = CliRunner().invoke(app, command, input=b'{"prompt": "apple"}\n' * 10_000, catch_exceptions=False)
        assert done.exit_code == ExitCode.OUTPUT
        assert "No space left on device" in done.stderr
        assert list(disk.iterdir()) == []


def test_a_read_only_disk_is_refused_and_its_runs_can_be_looked_at(here, args, undisturbed):
    disk = here / "disk"
    with a_disk(disk, "10m") as again:
        args += ["-o", str(disk / "jobs.run")]
        stopped = here_command(*args, "--max-errors", "0")
        assert stopped.exit_code == ExitCode.STOPPED
        again("ro")
        for out in (disk / "jobs.run", disk / "new.run"):
            with process(*args[:-1], str(out)) as started:
                code, err = ended(started)
            assert code == ExitCode.OUTPUT
            assert "Read-only file system" in err
        assert here_command("status", str(disk / "jobs.run")).exit_code == ExitCode.STOPPED
        again("rw")
        goes_on(args, disk / "jobs.run", undisturbed)


# --- files that cannot be written when the run ends


@pytest.mark.parametrize("name", ["report.json", "report.html", "run.json.tmp", "results.jsonl.tmp"])
def test_a_file_in_the_way_at_the_end_costs_no_result(name, here, args, undisturbed):
    out = here / "jobs.run"
    (out / name).mkdir(parents=True)
    args += ["--results-order", "input"]
    done = here_command(*args)
    assert done.exit_code == ExitCode.OUTPUT
    assert f"cannot write jobs.run/{name.removesuffix('.tmp')}: Is a directory" in done.stderr
    (out / name).rmdir()
    goes_on(args, out, undisturbed)


@pytest.mark.parametrize("name", ["run.log", pytest.param("steps.jsonl", marks=pytest.mark.slow)])
def test_a_log_that_cannot_be_written_is_told_and_costs_no_result(name, here, args, undisturbed):
    out = here / "jobs.run"
    out.mkdir()
    (out / name).symlink_to("/dev/full")
    with process(*args) as started:
        code, err = ended(started)
    assert code == ExitCode.OUTPUT
    assert f"cannot write jobs.run/{name}: No space left on device" in err
    assert answers(out) == undisturbed
    (out / name).unlink()
    goes_on(args, out, undisturbed)


# --- a run directory that goes away under way


def test_a_removed_run_directory_is_noticed_and_the_same_command_starts_again(here, args, undisturbed):
    out = here / "jobs.run"
    with process(*args) as started:
        halt_at_results(started, out)
        while out.exists():
            shutil.rmtree(out, ignore_errors=True)
        started.send_signal(signal.SIGCONT)
        code, err = ended(started)
    assert code == ExitCode.OUTPUT
    assert "was removed, moved or replaced" in err
    assert not out.exists()
    goes_on(args, out, undisturbed)


@pytest.mark.parametrize("name", ["lock", "results.jsonl", "errors.jsonl"])
def test_a_removed_file_is_noticed_before_another_is_written_in_its_place(name, here, args, model_dir, undisturbed):
    out = here / "jobs.run"
    assert run_during((out / name).unlink, model_dir()) is ExitCode.OUTPUT
    goes_on(args, out, undisturbed)


def test_a_moved_run_directory_goes_on_where_it_is(here, args, model_dir, undisturbed):
    out, moved = here / "jobs.run", here / "moved.run"
    assert run_during(lambda: out.rename(moved), model_dir()) is ExitCode.OUTPUT
    assert not out.exists()
    kept = answers(moved)
    assert len(kept) > 1
    goes_on([*args, "-o", str(moved)], moved, undisturbed)


def test_who_lost_the_directory_writes_nothing_into_that_of_another_start(here, args, model_dir, undisturbed):
    """The directory is removed and made anew by a second start, while the first one is still running."""
    out = here / "jobs.run"
    first: list[ExitCode] = []

    def start_again() -> None:
        shutil.rmtree(out)
        stopped = here_command(*args, "--max-errors", "0")
        first.append(ExitCode(stopped.exit_code))
        nonlocal before
        before = {path.name: path.read_bytes() for path in out.iterdir()}

    before: dict[str, bytes] = {}
    assert run_during(start_again, model_dir()) is ExitCode.OUTPUT
    assert first == [ExitCode.STOPPED]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    goes_on(args, out, undisturbed)


def test_without_its_lock_a_directory_is_neither_written_to_nor_closed_over(tmp_path):
    with RunDir.open(tmp_path, {"model": "m"}) as run_dir:
        run_dir.start(RequestCounts(1, 0, 0, 1), model="m", environment={})
        sink = ResultSink(tmp_path, run_dir.recover(), flush_seconds=3600, check=run_dir.check)
        sink.write_result(b"{}\n")
        (tmp_path / "lock").unlink()
        with RunDir.open(tmp_path, {"model": "m"}) as other:
            written = (tmp_path / "run.json").read_bytes()
            with pytest.raises(OutputError, match="lock was removed"):
                sink.close()
            with pytest.raises(OutputError, match="lock was removed"):
                run_dir.update(RunStatus.STOPPED, RequestCounts(1, 0, 0, 1), errors={})
            assert (tmp_path / "results.jsonl").read_bytes() == b""
            assert (tmp_path / "run.json").read_bytes() == written
            other.check()


# --- few open files


@pytest.mark.parametrize("limit", [12, *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 40, 2) if n != 12)])
def test_few_open_files_end_the_run_with_a_clear_error_or_not_at_all(limit, here, args, undisturbed):
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    with process(*args, preexec_fn=few) as started:
        _, err = started.communicate(timeout=110)
    assert started.returncode in (ExitCode.SOME_FAILED, ExitCode.INTERNAL, ExitCode.USAGE, ExitCode.OUTPUT), err
    if started.returncode != ExitCode.SOME_FAILED:
        assert "Too many open files" in err
        goes_on(args, here / "jobs.run", undisturbed)


# --- the clock

CLOCK = """
import os, time
_time = time.time
def _shifted():
    with open(os.environ["CLOCK"]) as file:
        return _time() + float(file.read() or 0)
time.time = _shifted
"""


@pytest.mark.parametrize("shift", [-86_400.0, pytest.param(86_400.0, marks=pytest.mark.slow)])
def test_a_clock_that_jumps_costs_no_line_and_ends_no_run_early(shift, here, args, undisturbed):
    (here / "site").mkdir()
    (here / "site" / "sitecustomize.py").write_text(CLOCK)
    (here / "clock").write_text("0")
    path = os.pathsep.join(map(str, (here / "site", ROOT, ROOT / "kernels")))
    env = {**os.environ, "PYTHONPATH": path, "CLOCK": str(here / "clock")}
    out = here / "jobs.run"
    with process(*args, "--timeout", "3h", "--request-timeout", "1h", env=env) as started:
        halt_at_results(started, out)
        (here / "clock").write_text(str(shift))
        started.send_signal(signal.SIGCONT)
        code, err = ended(started)
    assert code == ExitCode.SOME_FAILED, err
    assert answers(out) == undisturbed
    created = [json.loads(raw)["response"]["body"]["created"] for raw in (out / "results.jsonl").open()]
    assert abs(abs(created[-1] - created[0]) - abs(shift)) < 1000  # the clock did jump under way
    assert 0 <= json.loads((out / "report.json").read_bytes())["seconds"]["total"] < 1000


def test_until_follows_the_clock_that_is_set(here, args, model_dir, monkeypatch, undisturbed):
    now = time.time
    jumped = run_during(
        lambda: monkeypatch.setattr(time, "time", lambda: now() + 86_400),
        model_dir(),
        limits={"until": time.strftime("%H:%M", time.localtime(now() + 7200))},
    )
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert jumped is ExitCode.STOPPED
    goes_on(args, here / "jobs.run", undisturbed)


@pytest.mark.parametrize("shift", [-86_400, -1, 3600])
def test_status_tells_nothing_absurd_when_the_clock_was_set(shift, here, model_dir, monkeypatch):
    now, told = time.time, []

    def look() -> None:
        monkeypatch.setattr(time, "time", lambda: now() + shift)
        told.append(read_status(here / "jobs.run"))

    run_during(look, model_dir())
    told.append(read_status(here / "jobs.run"))
    assert [each.state for each in told] == [State.RUNNING, State.FINISHED]
    for each in told:
        figures = (each.seconds, each.results_per_second, each.recent_results_per_second, each.seconds_left)
        assert all(figure is None or 0 <= figure < 1e6 for figure in figures)


# --- two at once, and copies


def test_of_two_starts_one_runs_and_a_dead_one_holds_nothing(here, args, undisturbed):
    out = here / "jobs.run"
    with process(*args) as first:
        halt_at_results(first, out)
        with process(*args) as second:
            code, err = ended(second)
        assert code == ExitCode.RUN_DIR
        assert f"in use by process {first.pid} on " in err
        assert first.poll() is None
        first.kill()
        first.wait()
        assert f"{first.pid} " in (out / "lock").read_text()
        goes_on(args, out, undisturbed)


@pytest.mark.slow
def test_many_starts_at_once_give_every_line_once(here, args, undisturbed):
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(process(*args)) for _ in range(3)]
        codes = Counter(ended(each)[0] for each in started)
    assert codes[ExitCode.SOME_FAILED] >= 1
    assert set(codes) <= {ExitCode.SOME_FAILED, ExitCode.RUN_DIR}
    goes_on(args, here / "jobs.run", undisturbed)


def test_copies_of_a_run_go_on_each_by_itself(here, args, model_dir, undisturbed):
    out, copies = here / "jobs.run", [here / "copy.run", here / "elsewhere" / "b.run"]
    copies[1].parent.mkdir()

    def copy() -> None:
        for path in copies:
            shutil.copytree(out, path)

    assert run_during(copy, model_dir()) is ExitCode.SOME_FAILED
    for path in copies:
        kept = answers(path)
        assert 0 < len(kept) < len(undisturbed)
        assert read_status(path).state is State.DIED
        goes_on([*args, "-o", str(path)], path, undisturbed)
    assert answers(out) == undisturbed


# --- paths with odd letters

ODD = {
    "spaces": "  a b ",
    "quotes": 'it\'s "q" `x` $(touch outside)',
    "newline": "a\nb\rc",
    "markup": "[bold red]a[red] :skull: {0} %s %(name)s",
    "terminal": "\x1b[2J\x1b]0;title\x07",
    "bytes that are no UTF-8": os.fsdecode(b"caf\xe9\xff"),
    "looks like an option": "-o",
}


ALL_ODD = "".join(ODD.values())


@pytest.mark.parametrize(
    "name", [ALL_ODD, *(pytest.param(name, id=kind, marks=pytest.mark.slow) for kind, name in ODD.items())]
)
def test_a_path_of_odd_letters_works_and_is_escaped_on_the_terminal(name, here, model_dir, monkeypatch, undisturbed):
    folder = here / name
    folder.mkdir()
    for path in ("jobs.jsonl", "slow.toml"):
        (here / path).rename(folder / path)
    model = model_dir()
    if name.isascii():  # tokenizers opens no path that is no UTF-8
        model = shutil.copytree(model, folder / "model")
    args = ["run", str(folder / "jobs.jsonl"), "--config", str(folder / "slow.toml"), "--model", str(model)]
    out = folder / "jobs.run"

    def told(*command: str) -> int:
        done = here_command(*command)
        assert all(letter.isprintable() or letter == "\n" for letter in done.stdout + done.stderr)
        done.stdout.encode()
        return done.exit_code

    assert told(*args, "--max-errors", "0") == ExitCode.STOPPED
    assert told("status", str(out)) == ExitCode.STOPPED
    assert told(*args) == ExitCode.SOME_FAILED
    assert answers(out) == undisturbed
    assert told(*args) == ExitCode.SOME_FAILED  # says that it is finished already, and where
    assert told(*args, "--seed", "1") == ExitCode.RUN_DIR
    with RunDir.open(folder / "held.run", {}):
        assert told(*args, "-o", str(folder / "held.run")) == ExitCode.RUN_DIR
    assert told("plan", *args[1:], "--html", str(folder / "plan.html")) == ExitCode.SOME_FAILED
    log = (out / "run.log").read_text(encoding="utf-8")
    assert all(letter.isprintable() or letter == "\n" for letter in log)
    assert log.count("run of ") == 2
    assert {path.name for path in here.iterdir()} == {name}


@pytest.mark.slow
def test_a_path_of_all_odd_letters_in_a_process_of_its_own(here, args, undisturbed):
    out = here / ALL_ODD
    args += ["-o", str(out)]
    with process(*args) as started:
        code, err = ended(started)
    assert code == ExitCode.SOME_FAILED, err
    assert all(letter.isprintable() or letter == "\n" for letter in err)
    goes_on(args, out, undisturbed)
