"""What the kernels compute, in plain float32 torch: slow, and right by looking at it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shared_prefix_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: Sequence[torch.Tensor],
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row over the places of a KV pool that it sees; who shares them makes no difference to the result.

    Args:
        query: `[T, Hq, D]`; query head h reads KV head `h // (Hq / Hkv)`.
        keys, values: `[places, Hkv, D]`, the pool.
        visible: for each row the places it sees, int64 `[*]`; may be empty.
        scale: what scores are multiplied with before the softmax.

    Returns:
        `[T, Hq, D]` and the natural log-sum-exp of the scores, `[T, Hq]`, in float32. A row that sees nothing has 0 and
        -inf.
    """
    rows, heads, dim = query.shape
    group = heads // keys.shape[1]
    out = torch.zeros(rows, heads, dim)
    lse = torch.full((rows, heads), float("-inf"))
    for row, places in enumerate(visible):
        if not places.numel():
            continue
        for head in range(heads):
            scores = keys[places, head // group].float() @ query[row, head].float() * scale
            out[row, head] = torch.softmax(scores, dim=0) @ values[places, head // group].float()
            lse[row, head] = torch.logsumexp(scores, dim=0)
    return out, lse


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge P attention results over disjoint KV into the result over all of it.

    Args:
        outs: `[P, ..., D]`.
        lses: `[P, ...]`, natural log-sum-exp of the scores of each; -inf where nothing was seen.

    Returns:
        `[..., D]` and `[...]`; 0 and -inf where no result saw anything, never NaN.
    """
    lse = torch.logsumexp(lses, dim=0)
    shift = torch.where(lse == float("-inf"), 0.0, lse)
    weights = torch.exp(lses - shift)
    return (outs * weights[..., None]).sum(dim=0), lse
