"""The pool of KV pages: which are free, and no page has two owners."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class PagePool:
    """Hands out page numbers, as runs of neighbours where there are any: a run can be read without a gather.

    Attributes:
        size: pages of the pool.
        num_free: pages nobody holds.
        peak_used: most pages ever held at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_free = size
        self.peak_used = 0
        self._free = bytearray(b"\1") * size  # a byte a page, so that a run of free pages is one `find`

    @property
    def num_used(self) -> int:
        return self.size - self.num_free

    def take(self, count: int, after: int = -1) -> npt.NDArray[np.int32]:
        """Take `count` pages, int32 `[count]`.

        Args:
            count: at most `num_free`.
            after: the page that the sequence has last, if any; the pages right after it are preferred.
        """
        if count > self.num_free:
            raise ValueError(f"{count} pages asked for, {self.num_free} free")
        run = b"\1" * count
        first = after + 1 if after >= 0 and self._free.startswith(run, after + 1) else self._free.find(run)
        if first >= 0:
            pages = np.arange(first, first + count, dtype=np.int32)
            self._free[first : first + count] = b"\0" * count
        else:
            state = np.frombuffer(self._free, dtype=np.uint8)
            pages = np.flatnonzero(state)[:count].astype(np.int32)
            state[pages] = 0
        self.num_free -= count
        self.peak_used = max(self.peak_used, self.num_used)
        return pages

    def give_back(self, pages: npt.NDArray[np.int32]) -> None:
        """Return pages that were taken."""
        state = np.frombuffer(self._free, dtype=np.uint8)
        if state[pages].any():
            raise ValueError("a page was given back twice")
        state[pages] = 1
        self.num_free += pages.size
