"""The run directory: who may write there, what of it is whole after a crash, and how its files are kept whole.

`results.jsonl` and `errors.jsonl` are the one truth about what is finished; `run.json` sums them up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import math
import os
import shutil
import socket
import time
import uuid
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import TypeAdapter, ValidationError

from batchrun.errors import ExitCode, OutputError, RunDirError, UsageError
from batchrun.formats.results import Ending, encode_json, read_attempts, read_ending, read_line_number
from batchrun.formats.source import Source
from batchrun.report.records import RequestCounts
from batchrun.request import JobLine, LineFault

SCHEMA_VERSION = 1
RESULTS, ERRORS, RUN = "results.jsonl", "errors.jsonl", "run.json"
REPLACED = "replaced.jsonl"  # lines that were taken out of the two, to be run again
LOCK = "lock"
KEPT_JOB = "job.jsonl"  # the job, where it came from standard input, a store, a table or several files
COLUMNS = "columns.parquet"  # the columns of a table, to be joined to its answers
# run.json goes first when a run is moved aside: without it, what is left is taken for no run at all.
RUN_FILES = (
    RUN, RESULTS, ERRORS, REPLACED, "plan.json", "steps.jsonl", "report.json", "report.html", "run.log", KEPT_JOB,
    COLUMNS,
)  # fmt: skip

_LOOK_SECONDS = 0.1  # `batchrun status` holds a lock for less when it looks whether anyone does

BYTES_PER_TOKEN = 6  # of answer text: English has 4 to 5, code and most other scripts less than 6
BYTES_PER_LINE = 700  # of a result line around its text, with a custom_id of some 50 characters
BYTES_PER_LINE_LEAST = 500  # the same with an empty text, small numbers and one-letter names
BYTES_PER_CHOICE = 80  # of a further answer on a line, around its text

Fingerprint = Mapping[str, str | int | float | bool | None]
Int64 = npt.NDArray[np.int64]
T = TypeVar("T")
Numbered = TypeVar("Numbered", JobLine, LineFault, JobLine | LineFault)
log = logging.getLogger(__name__)


# --- files that are written whole ---


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` met while writing `path` into an `OutputError` that names it and the free space."""
    try:
        yield
    except OSError as error:
        free = _free_bytes(path)
        space = "" if free is None else f" ({_size(free)} free on its file system)"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            space, mend = "", "Allow more open files (`ulimit -n`)"
        else:
            mend = "Make room or give write permission"
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}{space}",
            hint=f"{mend}, then run the same command again: what is finished is kept.",
            code="output_not_writable",
        ) from error


def check_still_there(file: int, path: Path) -> None:
    """See that an open file is the one at `path`: what is written to one that was removed is lost without a word.

    Raises:
        OutputError: it was removed, moved or replaced, or cannot be looked at.
    """
    with output_errors(path):
        try:
            there = os.path.samestat(path.stat(), os.fstat(file))
        except (FileNotFoundError, NotADirectoryError):
            there = False
    if not there:
        raise OutputError(
            f"{path} was removed, moved or replaced while the run had it open",
            hint="Put it back if it was moved, then run the same command again: what is not there is computed again.",
            code="output_removed",
        )


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented JSON so that a reader sees the old file or the new one, even after a power cut.

    Raises:
        OutputError: it cannot be written; the old file is as it was.
    """
    with replacing(path) as file:
        file.write(encode_json(value, indent=True))


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all, as `write_json_atomic` does.

    Raises:
        OutputError: it cannot be written; the old file is as it was.
    """
    with replacing(path) as file:
        file.write(text.encode())


