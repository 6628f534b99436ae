"""Groups against trying every choice there is, and against the recursion that a paper prints."""

from __future__ import annotations

import tracemalloc
from functools import cache
from itertools import compress, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchrun.prefix.forest import build_forest
from batchrun.prefix.groups import GROUPINGS, GroupCosts, PrefixGroups, SharedNodes, choose_groups
from batchrun.tokens import TokenTable

# Long enough runs and few enough branches, so that there is something to choose between.
segments = st.lists(st.integers(0, 2), max_size=5)
prompts_of_jobs = st.lists(
    segments.map(lambda path: [token for step in path for token in [step] * (1 + 3 * step)] or [0])
    | st.lists(st.integers(0, 2), min_size=1, max_size=8)
    | st.tuples(st.integers(0, 2), st.integers(30, 70)).map(lambda pair: [pair[0]] * pair[1]),
    max_size=12,
)
ROWS_ALONE = GroupCosts(row=1.0, merge=0.0, kv_token=0.0, read=0.0)
# An 8-billion-parameter model on a GPU, about.
GPU = GroupCosts(row=27e-6, merge=2e-8, kv_token=4.5e-8, read=1e-5)


def groups_of(
    prompts: list[list[int]], grouping: str, costs: GroupCosts = ROWS_ALONE, new: int | list[int] = 3
) -> PrefixGroups:
    tokens = TokenTable.from_rows(prompts)
    expected = np.broadcast_to(np.asarray(new, dtype=np.int32), len(prompts))
    return choose_groups(build_forest(tokens), tokens, grouping=grouping, expected_new_tokens=expected, costs=costs)


def rows_computed(prompts: list[list[int]], groups: PrefixGroups) -> int:
    return int(groups.length.sum() + sum(map(len, prompts)) - groups.request_depth.sum())


def same(a: PrefixGroups, b: PrefixGroups) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in PrefixGroups.__slots__)


@given(prompts_of_jobs, st.sampled_from(sorted(GROUPINGS)), st.sampled_from([0.0, 0.05, 0.3]))
@settings(max_examples=500, deadline=None)
def test_groups_cover_each_prompt_once(prompts: list[list[int]], grouping: str, merge_cost: float) -> None:
    tokens = TokenTable.from_rows(prompts)
    groups = groups_of(prompts, grouping, ROWS_ALONE._replace(merge=merge_cost))
    if grouping == "none":
        assert len(groups) == 0
    if grouping in ("greedy", "exact"):
        assert groups.path.shape[1] <= 1
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


