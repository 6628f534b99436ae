"""From what a person names to a job of JSON lines: a local file of them is read where it lies; a URL, a table or
several files are put into one file first, in the run directory, from which all starts of the run read."""

from __future__ import annotations

import dataclasses
import fcntl
import filecmp
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from batchrun.config import InputConfig, RunConfig
from batchrun.errors import RunDirError, Stopped, UsageError
from batchrun.formats.job import JobSource, open_job, spool_stdin
from batchrun.formats.rundir import (
    COLUMNS,
    KEPT_JOB,
    RUN,
    RunFile,
    output_errors,
    own_files,
    read_document,
    sync_directory,
)
from batchrun.formats.source import Shard, Source
from batchrun.locations import is_url, redact_location
from batchrun.report.records import Warned
from batchrun.sources.stores import File, find, has_magic, kind_of, needs_pyarrow
from batchrun.sources.tables import Lines, chunks, column_names, schema_of
from batchrun.sources.template import Template, template_text

_SPOOL = ".source."  # what begins the name of a folder in which a job is being put together


@dataclass(slots=True)
class Opened:
    """A job that can be read.

    Attributes:
        job: its lines.
        place: where they came from, as `run.json` has it.
        source: the files that they came from; None where the job is read where it lies, or from standard input.
        warnings: what a person should know of it.
        folder: where `job` lies until it is kept; None where it is in its place.
    """

    job: JobSource
    place: str
    source: Source | None = None
    warnings: tuple[Warned, ...] = ()
    folder: Path | None = None

    def keep(self, run_dir: Path) -> None:
        """Put what was brought into the run directory, whose lock is held.

        Raises:
            OutputError: it cannot be.
            RunDirError: a file of the name is there that no run has brought.
        """
        if self.folder is None:
            return
        with output_errors(run_dir):
            columns = self.folder / COLUMNS
            if not (run_dir / RUN).exists():  # what a start has brought that was killed here is as good as this
                _refuse_other(run_dir / KEPT_JOB, self.job.path)
                _refuse_other(run_dir / COLUMNS, columns)
            if columns.exists():
                columns.replace(run_dir / COLUMNS)
            else:
                (run_dir / COLUMNS).unlink(missing_ok=True)
            self.job.path = self.job.path.replace(run_dir / KEPT_JOB)
            sync_directory(run_dir)
        self.folder = None


def _refuse_other(there: Path, brought: Path) -> None:
    """See that a file is not there, or is the one that was brought."""
    if there.exists() and not (brought.exists() and filecmp.cmp(there, brought, shallow=False)):
        raise RunDirError(
            f"{there.parent} has a {there.name} that no run there has brought",
            hint="Give another directory with -o, or move that file.",
            code="run_dir_unknown",
        )


def open_to_run(
    job: str, config: RunConfig, stack: ExitStack, *, tell: Callable[[str], None], stop: Callable[[], bool]
) -> tuple[Opened, Path]:
    """The job and its run directory. What has to be brought lies in the latter, where `stack` removes it again unless
    it is kept; what an earlier start has brought is taken again where nothing has changed.

    Args:
        tell: hears of the stage `fetch`.
        stop: whether to stop, asked now and then.

    Raises:
        UsageError: it is missing or cannot be read.
        OutputError: it cannot be put there.
        Stopped: `stop` said so.
    """
    if job == "-":
        if config.out is None:
            raise UsageError("A job from standard input needs a run directory.", hint="Give one with -o DIR.")
        folder = _spool_folder(config.out, stack)
        return _from_stdin(folder, config.input), config.out
    if (source := _in_place(job, config.input)) is not None:
        out = config.out or source.default_out()
        if config.fresh and os.path.realpath(source.path) in own_files(out):
            raise UsageError(
                f"--fresh would move the job itself: {source.path} is a file of the run directory.",
                hint="Give another directory with -o, or move the job out of this one.",
            )
        return Opened(source, str(source.path.absolute())), out
    out = config.out or _default_out(job)
    columns = str(config.output.results or "").lower().endswith(".parquet")
    brought = _Bringing(job, config.input, columns=columns, out=out)
    if not config.fresh and (kept := brought.kept(out)) is not None:
        return kept, out
    tell("fetch")
    return brought.bring(_spool_folder(out, stack), stop), out


def open_to_read(job: str, config: InputConfig, stack: ExitStack, *, out: Path | None = None) -> Opened:
    """The job, for a command that writes nothing: what has to be brought lies in a temporary folder, until `stack`
    ends. Raises as `open_to_run`.

    Args:
        out: the run directory that was named, if any: its files are no part of the job.
    """
    if job != "-" and (source := _in_place(job, config)) is not None:
        return Opened(source, str(source.path.absolute()))
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="batchrun-")))
    if job == "-":
        return _from_stdin(folder, config)
    return _Bringing(job, config, columns=False, out=out or folder).bring(folder, lambda: False)


