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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row over the places of a KV pool that it sees. Which rows share a place makes no difference.

    With `s_j = scale * q . k_j` for the places j that a row sees, in natural logarithms:

        lse = log(sum_j exp(s_j))          out = sum_j exp(s_j - lse) * v_j

    A sliding window is a matter of what a row sees.

    Args:
        query: `[T, Hq, D]`; query head h reads KV head `h // (Hq / Hkv)`.
        keys, values: `[places, Hkv, D]`, the pool.
        visible: for each row the places it sees, int64 `[*]`; may be empty.
        scale: what scores are multiplied by before the softmax.
        softcap: scores become `softcap * tanh(s_j / softcap)`.
        sinks: `[Hq]`, for each query head the score of one more key, whose value is 0.

    Returns:
        `out [T, Hq, D]` and `lse [T, Hq]`, float32. A row that sees nothing, not even a sink, has 0 and -inf.
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
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[row, head] = torch.softmax(scores, dim=0) @ values[places, head // group].float()
            lse[row, head] = torch.logsumexp(scores, dim=0)
    return (out, lse) if sinks is None else merge_states(out[None], lse[None], sinks)


def merge_states(
    outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge P attention results over disjoint KV into the result over all of it.

        lse = log(sum_p exp(lse_p))        out = sum_p exp(lse_p - lse) * out_p

    Args:
        outs: `[P, ..., D]`; 0 where nothing was seen.
        lses: `[P, ...]`, natural log-sum-exp of the scores of each; -inf where nothing was seen.
        sinks: `[*]`, one for each entry of the last dimension of `lses`: the score of a key whose value is 0. It enters
            once, here, and in no part.

    Returns:
        `out [..., D]` and `lse [...]`, float32; 0 and -inf where no result saw anything, never NaN.
    """
    outs, lses = outs.float(), lses.float()
    if sinks is not None:
        sink = sinks.float().expand(lses.shape[1:])
        outs, lses = torch.cat((outs, torch.zeros_like(outs[:1]))), torch.cat((lses, sink[None]))
    lse = torch.logsumexp(lses, dim=0)
    shift = torch.where(lse == float("-inf"), 0.0, lse)  # -inf - -inf would be NaN
    weights = torch.exp(lses - shift)
    return (outs * weights[..., None]).sum(dim=0), lse
