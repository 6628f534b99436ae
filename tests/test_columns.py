"""Columns that grow are what was put into them, however long they get."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun import columns
from batchrun.columns import Column, GrowingRows, gather


@pytest.mark.parametrize(("code", "count"), [("i", 5_300_001), ("Q", 700_003), ("B", 70_001), ("i", 1), ("q", 0)])
def test_a_column_is_all_that_was_added_in_order(code, count):
    values = (np.arange(count) * 7919 % 251).astype(code)
    column = Column(code)
    single, step = min(count, 70_000), 123_457
    for value in values[:single].tolist():
        column.append(value)
    for low in range(single, count, step):
        column.extend(values[low : low + step].tobytes())
    assert len(column) == count
    joined = column.joined()
    assert joined.dtype == np.dtype(code)
    assert np.array_equal(joined, values)
    assert len(column) == 0
    column.append(3)
    assert column.joined().tolist() == [3]


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9), max_size=9))
def test_rows_are_what_was_added(rows):
    growing = GrowingRows("i")
    for row in rows:
        growing.append(np.array(row, dtype=np.int32).tobytes())
    assert len(growing) == len(rows)
    values, offsets = growing.joined()
    assert [values[low:high].tolist() for low, high in itertools.pairwise(offsets)] == rows


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=20), st.integers(1, 30))
def test_spans_are_gathered_whatever_the_block(spans, block):
    ids = np.arange(100, dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_COPIED", block)
        start, length = (np.array([span[i] for span in spans], dtype=np.int64) for i in (0, 1))
        values, offsets = gather(ids, start, length)
    assert [values[low:high].tolist() for low, high in itertools.pairwise(offsets)] == [
        list(range(start, start + length)) for start, length in spans
    ]
