"""Files wherever they lie, through fsspec: which there are, which version of each, read and written whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO

from batchrun.errors import BatchrunError, OutputError, UsageError
from batchrun.formats.job import unpacked
from batchrun.formats.rundir import own_files
from batchrun.locations import is_url, redact, redact_location

_PACKED = (".gz", ".zst")
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}
_WEB = ("http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
# Stores in which a file appears when it is whole; a rename would be a second copy.
_APPEAR_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "hf"}
# What stores tell versions apart by, the surest first.
_VERSIONS = (
    *("ETag", "etag", "sha256", "blob_id", "version_id", "VersionId", "generation", "md5Hash", "crc32c", "Content-MD5"),
    *("Digest", "mtime", "LastModified", "last_modified", "Last-Modified", "updated"),
)


@dataclass(frozen=True, slots=True)
class File:
    """A file in a store.

    Attributes:
        store: fsspec's file system.
        path: of the file in it.
        name: to show, within what was named.
        size: bytes, or None where the store does not say.
        version: what the store tells this version from others by, or None.
    """

    store: Any
    path: str
    name: str
    size: int | None
    version: str | None

    @property
    def location(self) -> str:
        """Where it lies, as one could name it."""
        return self.path if isinstance(self.store, _local()) else str(self.store.unstrip_protocol(self.path))

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def tabs(self) -> bool:
        """Whether its columns have tabs between them."""
        return ".tsv" in PurePosixPath(self.name.lower()).suffixes

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes as they are stored; what goes wrong in the block with them is a `UsageError`."""
        with reading(self.location):
            if isinstance(self.store, _local()):
                with Path(self.path).open("rb") as file:
                    yield file
            else:
                with self.store.open(self.path, "rb") as file:
                    yield file

    def blocks(self) -> Iterator[bytes]:
        """The bytes, unpacked by the suffix, in blocks of bounded size.

        Raises:
            UsageError: it cannot be read, is damaged, or ends too early.
        """
        with self.open() as file:
            suffix = PurePosixPath(self.name).suffix
            read = 0
            for block in unpacked(file, suffix):
                read += len(block)
                yield block
            if suffix.lower() not in _PACKED and self.size is not None and read != self.size:
                raise EOFError(f"it ended after {read:,} of {self.size:,} bytes")


def kind_of(name: str) -> str:
    """What a file holds, by its name: `parquet`, `csv`, or `jsonl` where it says nothing else."""
    return _KINDS.get(_suffix(name), "jsonl")


def _suffix(name: str) -> str:
    path = PurePosixPath(name.lower())
    return (path.with_suffix("") if path.suffix in _PACKED else path).suffix


def has_magic(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def find(location: str, wanted: Callable[[str], bool] = lambda path: True) -> list[File]:
    """The files at a location: a file, those in a directory that are of a kind of job, or those that a pattern names;
    by name.

    Args:
        wanted: whether a local file that was not named itself is one of them.

    Raises:
        UsageError: there is none, they are of several kinds, or the store cannot be asked.
    """
    with reading(location):
        store, path = open_store(location)
        store.invalidate_cache()
        protocol = _protocol(store)
        if protocol in _WEB:
            found = {path: store.info(path)}
        elif has_magic(path) and not store.exists(path):
            found = {name: info for name, info in store.glob(path, detail=True).items() if info["type"] == "file"}
        elif store.isdir(path):
            found = {info["name"]: info for info in store.ls(path, detail=True) if _is_shard(info)}
        else:
            found = {path: store.info(path)}
        if isinstance(store, _local()) and path not in found:
            found = {name: info for name, info in found.items() if wanted(name)}
        above = os.path.commonpath([PurePosixPath(name).parent for name in found]) if found else ""
        files = [_file(store, name, found[name], above) for name in sorted(found)]
    if not files:
        raise UsageError(
            f"{redact_location(location)} has no job: there is no .jsonl, .csv, .tsv or .parquet file.",
            hint="Check the name; a pattern such as 'data/**/*.parquet' reaches further down.",
        )
    kinds = {file.kind: file.name for file in files}
    if len(kinds) > 1:
        names = " and ".join(sorted(kinds.values()))
        raise UsageError(
            f"{redact_location(location)} has files of several kinds: {redact(names)}.",
            hint="Name those that you mean with a pattern, such as 'data/*.jsonl'.",
        )
    return files


def _is_shard(info: dict[str, Any]) -> bool:
    name = PurePosixPath(info["name"]).name
    return info["type"] == "file" and name[0] not in "._" and _suffix(name) in _KINDS


def _file(store: Any, path: str, info: dict[str, Any], above: str) -> File:
    plain, query = path, "?" in path and not isinstance(store, _local())
    if query:  # a version or a signature, as in https://host/jobs.jsonl?key=value
        plain = path.partition("?")[0]
    name = PurePosixPath(plain)
    name = PurePosixPath(name.name) if query or _protocol(store) in _WEB else name.relative_to(above)
    return File(store, path, str(name), info.get("size"), _version(store, path, info))


def _version(store: Any, path: str, info: dict[str, Any]) -> str | None:
    if isinstance(store, _local()):
        return f"mtime {Path(path).stat().st_mtime_ns}"
    for name in _VERSIONS:
        if (value := info.get(name)) is not None:
            return f"{name} {value}"
    with suppress(NotImplementedError):
        return f"modified {store.modified(path)}"
    return None


def open_store(location: str) -> tuple[Any, str]:
    """The store of a location, and the path in it. Raises as fsspec does, within `reading` or `writing`."""
    from fsspec.core import url_to_fs

    if not is_url(location):
        location = str(Path(location).absolute())
    # A signature is checked as it was given: nothing in such a URL is to be encoded again.
    as_given = location.partition("://")[0] in _WEB and "%" in location
    store, path = url_to_fs(location, **({"encoded": True} if as_given else {}))
    return store, path


def _local() -> Any:
    from fsspec.implementations.local import LocalFileSystem

    return LocalFileSystem


def _protocol(store: Any) -> str:
    return store.protocol if isinstance(store.protocol, str) else store.protocol[0]


@contextmanager
def _telling(location: str, told: Callable[[Exception], BatchrunError]) -> Iterator[None]:
    """Turn whatever goes wrong with a store into an error without secrets; `told` makes it."""
    try:
        yield
    except BatchrunError:
        raise
    except ImportError as error:
        message, hint = _missing(location, error)
        raise UsageError(message, hint=hint) from None
    except Exception as error:  # stores and formats raise what they like, and their words may have the whole URL
        raise told(error) from None


def reading(location: str) -> AbstractContextManager[None]:
    """Turn whatever goes wrong while a store is read into a `UsageError` without secrets."""

    def told(error: Exception) -> UsageError:
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, OSError):
            error = error.__cause__  # nothing was asked: its server could not be reached
        elif isinstance(error, FileNotFoundError):
            return UsageError(
                f"There is nothing at {redact_location(location)}.", hint="Check the name, and who may read it."
            )
        return UsageError(
            f"{redact_location(location)} cannot be read: {_words(error)}",
            hint="Check the name, the network and who may read it.",
        )

    return _telling(location, told)