def _from_stdin(folder: Path, config: InputConfig) -> Opened:
    _refuse_columns(config, "standard input")
    return Opened(spool_stdin(folder / KEPT_JOB, sys.stdin.buffer), "-", folder=folder)


def _in_place(job: str, config: InputConfig) -> JobSource | None:
    """The job, if it is a local file of JSON lines. Raises as `open_job`."""
    # os.path says that a name too long is not there, where Path raises.
    if is_url(job) and not os.path.exists(job):  # noqa: PTH110
        return None
    if os.path.isdir(job):  # noqa: PTH112
        if (Path(job) / RUN).is_file():
            raise UsageError(
                f"{job} is a run directory, not a job.", hint="batchrun status, report and retry take run directories."
            )
        return None
    if has_magic(job) and not os.path.exists(job):  # noqa: PTH110
        return None
    source = open_job(job)
    if kind_of(source.path.name) != "jsonl" or _are_rows(config):
        return None
    _refuse_columns(config, job)
    return source


def _are_rows(config: InputConfig) -> bool:
    """Whether JSON lines are rows of a table, from which requests are yet to be made."""
    return config.template is not None or config.prompt_column is not None


def _refuse_columns(config: InputConfig, where: str) -> None:
    """Options that are about columns, where there are none."""
    given = [
        name for name in InputConfig.model_fields if getattr(config, name) != InputConfig.model_fields[name].default
    ]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for the rows of tables, and {redact_location(where)} has lines of a "
            "job.",
            hint="Leave it out; with --template or --prompt-column a file of JSON lines is a table.",
        )


def _default_out(job: str) -> Path:
    """The run directory of a job that is brought: beside what is local, here for a URL; a pattern's is named after the
    folder above it."""
    path = Path(job)
    if is_url(job):
        url = next(part for part in job.split("::") if "://" in part)
        path = Path(url.partition("://")[2].partition("?")[0])
    if has_magic(str(path)):
        path = next(above for above in path.parents if not has_magic(str(above)))
    if path.name in ("", ".."):
        raise UsageError(
            f"{redact_location(job)} does not say how to name the run directory.", hint="Give one with -o DIR."
        )
    path = Path(path.name) if is_url(job) else path
    return path.with_name(f"{path.name}.run") if path.is_dir() else JobSource(path).default_out()


def _spool_folder(out: Path, stack: ExitStack) -> Path:
    """A folder in the run directory for what is brought, held by this process; those of processes that died go."""
    new = not out.exists()
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if new:
            stack.callback(_remove_if_empty, out)
        for left in out.glob(f"{_SPOOL}*"):
            with suppress(OSError), ExitStack() as held:
                held.callback(os.close, _hold(left))
                shutil.rmtree(left)
        folder = out / f"{_SPOOL}{os.getpid()}"
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(os.close, _hold(folder))
    return folder


