"""Columns of what there is one of for each line, request or token: how they grow while a job is read, and rows of
different lengths that lie one after another in one column."""

from __future__ import annotations

import mmap
from array import array
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

_NEW = 1 << 16  # values that a column gathers before it puts them away
_PART = 1 << 20  # bytes of a part at least; never more than a sixteenth of a long column is empty
_COPIED = 1 << 16  # values copied at once


class Column:
    """A column that grows by values of a C type (`i`, `q`, `B`, ...), and is then joined.

    It lies in parts, each in a map of memory of its own, which goes back to the system as the parts are joined. An
    array that grows beside others leaves a hole wherever it was, and the C library keeps those.
    """

    def __init__(self, code: str) -> None:
        self._new = array(code)
        self._parts: list[npt.NDArray[Any]] = []
        self._room = 0  # at the end of the last part
        self._put_away = 0

    def append(self, value: int) -> None:
        self._new.append(value)
        if len(self._new) >= _NEW:
            self._put()

    def extend(self, values: bytes) -> None:
        """Add values by their bytes."""
        self._new.frombytes(values)
        if len(self._new) >= _NEW:
            self._put()

    def __len__(self) -> int:
        return self._put_away + len(self._new)

    def joined(self) -> npt.NDArray[Any]:
        """All values, `[values]`, in one array; the column is then empty."""
        self._put()
        whole = np.empty(self._put_away, dtype=self._new.typecode)
        self._parts.reverse()
        at = 0
        while self._parts:
            part = self._parts.pop()
            part = part[: whole.size - at]
            whole[at : at + part.size] = part
            at += part.size
        self._put_away = self._room = 0
        return whole

    def _put(self) -> None:
        new = np.frombuffer(self._new, dtype=self._new.typecode)
        while new.size:
            if not self._room:
                self._room = max(_PART // new.itemsize, self._put_away // 16)
                self._parts.append(np.frombuffer(mmap.mmap(-1, self._room * new.itemsize), dtype=new.dtype))
            part = self._parts[-1][-self._room :][: new.size]
            part[:] = new[: part.size]
            new = new[part.size :]
            self._room -= part.size
            self._put_away += part.size
        self._new = array(self._new.typecode)


class Rows(NamedTuple):
    """Rows of different lengths, one after another.

    Attributes:
        values: `[sum of lengths]`.
        offsets: int64 `[rows + 1]`; row i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: npt.NDArray[Any]
    offsets: Int64


class GrowingRows:
    """Rows that are added one by one, of a C type as in `Column`."""

    def __init__(self, code: str) -> None:
        self._values, self._offsets = Column(code), Column("q")
        self._offsets.append(0)

    def append(self, row: bytes) -> None:
        """Add a row by its bytes."""
        self._values.extend(row)
        self._offsets.append(len(self._values))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def joined(self) -> Rows:
        """All rows; none is left here."""
        return Rows(self._values.joined(), self._offsets.joined())


def gather(values: npt.NDArray[Any], start: npt.NDArray[np.integer[Any]], length: npt.NDArray[np.integer[Any]]) -> Rows:
    """Spans of some values as rows, copied some at a time, so that it takes little memory besides."""
    offsets = np.zeros(length.size + 1, dtype=np.int64)
    np.cumsum(length, out=offsets[1:])
    gathered = np.empty(int(offsets[-1]), dtype=values.dtype)
    for low in range(0, gathered.size, _COPIED):
        high = min(low + _COPIED, gathered.size)
        first, last = (np.searchsorted(offsets, (low, high - 1), side="right") - 1).tolist()
        inside = np.minimum(offsets[first + 1 : last + 2], high) - np.maximum(offsets[first : last + 1], low)
        shift = np.repeat(start[first : last + 1] - offsets[first : last + 1], inside)
        gathered[low:high] = values[np.arange(low, high) + shift]
    return Rows(gathered, offsets)


def concat_ranges(low: npt.NDArray[np.integer[Any]], size: npt.NDArray[np.integer[Any]]) -> Int64:
    """`[low[0], low[0] + 1, ..., low[1], ...]`: the given ranges one after another, int64 `[sum of size]`."""
    ends = np.cumsum(size, dtype=np.int64)
    ranges = np.repeat(low - (ends - size), size)
    ranges += np.arange(ranges.size)
    return ranges
