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

import numpy as np
import numpy.typing as npt

from batchrun.tokens import TokenTable, concat_ranges

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_WINDOW = 128  # tokens compared at once
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


def build_forest(tokens: TokenTable) -> PrefixForest:
    """Build the forest of all prompts.

    Args:
        tokens: one prompt a row, none empty.

    Raises:
        ValueError: a prompt is empty.
    """
    lengths = tokens.lengths
    if lengths.size and int(lengths.min()) == 0:
        raise ValueError(f"request {int(lengths.argmin())} has an empty prompt")
    made, order, ends_at = _split(tokens.ids, tokens.offsets[:-1], lengths)
    return _depth_first(made, order, ends_at, int(lengths.sum()))


# Of the nodes of one level: parent, start, length, depth, level, requests, first.
_Made = tuple[Int32, Int64, Int32, Int32, Int32, Int32, Int32]


def _split(ids: Int32, offsets: Int64, lengths: Int64) -> tuple[list[_Made], Int32, Int32]:
    """The nodes level by level, the requests in forest order, and the node that each ends in."""
    num_requests = lengths.size
    order = np.arange(num_requests, dtype=np.int32)
    ends_at = np.full(num_requests, -1, dtype=np.int32)
    made: list[_Made] = []
    made_count = 0

    # The ranges of `order` still to split: [low, low + size), equal on their first `depth` tokens, below `node`.
    low = np.zeros(min(num_requests, 1), dtype=np.int64)
    size = np.full(low.size, num_requests, dtype=np.int64)
    depth = np.zeros(low.size, dtype=np.int64)
    node = np.full(low.size, -1, dtype=np.int32)

    while low.size:
        places, members, key = _by_next_token(ids, offsets, lengths, order, low, size, depth)
        order[places] = members

        part = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        part_size = np.diff(np.append(part, key.size))
        part_range = (key[part] >> 32).astype(np.int64)
        goes_on = (key[part] & 0xFFFFFFFF) != 0
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
        first = places[part]
        made.append(
            (
                node[part_range],
                offsets[leader] + part_depth,
                run.astype(np.int32),
                part_depth.astype(np.int32),
                np.full(part.size, len(made), dtype=np.int32),
                part_size.astype(np.int32),
                first.astype(np.int32),
            )
        )
        ends_at[leader[~shared]] = numbers[~shared]
        low, size, depth, node = first[shared], part_size[shared], (part_depth + run)[shared], numbers[shared]

    return made, order, ends_at


def _depth_first(made: list[_Made], order: Int32, ends_at: Int32, prompt_logical: int) -> PrefixForest:
    """The nodes in one numbering, depth first: `made` is emptied on the way, so that no node is held twice for long."""
    if not made:
        empty32 = np.empty(0, dtype=np.int32)
        return PrefixForest(
            parent=empty32,
            start=np.empty(0, dtype=np.int64),
            length=empty32,
            depth=empty32,
            level=empty32,
            requests=empty32,
            node=empty32,
            order=order,
            first=empty32,
            prompt_logical=prompt_logical,
        )
    parent, start, length, node_depth, level, requests, first = (
        np.concatenate(columns) for columns in zip(*made, strict=True)
    )
    made.clear()
    # By place in the order, an ancestor (less deep) before its descendants.
    old = np.lexsort((node_depth, first)).astype(np.int32)
    new = np.empty_like(old)
    new[old] = np.arange(old.size, dtype=np.int32)
    parent = parent[old]
    return PrefixForest(
        parent=np.where(parent >= 0, new[parent], np.int32(-1)),
        start=start[old],
        length=length[old],
        depth=node_depth[old],
        level=level[old],
        requests=requests[old],
        node=new[ends_at],
        order=order,
        first=first[old],
        prompt_logical=prompt_logical,
    )


def _by_next_token(
    ids: Int32, offsets: Int64, lengths: Int64, order: Int32, low: Int64, size: Int64, depth: Int64
) -> tuple[Int64, Int32, Int64]:
    """The places of some ranges of `order` one after another, the requests there sorted by range and next token, and
    their keys: the range, and in the low 32 bits the token's id + 1, or 0 where the request ends.

    A function of its own, so that what it takes to sort is let go before runs are compared.
    """
    places = concat_ranges(low, size)
    of_range = np.repeat(np.arange(low.size), size)
    members = order[places]
    member_depth = depth[of_range]
    more = np.flatnonzero(lengths[members] > member_depth)
    key = of_range.astype(np.int64) << 32
    key[more] |= ids[offsets[members[more]] + member_depth[more]].astype(np.int64) + 1
    by_key = np.argsort(key, kind="stable")
    return places, members[by_key], key[by_key]


def _common_run(
    ids: Int32, offsets: Int64, lengths: Int64, members: Int32, part: Int64, part_size: Int64, depth: Int64
) -> Int64:
    """How many tokens from `depth` on all members of each part have in common, int64 `[parts]`.

    Every member is compared with the one before it, a window of tokens at a time; a part leaves the comparison as
    soon as two members differ.
    """
    run = np.zeros(part.size, dtype=np.int64)
    if not part.size:
        return run
    in_parts = members[concat_ranges(part, part_size)]
    limit = np.minimum.reduceat(lengths[in_parts], np.cumsum(part_size) - part_size) - depth
    active = np.arange(part.size)
    while active.size:
        left = (limit - run)[active]
        width = min(_WINDOW, int(left.max()))
        sizes = part_size[active]
        first = np.cumsum(sizes) - sizes
        begin = offsets[members[concat_ranges(part[active], sizes)]] + np.repeat((depth + run)[active], sizes)
        agreed = np.full(begin.size, width)
        block = _BLOCK // width
        for low in range(0, begin.size - 1, block):
            tokens = _windows(ids, begin[low : low + block + 1], width)
            same = tokens[1:] == tokens[:-1]
            # argmin finds the first difference; a pair without any agrees on the whole window.
            agreed[low + 1 : low + tokens.shape[0]] = np.where(same.all(axis=1), width, same.argmin(axis=1))
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
