"""In which order requests are admitted: plain functions by name. A new idea is a function and a line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from batchrun.prefix.forest import PrefixForest
from batchrun.prefix.groups import PrefixGroups

Int32 = npt.NDArray[np.int32]


def _input(forest: PrefixForest, groups: PrefixGroups, prompt: Int32, new: Int32, seed: int) -> Int32:
    """`input`: as the job file has them; a control."""
    return np.arange(prompt.size, dtype=np.int32)


def _shuffle(forest: PrefixForest, groups: PrefixGroups, prompt: Int32, new: Int32, seed: int) -> Int32:
    """`shuffle`: at random, by the run's seed; a control."""
    return np.random.default_rng(seed).permutation(prompt.size).astype(np.int32)


def _dfs(forest: PrefixForest, groups: PrefixGroups, prompt: Int32, new: Int32, seed: int) -> Int32:
    """`dfs`: forest order, so that the readers of every prefix run together."""
    return forest.order


def _decode_ratio(forest: PrefixForest, groups: PrefixGroups, prompt: Int32, new: Int32, seed: int) -> Int32:
    """`decode_ratio`: outermost groups by decode : prefill tokens, highest first (BatchLLM, arXiv 2412.03594,
    section 4.2), so that decode tokens of early groups mix with prefill chunks of later ones; forest order within.
    """
    root = np.where(groups.request_group >= 0, groups.path[groups.request_group, 0], -1) if len(groups) else None
    if root is None:
        root = np.full(prompt.size, -1, dtype=np.int32)
    # A request without a group is a group of one.
    unit = np.where(root >= 0, root, len(groups) + np.arange(prompt.size))
    decode = np.bincount(unit, weights=new, minlength=len(groups) + prompt.size)
    prefill = np.bincount(unit, weights=prompt - groups.request_depth, minlength=decode.size)
    if len(groups):
        outermost = groups.path[:, 0]
        prefill[: len(groups)] += np.bincount(outermost, weights=groups.length, minlength=len(groups))
    ratio = decode / np.maximum(prefill, 1)
    first = np.full(decode.size, prompt.size, dtype=np.int64)  # ties: by the first place in forest order
    np.minimum.at(first, unit, groups.request_rank)
    return np.lexsort((groups.request_rank, first[unit], -ratio[unit])).astype(np.int32)


Order = Callable[[PrefixForest, PrefixGroups, Int32, Int32, int], Int32]

ORDERS: dict[str, Order] = {
    "input": _input,
    "shuffle": _shuffle,
    "dfs": _dfs,
    "decode_ratio": _decode_ratio,
}
