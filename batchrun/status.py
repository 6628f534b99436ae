"""How far a run is, told from its directory while another process works on it, or after that has ended."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from batchrun.errors import ExitCode, RunDirError
from batchrun.formats.rundir import ERRORS, RESULTS, RUN, RunFile, RunStatus, read_document, refuse_no_run
from batchrun.formats.watch import Holder, count_error_codes, count_lines, count_since, last_created, look_at_lock
from batchrun.report.records import RequestCounts

RECENT_SECONDS = 120  # the rate of late is that of so many seconds
_LEAST_SECONDS = 5  # of fewer there is no rate worth telling


class State(StrEnum):
    """What has become of a run, with what its lock says."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"  # early, by itself; resumable
    DIED = "died"  # killed or crashed; resumable
    UNKNOWN = "unknown"  # in progress by its own words, and whether its process lives cannot be told from here


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What `batchrun status` tells. Times are seconds of Unix time.

    Attributes:
        state: `running`, `finished`, `stopped`, `died` or `unknown`.
        status: as `run.json` has it.
        exit_code: what the command ended with, as `run.json` has it; None while it runs and where it died.
        request_counts: the lines of the two files, counted.
        errors: error lines by code.
        process: who holds the lock, or held it last; None where it was given back.
        looked_at, started_at: now; the latest start.
        last_result_at: when the latest result was finished.
        seconds: from the latest start to now, or to the end of a finished run; None where that is not known.
        results_per_second: since the latest start, loading included; None unless it runs.
        recent_results_per_second: in the last `recent_seconds`; None unless it runs, and while it is too early.
        recent_seconds: 120, or less where the first result of this start is not so old.
        seconds_left: what the remaining lines take at the recent rate.
    """

    state: State
    status: RunStatus
    exit_code: int | None
    request_counts: RequestCounts
    errors: dict[str, int]
    process: Holder | None
    looked_at: float
    started_at: int
    last_result_at: int | None
    seconds: float | None
    results_per_second: float | None = None
    recent_results_per_second: float | None = None
    recent_seconds: float | None = None
    seconds_left: float | None = None

    @property
    def command_exit_code(self) -> ExitCode:
        """What `batchrun status` exits with."""
        if self.state is State.FINISHED:
            return ExitCode(self.exit_code or 0)
        return ExitCode.STOPPED if self.state in (State.STOPPED, State.DIED) else ExitCode.OK


def read_status(run_dir: Path, *, now: float | None = None) -> RunProgress:
    """How far the run in `run_dir` is. Reads, and writes nothing.

    Args:
        now: seconds of Unix time; the clock's if None.

    Raises:
        UsageError: there is no run.
        RunDirError: its files are not sound.
    """
    held, holder = look_at_lock(run_dir)
    refuse_no_run(run_dir, starting=held)
    run = read_document(run_dir / RUN, RunFile)
    if not held and not run.status.finished:
        held, holder = look_at_lock(run_dir)  # it may have been started since the first look
    state = _state(run, held)
    now = time.time() if now is None else now
    errors = count_error_codes(run_dir / ERRORS)
    counts = _counts(run_dir, run.request_counts.total, count_lines(run_dir / RESULTS), sum(errors.values()))
    rates = _Rates()
    # What starts again, or writes its report, makes no results.
    if state in (State.RUNNING, State.UNKNOWN) and run.status is RunStatus.IN_PROGRESS:
        rates = _rates(run_dir / RESULTS, run.in_progress_at, counts.remaining, now)
    seconds = None
    if state is State.FINISHED and run.completed_at is not None:
        seconds = max(float(run.completed_at - run.in_progress_at), 0.0)
    elif state in (State.RUNNING, State.UNKNOWN) and run.status is not RunStatus.STOPPED:
        seconds = max(now - run.in_progress_at, 0.0)
    return RunProgress(
        state=state,
        status=run.status,
        exit_code=run.exit_code,
        request_counts=counts,
        errors=errors,
        process=holder,
        looked_at=now,
        started_at=run.in_progress_at,
        last_result_at=_last_result_at(run_dir, run),
        seconds=seconds,
        **rates._asdict(),
    )


def _last_result_at(run_dir: Path, run: RunFile) -> int | None:
    """When the latest result was there. Once results are sorted by line, the last of them is not the latest."""
    last = last_created(run_dir / RESULTS)
    is_sorted = run.status.finished and (run.settings or {}).get("results_order") == "input"
    return run.completed_at if last is not None and is_sorted else last


def _state(run: RunFile, held: bool | None) -> State:
    if run.status.finished:
        return State.FINISHED
    if held:
        return State.RUNNING
    if run.status is RunStatus.STOPPED:
        return State.STOPPED
    return State.UNKNOWN if held is None else State.DIED


def _counts(run_dir: Path, total: int, completed: int, failed: int) -> RequestCounts:
    if completed + failed > total:
        raise RunDirError(
            f"{run_dir} has {completed + failed} results and errors of {total} lines",
            hint="Look again; if it stays so, the files were changed by hand: start again with --fresh.",
            code="run_dir_unsound",
        )
    return RequestCounts(total, completed, failed, total - completed - failed)


class _Rates(NamedTuple):
    """The fields of `RunProgress` of these names."""

    results_per_second: float | None = None
    recent_results_per_second: float | None = None
    recent_seconds: float | None = None
    seconds_left: float | None = None


def _rates(results: Path, started_at: int, remaining: int, now: float) -> _Rates:
    """Results per second, from the time that each result line has.

    Bad lines are refused all at once, so only results count. Those of a second are taken together or not at all, as
    times have no fractions.
    """
    done, first = count_since(results, started_at)
    elapsed = now - started_at
    overall = done / elapsed if elapsed > 0 else None
    since = math.ceil(now - RECENT_SECONDS)
    if first is not None:
        since = max(since, first + 1)  # loading and planning, before the first, say nothing about what is to come
    if first is None or now - since < _LEAST_SECONDS:
        return _Rates(overall)
    recent = count_since(results, since)[0] / (now - since)
    return _Rates(overall, recent, now - since, remaining / recent if recent else None)
