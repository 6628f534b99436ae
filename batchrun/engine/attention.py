"""Attention over shared prefixes and own KV on the CPU: by compiled kernels, or by torch where there are none.

By torch, a prefix is read once for all its readers: their query heads become the rows of one call (Hydragen, arXiv
2402.05099), and the KV is a view of the pool. Partial results over disjoint KV are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface

from batchrun.engine.batch import Batch, CompiledBatch, Read
from batchrun.engine.kv_cache import KVCache
from batchrun.errors import ModelRefused

# What a layer may pass besides q, k and v without asking for something that is not computed here.
_HARMLESS = {
    *("position_ids", "use_cache", "is_causal", "position_embeddings", "cache_position"),
    *("output_attentions", "output_router_logits"),
}

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_SCORES_AT_ONCE = 1 << 22  # of soft-capped layers, whose scores are held in memory


def attend(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: Batch | CompiledBatch,
    pool: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention of one layer over the packed rows of a step. Query heads are in the order of `decoder`: those of
    the same place in their groups side by side.

    Args:
        query: `[T, G * Hkv, D]`, contiguous.
        kv: `[T, 2, Hkv, D]`, of the new rows; they are stored before any row attends.
        pool: `[places, 2, Hkv, D]`, the layer's KV.
        window: keys that a row sees at most, itself included.
        softcap: scores s become `softcap * tanh(s / softcap)`.
        sinks: float32 `[G * Hkv]`, for each query head the score of one more key, whose value is 0.

    Returns:
        `[T, G * Hkv * D]`.
    """
    pool.index_copy_(0, batch.store_index, kv)
    rows, heads, dim = query.shape
    kv_heads = kv.shape[2]
    group = heads // kv_heads
    if isinstance(batch, CompiledBatch):
        by_place = query.view(rows, group, kv_heads, dim)
        seen = batch.kernels.attend(
            by_place, pool, batch.attention, scale=scaling, window=window, softcap=softcap, sinks=sinks
        )
        return seen.view(rows, heads * dim)
    work = batch.work(window)
    out, lse = batch.partial_results(window, heads, dim)

    for read in work.reads:
        count = read.kv.sequences
        some = query[read.first : read.first + count * read.rows]
        if read.row_index is not None:
            some = query.index_select(0, read.row_index)
        # The rows of a KV head: all query heads of all rows that read it.
        by_head = some.view(count, read.rows * group, kv_heads, dim)
        part, part_lse = _by_rows(by_head, read.kv.of(pool), mask=read.mask, scaling=scaling, softcap=softcap)
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
            part, part_lse = _by_rows(by_place[:, :, g], new, causal=True, scaling=scaling, softcap=softcap)
            part_out[:, :, g] = part
            part_of_lse[:, :, g] = part_lse

    merged = out[0] if work.partials == 1 else _merge(out, lse)
    if sinks is not None:  # once, whatever a row reads: the sink takes its share of all that the row sees
        merged = merged * torch.sigmoid(lse.logsumexp(dim=0) - sinks)[..., None]
    return merged.to(query.dtype).view(rows, heads * dim)


def _by_rows(
    query: torch.Tensor,
    kv: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of `[B, n, Hkv, D]` to `[B, M, 2, Hkv, D]`, and its log-sum-exp, `[B, n, Hkv]`."""
    query, key, value = (part.transpose(1, 2) for part in (query, *kv.unbind(2)))
    if softcap is None:
        out, lse = _flash(query, key, value, is_causal=causal, attn_mask=mask, scale=scaling)
    else:
        out, lse = _capped(query, key, value, softcap, scale=scaling, is_causal=causal, attn_mask=mask)
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
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    batch: Batch | CompiledBatch,
    kv_cache: KVCache,
    **features: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` as transformers' attention interface calls it, for layers of transformers.

    Args:
        query: `[1, Hq, T, D]`.
        key, value: `[1, Hkv, T, D]`, of the new rows.
        sliding_window: keys that a row sees at most, itself included.
        softcap: scores s become `softcap * tanh(s / softcap)`.
        s_aux: `[Hq]`, attention sinks: for each query head the score of one more key, whose value is 0.

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
    sinks = None if s_aux is None else s_aux.float().view(kv_heads, -1).T.flatten()
    out = attend(
        by_place.flatten(1, 2).contiguous(),
        kv,
        batch,
        pool,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )
    return out.view(by_place.shape).transpose(1, 2).flatten(1, 2)[None], None


def refuse_unknown(features: Mapping[str, Any], attention_mask: torch.Tensor | None, dropout: float) -> None:
    """Refuse a layer that asks for more than q, k and v and what is known to make no difference.

    Raises:
        ModelRefused: it does.
    """
    asked = [name for name, given in features.items() if given is not None and name not in _HARMLESS]
    if asked or attention_mask is not None or dropout:
        raise ModelRefused(f"The model's attention asks for {', '.join(asked) or 'a mask'}, which is not supported.")


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softcap: float,
    *,
    scale: float,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_flash` gives, of soft-capped scores: the result and its log-sum-exp, computed in float32. A row that the
    mask leaves nothing of has NaN, and -inf."""
    key, value = key.float(), value.float()
    rows, tokens = query.shape[2], key.shape[2]
    if is_causal:
        attn_mask = torch.full((rows, tokens), float("-inf")).triu(1)
    rows_at_once = max(1, _SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * tokens))
    parts = []
    for first in range(0, rows, rows_at_once):
        here = slice(first, first + rows_at_once)
        scores = (query[:, :, here].float() @ key.transpose(2, 3)).mul_(scale / softcap).tanh_().mul_(softcap)
        if attn_mask is not None:
            scores += attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., here, :]
        lse = scores.logsumexp(dim=-1)
        parts.append((scores.sub_(lse[..., None]).exp_() @ value, lse))
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return out.to(query.dtype), lse


AttentionInterface.register("batchrun", batchrun_attention)
