"""Looks at a run directory that another process may be writing to: nothing is written, and nothing is held."""

from __future__ import annotations

import fcntl
import os
import socket
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from batchrun.errors import RunDirError
from batchrun.formats.results import Told, read_created, read_line_number, read_told
from batchrun.formats.rundir import LOCK

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that took the lock of a run directory last.

    Attributes:
        pid: of the process, on its host.
        host: name of its host.
        since: when it took the lock, in ISO 8601.
    """

    pid: int
    host: str
    since: str


def look_at_lock(path: Path) -> tuple[bool | None, Holder | None]:
    """Whether a process holds the lock of the run directory `path`, and which one took it last.

    Returns:
        True: one does; False: none does; None: that cannot be told from here, as there is no lock to be read, or it
        was taken on another host and is free on this one, where locks of the other may not be seen. And the holder,
        or None where the lock was given back.
    """
    try:
        lock = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return None, None
    held: bool | None
    try:
        try:
            # Shared, so that those who look are not in each other's way; closing gives it back.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held = True
        except OSError:  # a file system without locks
            held = None
        words = os.pread(lock, 1024, 0).decode(errors="replace").split()
    finally:
        os.close(lock)
    holder = Holder(int(words[0]), *words[1:]) if len(words) == 3 and words[0].isdecimal() else None
    if held is False and holder is not None and holder.host != socket.gethostname():
        held = None
    return held, holder


def count_lines(path: Path, start: int = 0) -> int:
    """Whole lines of a file from the byte `start` on, by their ends; 0 where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK), b""))
    except FileNotFoundError:
        return 0


def told_lines(path: Path) -> Iterator[tuple[int, int, Told]]:
    """Offset and length of each whole line of `results.jsonl` or `errors.jsonl`, and what it says; none where there is
    no file.

    Raises:
        RunDirError: a line is not sound.
    """
    offset = 0
    with suppress(FileNotFoundError), path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                return  # it is being written, or torn
            yield offset, len(raw), told(raw, path, offset)
            offset += len(raw)


def told(raw: bytes, path: Path, offset: int) -> Told:
    """What the line of `path` at the byte `offset` says.

    Raises:
        RunDirError: it is not sound.
    """
    try:
        return read_told(raw)
    except ValueError as error:
        raise RunDirError(
            f"{path}: the line at byte {offset} is not sound: {error}",
            hint="The file was changed by hand, or by another program: repair it.",
            code="run_dir_unsound",
        ) from error


def count_error_codes(path: Path) -> dict[str, int]:
    """How many lines of `errors.jsonl` have each error code; only lines that are sound count."""
    codes: Counter[str] = Counter()
    with suppress(FileNotFoundError), path.open("rb") as file:
        for raw in file:
            with suppress(ValueError):
                codes[str(read_line_number(raw)[1])] += 1
    return dict(codes)


def count_since(path: Path, moment: int) -> tuple[int, int | None]:
    """Whole lines of `results.jsonl` that were finished at `moment` or later, in seconds of Unix time, and when the
    first of them was; (0, None) where there is none.

    Few lines are read: they stand in the order of their time, unless they are sorted at the end of a run.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return 0, None
    with file:

        def is_since(position: int) -> bool:
            created = _created(_line_from(file, position))
            return created is None or created >= moment

        size = file.seek(0, os.SEEK_END)
        first = _line_from(file, bisect_left(range(size), True, key=is_since))
        start = file.tell() - len(first)
    created = _created(first)
    return (count_lines(path, start), created) if created is not None else (0, None)


def last_created(path: Path) -> int | None:
    """When the last whole line of `results.jsonl` was finished, in seconds of Unix time; None where there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            tail = b""
            while end and tail.count(b"\n") < 2:  # the end of the last whole line, and that of the one before it
                start = max(end - _BLOCK, 0)
                file.seek(start)
                tail = file.read(end - start) + tail
                end = start
    except FileNotFoundError:
        return None
    whole = tail[: tail.rfind(b"\n") + 1]
    return _created(whole[whole.rfind(b"\n", 0, -1) + 1 :])


def _created(raw: bytes) -> int | None:
    """The time of a result line; None if it has no end yet, or is not sound."""
    if raw.endswith(b"\n"):
        with suppress(ValueError):
            return read_created(raw)
    return None


def _line_from(file: BinaryIO, position: int) -> bytes:
    """The first line that begins at the byte `position` or behind it; a last one that has no end yet comes as it is."""
    file.seek(max(position - 1, 0))
    if position:
        file.readline()
    return file.readline()