def document(value: Any) -> dict[str, Any]:
    """The dataclass instance `value` as a JSON document of ours: its fields, and `schema_version` before them."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {"schema_version": SCHEMA_VERSION, **fields}


def read_document(path: Path, kind: type[T]) -> T:
    """Read a file that holds `document(...)` of an instance of the dataclass `kind`.

    Raises:
        RunDirError: it is missing, not JSON, of another schema version, or has a missing or wrong field.
    """
    try:
        raw = path.read_bytes()
        version = orjson.loads(raw)["schema_version"]
        if type(version) is not int:
            raise ValueError("schema_version is no integer")
        if version != SCHEMA_VERSION:
            raise RunDirError(
                f"{path} has schema_version {version}; this batchrun reads {SCHEMA_VERSION}",
                hint="Use the batchrun that wrote it, or start again with --fresh.",
                code="schema_version",
            )
        return TypeAdapter(kind).validate_json(raw, strict=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}"
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            reason = f"it is not a JSON object with a schema_version ({error})"
        raise RunDirError(
            f"cannot read {path}: {reason}",
            hint="Give the directory of a run with -o, or start again with --fresh.",
            code="unreadable_document",
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file written beside `path`, which takes its place when the block ends well.

    Raises:
        OutputError: it cannot be written; the old file is as it was.
    """
    beside = path.with_name(path.name + ".tmp")
    with output_errors(path):
        try:
            with beside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    # A created or renamed file survives a power cut only once its directory is on disk too.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- space ---


class DiskEstimate(NamedTuple):
    """Bytes that the results of a job take: `least` for empty answers, `most` when all run to their limit."""

    least: int
    most: int


def estimate_disk(max_new_tokens: npt.NDArray[np.int32], lines: int) -> DiskEstimate:
    """Disk space for the results of `lines` lines, whose requests' token limits are `max_new_tokens`, int32 `[R]`.

    Taken for granted: a token is at most 6 bytes of text on average, a line has some 700 bytes around its text, and
    each further choice of a line 80.
    """
    text = BYTES_PER_TOKEN * int(max_new_tokens.sum(dtype=np.int64))
    around = lines * BYTES_PER_LINE + (max_new_tokens.size - lines) * BYTES_PER_CHOICE
    return DiskEstimate(least=lines * BYTES_PER_LINE_LEAST, most=around + text)


def check_disk(path: Path, estimate: DiskEstimate) -> str | None:
    """Compare an estimate with the free space of the file system that `path` lies on.

    Returns:
        A warning where the answers fit only if they stay below their limits; else None.

    Raises:
        OutputError: not even empty answers fit.
    """
    free = _free_bytes(path)
    if free is None or free >= estimate.most:
        return None
    if free < estimate.least:
        raise OutputError(
            f"the results take at least {_size(estimate.least)} and {path} has {_size(free)} free",
            hint="Make room, or give a directory on another disk with -o.",
            code="disk_full",
        )
    return (
        f"the results take up to {_size(estimate.most)} if every answer runs to its limit, "
        f"and {path} has {_size(free)} free"
    )


def _free_bytes(path: Path) -> int | None:
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


# --- the directory ---


class RunStatus(StrEnum):
    """Status of a run, in the words of OpenAI's batch object where it has them."""

    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    STOPPED = "stopped"  # early, resumable
    CANCELLED = "cancelled"  # closed for good by a person

    @property
    def finished(self) -> bool:
        return self in (RunStatus.COMPLETED, RunStatus.CANCELLED)


def exit_code_of(counts: RequestCounts) -> ExitCode:
    """What a run exits with that has come to its end."""
    if not counts.completed:
        return ExitCode.NOTHING_RUNNABLE
    return ExitCode.SOME_FAILED if counts.failed else ExitCode.OK


