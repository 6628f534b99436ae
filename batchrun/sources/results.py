"""All answers and errors of a finished run in one file, in the order of the job: as lines, or as a table with the
columns of the table that the job was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from batchrun.errors import RunDirError
from batchrun.formats.results import Outcome, read_outcome
from batchrun.formats.rundir import COLUMNS, ERRORS, RESULTS, output_errors, read_index, replacing
from batchrun.locations import is_url
from batchrun.sources.stores import needs_pyarrow, put

_ROWS = 4096  # of the table in memory at a time, and in a row group
_TAKEN = "batchrun_"  # before a name of ours that a column of the table has

Int64 = npt.NDArray[np.int64]


def write_results(run_dir: Path, target: str) -> None:
    """Write every result and error line of a run to one file, whole or not at all, as far as its store can do that.

    Args:
        target: a local path or a URL that ends in `.jsonl` or `.parquet`.

    Raises:
        RunDirError: a line of the run is not sound.
        OutputError: it cannot be written.
        UsageError: a library is missing.
    """
    if not is_url(target):
        _write(run_dir, Path(target), target)
        return
    local = run_dir / f".results{Path(target).suffix.lower()}"
    try:
        _write(run_dir, local, target)
        put(local, target)
    finally:
        with suppress(OSError):
            local.unlink()


def _write(run_dir: Path, path: Path, target: str) -> None:
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _Lines(run_dir) as lines, replacing(path) as file:
        if target.lower().endswith(".parquet"):
            _write_table(run_dir, lines, file, target)
        else:
            for raw in lines.between(0, None):
                file.write(raw)


class _Lines:
    """Result and error lines of a run together, in the order of the job.

    Attributes:
        numbers: int64 `[N]`, ascending: of the lines of the job that have one.
    """

    def __init__(self, run_dir: Path) -> None:
        self._stack = ExitStack()
        self._files: list[BinaryIO] = []
        parts = []
        for name in (RESULTS, ERRORS):
            if (run_dir / name).exists():
                numbers, offsets, lengths = read_index(run_dir / name)
                parts.append((numbers, offsets, lengths, np.full(numbers.size, len(self._files), dtype=np.int64)))
                self._files.append(self._stack.enter_context((run_dir / name).open("rb")))
        empty = np.empty(0, dtype=np.int64)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [empty] * 4
        order = np.argsort(columns[0], kind="stable")
        self.numbers, self._offsets, self._lengths, self._file = (column[order] for column in columns)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def between(self, first: int, end: int | None) -> Iterator[bytes]:
        """The lines at some places of `numbers`."""
        places = zip(self._offsets[first:end], self._lengths[first:end], self._file[first:end], strict=True)
        for offset, length, of in places:
            file = self._files[of]
            file.seek(int(offset))
            yield file.read(int(length))


def _write_table(run_dir: Path, lines: _Lines, file: BinaryIO, target: str) -> None:
    parquet = needs_pyarrow(target)
    import pyarrow

    with ExitStack() as stack:
        joined, there = None, pyarrow.schema([])
        if (run_dir / COLUMNS).is_file():
            try:
                joined = stack.enter_context(parquet.ParquetFile(run_dir / COLUMNS))
            except pyarrow.ArrowInvalid as error:
                raise _unsound(run_dir, f"{COLUMNS} cannot be read: {error}") from error
            there = joined.schema_arrow
        ours = _answer_schema(set(there.names))
        schema = pyarrow.schema([*there, *ours])
        writer = stack.enter_context(parquet.ParquetWriter(file, schema))
        written = 0
        for columns, first, end in _parts(joined, lines.numbers):
            written += end - first
            rows = [tuple(_row(raw, run_dir)) for raw in lines.between(first, end)]
            answers = [pyarrow.array([row[i] for row in rows], field.type) for i, field in enumerate(ours)]
            writer.write_table(pyarrow.table([*columns, *answers], schema=schema))

        if written != lines.numbers.size:
            raise _unsound(run_dir, f"it has lines for which {COLUMNS} has no rows")


def _unsound(run_dir: Path, reason: str) -> RunDirError:
    return RunDirError(
        f"The answers in {run_dir} cannot be put into a table: {reason}",
        hint=f"Remove {COLUMNS} there; `batchrun run` brings it anew.",
        code="run_dir_unsound",
    )


def _parts(joined: Any, numbers: Int64) -> Iterator[tuple[list[Any], int, int]]:
    """Columns of the job's table for the lines at places `[first, end)` of `numbers`, part by part; without a table,
    no columns."""
    if joined is None:
        for first in range(0, numbers.size, _ROWS):
            yield [], first, min(first + _ROWS, numbers.size)
        return
    row = 0  # of the table; its line of the job is one more
    for batch in joined.iter_batches(_ROWS):
        first, end = (int(place) for place in np.searchsorted(numbers, [row + 1, row + batch.num_rows + 1]))
        if end > first:
            taken = batch.take(_indices(numbers[first:end] - 1 - row))
            yield list(taken.columns), first, end
        row += batch.num_rows


def _indices(rows: Int64) -> Any:
    import pyarrow

    return pyarrow.array(rows)


def _answer_schema(taken: set[str]) -> Any:
    """Our columns; one whose name the table has is named differently."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int64()
    kinds = {
        "custom_id": text,
        "text": text,
        "finish_reason": text,
        "reasoning": text,
        "tool_calls": text,
        "choices": pyarrow.list_(pyarrow.struct([("text", text), ("finish_reason", text)])),
        "prompt_tokens": number,
        "completion_tokens": number,
        "cached_tokens": number,
        "error_code": text,
        "error_message": text,
    }
    assert tuple(kinds) == Outcome._fields
    named = []
    for name, kind in kinds.items():
        while name in taken:
            name = _TAKEN + name
        named.append(pyarrow.field(name, kind))
    return pyarrow.schema(named)


def _row(raw: bytes, run_dir: Path) -> Outcome:
    try:
        return read_outcome(raw)
    except ValueError as error:
        raise RunDirError(f"{run_dir} has a line that is not sound: {error}", code="run_dir_unsound") from error
