"""A model of transformers as the CPU runs it: its weights, packed, and as few operations around the products as can be.

    T   rows of the step               Hq, Hkv  query heads, KV heads
    H   hidden size                    G        query heads per KV head
    D   head_dim

Rows of weights are put in another order at load, which changes nothing that leaves a layer:

- the query heads of one place in their groups stand together, `[G, Hkv]` in place of `[Hkv, G]`. So the query heads
  of neighbouring rows are the rows of one matrix for each KV head, and the next product takes what attention gives;
- the two numbers that RoPE turns together are neighbours: a complex number, turned by one multiplication.
"""

from __future__ import annotations

from typing import Any

import torch
from batchrun_kernels.cpu import CompiledLayers, CpuKernels, LayerWeights
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from batchrun.engine.attention import attend
from batchrun.engine.batch import Batch, CompiledBatch
from batchrun.engine.kv_cache import KVCache
from batchrun.engine.linear import CompiledLinear, is_plain, make_linear

# Models whose layers are known here; all of them add the same parts in the same order.
DECODED = ("llama", "mistral", "qwen2", "qwen3")


def can_decode(module: Any) -> bool:
    """Whether a `Decoder` runs a model as transformers does: of a type in `DECODED`, with weights that are plain."""
    if module.config.model_type not in DECODED:
        return False
    return all(is_plain(part) for part in module.modules() if isinstance(part, nn.Linear))


class Decoder:
    """A causal language model of transformers, taken apart: its layers give their weights away.

    Args:
        module: one that `can_decode`.
        kernels: what computes it, if not torch.
    """

    @torch.no_grad()
    def __init__(self, module: Any, kernels: CpuKernels | None = None) -> None:
        base = module.model
        self._embed, self._rotary = base.embed_tokens, base.rotary_emb
        # What is not packed is copied: a view would keep the whole mapped file in memory.
        self._embed.weight.data = self._embed.weight.data.clone()
        self._norm = RMSNorm(base.norm, kernels)
        self._layers = []
        for i, layer in enumerate(base.layers):
            self._layers.append(Layer(layer, kernels, last=i == len(base.layers) - 1))
            base.layers[i] = nn.Identity()  # not twice in memory
        self._head = make_linear(module.lm_head.weight, module.lm_head.bias, kernels)
        weights = [layer.weights for layer in self._layers]
        self._compiled = None
        if kernels is not None and None not in weights:
            self._compiled = CompiledLayers(kernels, [each for each in weights if each is not None])

    def logits(self, batch: Batch | CompiledBatch, kv_cache: KVCache) -> torch.Tensor:
        """Run a step; the logits of the rows that sample, `[S, vocabulary]`."""
        hidden = self._embed(batch.input_ids[0])
        cos, sin = self._rotary(hidden.float(), batch.positions)
        half = cos.shape[-1] // 2  # the other half is the same
        turn = torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])
        if self._compiled is not None and isinstance(batch, CompiledBatch):
            hidden = self._compiled.run(
                hidden, turn, batch.store_index, batch.sample_index, batch.attention, kv_cache.tokens
            )
        else:
            for layer in self._layers:
                hidden = layer(hidden, turn, batch, kv_cache)
        return self._head(self._norm(hidden))


