"""In which order requests are admitted: plain functions by name. A new idea is a function and a line.

Shape letters: R requests, G groups, U units. A **unit** is a group with all requests below it, or a request alone;
every order but the controls keeps units together, and within a unit the order of the forest. Units are the outermost
groups, but for short headers that a large part of the job shares: those stay in memory whatever the order, and the
groups below them are what is put in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.prefix.groups import GroupCosts, PrefixGroups

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

AUTO = "auto"  # no order of its own: the one whose simulation is shortest
_BLOCKS = 1 << 14  # of units at most that the dual scan looks at one by one
_LARGE = 1 / 32  # share of the requests from which on a group is a large part of the job
_SHORT = 1 / 16  # share of the pool up to which a prefix is a short header


class OrderContext(NamedTuple):
    """What an order may look at beside the requests.

    Attributes:
        costs: what computing and reading cost.
        pool_tokens: KV tokens that the pool holds.
        seed: of the run.
    """

    costs: GroupCosts
    pool_tokens: int
    seed: int


def _input(groups: PrefixGroups, prompt: Int32, new: Int32, context: OrderContext) -> Int32:
    """`input`: as the job file has them; a control."""
    return np.arange(prompt.size, dtype=np.int32)


def _shuffle(groups: PrefixGroups, prompt: Int32, new: Int32, context: OrderContext) -> Int32:
    """`shuffle`: at random, by the run's seed; a control."""
    return np.random.default_rng(context.seed).permutation(prompt.size).astype(np.int32)


def _dfs(groups: PrefixGroups, prompt: Int32, new: Int32, context: OrderContext) -> Int32:
    """`dfs`: forest order, so that the readers of every prefix run together."""
    return np.argsort(groups.request_rank).astype(np.int32)


def _decode_ratio(groups: PrefixGroups, prompt: Int32, new: Int32, context: OrderContext) -> Int32:
    """`decode_ratio`: units by decode : prefill tokens, highest first (BatchLLM, arXiv 2412.03594, section 4.2), so
    that decode tokens of early units mix with prefill chunks of later ones.
    """
    unit, count = units(groups, context.pool_tokens)
    decode = np.bincount(unit, weights=new, minlength=count)
    return _by_unit(groups, unit, -decode / np.maximum(_rows(groups, prompt, unit, count, context.pool_tokens), 1))


def _density(groups: PrefixGroups, prompt: Int32, new: Int32, context: OrderContext) -> Int32:
    """`density`: dual scan (BlendServe, arXiv 2411.16102): units sorted by compute : memory time are taken from both
    ends, so that those that compute much and those that read much KV are under way together, each in the share of
    the KV memory at which the mix is as dense as the whole job.
    """
    unit, count = units(groups, context.pool_tokens)
    own = prompt - groups.request_depth
    computed = _rows(groups, prompt, unit, count, context.pool_tokens) + np.bincount(unit, weights=new, minlength=count)
    compute = context.costs.row * computed
    # KV tokens held, summed over steps: by each request while it decodes, and by its prefixes as long as anyone does.
    held = np.bincount(unit, weights=(own + new / 2) * new, minlength=count).astype(np.float64)
    longest = np.zeros(count)
    np.maximum.at(longest, unit, new)
    held += _prefix_tokens(groups, count, context.pool_tokens) * longest
    memory = np.maximum(context.costs.kv_token * held, np.finfo(float).tiny)
    # The scan goes over blocks of units of similar density where there are very many.
    used = np.flatnonzero(np.bincount(unit, minlength=count))
    by_density = used[np.argsort(-compute[used] / memory[used], kind="stable")]
    first = np.linspace(0, by_density.size, min(by_density.size, _BLOCKS) + 1).astype(np.int64)[:-1]
    block_compute, block_memory = (np.add.reduceat(column[by_density], first) for column in (compute, memory))
    turn = _dual_scan(block_compute / block_memory, block_memory, float(block_compute.sum() / block_memory.sum()))
    place = np.zeros(count)
    place[by_density] = np.repeat(turn, np.diff(np.append(first, by_density.size)))
    return _by_unit(groups, unit, place)


