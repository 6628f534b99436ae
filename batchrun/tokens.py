"""Token ids of a whole job in one flat table: 4 bytes a token, and a prompt is a span of it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Span(NamedTuple):
    """A half-open range of positions in a `TokenTable`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class TokenTable:
    """Prompts as rows of one flat int32 array.

    Attributes:
        ids: int32 `[total tokens]`, the rows one after another.
        offsets: int64 `[rows + 1]`; row i is `ids[offsets[i]:offsets[i + 1]]`.
    """

    __slots__ = ("ids", "offsets")

    def __init__(self, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> None:
        if offsets.ndim != 1 or offsets.size == 0 or int(offsets[-1]) != ids.size:
            raise ValueError("offsets must start at 0 and end at the number of tokens")
        self.ids = ids
        self.offsets = offsets

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[int]]) -> TokenTable:
        """Build a table from an iterable of token id sequences."""
        builder = TokenTableBuilder()
        for row in rows:
            builder.append(np.fromiter(row, dtype=np.int32))
        return builder.build()

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        """Row `row` as a view, int32 `[length]`."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def span(self, row: int) -> Span:
        """Where row `row` lies in `ids`."""
        return Span(int(self.offsets[row]), int(self.offsets[row + 1]))

    def take(self, rows: npt.NDArray[np.int64]) -> TokenTable:
        """A new table of some of the rows."""
        parts = [self[row] for row in rows]
        offsets = np.concatenate(([0], np.cumsum(self.lengths[rows])))
        return TokenTable(np.concatenate([np.empty(0, dtype=np.int32), *parts]), offsets.astype(np.int64))

    def only(self, rows: npt.NDArray[np.bool_]) -> TokenTable:
        """A new table in which all other rows are empty.

        Args:
            rows: bool `[rows]`.
        """
        lengths = np.where(rows, self.lengths, 0)
        ids = [self.ids[:0], *(self[row] for row in np.flatnonzero(rows).tolist())]
        return TokenTable(np.concatenate(ids), np.concatenate(([0], np.cumsum(lengths))))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, int64 `[rows]`."""
        return np.diff(self.offsets)


class TokenTableBuilder:
    """Appends rows. Its buffers grow in place, by a sixteenth, so that what it holds is what the table will."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._offsets = array("q", [0])

    def append(self, row: npt.ArrayLike) -> None:
        """Add one row of token ids."""
        self._ids.frombytes(np.asarray(row, dtype=np.int32).tobytes())
        self._offsets.append(len(self._ids))

    def build(self) -> TokenTable:
        """The table of all rows so far, over the builder's own buffers: no row can be added any more."""
        return TokenTable(np.asarray(self._ids), np.asarray(self._offsets))


def concat_ranges(low: npt.NDArray[np.integer[Any]], size: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """`[low[0], low[0] + 1, ..., low[1], ...]`: the given ranges one after another, int64 `[sum of size]`."""
    ends = np.cumsum(size, dtype=np.int64)
    ranges = np.repeat(low - (ends - size), size)
    ranges += np.arange(ranges.size)
    return ranges
