"""Prefix-sharing groups: which shared runs of the forest become sequences of their own.

A shared prefix never samples, so each request computes at least the last token of its prompt itself, also where
that token lies in a shared node: it then reads one token less of that node than the others do. A node that is not
chosen is computed again by each of its children, as part of their own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.prefix.forest import PrefixForest
from batchrun.tokens import TokenTable

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class GroupCosts(NamedTuple):
    """What sharing spares and what it costs, in seconds.

    Attributes:
        row: computing one row of a prompt.
        merge: merging one partial result into one row.
        kv_token: reading one KV token.
        read: reading one shared prefix in one step, whatever its length.
    """

    row: float
    merge: float
    kv_token: float
    read: float


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """The shared prefixes of a job and who reads them, in columns, numbered depth first.

    Shape letters: G groups, R requests, L levels.

    Attributes:
        parent: int32 `[G]`, the group whose prefix this one extends, or -1.
        start: int64 `[G]`, where the group's own tokens begin in `TokenTable.ids`.
        length: int32 `[G]`, the group's own tokens, at least 1.
        depth: int32 `[G]`, tokens before them.
        requests: int32 `[G]`, requests that read the group's KV.
        path: int32 `[G, L]`, the groups from the root to the group itself, then -1.
        request_group: int32 `[R]`, the deepest group a request reads, or -1.
        request_depth: int32 `[R]`, tokens of the request's prompt that it reads from groups: all of theirs, or one
            token less than its prompt.
        rank, request_rank: int32 `[G]` and `[R]`, places in forest order, over groups and requests together: the
            readers of a group are a range, and follow it.
    """

    parent: Int32
    start: Int64
    length: Int32
    depth: Int32
    requests: Int32
    path: Int32
    request_group: Int32
    request_depth: Int32
    rank: Int32
    request_rank: Int32

    def __len__(self) -> int:
        return self.parent.size


def choose_groups(
    forest: PrefixForest,
    tokens: TokenTable,
    *,
    grouping: str,
    expected_new_tokens: Int32,
    costs: GroupCosts,
) -> PrefixGroups:
    """Choose the shared prefixes of a job.

    Args:
        forest: of all prompts.
        tokens: the prompts.
        grouping: a name in `GROUPINGS`.
        expected_new_tokens: int32 `[R]`, tokens each request is expected to sample.
        costs: what sharing spares and what it costs.
    """
    shared = forest.requests > 1
    # The last token of identical prompts is of no use to anyone, unless another prompt goes on from it.
    useless = np.ones(len(forest), dtype=np.int32)
    useless[forest.parent[forest.parent >= 0]] = 0
    end = forest.depth + forest.length - useless
    kept = GROUPINGS[grouping](forest, shared, end, expected_new_tokens, costs)

    # The nearest kept ancestor of each node; parents are numbered before their children.
    nearest = forest.parent.copy()
    for nodes in _by_level(forest, shared):
        below = nodes[forest.parent[nodes] >= 0]
        up = forest.parent[below]
        nearest[below] = np.where(kept[up], up, nearest[up])
    leaves = np.flatnonzero(~shared & (forest.parent >= 0))
    up = forest.parent[leaves]
    nearest[leaves] = np.where(kept[up], up, nearest[up])
    # Without its useless token a node may have none left.
    kept &= end > np.where(nearest >= 0, end[nearest], 0)
    chosen = np.flatnonzero(kept)

    number = np.full(len(forest) + 1, -1, dtype=np.int32)  # [-1] stays -1: above a root there is no group
    number[chosen] = np.arange(chosen.size)
    parent = number[nearest[chosen]]
    depth = np.where(parent >= 0, end[nearest[chosen]], 0).astype(np.int32)
    length = (end[chosen] - depth).astype(np.int32)
    start = forest.start[chosen] - forest.depth[chosen] + depth

    last = forest.node
    request_node = np.where(kept[last], last, nearest[last])
    request_group = number[request_node]
    request_depth = np.where(request_group >= 0, np.minimum(end[request_node], tokens.lengths - 1), 0)

    path = _paths(parent)
    # Forest order over groups and requests: by the place of the first request below; an ancestor first.
    place = np.empty(last.size, dtype=np.int32)
    place[forest.order] = np.arange(last.size)
    rank = np.empty(chosen.size + last.size, dtype=np.int32)
    by_place = np.lexsort(
        (
            np.concatenate((depth, np.full(last.size, np.iinfo(np.int32).max, dtype=np.int32))),
            np.concatenate((forest.first[chosen], place)),
        )
    )
    rank[by_place] = np.arange(rank.size)
    return PrefixGroups(
        parent=parent,
        start=start,
        length=length,
        depth=depth,
        requests=forest.requests[chosen],
        path=path,
        request_group=request_group,
        request_depth=request_depth.astype(np.int32),
        rank=rank[: chosen.size],
        request_rank=rank[chosen.size :],
    )


def _no_node(forest: PrefixForest, shared: Bool, end: Int32, expected_new_tokens: Int32, costs: GroupCosts) -> Bool:
    """`none`: share nothing; the control."""
    return np.zeros_like(shared)


def _by_cost(forest: PrefixForest, shared: Bool, end: Int32, expected_new_tokens: Int32, costs: GroupCosts) -> Bool:
    """`tree`: keep a node where computing it once saves more than one more merge in every row below it costs.

    From the leaves up: a node that is given up is computed again by each of its units (kept nodes and requests
    right below it), and saves one partial result in each row of each reader (FastTree, MLSys'25, with the price of
    a row in place of that of a tile).
    """
    kept = shared.copy()
    units = np.zeros(len(forest), dtype=np.int64)
    np.add.at(units, forest.node[shared[forest.node]], 1)
    leaves = np.flatnonzero(~shared & (forest.parent >= 0))
    np.add.at(units, forest.parent[leaves], 1)
    # Rows that would merge the node's partial result: what its readers sample, and the shared rows below it.
    # (The own prompt tokens of the readers are left out: they are merged once each and weigh little.)
    sampled = np.concatenate(([0], np.cumsum(expected_new_tokens[forest.order], dtype=np.int64)))
    rows = sampled[forest.first + forest.requests] - sampled[forest.first]
    for nodes in reversed(_by_level(forest, shared)):
        parent = forest.parent[nodes]
        before = np.where(parent >= 0, end[parent], 0)
        saved = (units[nodes] - 1) * (end[nodes] - before)
        kept[nodes] = saved * costs.row > rows[nodes] * costs.merge
        below = parent >= 0
        np.add.at(units, parent[below], np.where(kept[nodes], 1, units[nodes])[below])
    return kept


GROUPINGS: dict[str, Callable[[PrefixForest, Bool, Int32, Int32, GroupCosts], Bool]] = {
    "tree": _by_cost,
    "none": _no_node,
}


def _by_level(forest: PrefixForest, chosen: Bool) -> list[Int64]:
    """The chosen nodes of each level, from the roots down."""
    nodes = np.flatnonzero(chosen)
    nodes = nodes[np.argsort(forest.level[nodes], kind="stable")]
    levels = forest.level[nodes]
    return [part for part in np.split(nodes, np.flatnonzero(np.diff(levels)) + 1) if part.size]


def _paths(parent: Int32) -> Int32:
    """The groups from the root down to each group, int32 `[G, L]`, padded with -1."""
    upward = [np.arange(parent.size, dtype=np.int32)]
    extended = np.append(parent, np.int32(-1))  # the parent of -1 is -1
    while upward[-1].size and (upward[-1] >= 0).any():
        upward.append(extended[upward[-1]])
    if len(upward) == 1:
        return np.empty((0, 0), dtype=np.int32)
    path = np.stack(upward[:-1][::-1], axis=1)  # root last among the -1s: shift each row to the left
    missing = (path < 0).sum(axis=1)
    column = np.arange(path.shape[1]) + missing[:, None]
    inside = column < path.shape[1]
    return np.where(inside, path[np.arange(parent.size)[:, None], np.where(inside, column, 0)], -1).astype(np.int32)
