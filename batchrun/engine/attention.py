"""Attention over shared prefixes and own KV on the CPU.

A prefix is read once for all its readers: their query heads become the rows of one call (Hydragen, arXiv 2402.05099),
and the KV is a view of the pool. Partial results over disjoint KV are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from batchrun.engine.batch import Batch
from batchrun.engine.kv_cache import KVCache
from batchrun.errors import ModelRefused

# What a layer may pass besides q, k and v without asking for something that is not computed here.
_HARMLESS = {
    *("position_ids", "use_cache", "is_causal", "position_embeddings", "cache_position"),
    *("output_attentions", "output_router_logits"),
}

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_SCORES_AT_ONCE = 1 << 22  # of soft-capped layers, whose scores are held in memory


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
    batch: Batch,
    kv_cache: KVCache,
    **features: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of one layer over the packed rows of a step, as transformers' attention interface calls it.

    Args:
        query: `[1, Hq, T, D]`.
        key, value: `[1, Hkv, T, D]`, of the new rows; they are stored before any row attends.
        sliding_window: keys that a row sees at most, itself included.
        softcap: scores s become `softcap * tanh(s / softcap)`.
        s_aux: `[Hq]`, attention sinks: for each query head the score of one more key, whose value is 0.

    Returns:
        `[1, T, Hq, D]` and None.

    Raises:
        ModelRefused: the layer asks for something that is not computed here.
    """
    refuse_unknown(features, attention_mask, dropout)
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = kv_cache.keys[layer], kv_cache.values[layer]
    keys.index_copy_(0, batch.store_index, key[0].transpose(0, 1))
    values.index_copy_(0, batch.store_index, value[0].transpose(0, 1))

    heads, rows, dim = query.shape[1:]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    # [Hkv, T, G, D]: the query heads of a KV head side by side, so that they are rows of one call.
    q = query[0].view(kv_heads, group, rows, dim).transpose(1, 2).contiguous()
    work = batch.work(sliding_window)
    out, lse = batch.partial_results(sliding_window, kv_heads, dim)

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **which: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if softcap is None:
            return _flash(query, key, value, scale=scaling, **which)  # type: ignore[no-any-return]
        return _capped(query, key, value, softcap, scale=dim**-0.5 if scaling is None else scaling, **which)

    for read in work.dense:
        here = slice(read.first, read.first + read.rows)
        part, part_lse = attend(
            q[:, here].view(1, kv_heads, read.rows * group, dim),
            read.kv.of(keys).transpose(0, 1)[None],
            read.kv.of(values).transpose(0, 1)[None],
            attn_mask=read.mask,
        )
        part = part.view(kv_heads, read.rows, group, dim)
        part_lse = part_lse.view(kv_heads, read.rows, group)
        if read.blind is not None:
            part = part.masked_fill(read.blind[None, :, None, None], 0.0)
            part_lse = part_lse.masked_fill(read.blind[None, :, None], float("-inf"))
        out[read.partial, :, here] = part
        lse[read.partial, :, here] = part_lse

    for causal in work.causal:
        here = slice(causal.first, causal.first + causal.chunks * causal.rows)
        shape = (causal.chunks, causal.rows)
        # is_causal wants the rows of one head in order: all Hq heads, [B, Hq, n, D].
        part, part_lse = attend(
            *(new[0, :, here].unflatten(1, shape).transpose(0, 1) for new in (query, key, value)), is_causal=True
        )
        by_row = out[causal.partial, :, here].unflatten(1, shape)  # [Hkv, B, n, G, D]
        by_row.copy_(part.unflatten(1, (kv_heads, group)).permute(1, 0, 3, 2, 4))
        by_row = lse[causal.partial, :, here].unflatten(1, shape)
        by_row.copy_(part_lse.unflatten(1, (kv_heads, group)).permute(1, 0, 3, 2))

    for short in work.ragged:
        count, width = short.sequences, short.rows
        short_q = q.index_select(1, short.row_index).view(kv_heads, count, width * group, dim).transpose(0, 1)
        short_k, short_v = (
            pool.index_select(0, short.kv_index).view(count, -1, kv_heads, dim).transpose(1, 2)
            for pool in (keys, values)
        )
        part, part_lse = attend(short_q, short_k, short_v, attn_mask=short.mask)
        part = part.transpose(0, 1).reshape(kv_heads, count * width, group, dim)
        part_lse = part_lse.transpose(0, 1).reshape(kv_heads, count * width, group)
        index = short.row_index
        if short.real is not None:
            part, part_lse = part.index_select(1, short.real), part_lse.index_select(1, short.real)
            index = index[short.real]
        out[short.partial].index_copy_(1, index, part)
        lse[short.partial].index_copy_(1, index, part_lse)

    merged = out[0] if work.partials == 1 else _merge(out, lse)
    if s_aux is not None:  # once, whatever a row reads: the sink takes its share of all that the row sees
        merged = merged * torch.sigmoid(lse.logsumexp(dim=0) - s_aux.float().view(kv_heads, 1, group))[..., None]
    merged = merged.to(query.dtype)
    return merged.permute(1, 0, 2, 3).reshape(1, rows, heads, dim), None


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
    groups = query.shape[1] // key.shape[1]
    key, value = (
        each.float().repeat_interleave(groups, dim=1) if groups > 1 else each.float() for each in (key, value)
    )
    rows, tokens = query.shape[2], key.shape[2]
    if is_causal:
        attn_mask = torch.full((rows, tokens), float("-inf")).triu(1)
    rows_at_once = max(1, _SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * tokens))
    parts = []
    for first in range(0, rows, rows_at_once):
        here = slice(first, first + rows_at_once)
        scores = (query[:, :, here].float() @ key.transpose(2, 3)).mul_(scale / softcap).tanh_().mul_(softcap)
        if attn_mask is not None:
            scores += attn_mask[..., here, :]
        lse = scores.logsumexp(dim=-1)
        parts.append((scores.sub_(lse[..., None]).exp_() @ value, lse))
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return out.to(query.dtype), lse


def _merge(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Merge partial results `[P, ..., D]` by their log-sum-exp `[P, ...]`, in float32. Every row has at least one that
    is not empty: its own token."""
    weights = torch.softmax(lse, dim=0)[..., None]
    merged = out[0] * weights[0]
    for part, weight in zip(out[1:], weights[1:], strict=True):
        merged.addcmul_(part, weight)
    return merged
