"""Prefix-sharing groups: which shared runs of the forest become sequences of their own.

A shared prefix never samples, so each request computes at least the last token of its prompt itself, also where
that token lies in a shared node: it then reads one token less of that node than the others do. A node that is not
kept is computed again by each of those below it, as part of their own tokens.

On several levels a group extends that of the nearest kept node above it. On a single level each group holds its prefix
from the first token on, and a request reads the group of the nearest kept node alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.prefix.forest import PrefixForest
from batchrun.tokens import TokenTable

Bool = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_BLOCK = 1 << 16  # requests looked at at once
_ABREAST = 256  # requests that are expected to decode at once
_LEAST_SAVING = 0.02  # of the time that something takes: less lies within the error of the cost model
_TIE = 1e-6  # what a node must save at least, in rows, so that rounding keeps none that saves nothing


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
        parent: int32 `[G]`, the group whose prefix this one extends, or -1: it holds its prefix from the first token.
        start: int64 `[G]`, where the group's own tokens begin in `TokenTable.ids`.
        length: int32 `[G]`, the group's own tokens, at least 1.
        depth: int32 `[G]`, tokens before them.
        requests: int32 `[G]`, requests that read the group's KV.
        path: int32 `[G, L]`, the groups from the root to the group itself, then -1.
        request_group: int32 `[R]`, the deepest group a request reads, or -1.
        request_depth: int32 `[R]`, tokens of the request's prompt that it reads from groups: all of theirs, or one
            token less than its prompt.
        rank, request_rank: int32 `[G]` and `[R]`, places in one order of groups and requests together: the readers of
            a group, and the groups that extend it, are a range and follow it. Forest order, as far as that goes.
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


@dataclass(frozen=True, slots=True)
class SharedNodes:
    """The nodes of a forest that two requests or more pass, and the requests below them, in columns.

    Shape letters: S shared nodes, numbered depth first, R requests.

    Attributes:
        parent: int32 `[S]`, or -1. A node above a shared one is shared.
        levels: the nodes of each level, from the roots down.
        begin: int64 `[S]`, where a prompt that has the node begins in `TokenTable.ids`.
        end: int32 `[S]`, tokens of such a prompt up to the node's last one that anyone can read: the last token of
            identical prompts is of no use, unless another prompt goes on from it.
        below: int64 `[S]`, tokens of all nodes below.
        requests: int32 `[S]`, requests that pass the node or end in it.
        first: int32 `[S]`, the place of the first of them in `order`, where they are neighbours.
        order: int32 `[R]`, the requests in forest order.
        node: int32 `[R]`, the deepest shared node of each request, or -1.
        prompt: int32 `[R]`, tokens of each prompt.
        own: int32 `[R]`, those that no other request has: at least the last one, which has to be computed.
    """

    parent: Int32
    levels: list[Int64]
    begin: Int64
    end: Int32
    below: Int64
    requests: Int32
    first: Int32
    order: Int32
    node: Int32
    prompt: Int32
    own: Int32

    def __len__(self) -> int:
        return self.parent.size

    @classmethod
    def of(cls, forest: PrefixForest, prompt: Int32) -> SharedNodes:
        """The shared nodes of the forest of prompts with these lengths, int32 `[R]`."""
        shared = np.flatnonzero(forest.requests > 1)
        number = np.full(len(forest) + 1, -1, dtype=np.int32)  # [-1] stays -1: nothing is above a root
        number[shared] = np.arange(shared.size)
        node = number[forest.node]
        alone = node < 0
        node[alone] = number[forest.parent[forest.node[alone]]]
        goes_on = np.zeros(len(forest), dtype=bool)
        goes_on[forest.parent[forest.parent >= 0]] = True
        stop = forest.depth[shared] + forest.length[shared]
        tokens = np.zeros(len(forest) + 1, dtype=np.int64)
        np.cumsum(forest.length, out=tokens[1:])
        # Those below follow a node, up to the first whose requests are others.
        after = np.searchsorted(forest.first, forest.first[shared] + forest.requests[shared])
        by_level = np.argsort(forest.level[shared], kind="stable")
        own = prompt - np.append(stop, np.int32(0))[node]
        return cls(
            parent=number[forest.parent[shared]],
            levels=np.split(by_level, np.cumsum(np.bincount(forest.level[shared]))[:-1]) if shared.size else [],
            begin=forest.start[shared] - forest.depth[shared],
            end=stop - ~goes_on[shared],
            below=tokens[after] - tokens[shared + 1],
            requests=forest.requests[shared],
            first=forest.first[shared],
            order=forest.order,
            node=node,
            prompt=prompt,
            own=np.maximum(own, 1, out=own),
        )

    def per_node(self, of_requests: Callable[[slice], npt.NDArray[Any]]) -> Floats:
        """The sum over the requests whose deepest shared node is each one, float64 `[S]`; requests without one count
        nowhere.

        Args:
            of_requests: what to add up, of a range of requests; asked for some at a time.
        """
        total = np.zeros(len(self) + 1)  # [-1] is for requests without any
        for rows in self.ranges():
            # Where both are of one type, numpy adds twenty times as fast.
            np.add.at(total, self.node[rows], of_requests(rows).astype(np.float64, copy=False))
        return total[:-1]

    def ranges(self) -> Iterator[slice]:
        """All requests, some at a time: what is worked out for each takes little memory then."""
        return (slice(low, low + _BLOCK) for low in range(0, self.node.size, _BLOCK))


class Choice(NamedTuple):
    """What a grouping chooses.

    Attributes:
        kept: bool `[S]`, the shared nodes that become groups.
        nested: whether groups extend each other (several levels) or each begins at the first token (a single one).
    """

    kept: Bool
    nested: bool


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
    shared = SharedNodes.of(forest, tokens.lengths)
    kept, nested = GROUPINGS[grouping](shared, expected_new_tokens, costs)
    chosen = np.flatnonzero(kept)

    group = np.full(len(shared) + 1, -1, dtype=np.int32)  # of the nearest kept node from each node up; [-1]: none
    group[chosen] = np.arange(chosen.size)
    for nodes in shared.levels:
        others = nodes[~kept[nodes]]
        group[others] = group[shared.parent[others]]
    end = shared.end[chosen]
    parent = group[shared.parent[chosen]] if nested else np.full(chosen.size, -1, dtype=np.int32)
    depth = np.append(end, np.int32(0))[parent]
    request_group = group[shared.node]
    request_depth = np.minimum(np.append(end, np.int32(0))[request_group], shared.prompt - 1)

    first, requests = shared.first[chosen], shared.requests[chosen]
    place = np.empty(len(tokens), dtype=np.int32)
    place[shared.order] = np.arange(len(tokens), dtype=np.int32)
    if not nested:
        # The readers of an inner prefix stand among those of an outer one: take them out, group by group.
        readers = request_group >= 0
        block = place.copy()
        block[readers] = first[request_group[readers]]
        place[np.lexsort((place, request_group, block))] = np.arange(len(tokens), dtype=np.int32)
        requests = np.bincount(request_group[readers], minlength=chosen.size).astype(np.int32)
        first = np.full(chosen.size, len(tokens), dtype=np.int32)
        np.minimum.at(first, request_group[readers], place[readers])
    before = np.cumsum(np.bincount(first, minlength=len(tokens)), dtype=np.int32)  # groups, by place
    return PrefixGroups(
        parent=parent,
        start=shared.begin[chosen] + depth,
        length=end - depth,
        depth=depth,
        requests=requests,
        path=_paths(parent),
        request_group=request_group,
        request_depth=request_depth,
        # A group stands before the first of its readers, and after the groups that begin there and are less deep.
        rank=(first + np.arange(chosen.size)).astype(np.int32),
        request_rank=place + before[place],
    )


def _none(shared: SharedNodes, expected_new_tokens: Int32, costs: GroupCosts) -> Choice:
    """`none`: share nothing; the control."""
    return Choice(np.zeros(len(shared), dtype=bool), nested=True)


def _greedy(shared: SharedNodes, expected_new_tokens: Int32, costs: GroupCosts) -> Choice:
    """`greedy`: a single level, fewest prompt tokens computed, by one step of promotion after another (MaximizeReuse of
    BatchLLM, arXiv 2412.03594, section 4.1); a baseline.

    From the leaves up: where node g is a child of c, and c one of p, g is promoted to be a child of p that holds the
    tokens of c too, if that computes fewer tokens again than g's readers save: `(readers(g) - 1) * len(g) > len(c)`.
    Nodes that are promoted to the top are kept, and readers of others read them.
    """
    parent, end = shared.parent, shared.end
    readers = shared.requests.astype(np.int64)
    above = parent.copy()  # of promoted nodes, too
    climbing = np.empty(0, dtype=np.int64)
    for nodes in reversed(shared.levels[1:]):
        climbing = np.concatenate((climbing, nodes))
        up = above[climbing]
        over = parent[up]
        before = np.where(over >= 0, end[over], 0)
        promoted = (readers[climbing] - 1) * (end[climbing] - end[up]) > end[up] - before
        climbing, up = climbing[promoted], up[promoted]
        np.subtract.at(readers, up, readers[climbing])
        above[climbing] = parent[up]
    kept = (above < 0) & (readers > 1) & (end > 0)
    return Choice(kept, nested=False)


def _exact(shared: SharedNodes, expected_new_tokens: Int32, costs: GroupCosts) -> Choice:
    """`exact`: a single level, fewest prompt tokens computed of all choices there are."""
    each = np.ones(len(shared))

    def reader(rows: slice) -> Floats:
        return np.ones(shared.node[rows].size)

    kept, _ = _best(shared, reader=reader, holder=each, fixed=0 * each, nested=False)
    return Choice(kept, nested=False)


def _tree(shared: SharedNodes, expected_new_tokens: Int32, costs: GroupCosts) -> Choice:
    """`tree`: several levels, the least time by the cost model of all choices there are (the aim of FastTree, MLSys'25,
    and PAT, ASPLOS'26, with the prices of the device in place of that of a tile)."""
    return Choice(_cheapest(shared, expected_new_tokens, costs)[0], nested=True)


def _auto(shared: SharedNodes, expected_new_tokens: Int32, costs: GroupCosts) -> Choice:
    """`auto`: as `tree`, but each group has to save at least 2 % of the time of its readers, and all groups 2 % of the
    job's: nothing is shared where prefixes are short or rare."""
    kept, saved = _cheapest(shared, expected_new_tokens, costs, least=_LEAST_SAVING)
    return Choice(kept & (saved >= _LEAST_SAVING), nested=True)


Grouping = Callable[[SharedNodes, Int32, GroupCosts], Choice]

GROUPINGS: dict[str, Grouping] = {
    "auto": _auto,
    "tree": _tree,
    "exact": _exact,
    "greedy": _greedy,
    "none": _none,
}


def _cheapest(
    shared: SharedNodes, expected_new_tokens: Int32, costs: GroupCosts, *, least: float = 0.0
) -> tuple[Bool, float]:
    """The nodes whose groups, on several levels, save most time, bool `[S]`, and which share of the job's they save.

    The time is that of the rows computed; of the KV tokens read, a request's own in each of its steps and a group's
    once in each step that has readers of it; of one more read in each such step; and of one more merge in each row
    that sees the group: those that sample, and the prompt tokens below (counted once, as if all below were shared).
    A group has readers in as many steps as the longest answer has tokens, and in more where they are too many to decode
    at once.

    Args:
        least: what a group has to save, as a share of the time that its readers take at least.
    """
    new, prompt, own, parent = expected_new_tokens, shared.prompt, shared.own, shared.parent
    merge, kv_token, read = (price / costs.row for price in (costs.merge, costs.kv_token, costs.read))

    def decoding(tokens: Int32, rows: slice) -> Floats:
        """The time of what each of some requests samples, where it reads so many tokens and those in each step."""
        return new[rows] + kv_token * new[rows] * (tokens[rows] + new[rows] / 2)

    # Without sharing; and where requests share all they can, without the rows of their prompts.
    alone = sum(float((prompt[rows] + decoding(prompt, rows)).sum()) for rows in shared.ranges())
    sampled, readers = shared.per_node(lambda rows: new[rows]), shared.per_node(lambda rows: decoding(own, rows))
    longest = np.zeros(len(shared) + 1, dtype=np.int32)
    for rows in shared.ranges():
        np.maximum.at(longest, shared.node[rows], new[rows])
    for nodes in reversed(shared.levels[1:]):  # what passes a node passes the one above it
        np.add.at(sampled, parent[nodes], sampled[nodes])
        np.add.at(readers, parent[nodes], readers[nodes])
        np.maximum.at(longest, parent[nodes], longest[nodes])
    steps = np.maximum(longest[:-1], sampled / _ABREAST)
    asked = least * (shared.below + readers)
    kept, saved = _best(
        shared,
        reader=lambda rows: 1 + kv_token * new[rows],
        holder=1 + kv_token * steps,
        fixed=merge * (sampled + shared.below) + read * steps + asked,
        nested=True,
    )
    return kept, (saved + float(asked[kept].sum())) / max(alone, 1.0)


def _best(
    shared: SharedNodes, *, reader: Callable[[slice], Floats], holder: Floats, fixed: Floats, nested: bool
) -> tuple[Bool, float]:
    """The nodes to keep so that most is saved, bool `[S]`, and what they save.

    With `x` the end of the nearest kept node above node v (0 without one), the most that v and all below it can save is

        S(v, x) = max(F(v, x), F(v, end(v)) - fixed(v) - holder(v) * (end(v) - x))
        F(v, x) = sum of S(c, x) over the children of v + reader(r) * x over the requests r that v is nearest to

    (without the `- x` on a single level). F and S are convex and piecewise linear in x: a constant, a slope at 0, and
    bends, where the slope grows. F never grows slower than what stands against it, so v is kept where x lies before
    the one point where they cross. So levels can be worked off from the leaves up in columns, without a table of all
    pairs of a node and a node above it.

    Args:
        reader: what each of a range of requests saves with each token that it reads, float64.
        holder: float64 `[S]`, what each token of a group costs; no more than all that read it save.
        fixed: float64 `[S]`, what else a group costs.
        nested: whether groups extend each other.
    """
    parent, end = shared.parent, shared.end
    slope = shared.per_node(reader)  # of F at 0
    value = np.zeros(len(shared))  # of F at 0
    # Requests that end in a node that others go on from compute one of its tokens again.
    end_of = np.append(end, np.int32(0))
    again = shared.per_node(lambda rows: reader(rows) * (shared.prompt[rows] == end_of[shared.node[rows]]))
    until = np.zeros(len(shared))  # a node is kept if the nearest kept one above it ends before
    bends = _Bends(np.empty(0, dtype=np.int64), np.empty(0), np.empty(0))
    saved = 0.0
    number = np.empty(len(shared), dtype=np.int64)  # of a node among those of its level
    for nodes in reversed(shared.levels):
        number[nodes] = np.arange(nodes.size)
        bends = bends._replace(of=number[bends.of])
        up = parent[nodes]
        top = np.where(up >= 0, end[up], 0)
        ends, own = end[nodes], holder[nodes]
        kept_slope = own if nested else np.zeros(nodes.size)
        kept_value = (
            value[nodes] + slope[nodes] * ends + bends.at(ends) - again[nodes] - fixed[nodes] - own * ends - _TIE
        )
        rises = slope[nodes] - kept_slope
        x = bends.crossing(value[nodes] - kept_value, rises, top)
        until[nodes] = x

        # S is what it is when kept up to x, and F from there on.
        crosses = (x > 0) & (x < np.inf)
        stay = (bends.x > np.where(x > 0, x, -1.0)[bends.of]) & (bends.x < top[bends.of])
        bends = _Bends(
            np.concatenate((up[bends.of[stay]], up[crosses])),
            np.concatenate((bends.x[stay], x[crosses])),
            np.concatenate((bends.slope[stay], (rises + bends.slope_at(x))[crosses])),
        )
        best_value = np.where(x > 0, kept_value, value[nodes])
        best_slope = np.where(x > 0, kept_slope, slope[nodes])
        inner = up >= 0
        np.add.at(value, up[inner], best_value[inner])
        np.add.at(slope, up[inner], best_slope[inner])
        saved += float(best_value[~inner].sum())

    kept = np.zeros(len(shared), dtype=bool)
    reach = np.zeros(len(shared) + 1)  # the end of the nearest kept node from each node up; [-1]: above a root, 0
    for nodes in shared.levels:
        above = reach[parent[nodes]]
        kept[nodes] = above < until[nodes]
        reach[nodes] = np.where(kept[nodes], end[nodes], above)
    return kept, saved


class _Bends(NamedTuple):
    """Where convex piecewise linear functions bend, in columns.

    Attributes:
        of: int64 `[B]`, the number of the function.
        x: float64 `[B]`, where it bends.
        slope: float64 `[B]`, by how much its slope grows there, at least 0.
    """

    of: Int64
    x: Floats
    slope: Floats

    def at(self, x: npt.NDArray[Any]) -> Floats:
        """What the bends of each function have added by its `x`, float64 `[functions]`."""
        return np.bincount(self.of, self.slope * np.maximum(x[self.of] - self.x, 0.0), x.size).astype(np.float64)

    def slope_at(self, x: Floats) -> Floats:
        """What they have added to its slope there."""
        return np.bincount(self.of, self.slope * (self.x <= x[self.of]), x.size).astype(np.float64)

    def crossing(self, value: Floats, slope: Floats, top: npt.NDArray[Any]) -> Floats:
        """Where in [0, top] each function reaches 0, float64 `[functions]`: 0 where it is never below, infinity where
        it is below at `top` too. The functions have the given values and slopes (at least 0) at 0.
        """
        x = top.astype(np.float64)
        below = value + slope * x + self.at(x) < 0
        # Newton's method from the right: on a convex function it never steps past the root.
        moved = True
        while moved:
            excess = value + slope * x + self.at(x)
            rises = slope + self.slope_at(x)
            step = np.divide(excess, rises, out=x.copy(), where=rises > 0)
            following = np.where(excess > 0, np.maximum(x - step, 0.0), x)
            moved = bool((x - following > _TIE).any())
            x = following
        return np.where(below, np.inf, x)


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
