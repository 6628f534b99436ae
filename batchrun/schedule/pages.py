"""The pool of KV pages: which are free, and no page has two owners."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Ints = npt.NDArray[np.integer[Any]]


class PagePool:
    """Hands out page numbers, as runs of neighbours where there are any: a run can be read without a gather.

    Attributes:
        size: pages of the pool.
        num_free: pages nobody holds.
        peak_used: most pages ever held at once.
    """

    def __init__(self, size: int, *, peak_used: int = 0) -> None:
        self.size = size
        self.num_free = size
        self.peak_used = peak_used
        self._held: dict[int, list[int]] = {}
        self._free = bytearray(b"\1") * size  # a byte a page, so that a run of free pages is one `find`
        self._all_taken_below = 0
        self._is_free = np.frombuffer(self._free, dtype=np.uint8)

    @property
    def num_used(self) -> int:
        return self.size - self.num_free

    def take(self, owner: int, count: int, after: int = -1) -> Int32:
        """Take `count` pages for one owner, int32 `[count]`, as neighbours where so many lie together.

        Args:
            owner: slot of a sequence.
            count: at most `num_free`.
            after: the page that it has last, if any; the pages right after it are preferred.
        """
        self._check(count)
        run = b"\1" * count
        first = after + 1 if after >= 0 and self._free.startswith(run, after + 1) else self._free.find(run)
        if first >= 0:
            pages = np.arange(first, first + count, dtype=np.int32)
        else:
            pages = np.array(self._lowest(count), dtype=np.int32)
        self._hand_out(pages)
        self._held.setdefault(owner, []).extend(pages.tolist())
        return pages

    def take_one_each(self, owners: Ints, after: Ints) -> Int32:
        """Take one page for each owner, int32 `[owners]`: the one right after its last page where that is free.

        Args:
            after: int32 `[owners]`, the page that each has last, or -1.
        """
        self._check(owners.size)
        pages = np.where(after >= 0, after + 1, self.size)
        inside = np.flatnonzero(pages < self.size)
        beside = inside[self._is_free[pages[inside]] == 1]
        self._hand_out(pages[beside])
        rest = np.ones(owners.size, dtype=bool)
        rest[beside] = False
        missing = int(rest.sum())
        if missing:
            pages[rest] = self._lowest(missing)
            self._hand_out(pages[rest])
        for owner, page in zip(owners.tolist(), pages.tolist(), strict=True):
            self._held.setdefault(owner, []).append(page)
        return pages.astype(np.int32)

    def release(self, owner: int) -> None:
        """Take back all pages of an owner."""
        pages = self._held.pop(owner)
        self._is_free[pages] = 1
        self._all_taken_below = min(self._all_taken_below, *pages)
        self.num_free += len(pages)

    def held_by(self, owner: int) -> list[int]:
        """The pages of an owner, in the order in which it took them."""
        return self._held.get(owner, [])

    def _lowest(self, count: int) -> list[int]:
        """The free pages with the lowest numbers."""
        found, at = [], self._all_taken_below
        for _ in range(count):
            at = self._free.find(1, at) + 1
            found.append(at - 1)
        self._all_taken_below = at
        return found

    def _check(self, count: int) -> None:
        if count > self.num_free:
            raise ValueError(f"{count} pages asked for, {self.num_free} free")

    def _hand_out(self, pages: Ints) -> None:
        self._is_free[pages] = 0
        self.num_free -= pages.size
        self.peak_used = max(self.peak_used, self.num_used)
