"""Ends an unfinished run for good: every line that remains becomes an error line, and no model is loaded for it."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from batchrun.config import RunConfig
from batchrun.devices import resolve_device
from batchrun.errors import RunDirError
from batchrun.formats.job import JobSource, lint_job, read_job
from batchrun.formats.report import REPORT, Course, read_report, write_report
from batchrun.formats.results import error_line, unrun_line
from batchrun.formats.rundir import (
    ERRORS,
    RESULTS,
    ResultSink,
    RunDir,
    RunFile,
    RunState,
    RunStatus,
    exit_code_of,
    sort_results,
)
from batchrun.origin import job_of, settings_of
from batchrun.pipeline import LOG, Outcome, finished, log_to, write_page
from batchrun.report.records import KvUse, Report, RequestCounts, Seconds, StepLog, Throughput, TokenCounts, Warned
from batchrun.request import LineFault
from batchrun.sources.results import write_results

log = logging.getLogger(__name__)

CANCELLED, EXPIRED = "batch_cancelled", "batch_expired"
_MESSAGES = {
    CANCELLED: "the run was closed before this line had its answer",
    EXPIRED: "the run was closed as expired before this line had its answer",
}
_FLUSH_LINES = 4096


def close_run(path: Path, *, expired: bool = False, job: Path | None = None) -> Outcome:
    """End the run in `path` for good: what `batchrun close` does. Killed at any moment, the same call ends it.

    A remaining line that is bad in itself gets the error that a run would give it.

    Args:
        expired: say of the lines that they expired, not that they were cancelled.
        job: where the job lies, if no longer where it was.

    Raises:
        UsageError: there is no run, an earlier version made it, or its job is missing.
        RunDirError: a process works on it, its job is another one, or its files are not sound.
        OutputError: it cannot be written.
    """
    with RunDir.reopen(path) as run_dir:
        if run_dir.state is RunState.FINISHED:
            return finished(run_dir)
        run = run_dir.run
        assert run is not None
        config = settings_of(run_dir)
        source = job_of(run_dir, job)
        lint = lint_job(source, config.limit)
        run_dir.expect(
            {**run.fingerprint, "job": lint.fingerprint}, hint="Give the job of this run, as it was, with --job."
        )
        with log_to(path / LOG):
            return _close(run_dir, source, lint.total, config, EXPIRED if expired else CANCELLED)


def _close(run_dir: RunDir, source: JobSource, total: int, config: RunConfig, code: str) -> Outcome:
    run, path = run_dir.run, run_dir.path
    assert run is not None
    recovered = run_dir.recover()
    codes = Counter(recovered.error_codes)
    with ResultSink(path, recovered, flush_results=_FLUSH_LINES) as sink:
        for line in recovered.unfinished(islice(read_job(source), config.limit)):
            if isinstance(line, LineFault):
                sink.write_error(error_line(line))
                codes[line.code] += 1
            else:
                attempts = int(recovered.attempts_of(np.array([line.number], dtype=np.int32))[0])
                sink.write_error(unrun_line(line.custom_id, line.number, code, _MESSAGES[code], attempts=attempts))
                codes[code] += 1
    if config.results_order == "input":
        for name in (RESULTS, ERRORS):
            sort_results(path / name)
    if config.output.results is not None:
        write_results(path, config.output.results)

    counts = RequestCounts(total, sink.completed, sink.failed, total - sink.completed - sink.failed)
    report = _report(path, run, config, counts, codes)
    write_report(path / REPORT, report)
    write_page(path, report, Course(None, StepLog(), ()), again=True)
    closed = codes[CANCELLED] + codes[EXPIRED]  # some perhaps by an earlier call, which was killed
    status = RunStatus.CANCELLED if closed else RunStatus.COMPLETED
    run_dir.update(status, counts, errors=codes, exit_code=exit_code_of(counts))
    log.info("closed for good: %s completed, %s failed, %s of them by closing", counts.completed, counts.failed, closed)
    return Outcome(report, path, exit_code_of(counts))


def _report(path: Path, run: RunFile, config: RunConfig, counts: RequestCounts, codes: Counter[str]) -> Report:
    """The report of the latest start, with what closing has changed; where none was written, one of nothing done."""
    report = Report(
        request_counts=counts,
        duplicates=0,
        tokens=TokenCounts(0, 0, 0, 0),
        saving=0.0,
        seconds=Seconds(),
        throughput=Throughput(),
        step_seconds=None,
        expected=None,
        bound=None,
        steps=0,
        rows=0,
        kv=KvUse(0, 0, 0),
        idle_rows=0,
        padded_rows=0,
        preemptions=0,
        memory_retries=0,
        worker_restarts=0,
        prefix_evictions=0,
        finish_reasons={},
        errors={},
        warnings=(),
        groups=(),
        slowest=(),
        schedule_order=config.schedule_order,
        model=run.model,
        device=resolve_device(config.device),
        dtype=str(run.fingerprint.get("dtype")),
        environment=run.environment,
    )
    with suppress(RunDirError):
        report = read_report(path / REPORT)
    closed = codes[CANCELLED] + codes[EXPIRED]
    warning = Warned("closed", closed, f"{closed:,} lines got no answer, as the run was closed before")
    kept = tuple(warned for warned in report.warnings if warned.code not in ("stopped_early", "closed"))
    return replace(report, request_counts=counts, errors=dict(codes), warnings=(*kept, warning) if closed else kept)
