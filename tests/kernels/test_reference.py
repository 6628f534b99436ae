"""The reference equals torch's own attention, and merging parts equals attention over the whole."""

from __future__ import annotations

import pytest
import torch
from batchrun_kernels.reference import merge_states, shared_prefix_attention
from torch.nn.functional import scaled_dot_product_attention


def parts(rows: int = 5, places: int = 20, *, heads: tuple[int, int] = (6, 3), seed: int = 0) -> list[torch.Tensor]:
    """Queries `[rows, Hq, 8]`, keys and values `[places, Hkv, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    heads_q, heads_kv = heads
    query = torch.randn(rows, heads_q, 8, generator=generator)
    return [query, *torch.randn(2, places, heads_kv, 8, generator=generator)]


def random_forest(places: int, seed: int) -> torch.Tensor:
    """Which of the places, each a token with a random earlier one (or none) as its parent, each token sees: itself and
    all above it, bool `[places, places]`."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.eye(places, dtype=torch.bool)
    for token in range(1, places):
        # Mostly the token before: long runs, as text has them.
        straight = float(torch.rand((), generator=generator)) < 0.7
        parent = token - 1 if straight else int(torch.randint(-1, token, (), generator=generator))
        if parent >= 0:
            seen[token] |= seen[parent]
    return seen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 3), (7, 1)])
@pytest.mark.parametrize("scale", [8**-0.5, 1.0])
def test_equals_torch_attention_with_the_dense_mask_of_a_forest(
    heads: tuple[int, int], scale: float, seed: int
) -> None:
    places = 60
    query, keys, values = parts(places, places, heads=heads, seed=seed)
    seen = random_forest(places, seed)
    # Rows and places in orders of their own: nothing may depend on where the KV lies.
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(places, generator=generator)
    keys[at], values[at] = keys.clone(), values.clone()
    visible = [at[row.nonzero()[:, 0]] for row in seen]
    out, lse = shared_prefix_attention(query, keys, values, visible, scale=scale)
    dense = scaled_dot_product_attention(
        query.transpose(0, 1),
        keys[at].transpose(0, 1),
        values[at].transpose(0, 1),
        attn_mask=seen,
        scale=scale,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, dense.transpose(0, 1))
    group = heads[0] // heads[1]
    scores = torch.einsum("thd,shd->ths", query, keys[at].repeat_interleave(group, dim=1)) * scale
    expected = scores.masked_fill(~seen[:, None], float("-inf")).exp().sum(dim=-1).log()
    torch.testing.assert_close(lse, expected)


def test_half_precision_is_computed_in_float32() -> None:
    query, keys, values = (part.bfloat16() for part in parts())
    everything = [torch.arange(20)] * 5
    out, lse = shared_prefix_attention(query, keys, values, everything, scale=0.5)
    exact = shared_prefix_attention(query.float(), keys.float(), values.float(), everything, scale=0.5)
    assert out.dtype == lse.dtype == torch.float32
    assert torch.equal(out, exact[0])
    assert torch.equal(lse, exact[1])


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
    assert (empty[0] == 0).all()
    assert (empty[1] == float("-inf")).all()
    some = shared_prefix_attention(query, keys, values, [torch.arange(9)] * 5, scale=0.5)
    for pair in ((empty, some), (some, empty)):
        both = [torch.stack(part) for part in zip(*pair, strict=True)]
        torch.testing.assert_close(merge_states(*both), some)
    twice = merge_states(*[torch.stack((part, part)) for part in empty])
    assert (twice[0] == 0).all()
    assert (twice[1] == float("-inf")).all()


@pytest.mark.parametrize("score", [500.0, -500.0])
def test_merging_extreme_scores_neither_overflows_nor_vanishes(score: float) -> None:
    out, lse = merge_states(torch.tensor([[1.0], [3.0]]), torch.tensor([score, score]))
    torch.testing.assert_close(out, torch.tensor([2.0]))
    torch.testing.assert_close(lse, torch.tensor(score) + torch.tensor(2.0).log())


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap_is_applied_to_scaled_scores(softcap: float) -> None:
    query, keys, values = parts(heads=(3, 3))
    out, lse = shared_prefix_attention(query, keys, values, [torch.arange(20)] * 5, scale=0.7, softcap=softcap)
    scores = softcap * torch.tanh(torch.einsum("thd,shd->ths", query, keys) * 0.7 / softcap)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))
    torch.testing.assert_close(out, torch.einsum("ths,shd->thd", scores.softmax(dim=-1), values))


def test_a_sink_is_one_more_key_whose_value_is_zero() -> None:
    query, keys, values = parts(heads=(3, 3))
    sinks = torch.tensor([-2.0, 0.0, 3.0])
    out, lse = shared_prefix_attention(query, keys, values, [torch.arange(20)] * 5, scale=0.7, sinks=sinks)
    scores = torch.einsum("thd,shd->ths", query, keys) * 0.7
    scores = torch.cat((scores, sinks[:, None].expand(5, 3, 1)), dim=-1)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))
    torch.testing.assert_close(out, torch.einsum("ths,shd->thd", scores.softmax(dim=-1)[..., :-1], values))
    # Merged with parts that know nothing of it, it enters once; where nothing else is seen it is all there is.
    cuts = [torch.arange(0, 7), torch.arange(7, 20)]
    pieces = [shared_prefix_attention(query, keys, values, [cut] * 5, scale=0.7) for cut in cuts]
    merged = merge_states(torch.stack([out for out, _ in pieces]), torch.stack([lse for _, lse in pieces]), sinks)
    torch.testing.assert_close(merged, (out, lse))
    nothing = [torch.empty(0, dtype=torch.int64)] * 5
    out, lse = shared_prefix_attention(query, keys, values, nothing, scale=0.7, sinks=sinks)
    assert (out == 0).all()
    assert torch.equal(lse, sinks.expand(5, 3))
