"""The least that a workload can take: its matrix products at the rates of `adapters/floor.py`, and reading its KV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from scripts.bench.peers.adapters.protocol import in_common


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that no engine can go below.

    Attributes:
        products: matrix products of all rows, each distinct prompt token once, and one step for each token of the
            longest answer, in which all requests that are not done have a row.
        kv: reading the keys and values of every such step once, a shared one once for all that read it.
        products_per_second: floating-point operations of the layers' products at the best number of rows.
        bytes_per_second: read from memory.
    """

    products: float
    kv: float
    products_per_second: float
    bytes_per_second: float


def physical_tokens(prompts: Sequence[list[int]]) -> int:
    """Distinct prompt tokens: each node of the tree of prompts once."""
    ordered = sorted(prompts)
    shared = sum(in_common(a, b) for a, b in pairwise(ordered))
    return sum(map(len, ordered)) - shared


def floor_of(prompts: Sequence[list[int]], outputs: Sequence[int], kv_bytes: int, rates: Mapping[str, Any]) -> Floor:
    """The floor of a workload.

    Args:
        kv_bytes: bytes of the keys and values of one token.
        rates: `details` of `adapters/floor.py`.
    """
    rows = np.array(rates["rows"], dtype=float)
    layers, head = np.array(rates["layers_seconds"]), np.array(rates["head_seconds"])
    lengths = np.array(outputs)
    live = np.array([int((lengths > step).sum()) for step in range(int(lengths.max()))])
    per_row = float((layers / rows).min())

    def products(seconds: np.ndarray, counts: np.ndarray) -> float:
        most = counts.max(initial=1)
        if most > rows[-1]:  # beyond what was measured the rate stays
            known, times = np.append(rows, most), np.append(seconds, seconds[-1] * most / rows[-1])
        else:
            known, times = rows, seconds
        return float(np.interp(counts, known, times).sum())

    tokens, held = 0, {len(prompts): physical_tokens(prompts)}
    for step, count in enumerate(live.tolist()[1:], 1):
        if count not in held:
            held[count] = physical_tokens([p for p, n in zip(prompts, outputs, strict=True) if n > step])
        tokens += held[count] + count * step
    return Floor(
        products=physical_tokens(prompts) * per_row + products(layers, live[1:]) + products(head, live),
        kv=tokens * kv_bytes / rates["read_bytes_per_second"],
        products_per_second=rates["layers_flop_per_row"] / per_row,
        bytes_per_second=rates["read_bytes_per_second"],
    )