class RunState(StrEnum):
    """What a start finds in the directory."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Retry:
    """Lines of a run that were taken out of its two files, to be run again.

    Attributes:
        at: when, in seconds of Unix time.
        lines: how many.
        codes: the error codes that were named; none: all, unless there is a finish reason.
        finish_reason: that of the finished lines that were named, or None.
        changed: settings that differ from those of the run, by name.
        size: bytes of `replaced.jsonl` with these lines as its last.
        taken: whether they are out of the two files; if not, whoever writes there next takes them out.
    """

    at: int
    lines: int
    codes: list[str]
    finish_reason: str | None
    changed: dict[str, Any]
    size: int = 0
    taken: bool = False


@dataclass(frozen=True, slots=True)
class RunFile:
    """`run.json`: what a run is and how far it is. Times are seconds of Unix time.

    Attributes:
        id: made at the first start, kept by later ones.
        object: `batch`, as in OpenAI's batch object.
        status: `in_progress`, `finalizing`, `completed`, `stopped` or `cancelled`.
        exit_code: what the command ended with; None while it runs.
        request_counts: what became of the lines.
        errors: failed lines by code.
        model: as it was given.
        fingerprint: all that decides the results, by name; a start with another one is refused.
        created_at, completed_at: of the run.
        in_progress_at: of the latest start.
        environment: versions and machine.
        job: absolute path of the job, or its URL without secrets; `-` where it came from standard input, and is
            `job.jsonl` here. None in files of earlier versions.
        settings: what the run was asked for, every default resolved. None in files of earlier versions.
        retries: the lines that were run again, in order.
        source: where the lines of `job.jsonl` came from; None where the job is read where it lies, or came from
            standard input.

    Raises:
        ValueError: a finished run without an exit code or with lines remaining; an exit code that there is not.
    """

    id: str
    object: str
    status: RunStatus
    exit_code: int | None
    request_counts: RequestCounts
    errors: dict[str, int]
    model: str
    fingerprint: dict[str, str | int | float | bool | None]
    created_at: int
    in_progress_at: int
    completed_at: int | None
    environment: dict[str, Any]
    job: str | None = None
    settings: dict[str, Any] | None = None
    retries: tuple[Retry, ...] = ()
    source: Source | None = None

    def __post_init__(self) -> None:
        if self.status.finished and (self.exit_code is None or self.request_counts.remaining):
            raise ValueError(f"a {self.status} run has an exit code and no remaining lines")
        if self.exit_code is not None:
            ExitCode(self.exit_code)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a run directory holds, read from its lines.

    Attributes:
        results: int64, sorted: job lines that have a result.
        errors: int64, sorted: job lines that have an error line; none is in both.
        error_codes: number of error lines by code.
        replaced: int64, sorted: job lines that were taken out to be run again, at any time.
        attempts: int64, for each of `replaced`, how often it was tried before.
        again: int64: job lines that the last retry has taken out.
    """

    results: Int64
    errors: Int64
    error_codes: dict[str, int]
    replaced: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    attempts: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    again: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def unfinished(self, lines: Iterable[Numbered]) -> Iterator[Numbered]:
        """Those of some lines of the job, or of their faults, that have neither a result nor an error; 8 bytes of
        memory for each line that has, where a set takes 60."""
        done = np.union1d(self.results, self.errors).data
        for line in lines:
            place = bisect_left(done, line.number)
            if place == len(done) or done[place] != line.number:
                yield line

    def attempts_of(self, lines: npt.NDArray[np.int32]) -> Int64:
        """How often each of some lines of the job, int32 `[N]`, was tried before; 0 for those never replaced."""
        if not self.replaced.size:
            return np.zeros(lines.size, dtype=np.int64)
        rows = np.minimum(np.searchsorted(self.replaced, lines), self.replaced.size - 1)
        return np.where(self.replaced[rows] == lines, self.attempts[rows], 0)


