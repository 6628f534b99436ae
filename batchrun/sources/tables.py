"""Rows of CSV, Parquet and JSON lines as lines of a job: a row that cannot be one is a line that says why."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson

from batchrun.config import InputConfig
from batchrun.errors import UsageError
from batchrun.formats.job import MAX_LINE_BYTES
from batchrun.locations import redact_location
from batchrun.sources.stores import File, needs_pyarrow
from batchrun.sources.template import Template

_ROWS = 1024  # read at a time
_MESSAGES, _PROMPT, _ID = "messages", "prompt", "custom_id"

Row = dict[str, Any]


class BadRow(ValueError):
    """Why a row cannot be a line."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a table.

    Attributes:
        rows: by column, those that are needed; or why a row cannot be read.
        columns: all columns of these rows as a pyarrow table; None where they are not wanted.
    """

    rows: list[Row | BadRow]
    columns: Any = None


# --- files ------------------------------------------------------------------------------------------------------


def column_names(file: File) -> list[str]:
    """The columns of a table; of JSON lines those that the first ones have.

    Raises:
        UsageError: it cannot be read, or two have one name.
    """
    if file.kind == "csv":
        return next(_csv_rows(file))
    if file.kind == "jsonl":
        first = islice(_json_rows(file), _ROWS)
        return list(dict.fromkeys(name for row in first if isinstance(row, dict) for name in row))
    return _unique(schema_of(file).names, file)


def schema_of(file: File) -> Any:
    """The columns of a table as a pyarrow schema: those of CSV are texts."""
    parquet = needs_pyarrow(file.location)
    import pyarrow

    if file.kind == "csv":
        return pyarrow.schema([(name, pyarrow.string()) for name in column_names(file)])
    with file.open() as opened:
        return parquet.ParquetFile(opened).schema_arrow.remove_metadata()


def chunks(file: File, needed: Sequence[str], *, columns: Any = None) -> Iterator[Chunk]:
    """The rows of a table, some at a time.

    Args:
        needed: columns that rows are to have.
        columns: schema of the columns that are wanted besides; None: no columns.
    """
    by_kind = {"csv": _csv_chunks, "jsonl": _json_chunks, "parquet": _parquet_chunks}
    return by_kind[file.kind](file, needed, columns)


def _unique(names: list[str], file: File) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"{redact_location(file.location)} has two columns of the name {twice[0]!r}.", hint="Rename one."
        )
    return names


class _Unpacked(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._left = memoryview(block)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _csv_rows(file: File) -> Iterator[list[str]]:
    """The header of a CSV file, then its rows; blank lines are none."""
    csv.field_size_limit(MAX_LINE_BYTES)
    raw = io.BufferedReader(_Unpacked(file.blocks()), 1 << 20)
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter="\t" if file.tabs else ",", strict=True)
    try:
        header = next((row for row in reader if row), None)
        if header is None:
            raise UsageError(
                f"{redact_location(file.location)} is empty: a table has its columns' names in its first line."
            )
        if not _is_text("".join(header)):
            raise UsageError(
                f"{redact_location(file.location)} is not in UTF-8.", hint="Convert it, for instance with iconv."
            )
        yield _unique(header, file)
        for row in reader:
            if row:
                yield row
    except csv.Error as error:
        raise UsageError(
            f"{redact_location(file.location)} is not sound CSV in line {reader.line_num}: {error}.",
            hint='A text with quotes or line ends stands in quotes, and a quote in it is written "".',
        ) from None


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text)


def _csv_chunks(file: File, needed: Sequence[str], schema: Any) -> Iterator[Chunk]:
    rows = _csv_rows(file)
    header = next(rows)
    places = {name: header.index(name) for name in needed if name in header}
    taken: list[list[str]] = []

    def chunk() -> Chunk:
        if schema is None:
            return Chunk([_csv_row(row, header, places) for row in taken])
        import pyarrow

        whole = [(row + [None] * len(header))[: len(header)] for row in taken]  # type: ignore[operator]
        texts = ([_without_bad_bytes(row[i]) for row in whole] for i in range(len(header)))
        table = pyarrow.table([pyarrow.array(column, pyarrow.string()) for column in texts], names=header)
        return Chunk([_csv_row(row, header, places) for row in taken], _fitted(table, schema))

    for row in rows:
        taken.append(row)
        if len(taken) == _ROWS:
            yield chunk()
            taken = []
    if taken:
        yield chunk()


def _without_bad_bytes(text: str | None) -> str | None:
    return (
        text if text is None or _is_text(text) else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    )


def _csv_row(row: list[str], header: list[str], places: Mapping[str, int]) -> Row | BadRow:
    if len(row) != len(header):
        return BadRow(f"the row has {len(row)} fields, and the header {len(header)}")
    found = {name: row[place] for name, place in places.items()}
    for name, text in found.items():
        if not _is_text(text):
            return BadRow(f"column {name!r} is not in UTF-8")
    return found


def _json_rows(file: File) -> Iterator[Row | BadRow]:
    """The objects of a file of JSON lines; blank lines are no rows."""
    raw = io.BufferedReader(_Unpacked(file.blocks()), 1 << 20)
    for line in raw:
        text = line.removeprefix(b"\xef\xbb\xbf")
        if text.isspace() or not text:
            continue
        try:
            row = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            yield BadRow(f"the row is not valid JSON: {error}")
            continue
        yield row if isinstance(row, dict) else BadRow("the row is no JSON object")


def _json_chunks(file: File, needed: Sequence[str], _columns: Any) -> Iterator[Chunk]:
    rows = _json_rows(file)
    while taken := list(islice(rows, _ROWS)):
        yield Chunk([row if isinstance(row, BadRow) else {name: row.get(name) for name in needed} for row in taken])


def _parquet_chunks(file: File, needed: Sequence[str], schema: Any) -> Iterator[Chunk]:
    parquet = needs_pyarrow(file.location)
    import pyarrow

    with file.open() as opened:
        table = parquet.ParquetFile(opened)
        names = None if schema is not None else list(needed)
        for batch in table.iter_batches(_ROWS, columns=names):
            wanted = batch.select([name for name in needed if name in batch.schema.names])
            rows = _python_rows(wanted)
            whole = _fitted(pyarrow.Table.from_batches([batch]), schema) if schema is not None else None
            yield Chunk(rows, whole)


def _python_rows(batch: Any) -> list[Row | BadRow]:
    """The rows of a batch; where one has a text that is none, it alone is bad."""
    if not batch.num_columns:
        return [{} for _ in range(batch.num_rows)]
    try:
        rows: list[Row | BadRow] = batch.to_pylist()
        return rows
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [BadRow(f"a value cannot be read: {error}")]
    return [row for i in range(batch.num_rows) for row in _python_rows(batch.slice(i, 1))]


def _fitted(table: Any, schema: Any) -> Any:
    """A table with the columns of a schema: those that it lacks are null."""
    import pyarrow

    there = set(table.schema.names)
    columns = [
        table[field.name].cast(field.type) if field.name in there else pyarrow.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pyarrow.table(columns, schema=schema)


# --- lines ------------------------------------------------------------------------------------------------------


class Lines:
    """Makes lines of a job from rows.

    Args:
        config: which columns are what.
        template: of the prompts, or None.
        columns: that the table has.
        where: the table's name, for errors.

    Attributes:
        needed: columns that are read.

    Raises:
        UsageError: a column that is named is not there, or it is not known which has the prompts.
    """

    def __init__(self, config: InputConfig, template: Template | None, columns: Iterable[str], where: str) -> None:
        there = list(columns)

        def look(name: str, option: str) -> str:
            if name not in there:
                raise UsageError(
                    f"{redact_location(where)} has no column {name!r} ({option}).", hint=f"It has {_listed(there)}."
                )
            return name

        self._template = template
        self._chat = config.chat
        self._prompt: str | None = None
        if template is not None and config.prompt_column is not None:
            raise UsageError("A prompt comes from --prompt-column or from --template, not from both.")
        if config.prompt_column is not None:
            self._prompt = look(config.prompt_column, "--prompt-column")
        elif template is None:
            both = [name for name in (_MESSAGES, _PROMPT) if name in there]
            if len(both) != 1:
                raise UsageError(
                    f"{redact_location(where)} has {'both' if both else 'no'} column {_MESSAGES!r} "
                    f"{'and' if both else 'or'} {_PROMPT!r}: which has the prompts?",
                    hint=f"Name it with --prompt-column, or give a --template. There are {_listed(there)}.",
                )
            self._prompt = both[0]
        self._id = look(config.id_column, "--id-column") if config.id_column is not None else None
        if self._id is None and _ID in there:
            self._id = _ID
        self._fields = [look(name, "--field-columns") for name in config.field_columns]
        if wrong := {_PROMPT, _MESSAGES, _ID, "id", "body", "url", "method", "batchrun"}.intersection(self._fields):
            raise UsageError(f"--field-columns: {min(wrong)!r} is no field that says how to answer.")
        of_template: list[str] = []
        if template is not None:
            try:
                of_template = template.columns(there)
            except UsageError as error:
                raise UsageError(error.message, hint=f"{redact_location(where)} has {_listed(there)}.") from None
        named = [name for name in (self._prompt, self._id) if name is not None]
        self.needed = list(dict.fromkeys([*named, *self._fields, *of_template]))

    def line(self, row: Row | BadRow) -> bytes:
        """The line of a row, newline included."""
        line: dict[str, Any] = {}
        try:
            if isinstance(row, BadRow):
                raise row
            self._add_id(line, row)
            made = line | self._fields_of(row) | self._content(row)
            return orjson.dumps(made, option=orjson.OPT_APPEND_NEWLINE)
        except (BadRow, orjson.JSONEncodeError, UnicodeError) as error:
            return orjson.dumps(line | {"batchrun": {"fault": str(error)}}, option=orjson.OPT_APPEND_NEWLINE)

    def _add_id(self, line: dict[str, Any], row: Row) -> None:
        value = row.get(self._id) if self._id is not None else None
        if value is None or value == "":
            return
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadRow(f"column {self._id!r} must have a text or an integer, and has {_kind(value)}")
        line[_ID] = str(value)

    def _fields_of(self, row: Row) -> dict[str, Any]:
        found = {name: _field(row.get(name)) for name in self._fields}
        return {name: value for name, value in found.items() if value is not None}

    def _content(self, row: Row) -> dict[str, Any]:
        if self._template is not None:
            try:
                return self._as_asked(self._template.render(row))
            except ValueError as error:
                raise BadRow(str(error)) from None
        value = row.get(self._prompt)  # type: ignore[arg-type]
        if value is None:
            raise BadRow(f"column {self._prompt!r} is null")
        if isinstance(value, str) and self._prompt == _MESSAGES:
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise BadRow(f"column {_MESSAGES!r} is not valid JSON: {error}") from None
        elif isinstance(value, str):
            return self._as_asked(value)
        if not isinstance(value, list):
            raise BadRow(
                f"column {self._prompt!r} has {_kind(value)} and not a text; --template '{{{{ {self._prompt} }}}}' "
                "writes it as one"
            )
        if self._prompt == _MESSAGES or (value and all(isinstance(one, dict) for one in value)):
            return {_MESSAGES: value}
        if self._chat:
            raise BadRow(f"column {self._prompt!r} must have a text for --chat, and has {_kind(value)}")
        return {_PROMPT: value}

    def _as_asked(self, prompt: str) -> dict[str, Any]:
        return {_MESSAGES: [{"role": "user", "content": prompt}]} if self._chat else {_PROMPT: prompt}


def _field(value: Any) -> Any:
    """A column's value as a field of a request. CSV has only texts, and pandas makes integers with nulls floats."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value) if value else None
        except orjson.JSONDecodeError:
            return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return value


def _kind(value: Any) -> str:
    return {"int": "an integer", "float": "a number", "bool": "true or false", "bytes": "bytes", "list": "a list"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"
