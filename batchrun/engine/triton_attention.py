"""Attention by the Triton kernels: one launch for shared prefixes and own KV of all rows of a step.

On CPU tensors it runs under Triton's interpreter (`TRITON_INTERPRET=1`), which is how it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from batchrun_kernels.attention import Plan, SharedPrefixAttention, store_kv
from batchrun_kernels.work_list import Columns
from transformers import AttentionInterface

from batchrun.engine.attention import refuse_unknown
from batchrun.engine.batch import StepTensors
from batchrun.engine.kv_cache import KVCache, PageTables
from batchrun.schedule.step import Step


class TritonBatch(StepTensors):
    """A step for the kernels: its rows, and a work list for each window that layers have.

    Args:
        windows: those that layers have asked for so far, None for one that sees all; others are added as layers ask.
        rows: as for `StepTensors`.
    """

    def __init__(
        self,
        step: Step,
        tables: PageTables,
        attention: SharedPrefixAttention,
        windows: list[int | None],
        rows: int | None = None,
    ) -> None:
        super().__init__(step, tables, rows)
        self.attention = attention
        self._windows = windows
        reads = step.prefix_reads
        self._columns = Columns(
            sequence=step.sequence,
            start=step.start,
            length=step.length,
            depth=step.depth,
            first_row=reads.first_row,
            rows=reads.rows,
            read_sequence=reads.sequence,
            tokens=reads.length,
            position=reads.position,
            pages=tables.pages,
        )
        self._lists = {window: attention.make(self._columns, window=window) for window in windows}
        self._plans: dict[int | None, Plan] = {}
        for window, made in self._lists.items():
            work = made.data
            if self._padded:  # as long as the longest, so that a graph finds all that follows in the same place
                work = np.zeros(attention.room[0], dtype=np.int32)
                work[: made.data.size] = made.data
            self.arrays[f"work list, window {window}"] = work

    def bind(self, tensors: Mapping[str, torch.Tensor], sampled_before: torch.Tensor | None) -> None:
        super().bind(tensors, sampled_before)
        for window, made in self._lists.items():
            self._plans[window] = Plan(made, tensors[f"work list, window {window}"], window)

    def plan(self, window: int | None) -> Plan:
        """The work list of layers whose rows see `window` keys at most."""
        if window not in self._plans:  # the first step of a model: later ones bring it with all else
            self._plans[window] = self.attention.plan(self._columns, window=window)
            self._windows.append(window)
        return self._plans[window]

    @property
    def graph_key(self) -> tuple[Hashable, Hashable] | None:
        # The first step of a model makes its work lists on the way, which no graph can hold.
        return (self.num_rows, self.attention.room) if self._padded and self._lists else None


def triton_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    batch: TritonBatch,
    kv_cache: KVCache,
    **features: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of one layer over the packed rows of a step, as transformers' attention interface calls it.

    Args:
        query: `[1, Hq, T, D]`.
        key, value: `[1, Hkv, T, D]`, of the new rows; they are stored before any row attends.
        sliding_window: keys that a row sees at most, itself included.
        softcap: scores s become `softcap * tanh(s / softcap)`.
        s_aux: `[Hq]`, attention sinks.

    Returns:
        `[1, T, Hq, D]` and None.

    Raises:
        ModelRefused: the layer asks for something that is not computed here.
    """
    refuse_unknown(features, attention_mask, dropout)
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = kv_cache.keys[layer], kv_cache.values[layer]
    rows = batch.num_rows
    # [T, H, D] from [1, H, T, D]; by way of [T, H * D], so that the strides of a single head are those of many.
    query, key, value = (
        new[0].transpose(0, 1).reshape(rows, -1).view(rows, new.shape[1], new.shape[3]) for new in (query, key, value)
    )
    store_kv(key, value, keys, values, batch.store_index)
    out = batch.attention.run(
        query,
        keys,
        values,
        batch.plan(sliding_window),
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


AttentionInterface.register("batchrun_triton", triton_attention)
