"""The forest against a trie of dictionaries that is too simple to be wrong."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.prefix.forest import build_forest
from batchrun.tokens import TokenTable

prompts_of_jobs = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=8)
    | st.tuples(st.integers(0, 2), st.integers(30, 70)).map(lambda pair: [pair[0]] * pair[1]),
    max_size=12,
)


def brute_force_nodes(prompts: list[list[int]]) -> dict[tuple[int, ...], tuple[int, int]]:
    """Each node by its whole path: (tokens before it, requests below it). A path ends where its readers change."""
    readers: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        for stop in range(1, len(prompt) + 1):
            path = tuple(prompt[:stop])
            readers[path] = readers.get(path, 0) + 1
    ends = {tuple(prompt) for prompt in prompts}
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for path in readers:
        children.setdefault(path[:-1], []).append(path)
    nodes = {}
    for path, count in readers.items():
        below = children.get(path, [])
        if path in ends or len(below) != 1:
            above = path[:-1]
            while above and above not in ends and len(children[above]) == 1:
                above = above[:-1]
            nodes[path] = (len(above), count)
    return nodes


@given(prompts_of_jobs, st.sampled_from([(128, 1 << 18), (4, 8), (3, 3)]))
@settings(max_examples=2000, deadline=None)
def test_forest_is_the_trie(prompts: list[list[int]], window_and_block: tuple[int, int]) -> None:
    tokens = TokenTable.from_rows(prompts)
    with pytest.MonkeyPatch.context() as patch:
        # So small that jobs of a few tokens take many of them.
        patch.setattr("batchrun.prefix.forest._WINDOW", window_and_block[0])
        patch.setattr("batchrun.prefix.forest._BLOCK", window_and_block[1])
        forest = build_forest(tokens)
    found = {}
    paths: list[tuple[int, ...]] = []
    for n in range(len(forest)):
        own = tuple(tokens.ids[forest.start[n] : forest.start[n] + forest.length[n]].tolist())
        parent = int(forest.parent[n])
        assert parent < n
        assert forest.level[n] == (forest.level[parent] + 1 if parent >= 0 else 0)
        path = (paths[parent] if parent >= 0 else ()) + own
        paths.append(path)
        assert path not in found
        found[path] = (int(forest.depth[n]), int(forest.requests[n]))
        below = forest.order[forest.first[n] : forest.first[n] + forest.requests[n]]
        assert all(tuple(prompts[r][: len(path)]) == path for r in below)
    assert found == brute_force_nodes(prompts)
    assert [paths[n] for n in forest.node] == [tuple(prompt) for prompt in prompts]
    assert sorted(forest.order.tolist()) == list(range(len(prompts)))
    assert [prompts[r] for r in forest.order] == sorted(prompts)
    assert forest.prompt_logical == sum(map(len, prompts))
    assert forest.prompt_physical == len({tuple(p[:k]) for p in prompts for k in range(1, len(p) + 1)})


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="request 1"):
        build_forest(TokenTable.from_rows([[1], [], [2]]))


def test_runs_longer_than_a_comparison_window() -> None:
    long = list(range(1000))
    forest = build_forest(TokenTable.from_rows([[*long, 1], [*long, 2], long[:500], [7]]))
    assert forest.length.tolist() == [500, 500, 1, 1, 1]
    assert forest.prompt_physical == 1003


def test_memory_at_its_peak_is_a_few_columns():
    """Of each short prompt some 45 bytes stay, and some 90 are taken for a while."""
    count = 60_000
    rows = np.arange(count)
    digits = 1 + rows[:, None] // 10 ** np.arange(4, -1, -1) % 10
    heads = np.full((count, 6), 11) + (rows % 100)[:, None]
    tokens = TokenTable(np.hstack((heads, digits)).astype(np.int32).ravel(), np.arange(count + 1, dtype=np.int64) * 11)
    tracemalloc.start()
    try:
        forest = build_forest(tokens)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(forest) > count
    assert kept < 60 * count
    # One block of windows is compared at a time, whatever the number of prompts.
    assert peak < 105 * count + (2 << 20)


@given(prompts_of_jobs.filter(bool), st.integers(0, 2**12 - 1))
@settings(max_examples=500, deadline=None)
def test_prompts_that_stand_apart_share_nothing_and_change_nothing(prompts: list[list[int]], which: int) -> None:
    apart = np.array([bool(which >> i & 1) for i in range(len(prompts))])
    forest = build_forest(TokenTable.from_rows(prompts), apart)
    alone = forest.node[apart]
    assert np.unique(alone).size == alone.size
    assert (forest.requests[alone] == 1).all() and (forest.parent[alone] == -1).all()
    assert forest.length[alone].tolist() == [len(prompt) for prompt, own in zip(prompts, apart, strict=True) if own]
    rest = build_forest(TokenTable.from_rows([prompt for prompt, own in zip(prompts, apart, strict=True) if not own]))
    kept = np.setdiff1d(np.arange(len(forest)), alone)
    assert all((getattr(rest, name) == getattr(forest, name)[kept]).all() for name in ("length", "depth", "requests"))
    assert sorted(forest.order.tolist()) == list(range(len(prompts)))
    for node in range(len(forest)):
        below = forest.order[forest.first[node] : forest.first[node] + forest.requests[node]]
        assert (forest.node[below] >= node).all()