def writing(location: str) -> AbstractContextManager[None]:
    """Turn whatever goes wrong while a store is written into an `OutputError`."""
    return _telling(
        location,
        lambda error: OutputError(
            f"{redact_location(location)} cannot be written: {_words(error)}",
            hint="The answers are in the run directory; the same command again writes them there.",
            code="output_not_writable",
        ),
    )


def _words(error: Exception) -> str:
    told = redact(" ".join(str(getattr(error, "strerror", None) or error).split()))[:500]
    told = told if told.isprintable() else ascii(told)[1:-1]
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def _missing(location: str, error: ImportError) -> tuple[str, str]:
    """What a library that is not installed means, and what to install."""
    protocol = location.rpartition("::")[2].partition("://")[0] if is_url(location) else ""
    extra = "parquet" if error.name == "pyarrow" else _EXTRAS.get(protocol)
    hint = f"Install it with pip install 'batchrun[{extra}]'." if extra else f"fsspec says: {redact(str(error))}"
    return f"{redact_location(location)} needs a library that is not installed: {redact(str(error))}.", hint


def needs_pyarrow(what: str) -> Any:
    """pyarrow's module for Parquet.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{redact_location(what)}: Parquet needs pyarrow, which is not installed.",
            hint="Install it with pip install 'batchrun[parquet]'.",
        ) from None
    return pyarrow.parquet


def put(file: Path, location: str) -> None:
    """Copy a file to a URL, where it appears whole or not at all as far as the store can do that.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(location):
        store, path = open_store(location)
        parent = str(PurePosixPath(path).parent)
        if _protocol(store) in _APPEAR_WHOLE:
            store.put_file(str(file), path)
            return
        store.makedirs(parent, exist_ok=True)
        beside = f"{path}.part"
        try:
            store.put_file(str(file), beside)
            if not isinstance(store, _local()) and store.exists(path):
                store.rm_file(path)  # few can rename onto a file
            store.mv(beside, path)
        except Exception:
            with suppress(Exception):
                store.rm_file(beside)
            raise


def refuse_own_file(location: str, job: str, out: Path) -> None:
    """See that answers are not to be written over the run's own files, or into its job.

    Args:
        out: the run's directory.

    Raises:
        UsageError: they are.
    """
    if is_url(location):
        return
    there = os.path.realpath(location)
    if there in own_files(out):
        raise UsageError(
            f"--results: {location} is a file of the run itself, which has its answers there anyway.",
            hint="Name another place.",
        )
    if not is_url(job) and has_magic(job) and PurePath(there).match(os.path.abspath(job)):  # noqa: PTH100
        raise UsageError(
            f"--results: {location} is one of the files that {job} names, or would be.", hint="Name another place."
        )


def check_writable(location: str, job: str) -> None:
    """See, before anything is computed, that a place for answers can be written as far as that can be known.

    Raises:
        UsageError: its library is missing, it is a directory or in that of the job, or its store takes no files.
    """
    of_job, there = (name if is_url(name) else os.path.realpath(name) for name in (job, location))
    if there == of_job or there.rpartition("/")[0] == of_job.rstrip("/"):
        where = "is the job itself" if there == of_job else "lies in the directory that is the job"
        raise UsageError(f"--results: {location} {where}.", hint="Name another place.")
    if location.lower().endswith(".parquet"):
        needs_pyarrow(location)
    if not is_url(location):
        if Path(location).is_dir():
            raise UsageError(f"--results: {location} is a directory.", hint="Name the file.")
        return
    with writing(location):
        store, _ = open_store(location)
    if _protocol(store) in _WEB:
        raise UsageError(
            f"--results: {redact_location(location)} cannot be written to: the web only gives files.",
            hint="Name a local file, or a store such as s3://bucket/name.parquet.",
        )
