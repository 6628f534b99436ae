"""The prefix forest: every distinct token run of a job exactly once.

A compact radix forest over whole prompts. A node is a run of tokens; a request ends at exactly one node, and may
end inside what other requests go on from. Identical prompts meet in one node.

Built by rounds over ranges of one permutation (a most-significant-digit radix sort that takes a whole run of
tokens per round): in each round the requests of a range are sorted by their next token, and each part of two or
more goes on as far as all of it agrees. All requests of a round are handled in one go by numpy. Tokens are compared a
window at a time, and again only those behind the end of a run in its last window: the work is linear in the tokens that
are shared. The number of rounds is the height of the forest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.columns import concat_ranges
from batchrun.tokens import TokenTable

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_WINDOW = 128  # tokens compared at once, at most 255
_BLOCK = 1 << 18  # tokens read at once while comparing: about what a cache holds


@dataclass(frozen=True, slots=True)
class PrefixForest:
    """Nodes in columns, numbered depth first (a parent before its children, children by their first token).

    Shape letters: N nodes, R requests.

    Attributes:
        parent: int32 `[N]`, or -1 for a root.
        start: int64 `[N]`, where the node's tokens begin in the job's `TokenTable.ids`.
        length: int32 `[N]`, tokens of the node, at least 1.
        depth: int32 `[N]`, tokens before the node.
        level: int32 `[N]`, nodes above the node.
        requests: int32 `[N]`, requests that end in the node or below it.
        node: int32 `[R]`, the node at which each request ends.
        order: int32 `[R]`, the requests in forest order (depth first); those below node n are
            `order[first[n]:first[n] + requests[n]]`.
        first: int32 `[N]`.
        prompt_logical: sum of the lengths of all prompts.
    """

    parent: Int32
    start: Int64
    length: Int32
    depth: Int32
    level: Int32
    requests: Int32
    node: Int32
    order: Int32
    first: Int32
    prompt_logical: int

    def __len__(self) -> int:
        return self.parent.size

    @property
    def prompt_physical(self) -> int:
        """Tokens of the forest: what is left of the prompts when every shared run is counted once."""
        return int(self.length.sum(dtype=np.int64))

    @property
    def saving(self) -> float:
        """Share of prompt tokens that sharing can save: the reuse ceiling, in [0, 1)."""
        return 1.0 - self.prompt_physical / self.prompt_logical if self.prompt_logical else 0.0


def build_forest(tokens: TokenTable, apart: npt.NDArray[np.bool_] | None = None) -> PrefixForest:
    """Build the forest of all prompts.

    Args:
        tokens: one prompt a row, none empty.
        apart: bool `[R]`, prompts that share nothing, each a tree of its own.

    Raises:
        ValueError: a prompt is empty.
    """
    lengths = tokens.lengths
    if lengths.size and int(lengths.min()) == 0:
        raise ValueError(f"request {int(lengths.argmin())} has an empty prompt")
    made, order, ends_at = _split(tokens.ids, tokens.offsets[:-1], lengths, apart)
    return _depth_first(made, order, ends_at, tokens.ids.size)


# Nodes level by level: for each column of nodes, an array a level.
_Made = dict[str, list[npt.NDArray[Any]]]


def _split(
    ids: Int32, offsets: Int64, lengths: Int32, apart: npt.NDArray[np.bool_] | None
) -> tuple[_Made, Int32, Int32]:
    """The nodes, the requests in forest order, and the node that each ends in."""
    num_requests = lengths.size
    order = np.arange(num_requests, dtype=np.int32)
    ends_at = np.full(num_requests, -1, dtype=np.int32)
    made: _Made = {name: [] for name in ("parent", "start", "length", "depth", "level", "requests", "first")}
    made_count = 0

    # The ranges of `order` still to split: [low, low + size), equal on their first `depth` tokens, below `node`.
    together = num_requests
    if apart is not None and apart.any():
        order = np.argsort(apart, kind="stable").astype(np.int32)
        together -= int(apart.sum())
    low = np.append(np.zeros(min(together, 1), dtype=np.int32), np.arange(together, num_requests, dtype=np.int32))
    size = np.ones(low.size, dtype=np.int32)
    size[: min(together, 1)] = together
    depth = np.zeros(low.size, dtype=np.int32)
    node = np.full(low.size, -1, dtype=np.int32)

    while low.size:
        members, key = _by_next_token(ids, offsets, lengths, order, low, size, depth)
        part = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1]))).astype(np.int32)
        part_size = np.diff(part, append=np.int32(key.size))
        key = key[part]  # of which the whole may be as long as the job
        part_range = (key >> 32).astype(np.int32)
        goes_on = (key & 0xFFFFFFFF) != 0
        ends_here = np.repeat(~goes_on, part_size)
        ends_at[members[ends_here]] = np.repeat(node[part_range], part_size)[ends_here]

        part, part_size, part_range = part[goes_on], part_size[goes_on], part_range[goes_on]
        part_depth = depth[part_range]
        leader = members[part]
        run = lengths[leader] - part_depth
        shared = part_size > 1
        run[shared] = _common_run(ids, offsets, lengths, members, part[shared], part_size[shared], part_depth[shared])

        numbers = np.arange(made_count, made_count + part.size, dtype=np.int32)
        made_count += part.size
        # The ranges lie one after another in `members`, and apart in `order`.
        first = part + (low - (np.cumsum(size, dtype=np.int32) - size))[part_range]
        level = np.full(part.size, len(made["level"]), dtype=np.int32)
        columns = (node[part_range], offsets[leader] + part_depth, run, part_depth, level, part_size, first)
        for name, column in zip(made, columns, strict=True):
            made[name].append(column)
        ends_at[leader[~shared]] = numbers[~shared]
        low, size, depth, node = first[shared], part_size[shared], (part_depth + run)[shared], numbers[shared]

    return made, order, ends_at


def _depth_first(made: _Made, order: Int32, ends_at: Int32, prompt_logical: int) -> PrefixForest:
    """The nodes in one numbering, depth first: `made` is emptied on the way, so that no node is held twice for long."""

    def column(name: str) -> npt.NDArray[Any]:
        return np.concatenate([np.empty(0, dtype=np.int32), *made.pop(name)])

    # By place in the order, and an ancestor, which was made before its descendants, in front of them.
    first = column("first")
    old = np.argsort(first, kind="stable").astype(np.int32)
    first = first[old]
    new = np.empty_like(old)
    new[old] = np.arange(old.size, dtype=np.int32)
    parent = column("parent")[old]
    return PrefixForest(
        parent=np.where(parent >= 0, new[parent], np.int32(-1)),
        start=column("start")[old].astype(np.int64, copy=False),
        length=column("length")[old],
        depth=column("depth")[old],
        level=column("level")[old],
        requests=column("requests")[old],
        node=new[ends_at],
        order=order,
        first=first,
        prompt_logical=prompt_logical,
    )


def _by_next_token(
    ids: Int32, offsets: Int64, lengths: Int32, order: Int32, low: Int32, size: Int32, depth: Int32
) -> tuple[Int32, Int64]:
    """Sort the requests in some ranges of `order` by range and next token; returns them, one range after another, and
    their keys: the range, and in the low 32 bits the token's id + 1, or 0 where the request ends.

    A function of its own, so that what it takes to sort is let go before runs are compared.
    """
    places = concat_ranges(low, size)
    members = order[places]
    before = np.repeat(depth, size)
    token = ids.take(offsets[members] + before, mode="clip").view(np.uint32)
    token += 1
    token[lengths[members] == before] = 0  # what was taken is of the next prompt
    key = np.repeat(np.arange(low.size) << 32, size)
    key |= token
    del token, before
    by_key = np.argsort(key, kind="stable")
    members = members[by_key]
    order[places] = members
    return members, key[by_key]


def _common_run(
    ids: Int32, offsets: Int64, lengths: Int32, members: Int32, part: Int32, part_size: Int32, depth: Int32
) -> Int32:
    """How many tokens from `depth` on all members of each part have in common, int32 `[parts]`.

    Every member is compared with the one before it, a window of tokens at a time; a part leaves the comparison as
    soon as two members differ.
    """
    run = np.zeros(part.size, dtype=np.int32)
    if not part.size:
        return run
    in_parts = members[concat_ranges(part, part_size)]
    limit = np.minimum.reduceat(lengths[in_parts], np.cumsum(part_size) - part_size) - depth
    del in_parts
    active = np.arange(part.size)
    while active.size:
        left = (limit - run)[active]
        width = min(_WINDOW, int(left.max()))
        sizes = part_size[active]
        first = np.cumsum(sizes) - sizes
        begin = offsets[members[concat_ranges(part[active], sizes)]]
        begin += np.repeat((depth + run)[active], sizes)
        agreed = np.full(begin.size, width, dtype=np.uint8)
        block = _BLOCK // width
        for at in range(0, begin.size - 1, block):
            tokens = _windows(ids, begin[at : at + block + 1], width)
            same = tokens[1:] == tokens[:-1]
            # argmin finds the first difference; a pair without any agrees on the whole window.
            agreed[at + 1 : at + tokens.shape[0]] = np.where(same.all(axis=1), width, same.argmin(axis=1))
        agreed[first] = width  # the first member of a part has none before it
        common = np.minimum(np.minimum.reduceat(agreed, first), left)
        run[active] += common
        active = active[(common == width) & (common < left)]
    return run


def _windows(ids: Int32, begin: Int64, width: int) -> Int32:
    """`width` tokens from each place in `begin` on, int32 `[begins, width]`; past the end of `ids`, any."""
    last = ids.size - width
    # A view of overlapping rows, so that numpy copies a row at a time: many times faster than by token.
    tokens = np.lib.stride_tricks.sliding_window_view(ids, width)[np.minimum(begin, last)]
    late = np.flatnonzero(begin > last)
    tokens[late] = ids.take(begin[late, None] + np.arange(width), mode="clip")
    return tokens
