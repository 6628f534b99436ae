"""How many pages will be taken in each of the coming steps, if answers have the lengths expected of them.

A sequence that decodes takes every step, so what it holds in a coming step is known: its tokens now and one more for
each step. It is booked once, when it is admitted, up to the step in which it is expected to end; a prefix up to the end
of its last reader. That keeps the peak over all future ends of sequences at hand for one slice and its maximum,
without sorting them anew in every step.
"""

from __future__ import annotations

import numpy as np


class PageLedger:
    """Pages booked by step. Step numbers are the scheduler's own, from 0."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._booked = np.zeros(1 << 10, dtype=np.int64)  # by step
        self._ramp = np.arange(1 << 10, dtype=np.int64) // page_size + 1  # pages of token i and those before it

    def book_growing(self, start: int, stop: int, tokens: int, sign: int = 1) -> None:
        """Book a sequence over steps `[start, stop)` that has `tokens` tokens of KV in step `start` and one more in
        each step after it; `sign` -1 takes the same back."""
        if stop > start:
            self._reach(stop, tokens + stop - start)
            self._booked[start:stop] += sign * self._ramp[tokens - 1 : tokens - 1 + stop - start]

    def book(self, start: int, stop: int, pages: int) -> None:
        """Book as many pages in each of the steps `[start, stop)`; a negative number takes them back."""
        if stop > start:
            self._reach(stop, 0)
            self._booked[start:stop] += pages

    def peak(self, start: int, stop: int) -> int:
        """Most pages booked in a step of `[start, stop)`."""
        return int(self._booked[start:stop].max(initial=0))

    def _reach(self, stop: int, tokens: int) -> None:
        if stop > self._booked.size:
            self._booked = np.concatenate((self._booked, np.zeros(max(stop, self._booked.size), dtype=np.int64)))
        if tokens > self._ramp.size:
            self._ramp = np.arange(2 * tokens, dtype=np.int64) // self._page_size + 1
