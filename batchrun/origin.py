"""Where a run came from: its job and its settings, as its directory has them, so that it can be gone on with without
the command that it was started with."""

from __future__ import annotations

from pathlib import Path

from batchrun.config import RunConfig, load_dumped
from batchrun.errors import UsageError
from batchrun.formats.job import JobSource, open_job
from batchrun.formats.rundir import KEPT_JOB, RUN, RunDir


def settings_of(run_dir: RunDir) -> RunConfig:
    """What the run was asked for. What ended its earlier starts (a time, failed lines) and decided whether it began at
    all (strict, fresh) is left out, as it is for each start to say.

    Raises:
        UsageError: `run.json` does not have it, or not soundly.
    """
    run, source = run_dir.run, run_dir.path / RUN
    assert run is not None
    if run.job is None or run.settings is None:
        raise UsageError(
            f"{source} does not say with which job and settings the run was made: an earlier version wrote it.",
            hint="Give the `batchrun run` command of this run once more; it notes them and computes nothing twice.",
            code="run_of_earlier_version",
        )
    config = load_dumped(run.settings, source)
    limits = config.limits.model_copy(update={"until": None, "timeout": None, "max_errors": None})
    return config.model_copy(update={"out": run_dir.path, "fresh": False, "strict": False, "limits": limits})


def job_of(run_dir: RunDir, moved_to: Path | None = None) -> JobSource:
    """The job of a run that `settings_of` has been asked about.

    Args:
        moved_to: where it lies now, if it is no longer where it was.

    Raises:
        UsageError: it is not there, or cannot be read.
    """
    assert run_dir.run is not None and run_dir.run.job is not None
    if moved_to is not None:
        return open_job(moved_to)
    source = run_dir.run.source
    if source is not None or run_dir.run.job == "-":
        return JobSource(open_job(run_dir.path / KEPT_JOB).path, source)
    place = Path(run_dir.run.job)
    if not place.exists():
        raise UsageError(f"The job of this run is no longer at {place}.", hint="Say with --job where it lies now.")
    return open_job(place)
