"""`report.json`: what a job did; `steps.jsonl`: each step that it took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson

from batchrun.errors import RunDirError
from batchrun.formats.plan import PLAN, PlanFile, read_plan
from batchrun.formats.results import encode_json
from batchrun.formats.rundir import cut_torn_tail, document, output_errors, read_document, write_json_atomic
from batchrun.report.records import Report, StartSummary, StepLog, StepRecord, sum_up
from batchrun.schedule.step import Step

REPORT, STEPS = "report.json", "steps.jsonl"
_RECORD = b'"record":'


def write_report(path: Path, report: Report) -> None:
    """Write `report.json`.

    Raises:
        OutputError: it cannot be written.
    """
    write_json_atomic(path, document(report))


def read_report(path: Path) -> Report:
    """Read `report.json`.

    Raises:
        RunDirError: it is missing or not sound.
    """
    return read_document(path, Report)


def read_latest(run_dir: Path) -> Report | None:
    """The report in a run directory; None where there is none.

    Raises:
        RunDirError: it is not sound.
    """
    return read_report(run_dir / REPORT) if (run_dir / REPORT).is_file() else None


def encode_step(step: Step, record: StepRecord | None = None) -> bytes:
    """The line of `steps.jsonl` for a step: columns, as in `batchrun.schedule.step`; `samples` as 0 and 1.

    All but `record`, what was counted and measured, is the schedule's alone: a planned step and the same step as it ran
    differ in nothing else.
    """
    reads = step.prefix_reads
    return encode_json(
        {
            "index": step.index,
            "chunks": {
                "sequence": step.sequence,
                "request": step.request,
                "start": step.start,
                "length": step.length,
                "samples": step.samples.astype(np.uint8),
            },
            "prefix_reads": {
                "level": reads.level,
                "first_row": reads.first_row,
                "rows": reads.rows,
                "sequence": reads.sequence,
                "length": reads.length,
                "position": reads.position,
            },
            "releases": step.releases,
            "grants": {"sequence": step.grant_sequence, "page": step.grant_page},
            "record": record,
        }
    )


class StepWriter:
    """Appends steps to `steps.jsonl`, buffered. After a resume its steps count from 0 again.

    Raises:
        OutputError: from every method, where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists():
            cut_torn_tail(path)
        with output_errors(path):
            self._file = path.open("ab", buffering=1 << 20)

    def write(self, step: Step, record: StepRecord | None = None) -> None:
        """Append one step; `record` says how it ran."""
        with output_errors(self._path):
            self._file.write(encode_step(step, record))

    def close(self) -> None:
        """Bring everything to the file and close it."""
        with output_errors(self._path):
            self._file.close()

    def __enter__(self) -> StepWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a log, one by one, each as `encode_step` wrote it; a torn last line is left out.

    Raises:
        RunDirError: a line before the last is not sound.
    """
    for number, raw in _whole_lines(path):
        try:
            yield orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise RunDirError(
                f"{path}: line {number} is not sound: {error}",
                hint="The results do not depend on it: remove the file to go on without a log of the steps.",
                code="run_dir_unsound",
            ) from error


def read_step_logs(path: Path) -> list[StepLog]:
    """The records of the steps of a log: those of each start of the run, the first start first; none where there is
    no log.

    Raises:
        RunDirError: a line before the last is not sound.
    """
    logs: list[StepLog] = []
    if not path.exists():
        return logs
    for number, raw in _whole_lines(path):
        try:
            # It is the last of a line, most of which are columns with an entry for each sequence of the step.
            record = StepRecord(**orjson.loads(raw[raw.rindex(_RECORD) + len(_RECORD) : -2]))
            if not logs or record.index <= logs[-1][-1].index:
                logs.append(StepLog())
            logs[-1].append(record)
        except (TypeError, ValueError) as error:
            raise RunDirError(
                f"{path}: line {number} has no sound record: {error}",
                hint="The results do not depend on it: remove the file to have a report without a log of the steps.",
                code="run_dir_unsound",
            ) from error
    return logs


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a log with their numbers, but for a torn last one."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            yield number, raw


@dataclass(frozen=True, slots=True)
class Course:
    """How a run went, as far as its directory tells.

    Attributes:
        plan: that its latest start followed; None where there is none.
        steps: of this start; empty where they were not logged.
        starts: what the steps of each start did, the first start first.
    """

    plan: PlanFile | None
    steps: StepLog
    starts: tuple[StartSummary, ...]


def read_course(run_dir: Path, report: Report) -> Course:
    """Read what a run's directory has beside its report.

    Raises:
        RunDirError: a file is not sound.
    """
    plan = read_plan(run_dir / PLAN) if (run_dir / PLAN).is_file() else None
    if plan is not None and plan.expected != report.expected:  # it is of another start
        plan = None
    logs = read_step_logs(run_dir / STEPS)
    latest = next((log for log in reversed(logs) if len(log) == report.steps), StepLog(1))
    return Course(plan, latest, tuple(map(sum_up, logs)))