class RunDir:
    """A run directory that this process holds the lock of, until it is closed.

    Attributes:
        path: the directory.
        run: its `run.json`, or None before the first `start`.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Fingerprint,
        lock: int,
        job: str | None,
        settings: dict[str, Any] | None,
        source: Source | None = None,
    ) -> None:
        self.path = path
        self._fingerprint = _as_read(fingerprint)
        self._lock = lock
        self._job = job
        self._settings = settings
        self._source = source
        self.run: RunFile | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        fingerprint: Fingerprint,
        *,
        fresh: bool = False,
        job: str | None = None,
        settings: dict[str, Any] | None = None,
        source: Source | None = None,
    ) -> RunDir:
        """Make the directory where it is missing, take its lock, and see that a run in it is of this job.

        Args:
            fingerprint: all that decides the results (job content, model, template, sampling defaults), by name.
            fresh: move a run that is there to `<path>.1` (`.2`, ...) beside it, and start anew.
            job, settings, source: as in `RunFile`, to be noted there.

        Raises:
            RunDirError: another process holds it, it belongs to another job, or its files are not sound.
            OutputError: it cannot be made or written.
        """
        with output_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        run_dir = cls(path, fingerprint, _take_lock(path), job, settings, source)
        try:
            if fresh:
                _move_aside(path)
            run_dir._read_run()
            if run_dir.run is not None:
                run_dir.expect(fingerprint)
                if run_dir.run.settings is None and settings is not None:  # an earlier version noted none
                    run_dir._save(dataclasses.replace(run_dir.run, job=job, settings=settings))
        except BaseException:
            run_dir.close()
            raise
        return run_dir

    @classmethod
    def reopen(cls, path: Path) -> RunDir:
        """Take the lock of a directory that has a run, whatever its job is; its `run` is there.

        Raises:
            UsageError: there is no run.
            RunDirError: another process holds it, or its files are not sound.
        """
        refuse_no_run(path)
        run_dir = cls(path, {}, _take_lock(path), None, None)
        try:
            run_dir._read_run()
            assert run_dir.run is not None
            run_dir._fingerprint = run_dir.run.fingerprint
        except BaseException:
            run_dir.close()
            raise
        return run_dir

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> None:
        """See that the directory is there, and that no other process can have taken its lock.

        Raises:
            OutputError: the directory or its lock was removed, moved or replaced.
        """
        check_still_there(self._lock, self.path / LOCK)

    def close(self) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError):  # the file's content is a courtesy; closing it is what frees the lock
            os.ftruncate(self._lock, 0)
        os.close(self._lock)

    @property
    def state(self) -> RunState:
        """What was found, or what it has become since."""
        if self.run is None:
            return RunState.NEW
        return RunState.FINISHED if self.run.status.finished else RunState.UNFINISHED

    def start(self, counts: RequestCounts, *, model: str, environment: dict[str, Any]) -> None:
        """Write `run.json` as in progress, before any result. A resumed run keeps its id and time of creation."""
        now = int(time.time())
        self._save(
            RunFile(
                id=self.run.id if self.run else f"batch_{uuid.uuid4().hex}",
                object="batch",
                status=RunStatus.IN_PROGRESS,
                exit_code=None,
                request_counts=counts,
                errors=self.run.errors if self.run else {},
                model=model,
                fingerprint=self._fingerprint,
                created_at=self.run.created_at if self.run else now,
                in_progress_at=now,
                completed_at=None,
                environment=environment,
                job=self._job if self._job is not None or self.run is None else self.run.job,
                settings=self._settings if self._settings is not None or self.run is None else self.run.settings,
                retries=self.run.retries if self.run else (),
                source=self._source if self._job is not None or self.run is None else self.run.source,
            )
        )

    def update(
        self,
        status: RunStatus,
        counts: RequestCounts,
        *,
        errors: Mapping[str, int],
        exit_code: ExitCode | None = None,
    ) -> None:
        """Write `run.json` anew, after `start`.

        Args:
            counts: as the lines of the two files are now.
            errors: failed lines by code.
            exit_code: what the run ends with; given when it ends.
        """
        if self.run is None:
            raise RuntimeError("start the run before it is updated")
        self._save(
            dataclasses.replace(
                self.run,
                status=status,
                request_counts=counts,
                errors=dict(errors),
                exit_code=None if exit_code is None else int(exit_code),
                completed_at=int(time.time()) if status.finished else None,
            )
        )

    def recover(self) -> Recovered:
        """Cut a torn last line off both files, take those lines out that a retry has left there, and read which lines
        of the job are done; in bounded memory.

        Raises:
            RunDirError: a line before the last is not sound, a result is among the errors or an error among the
                results, or a line of the job is there twice.
        """
        results, _ = _recover_file(self.path / RESULTS, of_errors=False)
        errors, codes = _recover_file(self.path / ERRORS, of_errors=True)
        both = np.intersect1d(results, errors)
        if both.size:
            raise _unsound(self.path, f"line {both[0]} of the job is in {RESULTS} and in {ERRORS}")
        if self.run is None or not self.run.retries:
            return Recovered(results, errors, codes)
        *_, last = self.run.retries
        numbers, attempts = _read_replaced(self.path / REPLACED, last.size)
        again = numbers[numbers.size - last.lines :] if numbers.size >= last.lines else numbers
        if last.taken:  # and what was kept aside may be gone
            return Recovered(results, errors, codes, *_most_by_line(numbers, attempts), again)
        if numbers.size < last.lines:
            raise _unsound(self.path / REPLACED, f"it has not the {last.lines} lines that were to be run again")
        for name in (RESULTS, ERRORS):
            _drop_lines(self.path / name, again)
        self._save(
            dataclasses.replace(self.run, retries=(*self.run.retries[:-1], dataclasses.replace(last, taken=True)))
        )
        return self.recover()

    def take_out(self, numbers: Int64, retry: Retry) -> Recovered:
        """Take lines of the job out of the two files, so that they remain, and note the retry; what the lines were is
        kept in `replaced.jsonl`. Whenever it is killed, either all is as it was, or `recover` does the rest.

        Args:
            numbers: the lines of the job, at least one of whose files has each.
            retry: as it is to be noted; its `lines`, `size` and `taken` are seen to here.

        Raises:
            OutputError: it cannot be written.
        """
        assert self.run is not None
        noted = self.run.retries[-1].size if self.run.retries else 0
        size = _append_replaced(self.path, numbers, noted)
        # This is the moment that decides: the run is unfinished from here on, and what is to be taken out is known.
        self._save(
            dataclasses.replace(
                self.run,
                status=RunStatus.IN_PROGRESS,
                exit_code=None,
                completed_at=None,
                retries=(*self.run.retries, dataclasses.replace(retry, lines=numbers.size, size=size, taken=False)),
            )
        )
        return self.recover()

    def note_results(self, results: str) -> None:
        """Note where the answers of a finished run go besides, so that a retry writes them there anew."""
        assert self.run is not None
        settings = dict(self.run.settings or {})
        settings["output"] = {**settings.get("output", {}), "results": results}
        self._save(dataclasses.replace(self.run, settings=settings, source=self._source or self.run.source))

    def expect(self, fingerprint: Fingerprint, *, hint: str | None = None) -> None:
        """See that the run is of this fingerprint.

        Args:
            hint: what to do if it is not.

        Raises:
            RunDirError: it is not; the fields that differ are named.
        """
        assert self.run is not None
        there, now = self.run.fingerprint, _as_read(fingerprint)
        fields = [name for name in {**there, **now} if there.get(name) != now.get(name)]
        if fields:
            values = ((name, *_shorten(_show(there, name), _show(now, name))) for name in fields)
            differences = "; ".join(f"{name} is {old} there and {new} now" for name, old, new in values)
            if "job" in fields and self.run.source is not None and self._source is not None:
                differences = "; ".join([differences, *islice(self.run.source.differences(self._source), 5)])
            raise RunDirError(
                f"{self.path} belongs to another run: {differences}",
                hint=hint or "Give another directory with -o, or --fresh to move that run aside and start again.",
                code="run_dir_mismatch",
            )

    def _save(self, run: RunFile) -> None:
        self.check()
        write_json_atomic(self.path / RUN, document(run))
        self.run = run

    def _read_run(self) -> None:
        path = self.path / RUN
        if not path.exists():
            for name in (RESULTS, ERRORS):
                if (self.path / name).exists():
                    raise RunDirError(
                        f"{self.path} has a {name} but no {RUN}, so it is unknown whose results they are",
                        hint="Give another directory with -o, or --fresh to move them aside.",
                        code="run_dir_unknown",
                    )
            return
        self.run = read_document(path, RunFile)


def own_files(run_dir: Path) -> frozenset[str]:
    """The real paths of all files that a run may have in its directory."""
    return frozenset(os.path.realpath(run_dir / name) for name in (*RUN_FILES, LOCK))


def refuse_no_run(path: Path, *, starting: bool | None = False) -> None:
    """See that a directory has a run.

    Args:
        starting: whether a process holds its lock.

    Raises:
        UsageError: it has none.
    """
    if (path / RUN).is_file():
        return
    if starting:
        raise UsageError(f"The run in {path} is just being started.", hint="Ask again in a moment.")
    if path.is_file():
        raise UsageError(
            f"{path} is a file, not a run directory.",
            hint="Name the directory that the run writes to: that of -o, or jobs.run beside jobs.jsonl.",
        )
    reason = f"{path} has no {RUN}" if path.is_dir() else f"there is no directory {path}"
    raise UsageError(
        f"There is no run: {reason}.", hint="A run has its directory once its job is read and its model is found."
    )


def _take_lock(path: Path) -> int:
    """Lock the directory for this process: the lock dies with it, so that a stale one is no lock."""
    with output_errors(path / LOCK):
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOOK_SECONDS)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check_still_there(lock, path / LOCK)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} {socket.gethostname()} {since}\n".encode(), 0)
        except BlockingIOError:
            words = os.pread(lock, 1024, 0).decode(errors="replace").split()
            os.close(lock)
            holder = "process {} on {}, since {}".format(*words) if len(words) == 3 else "another process"
            raise RunDirError(
                f"{path} is in use by {holder}",
                hint="Wait until it ends, or give another directory with -o.",
                code="run_dir_locked",
            ) from None
        except BaseException:
            os.close(lock)
            raise
    return lock


def _move_aside(path: Path) -> None:
    """Move the files of a run to a new directory beside this one; other files stay where they are."""
    here = path.resolve()
    files = [here / name for name in RUN_FILES if (here / name).exists()]
    if not files:
        return
    number = 1
    with output_errors(path):
        while True:
            aside = here.with_name(f"{here.name}.{number}")
            try:
                aside.mkdir()
                break
            except FileExistsError:
                number += 1
        try:
            for file in files:
                file.rename(aside / file.name)
        except OSError as error:
            with contextlib.suppress(OSError):  # it is removed only where nothing has moved
                aside.rmdir()
            if error.errno == errno.EXDEV:
                raise RunDirError(
                    f"the run in {path} cannot be moved aside: {aside} is on another file system",
                    hint="Give another directory with -o.",
                    code="run_dir_not_movable",
                ) from error
            raise
        sync_directory(aside)
        sync_directory(here)
    log.info("moved the run in %s to %s", path, aside)


def _as_read(fingerprint: Fingerprint) -> dict[str, str | int | float | bool | None]:
    """A fingerprint as it reads back from JSON, so that equal stays equal."""
    read: dict[str, str | int | float | bool | None] = orjson.loads(encode_json(dict(fingerprint)))
    return read


def _show(fingerprint: Fingerprint, name: str) -> str:
    return repr(fingerprint[name]) if name in fingerprint else "not set"


def _shorten(one: str, other: str, width: int = 48) -> tuple[str, str]:
    """Two values cut to where they differ."""
    if max(len(one), len(other)) <= width:
        return one, other
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    start = start - 8 if start > 16 else 0

    def cut(text: str) -> str:
        return ("…" if start else "") + text[start : start + width] + ("…" if len(text) > start + width else "")

    return cut(one), cut(other)


# --- result lines ---


def cut_torn_tail(path: Path) -> None:
    """Cut off what follows the last newline: a line whose writing was cut short."""
    with output_errors(path), path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        whole = 0
        while end and not whole:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            whole = start + newline + 1 if newline >= 0 else 0
            end = start
        if whole < size:
            _cut(file, whole, size)


def sort_results(path: Path) -> None:
    """Sort a file of result or error lines by their line of the job, on disk: 32 bytes of memory a line.

    Raises:
        RunDirError: a line of it is not sound.
        OutputError: the sorted file cannot be written; the old one is as it was.
    """
    if not path.exists():
        return
    numbers, offsets, lengths = read_index(path)
    if (numbers[1:] >= numbers[:-1]).all():
        return
    order = np.argsort(numbers, kind="stable")
    with replacing(path) as target:
        _copy_lines(path, offsets[order], lengths[order], target)


def failed_lines(path: Path, codes: Collection[str] = ()) -> Int64:
    """The lines of the job that have an error line, or those of them with one of some codes; int64, as they stand.

    Args:
        path: the run directory.
        codes: error codes; none: all.
    """
    errors = path / ERRORS
    if not errors.exists():
        return np.empty(0, dtype=np.int64)
    return np.fromiter(
        (number for _, _, number, code in _scan(errors) if number is not None and (not codes or code in codes)),
        dtype=np.int64,
    )


def endings(path: Path) -> Iterator[Ending]:
    """How each line of the job that has a result ended, as they stand in the run directory `path`.

    Raises:
        RunDirError: a result line is not sound.
    """
    results = path / RESULTS
    if not results.exists():
        return
    with results.open("rb") as file:
        for raw in file:
            try:
                yield read_ending(raw)
            except ValueError as error:
                raise _unsound(results, f"the line that ends at byte {file.tell()}: {error}") from error


def _read_replaced(path: Path, size: int) -> tuple[Int64, Int64]:
    """The job line, and the number of attempts, of each line in the first `size` bytes of `replaced.jsonl`."""
    numbers, attempts = array("q"), array("q")
    if path.exists():
        with path.open("rb") as file:
            for raw in file:
                if file.tell() > size:
                    break
                try:
                    numbers.append(read_line_number(raw)[0])
                    attempts.append(read_attempts(raw))
                except ValueError as error:
                    raise _unsound(path, f"the line that ends at byte {file.tell()} is not sound") from error
    return np.asarray(numbers), np.asarray(attempts)


def _most_by_line(numbers: Int64, attempts: Int64) -> tuple[Int64, Int64]:
    """Each line once, ascending, with its largest number of attempts."""
    order = np.lexsort((attempts, numbers))
    numbers, attempts = numbers[order], attempts[order]
    last = np.append(numbers[1:] != numbers[:-1], True)[: numbers.size]
    return numbers[last], attempts[last]


def _append_replaced(path: Path, numbers: Int64, noted: int) -> int:
    """Append the result and error lines of some lines of the job to `replaced.jsonl`; returns its size.

    Args:
        noted: size that `run.json` knows of; what lies behind it was written by a retry that came no further.
    """
    replaced = path / REPLACED
    with output_errors(replaced), replaced.open("ab") as target:
        target.truncate(min(noted, target.tell()))
        target.seek(0, os.SEEK_END)
        for source in (path / RESULTS, path / ERRORS):
            if source.exists():
                there, offsets, lengths = read_index(source)
                taken = np.isin(there, numbers)
                _copy_lines(source, offsets[taken], lengths[taken], target)
        target.flush()
        os.fsync(target.fileno())
        sync_directory(path)
        return target.tell()


def _drop_lines(path: Path, numbers: Int64) -> None:
    """Write a file of result or error lines anew, without those of some lines of the job."""
    if not path.exists():
        return
    there, offsets, lengths = read_index(path)
    kept = ~np.isin(there, numbers)
    if kept.all():
        return
    with replacing(path) as target:
        _copy_lines(path, offsets[kept], lengths[kept], target)


def read_index(path: Path) -> tuple[Int64, Int64, Int64]:
    """Line of the job, offset and length of each line of a file; 24 bytes of memory a line, while it is read 16."""
    numbers, ends = array("q"), array("q", [0])
    for offset, length, number, _ in _scan(path):
        if number is None:
            raise _unsound(path, f"the line at byte {offset} is not sound")
        numbers.append(number)
        ends.append(offset + length)
    at = np.asarray(ends)
    return np.asarray(numbers), at[:-1], np.diff(at)


def _copy_lines(path: Path, offsets: Int64, lengths: Int64, target: Any) -> None:
    """Write the lines of a file that lie at some offsets."""
    with path.open("rb") as source:
        for offset, length in zip(offsets, lengths, strict=True):
            source.seek(int(offset))
            target.write(source.read(int(length)))


class ResultSink:
    """Appends to `results.jsonl` and `errors.jsonl`, so that no more than a flush interval is ever lost.

    Attributes:
        completed, failed: whole lines in the two files.
    """

    def __init__(
        self,
        path: Path,
        recovered: Recovered,
        *,
        flush_seconds: float = 2.0,
        flush_results: int = 1000,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the two files of the run directory `path`, made where they are missing.

        Args:
            recovered: what they hold, from `RunDir.recover`.
            flush_seconds, flush_results: lines are on disk at the latest when they are this old or this many.
            check: `RunDir.check`, called before anything is written.

        Raises:
            OutputError: a file cannot be opened.
        """
        self._results = _LineFile(path / RESULTS, recovered.results.size)
        self._errors = _LineFile(path / ERRORS, recovered.errors.size)
        with output_errors(path):
            sync_directory(path)
        self._flush_seconds = flush_seconds
        self._flush_results = flush_results
        self._check = check
        self._flushed_at = time.monotonic()

    @property
    def completed(self) -> int:
        return self._results.lines

    @property
    def failed(self) -> int:
        return self._errors.lines

    def write_result(self, line: bytes) -> None:
        """Append one line of `results.jsonl`, newline included; raises as `flush` does."""
        self._results.pending.append(line)
        self.poll()

    def write_error(self, line: bytes) -> None:
        """Append one line of `errors.jsonl`, newline included; raises as `flush` does."""
        self._errors.pending.append(line)
        self.poll()

    def poll(self) -> None:
        """Flush if that is due; to be called now and then while nothing is written. Raises as `flush` does."""
        pending = len(self._results.pending) + len(self._errors.pending)
        old = time.monotonic() - self._flushed_at >= self._flush_seconds
        if pending >= self._flush_results or (pending and old):
            self.flush()

    def flush(self) -> None:
        """Bring every line to disk.

        Raises:
            OutputError: the disk is full or refuses, or the files are not there any more. Whole lines stay, a part of
                a line is cut off, and the lines that did not fit are dropped: they count as remaining.
        """
        self._flushed_at = time.monotonic()
        self._check()
        try:
            self._results.flush()
        finally:
            self._errors.flush()

    def close(self) -> None:
        """Flush what is pending and close both files, which are closed even where that fails. Raises as `flush`."""
        try:
            if self._results.pending or self._errors.pending:  # else the files may have been sorted since
                self.flush()
        finally:
            self._results.close()
            self._errors.close()

    def __enter__(self) -> ResultSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LineFile:
    """A file that lines are appended to, and that holds whole lines whatever happens."""

    def __init__(self, path: Path, lines: int) -> None:
        self.path = path
        self.lines = lines
        self.pending: list[bytes] = []
        with output_errors(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._end = os.fstat(self._fd).st_size

    def flush(self) -> None:
        data = b"".join(self.pending)
        self.pending.clear()
        check_still_there(self._fd, self.path)
        if not data:
            return
        written = 0
        with output_errors(self.path):
            try:
                while written < len(data):
                    written += os.write(self._fd, memoryview(data)[written:])
                os.fsync(self._fd)
            finally:
                whole = data.rfind(b"\n", 0, written) + 1
                self._end += whole
                self.lines += data.count(b"\n", 0, whole)
                if whole < len(data):
                    # Where even this fails, the torn line is cut off by the next start.
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._fd, self._end)

    def close(self) -> None:
        os.close(self._fd)


