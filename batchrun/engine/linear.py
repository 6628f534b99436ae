"""Linear layers with weights packed once for oneDNN, as torch.compile's freezing does: the same products, faster."""

from __future__ import annotations

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A linear layer whose weight is in oneDNN's own layout; it takes the place of an `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.shape[-2]:
            return x.new_empty(*x.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have the packed product for a dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_linears(module: nn.Module) -> None:
    """Swap every linear layer of a model for a packed one, where that is possible. A weight that something else uses
    too (a tied embedding) stays where it is, and the layer gets a packed copy."""
    for name, child in module.named_children():
        # Not a kind of its own, nor one whose weight is quantised.
        if type(child) is nn.Linear and type(child.weight.data) is torch.Tensor and can_pack(child.weight.dtype):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