class Layer:
    """A layer of a decoder.

    Args:
        layer: transformers'.
        kernels: what computes it, if not torch.
        last: whether only rows that sample are wanted of it.
    """

    def __init__(self, layer: Any, kernels: CpuKernels | None, *, last: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index: int = attention.layer_idx
        self._scaling: float = attention.scaling
        # Where transformers' layers take their window from.
        holder = attention.config if attention.config.model_type == "mistral" else attention
        self._window: int | None = getattr(holder, "sliding_window", None)
        self._last = last
        self._dim = dim = attention.head_dim
        self._kv_heads = kv_heads = attention.k_proj.out_features // dim
        self._heads = heads = attention.q_proj.out_features // dim

        pairs = torch.arange(dim).view(2, -1).T.flatten()
        by_place = torch.arange(heads).view(kv_heads, -1).T.flatten()
        of_query = (by_place[:, None] * dim + pairs).flatten()
        of_key = (torch.arange(kv_heads)[:, None] * dim + pairs).flatten()
        of_output = (by_place[:, None] * dim + torch.arange(dim)).flatten()
        parts = [(attention.q_proj, of_query), (attention.k_proj, of_key), (attention.v_proj, slice(None))]
        self._qkv = make_linear(
            torch.cat([part.weight[order] for part, order in parts]),
            None if attention.q_proj.bias is None else torch.cat([part.bias[order] for part, order in parts]),
            kernels,
        )
        self._output = make_linear(attention.o_proj.weight[:, of_output], attention.o_proj.bias, kernels)
        self._query_norm, self._key_norm = (
            RMSNorm(getattr(attention, name), kernels, pairs) if hasattr(attention, name) else None
            for name in ("q_norm", "k_norm")
        )
        self._head_norms = None  # as the kernels take them
        if self._query_norm is not None and self._key_norm is not None:
            self._head_norms = self._query_norm.weight, self._key_norm.weight, self._key_norm.eps
        self._gate, self._up, self._down = (
            make_linear(part.weight, part.bias, kernels) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self._activation = None if isinstance(mlp.act_fn, type(ACT2FN["silu"])) else mlp.act_fn
        self._attention_norm = RMSNorm(layer.input_layernorm, kernels)
        self._mlp_norm = RMSNorm(layer.post_attention_layernorm, kernels)

    @property
    def weights(self) -> LayerWeights | None:
        """What the layer consists of, where compiled kernels run all of it."""
        parts = [self._qkv, self._output, self._gate, self._up, self._down]
        packed = [part.packed for part in parts if isinstance(part, CompiledLinear)]
        if len(packed) < len(parts) or self._activation is not None:
            return None
        qkv, output, gate, up, down = packed
        return LayerWeights(
            qkv=qkv,
            output=output,
            gate=gate,
            up=up,
            down=down,
            attention_norm=(self._attention_norm.weight, self._attention_norm.eps),
            mlp_norm=(self._mlp_norm.weight, self._mlp_norm.eps),
            head_norms=self._head_norms,
            heads=self._heads,
            kv_heads=self._kv_heads,
            dim=self._dim,
            scale=self._scaling,
            window=self._window,
        )

    def __call__(
        self, hidden: torch.Tensor, turn: torch.Tensor, batch: Batch | CompiledBatch, kv_cache: KVCache
    ) -> torch.Tensor:
        """Args:
            hidden: `[T, H]`.
            turn: complex `[T, 1, D / 2]`, what RoPE multiplies by.

        Returns:
            `[T, H]`, of the last layer `[S, H]`.
        """
        pool = kv_cache.tokens[self._index]
        qkv = self._qkv(self._attention_norm(hidden)).view(len(hidden), self._heads + 2 * self._kv_heads, self._dim)
        attend = self._attend_compiled if isinstance(batch, CompiledBatch) else self._attend
        seen = attend(qkv, turn, batch, pool)  # type: ignore[arg-type]
        if self._last:
            seen, hidden = seen[batch.sample_index], hidden[batch.sample_index]
            if not len(hidden):
                return hidden
        hidden = self._output.plus(seen, hidden)
        rows = self._mlp_norm(hidden)
        if self._activation is None:
            inner = self._gate.gated(rows, self._up)
        else:
            inner = self._activation(self._gate(rows)) * self._up(rows)
        return self._down.plus(inner, hidden)

    def _attend_compiled(
        self, qkv: torch.Tensor, turn: torch.Tensor, batch: CompiledBatch, pool: torch.Tensor
    ) -> torch.Tensor:
        """Args:
            qkv: `[T, Hq + 2 * Hkv, D]`.

        Returns:
            `[T, Hq * D]`.
        """
        query = batch.kernels.take_in(qkv, turn, batch.store_index, pool, self._head_norms)
        by_place = query.view(len(qkv), -1, self._kv_heads, self._dim)
        seen = batch.kernels.attend(by_place, pool, batch.attention, scale=self._scaling, window=self._window)
        return seen.view(len(qkv), -1)

    def _attend(self, qkv: torch.Tensor, turn: torch.Tensor, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        """The same by torch."""
        heads, kv_heads = self._heads, self._kv_heads
        query, key = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
        if self._query_norm is not None and self._key_norm is not None:
            query = self._query_norm(query)
            key.copy_(self._key_norm(key))
        query = turned(query, turn)
        key.copy_(turned(key, turn))
        kv = qkv[:, heads:].view(-1, 2, kv_heads, self._dim)
        return attend(query, kv, batch, pool, scaling=self._scaling, window=self._window)


class RMSNorm:
    """Rows divided by their root mean square, times a weight.

    Attributes:
        weight: `[H]`.
        eps: added to the mean of squares.

    Args:
        norm: transformers'.
        kernels: what computes it, if not torch.
        order: int64 `[H]`, of the weights, if another.
    """

    def __init__(self, norm: Any, kernels: CpuKernels | None, order: torch.Tensor | None = None) -> None:
        weight = norm.weight.detach()
        self.weight = weight.clone() if order is None else weight[order]
        self.eps: float = norm.variance_epsilon
        self._kernels = kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., H]`."""
        if self._kernels is not None:
            return self._kernels.norm(x, self.weight, self.eps)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """What RoPE makes of heads `[T, *, D]` whose pairs of numbers are neighbours.

    Args:
        turn: complex `[T, 1, D / 2]`.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
