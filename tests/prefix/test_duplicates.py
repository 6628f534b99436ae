"""Requests that must have the same answer are found, and no others."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_requests

from batchrun.prefix.duplicates import first_alike
from batchrun.prefix.forest import build_forest
from batchrun.request import SamplingParams

SAMPLING = [SamplingParams(0.0), SamplingParams(0.0, stop=("x",)), SamplingParams(1.0), SamplingParams(1.0, top_k=3)]
ROWS = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=4),  # prompt
    st.integers(1, 2),  # limit
    st.integers(0, 3),  # sampling
    st.integers(0, 1),  # seed
    st.booleans(),  # whether nobody set the limit
)


@settings(max_examples=500, deadline=None)
@given(st.lists(ROWS, max_size=40))
def test_the_first_of_all_that_ask_for_the_same(rows):
    requests = make_requests([row[0] for row in rows], [row[1] for row in rows])
    requests.sampling = SAMPLING
    requests.sampling_id = np.array([row[2] for row in rows], dtype=np.int32)
    requests.seed = np.array([row[3] for row in rows], dtype=np.uint64)
    defaulted = np.array([row[4] for row in rows], dtype=bool)
    first: dict[object, int] = {}
    expected = []
    for index, (prompt, limit, sampling, seed, default) in enumerate(rows):
        asked = (tuple(prompt), limit, sampling, None if SAMPLING[sampling].greedy else seed, default)
        expected.append(first.setdefault(asked, index))
    assert first_alike(requests, build_forest(requests.tokens), defaulted).tolist() == expected
