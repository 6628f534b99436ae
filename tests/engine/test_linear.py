"""Packed products are the linear layer's; whole models are compared in test_worker.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from batchrun.engine.linear import Linear, PackedLinear, can_pack


@pytest.mark.parametrize("kind", [Linear, PackedLinear])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_the_linear(kind: type[Linear], bias: bool, rows: int, dtype: torch.dtype) -> None:
    if kind is PackedLinear and not can_pack(dtype):
        pytest.skip("this build of torch, or this processor, has no packed product")
    layer = nn.Linear(24, 40, bias=bias, dtype=dtype)
    x, other = torch.randn(rows, 24, dtype=dtype), torch.randn(rows, 40, dtype=dtype)
    found = kind(layer.weight, layer.bias)
    up = nn.Linear(24, 40, bias=bias, dtype=dtype)
    tolerances = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.inference_mode():
        product = layer(x)
        for one, two in (
            (found(x), product),
            (found.plus(x, other), product + other),
            (found.gated(x, kind(up.weight, up.bias)), functional.silu(product) * up(x)),
        ):
            torch.testing.assert_close(one, two, **tolerances)


@pytest.mark.parametrize("kind", [Linear, PackedLinear])
def test_linear_of_no_rows(kind: type[Linear]) -> None:
    if kind is PackedLinear and not can_pack(torch.float32):
        pytest.skip("this build of torch has no packed product")
    assert kind(torch.randn(40, 24))(torch.randn(1, 0, 24)).shape == (1, 0, 40)
