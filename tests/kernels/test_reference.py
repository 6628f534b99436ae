"""The reference equals torch's own attention, and merging parts equals attention over the whole."""

from __future__ import annotations

import pytest
import torch
from batchrun_kernels.reference import merge_states, shared_prefix_attention


def parts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(5, 6, 8, generator=generator)
    keys, values = torch.randn(2, 20, 3, 8, generator=generator)
    return query, keys, values


@pytest.mark.parametrize("scale", [8**-0.5, 1.0])
def test_equals_torch_attention_with_a_dense_mask(scale: float) -> None:
    query, keys, values = parts()
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(5, 20, generator=generator) < 0.4
    seen[:, 3] = True
    out, _ = shared_prefix_attention(query, keys, values, [row.nonzero()[:, 0] for row in seen], scale=scale)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        attn_mask=seen,
        scale=scale,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, dense.transpose(0, 1))


def test_merging_parts_gives_the_whole() -> None:
    query, keys, values = parts()
    cuts = [torch.arange(0, 7), torch.arange(7, 8), torch.arange(8, 20)]
    whole = shared_prefix_attention(query, keys, values, [torch.arange(20)] * 5, scale=0.5)
    pieces = [shared_prefix_attention(query, keys, values, [cut] * 5, scale=0.5) for cut in cuts]
    merged = merge_states(torch.stack([out for out, _ in pieces]), torch.stack([lse for _, lse in pieces]))
    torch.testing.assert_close(merged, whole)


def test_an_empty_part_changes_nothing_and_two_are_empty() -> None:
    query, keys, values = parts()
    nothing = torch.empty(0, dtype=torch.int64)
    empty = shared_prefix_attention(query, keys, values, [nothing] * 5, scale=0.5)
    assert (empty[0] == 0).all() and (empty[1] == float("-inf")).all()
    some = shared_prefix_attention(query, keys, values, [torch.arange(9)] * 5, scale=0.5)
    both = [torch.stack(pair) for pair in zip(empty, some, strict=True)]
    torch.testing.assert_close(merge_states(*both), some)
    twice = merge_states(*[torch.stack((part, part)) for part in empty])
    assert (twice[0] == 0).all() and (twice[1] == float("-inf")).all()


def test_merging_large_scores_does_not_overflow() -> None:
    out, lse = merge_states(torch.tensor([[1.0], [3.0]]), torch.tensor([500.0, 500.0]))
    torch.testing.assert_close(out, torch.tensor([2.0]))
    torch.testing.assert_close(lse, torch.tensor(500.0) + torch.tensor(2.0).log())
