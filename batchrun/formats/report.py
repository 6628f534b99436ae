"""`report.json`: what a job did; `steps.jsonl`: each step that it took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson

from batchrun.errors import RunDirError
from batchrun.formats.results import encode_json
from batchrun.formats.rundir import cut_torn_tail, document, output_errors, read_document, write_json_atomic
from batchrun.report.records import Report
from batchrun.schedule.step import Step


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


def encode_step(step: Step, seconds: float | None = None) -> bytes:
    """The line of `steps.jsonl` for a step: columns, as in `batchrun.schedule.step`; `samples` as 0 and 1.

    All but `seconds` is the schedule's alone: a planned step and the same step as it ran differ in nothing else.
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
            "seconds": seconds,
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

    def write(self, step: Step, seconds: float | None = None) -> None:
        """Append one step; `seconds` is its time on the device, where it ran."""
        with output_errors(self._path):
            self._file.write(encode_step(step, seconds))

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
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                yield orjson.loads(raw)
            except orjson.JSONDecodeError as error:
                raise RunDirError(
                    f"{path}: line {number} is not sound: {error}",
                    hint="The results do not depend on it: remove the file to go on without a log of the steps.",
                    code="run_dir_unsound",
                ) from error
