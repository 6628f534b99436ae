"""The ledger against counting each sequence in each step."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchrun.schedule.ledger import PageLedger

sequences = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 50)), max_size=12)
prefixes = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1500), st.integers(1, 50)), max_size=6)


@given(sequences, prefixes, st.integers(1, 7))
def test_what_is_booked_is_what_is_held_in_each_step(growing, held, page_size):
    ledger = PageLedger(page_size)
    expected = np.zeros(2000, dtype=int)
    for start, steps, tokens in growing:
        ledger.book_growing(start, start + steps, tokens)
        for step in range(start, start + steps):
            expected[step] += -(-(tokens + step - start) // page_size)
    for start, steps, pages in held:
        ledger.book(start, start + steps, pages)
        expected[start : start + steps] += pages
    assert [ledger.peak(step, step + 1) for step in range(0, 2000, 7)] == expected[::7].tolist()
    assert ledger.peak(3, 60) == expected[3:60].max()

    for start, steps, tokens in growing:
        ledger.book_growing(start + steps // 2, start + steps, tokens + steps // 2, -1)  # ended half way
    for start, steps, pages in held:
        ledger.book(start, start + steps, -pages)
    assert ledger.peak(80, 2000) == 0
    for start, steps, tokens in growing:
        ledger.book_growing(start, start + steps // 2, tokens, -1)
    assert ledger.peak(0, 2000) == 0
