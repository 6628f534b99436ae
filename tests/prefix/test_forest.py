"""The forest and its groups against a trie of dictionaries that is too simple to be wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.prefix.forest import build_forest
from batchrun.prefix.groups import GroupCosts, choose_groups
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


@given(prompts_of_jobs)
@settings(max_examples=400, deadline=None)
def test_forest_is_the_trie(prompts: list[list[int]]) -> None:
    tokens = TokenTable.from_rows(prompts)
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


@given(prompts_of_jobs, st.sampled_from(["tree", "none"]), st.sampled_from([0.0, 0.05, 0.3]))
@settings(max_examples=300, deadline=None)
def test_groups_cover_each_prompt_once(prompts: list[list[int]], grouping: str, merge_cost: float) -> None:
    tokens = TokenTable.from_rows(prompts)
    forest = build_forest(tokens)
    groups = choose_groups(
        forest,
        tokens,
        grouping=grouping,
        expected_new_tokens=np.full(len(prompts), 3, np.int32),
        costs=GroupCosts(row=1.0, merge=merge_cost, kv_token=0.0, read=0.0),
    )
    if grouping == "none":
        assert len(groups) == 0
    for request, prompt in enumerate(prompts):
        group = int(groups.request_group[request])
        path = [g for g in groups.path[group].tolist() if g >= 0] if group >= 0 else []
        shared: list[int] = []
        for above, g in zip([-1, *path], path, strict=False):
            assert groups.parent[g] == above
            assert groups.depth[g] == len(shared)
            assert groups.length[g] >= 1
            assert groups.rank[g] < groups.request_rank[request]
            shared += tokens.ids[groups.start[g] : groups.start[g] + groups.length[g]].tolist()
        assert prompt[: len(shared)] == shared
        assert groups.request_depth[request] == min(len(shared), len(prompt) - 1)
    ranks = [*groups.rank.tolist(), *groups.request_rank.tolist()]
    assert sorted(ranks) == list(range(len(groups) + len(prompts)))
    for g in range(len(groups)):
        readers = [
            r for r in range(len(prompts)) if groups.request_group[r] >= 0 and g in groups.path[groups.request_group[r]]
        ]
        assert len(readers) == groups.requests[g] >= 2
        inside = [
            *groups.request_rank[readers].tolist(),
            *(groups.rank[h] for h in range(len(groups)) if g in groups.path[h]),
        ]
        assert sorted(inside) == list(range(int(groups.rank[g]), int(groups.rank[g]) + len(inside)))


@given(prompts_of_jobs)
@settings(max_examples=200, deadline=None)
def test_free_merging_computes_the_fewest_rows(prompts: list[list[int]]) -> None:
    """With merges at no cost, what is computed is every proper prefix once, and each prompt's last token."""
    tokens = TokenTable.from_rows(prompts)
    groups = choose_groups(
        build_forest(tokens),
        tokens,
        grouping="tree",
        expected_new_tokens=np.ones(len(prompts), np.int32),
        costs=GroupCosts(row=1.0, merge=0.0, kv_token=0.0, read=0.0),
    )
    computed = int(groups.length.sum()) + sum(
        len(p) - int(d) for p, d in zip(prompts, groups.request_depth, strict=True)
    )
    proper = {tuple(p[:k]) for p in prompts for k in range(1, len(p))}
    assert computed == len(proper) + len(prompts)


def test_a_short_header_above_long_prefixes_is_not_worth_a_merge() -> None:
    jobs = [[1, 2, 3, 10 + g] + [g] * 200 + [50 + r] for g in range(4) for r in range(16)]
    tokens = TokenTable.from_rows(jobs)
    groups = choose_groups(
        build_forest(tokens),
        tokens,
        grouping="tree",
        expected_new_tokens=np.full(64, 64, np.int32),
        costs=GroupCosts(row=1.0, merge=1 / 400, kv_token=0.0, read=0.0),
    )
    assert len(groups) == 4
    assert groups.length.tolist() == [204] * 4
