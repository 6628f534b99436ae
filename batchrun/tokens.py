"""Token ids of a whole job in one flat table: 4 bytes a token, and a prompt is a span of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.columns import GrowingRows, gather


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
        start = self.offsets[rows]
        return TokenTable(*gather(self.ids, start, self.offsets[rows + 1] - start))

    def only(self, rows: npt.NDArray[np.bool_]) -> TokenTable:
        """A new table in which all other rows are empty.

        Args:
            rows: bool `[rows]`.
        """
        return TokenTable(*gather(self.ids, self.offsets[:-1], np.where(rows, self.lengths, 0)))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row, int32 `[rows]`."""
        # In int32 from the start: a difference that fits is the same, also of offsets that do not.
        return np.subtract(self.offsets[1:], self.offsets[:-1], dtype=np.int32, casting="same_kind")


class TokenTableBuilder:
    """Appends rows."""

    def __init__(self) -> None:
        self._rows = GrowingRows("i")

    def append(self, row: npt.NDArray[np.int32]) -> None:
        """Add one row of token ids."""
        self._rows.append(row.tobytes())

    def build(self) -> TokenTable:
        """The table of all rows, which are then no longer here."""
        return TokenTable(*self._rows.joined())
