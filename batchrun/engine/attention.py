"""Attention over shared prefixes and own KV on the CPU.

A prefix is read once for all its readers: their query heads become the rows of one call (Hydragen, arXiv 2402.05099),
and the KV is a view of the pool. Partial results over disjoint KV are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface

from batchrun.engine.batch import Batch, Read
from batchrun.engine.kv_cache import KVCache
from batchrun.errors import ModelRefused

# What a layer may pass besides q, k and v without asking for something that is not computed here.
_HARMLESS = {"position_ids", "use_cache", "is_causal", "position_embeddings", "cache_position", "output_attentions"}

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: torch.Tensor, kv: torch.Tensor, batch: Batch, pool: torch.Tensor, *, scaling: float, window: int | None
) -> torch.Tensor:
    """The attention of one layer over the packed rows of a step. Query heads are in the order of `decoder`: those of
    the same place in their groups side by side.

    Args:
        query: `[T, G * Hkv, D]`, contiguous.
        kv: `[T, 2, Hkv, D]`, of the new rows; they are stored before any row attends.
        pool: `[places, 2, Hkv, D]`, the layer's KV.
        window: keys that a row sees at most, itself included.

    Returns:
        `[T, G * Hkv * D]`.
    """
    pool.index_copy_(0, batch.store_index, kv)
    rows, heads, dim = query.shape
    kv_heads = kv.shape[2]
    group = heads // kv_heads
    work = batch.work(window)
    out, lse = batch.partial_results(window, heads, dim)

    for read in work.reads:
        count = read.kv.sequences
        some = query[read.first : read.first + count * read.rows]
        if read.row_index is not None:
            some = query.index_select(0, read.row_index)
        # The rows of a KV head: all query heads of all rows that read it.
        part, part_lse = _by_rows(
            some.view(count, read.rows * group, kv_heads, dim), read.kv.of(pool), mask=read.mask, scaling=scaling
        )
        _write(read, part.reshape(-1, heads, dim), out[read.partial], 0.0)
        _write(read, part_lse.reshape(-1, heads), lse[read.partial], float("-inf"))

    for causal in work.causal:
        here = slice(causal.first, causal.first + causal.chunks * causal.rows)
        shape = (causal.chunks, causal.rows)
        new = kv[here].unflatten(0, shape)
        by_place = query[here].view(*shape, group, kv_heads, dim)
        part_out = out[causal.partial, here].view(*shape, group, kv_heads, dim)
        part_of_lse = lse[causal.partial, here].view(*shape, group, kv_heads)
        for g in range(group):  # is_causal wants the rows of one head in order
            part, part_lse = _by_rows(by_place[:, :, g], new, causal=True, scaling=scaling)
            part_out[:, :, g] = part
            part_of_lse[:, :, g] = part_lse

    merged = out[0] if work.partials == 1 else _merge(out, lse)
    return merged.to(query.dtype).view(rows, heads * dim)


def _by_rows(
    query: torch.Tensor,
    kv: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of `[B, n, Hkv, D]` to `[B, M, 2, Hkv, D]`, and its log-sum-exp, `[B, n, Hkv]`."""
    keys, values = kv.unbind(2)
    out, lse = _flash(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        is_causal=causal,
        attn_mask=mask,
        scale=scaling,
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _write(read: Read, part: torch.Tensor, room: torch.Tensor, nothing: float) -> None:
    """Put what a read gave, `[B * n, ...]`, into its rows of `[T, ...]`."""
    if read.blind is not None:
        part = part.masked_fill(read.blind.view(-1, *(1 for _ in part.shape[1:])), nothing)
    if read.row_index is None:
        room[read.first : read.first + len(part)] = part
        return
    index = read.row_index
    if read.real is not None:
        part, index = part.index_select(0, read.real), index[read.real]
    room.index_copy_(0, index, part.to(room.dtype))


def _merge(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Merge partial results `[P, ..., D]` by their log-sum-exp `[P, ...]`. Every row has at least one that is not
    empty: its own token."""
    weights = torch.softmax(lse, dim=0)[..., None]
    merged = out[0] * weights[0]
    for part, weight in zip(out[1:], weights[1:], strict=True):
        merged.addcmul_(part, weight)
    return merged


def batchrun_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    batch: Batch,
    kv_cache: KVCache,
    **features: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` as transformers' attention interface calls it, for layers of transformers.

    Args:
        query: `[1, Hq, T, D]`.
        key, value: `[1, Hkv, T, D]`, of the new rows.
        sliding_window: keys that a row sees at most, itself included.

    Returns:
        `[1, T, Hq, D]` and None.

    Raises:
        ModelRefused: the layer asks for something that is not computed here.
    """
    refuse_unknown(features, attention_mask, dropout)
    kv_heads = key.shape[1]
    by_place = query[0].unflatten(0, (kv_heads, -1)).permute(2, 1, 0, 3)  # [T, G, Hkv, D]
    kv = torch.stack((key[0], value[0])).permute(2, 0, 1, 3)
    layer: int = module.layer_idx  # type: ignore[assignment]
    pool = kv_cache.tokens[layer]
    out = attend(by_place.flatten(1, 2), kv, batch, pool, scaling=scaling, window=sliding_window)
    return out.view(by_place.shape).transpose(1, 2).flatten(1, 2)[None], None


def refuse_unknown(features: Mapping[str, Any], attention_mask: torch.Tensor | None, dropout: float) -> None:
    """Refuse a layer that asks for more than q, k and v and what is known to make no difference.

    Raises:
        ModelRefused: it does.
    """
    asked = [name for name, given in features.items() if given is not None and name not in _HARMLESS]
    if asked or attention_mask is not None or dropout:
        raise ModelRefused(f"The model's attention asks for {', '.join(asked) or 'a mask'}, which is not supported.")


AttentionInterface.register("batchrun", batchrun_attention)