def choose_probe(unknown: npt.NDArray[np.bool_], share: float, seed: int) -> Int32:
    """Requests to run first so that the lengths of the others are better known: about `share` of those whose length is
    unknown, spread over the whole job (BlendServe samples each subtree so)."""
    drawn = np.random.default_rng(seed).random(unknown.size) < share
    return np.flatnonzero(unknown & drawn).astype(np.int32)


def _dual_scan(density: npt.NDArray[np.float64], memory: npt.NDArray[np.float64], whole: float) -> Int64:
    """The turn of each block, int64 `[blocks]`, where they are taken from both ends.

    The left end has density `left` and the right one `right`; the left ones get the share
    `(whole - right) / (left - right)` of the memory, here of KV tokens times steps.

    Args:
        density: descending.
        memory: what each block holds.
        whole: density of the job.
    """
    dense, weight = density.tolist(), memory.tolist()
    turn = np.empty(density.size, dtype=np.int64)
    low, high = 0, density.size - 1
    taken_left = taken = 0.0
    for number in range(density.size):
        left, right = dense[low], dense[high]
        share = (whole - right) / (left - right) if left > right else 1.0
        if taken_left <= share * taken:
            turn[low] = number
            taken_left += weight[low]
            taken += weight[low]
            low += 1
        else:
            turn[high] = number
            taken += weight[high]
            high -= 1
    return turn


def units(groups: PrefixGroups, pool_tokens: int) -> tuple[Int32, int]:
    """The unit of each request, int32 `[R]`, and how many numbers there are: groups first, then requests."""
    requests = np.arange(groups.request_group.size, dtype=np.int32)
    of_group = np.append(_unit_of_group(groups, pool_tokens), np.int32(-1))[groups.request_group]
    return np.where(of_group >= 0, of_group, len(groups) + requests), len(groups) + requests.size


def _unit_of_group(groups: PrefixGroups, pool_tokens: int) -> Int32:
    """The unit that each group belongs to, int32 `[G]`: the outermost group above it that is no header; -1 for a
    header."""
    if not len(groups):
        return np.empty(0, dtype=np.int32)
    large = groups.requests > max(_LARGE * groups.request_group.size, 2)
    header = large & (groups.depth + groups.length <= _SHORT * pool_tokens)
    # Below a group that is no header there are none: each path is headers, then a unit and what is in it.
    inside = np.where(groups.path >= 0, ~header[groups.path], False)
    first = inside.argmax(axis=1)
    rows = np.arange(len(groups))
    return np.where(inside[rows, first], groups.path[rows, first], np.int32(-1))


def _prefix_tokens(groups: PrefixGroups, count: int, pool_tokens: int) -> npt.NDArray[np.float64]:
    """Tokens of the groups of each unit, float64 `[U]`."""
    unit = _unit_of_group(groups, pool_tokens)
    inside = unit >= 0
    return np.bincount(unit[inside], weights=groups.length[inside], minlength=count).astype(np.float64)


def _rows(groups: PrefixGroups, prompt: Int32, unit: Int32, count: int, pool_tokens: int) -> npt.NDArray[np.float64]:
    """Prompt rows that each unit computes, float64 `[U]`."""
    own = np.bincount(unit, weights=prompt - groups.request_depth, minlength=count)
    return own + _prefix_tokens(groups, count, pool_tokens)


def _by_unit(groups: PrefixGroups, unit: Int32, key: npt.NDArray[np.float64]) -> Int32:
    """Requests by the key of their unit, lowest first; ties by the unit's first place in forest order."""
    first = np.full(key.size, np.iinfo(np.int32).max, dtype=np.int32)
    np.minimum.at(first, unit, groups.request_rank)
    return np.lexsort((groups.request_rank, first[unit], key[unit])).astype(np.int32)


Order = Callable[[PrefixGroups, Int32, Int32, OrderContext], Int32]

ORDERS: dict[str, Order] = {
    "input": _input,
    "shuffle": _shuffle,
    "dfs": _dfs,
    "decode_ratio": _decode_ratio,
    "density": _density,
}
# What `auto` chooses from, of equals the first; the controls are for comparison.
CANDIDATES = ("dfs", "decode_ratio", "density", "input")