def _hold(folder: Path) -> int:
    """A lock on a folder that dies with the process. Raises OSError where another has it."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


class _Bringing:
    """A job that is put together: what it is made of, and how.

    Args:
        columns: whether the columns of a table are wanted too.
        out: the run directory, whose own files are no part of the job, though a pattern may reach them.
    """

    def __init__(self, job: str, config: InputConfig, *, columns: bool, out: Path) -> None:
        self.job = job
        self._out = out
        self.config = config
        text = template_text(config.template) if config.template is not None else None
        self.template = Template(text) if text is not None else None
        self.warnings = tuple(self.template.warnings()) if self.template is not None else ()
        self.columns = columns
        self.source = Source(
            location=redact_location(job) if is_url(job) else str(Path(job).absolute()),
            kind="",
            prompt_column=config.prompt_column,
            id_column=config.id_column,
            field_columns=config.field_columns,
            chat=config.chat,
            template=sha256(text.encode()).hexdigest() if text is not None else None,
            files=(),
        )
        self.files: list[File] = []
        self.fault: UsageError | None = None
        try:
            self._look()
        except UsageError as error:  # what an earlier start has brought may do
            self.fault = error

    def _look(self) -> None:
        own = own_files(self._out) if (self._out / RUN).is_file() else frozenset()
        spool = os.path.join(os.path.realpath(self._out), _SPOOL)  # noqa: PTH118

        def is_other(path: str) -> bool:
            real = os.path.realpath(path)
            return real not in own and not real.startswith(spool)

        self.files = find(self.job, is_other)
        kind = self.files[0].kind
        if kind == "jsonl" and _are_rows(self.config):
            kind = "json rows"
        elif kind == "jsonl":
            _refuse_columns(self.config, self.job)
        shards = tuple(Shard(file.name, file.size, file.version) for file in self.files)
        self.source = dataclasses.replace(self.source, kind=kind, files=shards)

    @property
    def joins(self) -> bool:
        """Whether the columns are brought too: JSON has no types that columns could have."""
        return self.columns and self.source.kind in ("csv", "parquet")

    def kept(self, out: Path) -> Opened | None:
        """What an earlier start has brought, if the stores say that nothing has changed, or cannot be asked."""
        if not ((out / RUN).is_file() and (out / KEPT_JOB).is_file()):
            return None
        try:
            before = read_document(out / RUN, RunFile).source
        except RunDirError:
            return None  # whoever opens the directory says what is wrong
        if before is None:
            return None
        warnings = self.warnings
        if self.fault is not None:
            if not before.same_reading(dataclasses.replace(self.source, kind=before.kind)):
                return None
            self.source = dataclasses.replace(self.source, kind=before.kind)
            words = (
                f"the source could not be looked at, so the lines that the first start brought are run: {self.fault}"
            )
            warnings += (Warned("source_not_checked", 1, words),)
        elif not before.surely_same(self.source):
            return None
        if self.joins and not (out / COLUMNS).is_file():
            return None
        return Opened(JobSource(out / KEPT_JOB, before), before.location, before, warnings)

    def bring(self, folder: Path, stop: Callable[[], bool]) -> Opened:
        """Put the job together in a folder.

        Raises:
            UsageError: a file cannot be read, or changes meanwhile.
            OutputError: it cannot be written there.
            Stopped: `stop` said so.
        """
        if self.fault is not None:
            raise self.fault
        path = folder / KEPT_JOB
        with output_errors(path):  # what goes wrong with the files that are read is a `UsageError` already
            with ExitStack() as stack:
                target = stack.enter_context(path.open("wb"))
                bring = self._bring_lines if self.source.kind == "jsonl" else _Table(self, folder, stack).bring
                counts = [bring(each, target, stop) for each in self.files]
            for written in folder.iterdir():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        before = self.source
        self._look()
        if changed := next(before.differences(self.source), None):
            raise UsageError(
                f"{self.source.location} changed while it was read: {changed}.", hint="Start again when it is complete."
            )
        files = tuple(dataclasses.replace(file, lines=n) for file, n in zip(before.files, counts, strict=True))
        source = dataclasses.replace(before, files=files)
        return Opened(JobSource(path, source), source.location, source, self.warnings, folder)

    def _bring_lines(self, file: File, target: BinaryIO, stop: Callable[[], bool]) -> int:
        """Append a file of JSON lines; returns how many lines it has."""
        lines, last = 0, b"\n"
        for block in file.blocks():
            _go_on(stop)
            target.write(block)
            lines += block.count(b"\n")
            last = block[-1:]
        if last != b"\n":
            lines += 1
            if file is not self.files[-1]:
                target.write(b"\n")
        return lines


class _Table:
    """Rows as lines, and where they are wanted the columns beside them."""

    def __init__(self, bringing: _Bringing, folder: Path, stack: ExitStack) -> None:
        self._config, self._template = bringing.config, bringing.template
        self._columns: Any = None
        if bringing.joins:
            parquet = needs_pyarrow(bringing.source.location)
            self._schema = _one_schema(bringing.files)
            self._columns = stack.enter_context(parquet.ParquetWriter(folder / COLUMNS, self._schema))

    def bring(self, file: File, target: BinaryIO, stop: Callable[[], bool]) -> int:
        """Append the rows of a table; returns how many it has."""
        lines = Lines(self._config, self._template, column_names(file), file.location)
        count = 0
        for chunk in chunks(file, lines.needed, columns=self._schema if self._columns is not None else None):
            _go_on(stop)
            target.write(b"".join(map(lines.line, chunk.rows)))
            count += len(chunk.rows)
            if self._columns is not None:
                self._columns.write_table(chunk.columns)
        return count


def _one_schema(files: list[File]) -> Any:
    """The columns of all files together."""
    import pyarrow

    plain = [
        pyarrow.schema(
            [
                field.with_type(field.type.value_type) if pyarrow.types.is_dictionary(field.type) else field
                for field in schema_of(file)
            ]
        )
        for file in files
    ]
    try:
        return pyarrow.unify_schemas(plain, promote_options="permissive")
    except pyarrow.ArrowException as error:
        words = " ".join(str(error).split())
        raise UsageError(f"The tables have columns of one name and different types: {words}.") from None


def _go_on(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped("Stopped while the job was brought.", hint="The same command again begins with it anew.")
