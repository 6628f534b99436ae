"""The exception tree and the exit codes: every failure a user can meet has a type, a message and a next move.

    BatchrunError               1   internal failure, or the base of those below
    ├── UsageError              2   a flag, a configuration key, a missing file
    │   ├── ModelNotFound       2   the model is missing, gated or offline
    │   └── ModelRefused        2   the model is there, and running it is not proven exact
    ├── NothingRunnable         4   no line has an answer, or any is bad under --strict
    ├── OutputError            73   results cannot be written (disk full, permissions); resumable
    ├── Stopped                75   stopped early (signal, limit); resumable
    └── RunDirError            76   the run directory is locked or belongs to another job

A fault of one line of the job is no exception: it is a `batchrun.request.LineFault`, and the rest of the job runs.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What `batchrun` exits with. The values are part of the interface: cron and pipelines read them."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    SOME_FAILED = 3
    NOTHING_RUNNABLE = 4
    OUTPUT = 73  # EX_CANTCREAT
    STOPPED = 75  # EX_TEMPFAIL
    RUN_DIR = 76  # EX_PROTOCOL


class BatchrunError(Exception):
    """A failure with a cause and a next move.

    Args:
        message: one sentence that says what failed and why.
        hint: one sentence that says what to do next, or None.
        code: a machine-readable name (`model_not_found`), or None.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class UsageError(BatchrunError):
    """The command line, the configuration or an input path is wrong."""

    exit_code = ExitCode.USAGE


class ModelNotFound(UsageError):
    """The model is missing, gated or out of reach."""


class ModelRefused(UsageError):
    """The model was found and is not one that batchrun has been shown to run exactly."""


class NothingRunnable(BatchrunError):
    """No line of the job can run."""

    exit_code = ExitCode.NOTHING_RUNNABLE


class OutputError(BatchrunError):
    """Results cannot be written; what was written before stays."""

    exit_code = ExitCode.OUTPUT


class Stopped(BatchrunError):
    """The run ended early and can be resumed."""

    exit_code = ExitCode.STOPPED


class RunDirError(BatchrunError):
    """The run directory is in use, or belongs to another job."""

    exit_code = ExitCode.RUN_DIR
