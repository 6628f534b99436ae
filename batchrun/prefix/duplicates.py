"""Which requests are the same, so that one of them is computed and gives its answer to all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchrun.prefix.forest import PrefixForest
from batchrun.request import Requests

Int32 = npt.NDArray[np.int32]


def first_alike(requests: Requests, forest: PrefixForest, defaulted: npt.NDArray[np.bool_]) -> Int32:
    """For each request the first one that must have the same answer, int32 `[R]`; itself, where none before it must.

    Requests must have the same answer if they have the same prompt (they end in one node of the forest), sampling and
    token limit, and, where they are not greedy, the same seed.

    Args:
        forest: of these requests.
        defaulted: bool `[R]`, requests whose token limit nobody set; it may yet be cut, and those of others not.
    """
    alike = np.arange(len(requests), dtype=np.int32)
    rows = np.flatnonzero(np.bincount(forest.node, minlength=len(forest))[forest.node] > 1)
    greedy = np.array([sampling.greedy for sampling in requests.sampling], dtype=bool)[requests.sampling_id[rows]]
    columns = (
        np.where(greedy, np.uint64(0), requests.seed[rows]),
        defaulted[rows],
        requests.max_new_tokens[rows],
        requests.sampling_id[rows],
        forest.node[rows],
    )
    order = np.lexsort(columns)  # stable: of equal requests the first stays in front
    begins = np.ones(rows.size, dtype=bool)
    begins[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    first = rows[order[begins]]
    alike[rows[order]] = first[np.cumsum(begins) - 1]
    return alike