class Trie:
    """A forest as lists, to try choices of nodes on, one node at a time."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.forest = build_forest(TokenTable.from_rows(prompts))
        self.parent = self.forest.parent.tolist()
        self.node = self.forest.node.tolist()
        self.prompts = [len(prompt) for prompt in prompts]
        # The last token of a node that nothing goes on from is nobody's.
        stops = (self.forest.depth + self.forest.length).tolist()
        self.end = [stop - (n not in self.parent) for n, stop in enumerate(stops)]
        self.shared = np.flatnonzero(self.forest.requests > 1).tolist()

    def choices(self) -> list[set[int]]:
        """Every set of nodes that could be kept."""
        assume(len(self.shared) <= 6)
        return [set(compress(self.shared, keeps)) for keeps in product([0, 1], repeat=len(self.shared))]

    def nearest(self, node: int, kept: set[int]) -> int:
        while node >= 0 and node not in kept:
            node = self.parent[node]
        return node

    def lengths(self, kept: set[int], *, nested: bool) -> tuple[dict[int, int], list[int]]:
        """Tokens that each kept node computes, and tokens of its prompt that each request does."""
        groups = {}
        for node in kept:
            above = self.nearest(self.parent[node], kept) if nested else -1
            groups[node] = self.end[node] - (self.end[above] if above >= 0 else 0)
        own = []
        for node, length in zip(self.node, self.prompts, strict=True):
            above = self.nearest(node, kept)
            own.append(length - (min(self.end[above], length - 1) if above >= 0 else 0))
        return groups, own

    def seconds(self, kept: set[int], new: list[int], costs: GroupCosts) -> float:
        """What a choice on several levels costs: see `groups._cheapest`."""
        groups, own = self.lengths(kept, nested=True)
        spent = sum(tokens * (costs.row + n * costs.kv_token) for tokens, n in zip(own, new, strict=True))
        for node, length in groups.items():
            under = {node}
            for n, parent in enumerate(self.parent):
                if parent in under:
                    under.add(n)
            readers = [n for n, at in zip(new, self.node, strict=True) if at in under]
            tokens_under = sum(int(self.forest.length[n]) for n in under - {node})
            spent += length * (costs.row + max(readers) * costs.kv_token) + max(readers) * costs.read
            spent += (sum(readers) + tokens_under) * costs.merge
        return spent


@given(prompts_of_jobs)
@settings(max_examples=2000, deadline=None)
def test_exact_computes_the_fewest_tokens_of_all_choices(prompts: list[list[int]]) -> None:
    trie = Trie(prompts)
    fewest = min(
        sum(groups.values()) + sum(own) for groups, own in (trie.lengths(kept, nested=False) for kept in trie.choices())
    )
    assert rows_computed(prompts, groups_of(prompts, "exact")) == fewest


@given(
    prompts_of_jobs,
    st.lists(st.integers(1, 30), min_size=12, max_size=12),
    st.sampled_from([0.0, 0.01, 0.1, 0.7]),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([0.0, 0.1, 2.0]),
    st.sampled_from([1.0, 1e-5]),
)
@settings(max_examples=1000, deadline=None)
def test_tree_takes_the_least_time_of_all_choices(
    prompts: list[list[int]], new: list[int], merge: float, kv_token: float, read: float, row: float
) -> None:
    trie, new = Trie(prompts), new[: len(prompts)]
    costs = GroupCosts(row, merge * row, kv_token * row, read * row)
    shared = SharedNodes.of(trie.forest, np.array(trie.prompts, np.int32))
    choice = GROUPINGS["tree"](shared, np.array(new, np.int32), costs)
    taken = trie.seconds(set(compress(trie.shared, choice.kept)), new, costs)
    least = min(trie.seconds(kept, new, costs) for kept in trie.choices())
    assert taken == pytest.approx(least, rel=1e-9, abs=1e-4 * row)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_exact_on_deep_forests_is_the_recursion(seed: int) -> None:
    """G(v, a): the most that is saved in v and below, where a is the nearest kept node above."""
    rng = np.random.default_rng(seed)
    prompts = [[0]]
    for _ in range(60):
        old = prompts[rng.integers(len(prompts))]
        grown = [*old[: rng.integers(len(old) + 1)], *np.repeat(rng.integers(0, 3, 2), rng.integers(0, 6)).tolist()]
        prompts.append(grown or [1])
    trie = Trie(prompts)
    children: dict[int, list[int]] = {}
    for n, parent in enumerate(trie.parent):
        children.setdefault(parent, []).append(n)

    @cache
    def most(v: int, a: int) -> int:
        def below(a: int) -> int:
            return sum(most(c, a) for c in children.get(v, [])) + sum(
                min(trie.end[a], trie.prompts[r] - 1) for r, n in enumerate(trie.node) if n == v and a >= 0
            )

        return max(below(a), below(v) - trie.end[v])

    saved = sum(trie.prompts) - rows_computed(prompts, groups_of(prompts, "exact"))
    assert saved == sum(most(root, -1) for root in children[-1])


class Node:
    """A node of the tree that `maximize_reuse` changes as it goes."""

    def __init__(self, tokens: int, ending: int) -> None:
        self.tokens = tokens
        self.ending = ending
        self.children: list[Node] = []

    def readers(self) -> int:
        return self.ending + sum(child.readers() for child in self.children)


def maximize_reuse(node: Node) -> None:
    """BatchLLM's algorithm, as in arXiv 2412.03594."""
    for child in list(node.children):
        maximize_reuse(child)
        for grandchild in list(child.children):
            if (grandchild.readers() - 1) * grandchild.tokens > child.tokens:
                child.children.remove(grandchild)
                grandchild.tokens += child.tokens
                node.children.append(grandchild)


@given(prompts_of_jobs)
@settings(max_examples=500, deadline=None)
def test_greedy_promotes_as_its_paper_does(prompts: list[list[int]]) -> None:
    trie = Trie(prompts)
    root = Node(0, 0)
    nodes: list[Node] = []
    for n, parent in enumerate(trie.parent):
        above, before = (nodes[parent], trie.end[parent]) if parent >= 0 else (root, 0)
        nodes.append(Node(trie.end[n] - before, trie.node.count(n)))
        above.children.append(nodes[-1])
    maximize_reuse(root)
    expected = sorted((top.tokens, top.readers()) for top in root.children if top.tokens and top.readers() > 1)
    groups = groups_of(prompts, "greedy")
    assert sorted(zip(groups.length.tolist(), groups.requests.tolist(), strict=True)) == expected
    assert rows_computed(prompts, groups) >= rows_computed(prompts, groups_of(prompts, "exact"))


def test_a_run_above_two_shorter_ones_separates_the_methods() -> None:
    """15 tokens above two runs of 7 with 3 requests each: no promotion pays on its own, and both together do."""
    prompts = [[0] * 15 + [run] * 7 + [10 * run + leaf] for run in (1, 2) for leaf in range(3)]
    saved = {name: 6 * 23 - rows_computed(prompts, groups_of(prompts, name)) for name in GROUPINGS}
    assert saved == {"none": 0, "greedy": 75, "exact": 88, "tree": 103, "auto": 103}


@given(prompts_of_jobs)
@settings(max_examples=200, deadline=None)
def test_free_merging_computes_the_fewest_rows(prompts: list[list[int]]) -> None:
    """With merges at no cost, what is computed is every proper prefix once, and each prompt's last token."""
    proper = {tuple(p[:k]) for p in prompts for k in range(1, len(p))}
    assert rows_computed(prompts, groups_of(prompts, "tree")) == len(proper) + len(prompts)


