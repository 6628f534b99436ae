"""Page tables follow releases and grants in any interleaving: they equal a dictionary of lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine.kv_cache import KVCache, PageTables
from batchrun.schedule.step import PrefixReads, Step


def step_of(releases: list[int], grants: list[tuple[int, int]]) -> Step:
    """A step that computes nothing and moves pages: `grants` are pairs of slot and page."""
    nothing = np.empty(0, dtype=np.int32)
    columns: dict[str, Any] = dict.fromkeys(
        ("sequence", "request", "start", "length", "depth", "num_sampled", "token_ids"), nothing
    )
    return Step(
        index=0,
        samples=np.empty(0, dtype=bool),
        prefix_reads=PrefixReads(*[nothing] * 6),
        releases=np.array(releases, dtype=np.int32),
        grant_sequence=np.array([slot for slot, _ in grants], dtype=np.int32),
        grant_page=np.array([page for _, page in grants], dtype=np.int32),
        **columns,
    )


# Slots and pages of a sequence go beyond what a table has room for at first.
slots = st.integers(0, 5) | st.sampled_from([63, 64, 65, 130, 300])
steps = st.lists(
    st.tuples(st.lists(slots, unique=True, max_size=3), st.lists(slots, max_size=40)), min_size=1, max_size=12
)


@given(steps=steps, page_size=st.sampled_from([1, 3, 16]), seed=st.integers(0, 99), neighbours=st.booleans())
@settings(max_examples=300, deadline=None)
def test_tables_equal_a_dictionary_of_lists(
    steps: list[tuple[list[int], list[int]]], page_size: int, seed: int, neighbours: bool
) -> None:
    random = np.random.default_rng(seed)
    tables = PageTables(page_size)
    held: dict[int, list[int]] = {}
    free = list(range(500)) if neighbours else random.permutation(500).tolist()
    for released, granted in steps:
        releases = [slot for slot in released if slot in held]
        for slot in releases:
            free += held.pop(slot)  # also for what the same step grants, to the same slot or another
        grants = [(slot, free.pop(0)) for slot in granted]
        for slot, page in grants:
            held.setdefault(slot, []).append(page)
        tables.apply(step_of(releases, grants))
        for slot, pages in held.items():
            places = [page * page_size + offset for page in pages for offset in range(page_size)]
            assert tables.index(slot, np.arange(len(places))).tolist() == places
            # One call for tokens of several sequences, as rows of a step are looked up.
            some = np.array([0, len(places) - 1])
            assert tables.index(np.array([slot, slot], dtype=np.int32), some).tolist() == [places[0], places[-1]]
            start, stop = sorted(random.choice(len(places) + 1, 2, replace=False).tolist())
            in_one_run = places[start:stop] == list(range(places[start], places[start] + stop - start))
            run = tables.run(slot, start, stop)
            assert run == (places[start] if in_one_run else None)


def test_run_looks_at_the_pages_of_its_range_only() -> None:
    tables = PageTables(4)
    tables.apply(step_of([], [(2, 7), (2, 8), (2, 3), (2, 4)]))
    assert tables.run(2, 0, 8) == 28
    assert tables.run(2, 5, 8) == 33
    assert tables.run(2, 8, 16) == 12
    assert tables.run(2, 7, 9) is None
    assert tables.run(2, 0, 16) is None


def test_grants_of_a_slot_need_not_be_neighbours() -> None:
    tables = PageTables(1)
    tables.apply(step_of([], [(1, 5), (0, 9), (1, 2), (0, 3), (1, 7)]))
    assert tables.index(1, np.arange(3)).tolist() == [5, 2, 7]
    assert tables.index(0, np.arange(2)).tolist() == [9, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_has_a_place_for_each_token(dtype: torch.dtype) -> None:
    cache = KVCache(3, 2, 16, num_pages=5, page_size=4, dtype=dtype, device="cpu")
    assert len(cache.keys) == len(cache.values) == 3
    for pool in (*cache.keys, *cache.values):
        assert pool.shape == (20, 2, 16)
        assert pool.dtype == dtype
    assert len({pool.data_ptr() for pool in (*cache.keys, *cache.values)}) == 6
