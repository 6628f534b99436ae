"""Linear layers with weights packed once: for our own kernels where these are faster, else for oneDNN, as the freezing
of torch.compile does. The same products, faster."""

from __future__ import annotations

from typing import TypeGuard

import torch
from batchrun_kernels.cpu import CpuKernels, PackedWeight
from torch import nn
from torch.nn import functional

_packed = torch.ops.mkldnn._linear_pointwise.default
_packed_with = torch.ops.mkldnn._linear_pointwise.binary


class Linear(nn.Module):
    """Rows `[*, n, in]` times a weight; what is done to the products next is done while they are at hand.

    Args:
        weight: `[out, in]`.
        bias: `[out]`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._out_features = len(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The products, `[*, n, out]`."""
        return functional.linear(x, self._weight, self._bias)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The products and `[*, n, out]` others, added."""
        return functional.linear(x, self._weight, self._bias).add_(other)

    def gated(self, x: torch.Tensor, up: nn.Module) -> torch.Tensor:
        """SiLU of the products, times those with `up`, a layer of the same kind and size."""
        product: torch.Tensor = up(x)
        return product.mul_(functional.silu(self(x), inplace=True))


class PackedLinear(Linear):
    """A linear layer whose weight is in oneDNN's own layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)
        self._bias = None if self._bias is None else self._bias.clone()  # no view of a mapped file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._products(x, "none")

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return _packed_with(x, other, self._weight, self._bias, "add")

    def gated(self, x: torch.Tensor, up: nn.Module) -> torch.Tensor:
        assert isinstance(up, PackedLinear)
        return _packed_with(x, self._products(x, "swish"), up._weight, up._bias, "mul")

    def _products(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        if not x.shape[-2]:  # which oneDNN refuses
            return x.new_empty(*x.shape[:-1], self._out_features)
        return _packed(x, self._weight, self._bias, activation, [], "")


class CompiledLinear(nn.Module):
    """A linear layer whose products are those of our own kernels.

    Attributes:
        packed: its weight.
    """

    def __init__(self, kernels: CpuKernels, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._kernels, self.packed = kernels, PackedWeight(kernels, weight, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.multiply(x, self.packed)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self._kernels.multiply(x, self.packed, other)

    def gated(self, x: torch.Tensor, up: nn.Module) -> torch.Tensor:
        assert isinstance(up, CompiledLinear)
        return self._kernels.multiply_gated(x, self.packed, up.packed)


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, kernels: CpuKernels | None = None
) -> Linear | CompiledLinear:
    """A linear layer, packed where that is possible. A weight that something else uses too (a tied embedding) stays as
    it is, and the layer has a packed copy."""
    if kernels is not None and kernels.dtype == weight.dtype and kernels.can_multiply(weight.shape[1]):
        return CompiledLinear(kernels, weight, bias)
    return (PackedLinear if can_pack(weight.dtype) else Linear)(weight, bias)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have the packed product for a dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer and nothing more: not a kind of its own, nor one whose weight is quantised."""
    return type(module) is nn.Linear and type(module.weight.data) is torch.Tensor


def pack_linears(module: nn.Module, kernels: CpuKernels | None = None) -> None:
    """Swap every linear layer of a model for a packed one, where that is possible."""
    for name, child in module.named_children():
        if is_plain(child):
            setattr(module, name, make_linear(child.weight, child.bias, kernels))
        else:
            pack_linears(child, kernels)