def _scan(path: Path) -> Iterator[tuple[int, int, int | None, str | None]]:
    """Offset and length of each line, its line of the job (None where it is not sound) and its error code."""
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            number, code = None, None
            with contextlib.suppress(ValueError):
                number, code = read_line_number(raw)
            yield offset, len(raw), number, code
            offset += len(raw)


def _recover_file(path: Path, *, of_errors: bool) -> tuple[npt.NDArray[np.int64], dict[str, int]]:
    """Cut a torn last line off; the sorted lines of the job that it has, and how often it has each error code."""
    codes: Counter[str] = Counter()
    if not path.exists():
        return np.empty(0, dtype=np.int64), {}
    cut_torn_tail(path)
    size = path.stat().st_size
    found = array("q")
    for offset, length, number, code in _scan(path):
        if number is not None:
            if (code is not None) is not of_errors:
                raise _unsound(path, f"the line at byte {offset} is {'a result' if of_errors else 'an error'}")
            found.append(number)
            codes.update([code] if code is not None else [])
        elif offset + length == size:
            with output_errors(path), path.open("r+b") as file:
                _cut(file, offset, size)
        else:
            raise _unsound(path, f"the line at byte {offset} is not sound, and lines follow it")
    numbers = np.asarray(found, dtype=np.int64)
    numbers.sort()  # in place
    again = numbers[1:][numbers[1:] == numbers[:-1]]
    if again.size:
        raise _unsound(path, f"line {again[0]} of the job is there twice")
    return numbers, dict(codes)


def _cut(file: Any, whole: int, size: int) -> None:
    log.warning("cut a torn last line of %d bytes off %s", size - whole, file.name)
    file.truncate(whole)
    os.fsync(file.fileno())


def _unsound(path: Path, reason: str) -> RunDirError:
    return RunDirError(
        f"{path} cannot be continued: {reason}",
        hint="Repair the file, or start again with --fresh.",
        code="run_dir_unsound",
    )