def test_a_short_header_above_long_prefixes_is_not_worth_a_merge() -> None:
    prompts = [[1, 2, 3, 10 + g] + [g] * 200 + [50 + r] for g in range(4) for r in range(16)]
    groups = groups_of(prompts, "tree", ROWS_ALONE._replace(merge=1 / 400), new=64)
    assert groups.length.tolist() == [204] * 4


@pytest.mark.parametrize(
    ("costs", "shares"),
    [
        (GroupCosts(row=1.0, merge=0.5, kv_token=0.0, read=0.0), False),  # 10 x (20 + 10) merges for 9 x 10 rows
        (GroupCosts(row=1.0, merge=0.5, kv_token=0.1, read=0.0), True),  # and 9 x 10 KV tokens less in 20 steps
        (GroupCosts(row=1.0, merge=0.5, kv_token=0.1, read=10.0), False),  # at one more read in each
    ],
)
def test_tree_weighs_rows_merges_kv_and_reads(costs: GroupCosts, shares: bool) -> None:
    prompts = [[1] * 10 + [10 + r] for r in range(10)]
    assert bool(len(groups_of(prompts, "tree", costs, new=20))) == shares


def prompts_with(prefix: int, readers: int, others: int, own: int = 400) -> list[list[int]]:
    """`readers` requests with a common prefix and `others` without, each with `own` tokens of its own."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 30_000, prefix).tolist()
    first = rng.permutation(30_000).tolist()
    return [
        [*(shared if r < readers else []), first[r], *rng.integers(0, 30_000, own).tolist()]
        for r in range(readers + others)
    ]


@pytest.mark.parametrize(
    ("prefix", "readers", "others"),
    [(1, 300, 0), (6, 300, 0), (300, 6, 294), (5, 20, 280)],
    ids=["one token", "a short header", "rare", "short and rare"],
)
def test_auto_shares_nothing_where_sharing_is_short_or_rare(prefix: int, readers: int, others: int) -> None:
    prompts = prompts_with(prefix, readers, others)
    assert len(groups_of(prompts, "tree", GPU, new=100)) == 1
    assert same(groups_of(prompts, "auto", GPU, new=100), groups_of(prompts, "none", GPU, new=100))


@pytest.mark.parametrize(("prefix", "readers", "others"), [(500, 300, 0), (500, 60, 240), (40, 300, 0)])
def test_auto_shares_long_or_frequent_prefixes_as_tree_does(prefix: int, readers: int, others: int) -> None:
    prompts = prompts_with(prefix, readers, others)
    groups = groups_of(prompts, "auto", GPU, new=100)
    assert groups.length.tolist() == [prefix]
    assert groups.requests.tolist() == [readers]
    assert same(groups, groups_of(prompts, "tree", GPU, new=100))


def test_auto_keeps_no_runs_that_few_requests_share_by_chance() -> None:
    rng = np.random.default_rng(0)
    prompts = [[1] * 300 + rng.integers(2, 10, 100).tolist() for _ in range(40)]
    costs = GPU._replace(read=0.0)
    assert len(groups_of(prompts, "tree", costs, new=100)) > 1
    assert groups_of(prompts, "auto", costs, new=100).length.tolist() == [300]


def test_requests_of_an_outer_prefix_stand_together_around_those_of_an_inner_one() -> None:
    outer, inner = [1] * 10, [5] * 30
    prompts = [
        [*outer, 3],
        outer + inner + [1],
        [*outer, 8],
        outer + inner + [2],
        outer + inner + [3],
        [*outer, 4],
        [2, 2],
        outer + inner + [4],
    ]
    groups = groups_of(prompts, "exact")
    assert groups.length.tolist() == [10, 40]
    assert groups.requests.tolist() == [3, 4]
    assert groups.rank.tolist() == [0, 4]
    assert groups.request_rank.tolist() == [1, 5, 3, 6, 7, 2, 9, 8]


def test_memory_at_its_peak_is_a_few_columns():
    """Of each request 12 bytes stay, and some 55 are taken for a while."""
    count = 60_000
    rows = np.arange(count)
    digits = 1 + rows[:, None] // 10 ** np.arange(4, -1, -1) % 10
    heads = np.full((count, 6), 11) + (rows % 100)[:, None]
    tokens = TokenTable(np.hstack((heads, digits)).astype(np.int32).ravel(), np.arange(count + 1, dtype=np.int64) * 11)
    forest, new = build_forest(tokens), np.full(count, 2, dtype=np.int32)
    for grouping in ("auto", "tree"):
        tracemalloc.start()
        try:
            costs = GroupCosts(row=1.0, merge=0.0, kv_token=0.001, read=0.0)
            groups = choose_groups(forest, tokens, grouping=grouping, expected_new_tokens=new, costs=costs)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(groups) > 100
        assert kept < 20 * count
        assert peak < 65 * count
