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
from torch import nn
from torch.nn import functional

from batchrun.engine.attention import attend
from batchrun.engine.batch import Batch
from batchrun.engine.kv_cache import KVCache
from batchrun.engine.linear import Linear, is_plain, make_linear

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
    """

    @torch.no_grad()
    def __init__(self, module: Any) -> None:
        base = module.model
        self._embed, self._rotary = base.embed_tokens, base.rotary_emb
        self._norm = RMSNorm(base.norm)
        self._layers = []
        for i, layer in enumerate(base.layers):
            self._layers.append(Layer(layer, last=i == len(base.layers) - 1))
            base.layers[i] = nn.Identity()  # not twice in memory
        self._head = linear_of(module.lm_head)

    def logits(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Run a step; the logits of the rows that sample, `[S, vocabulary]`."""
        hidden = self._embed(batch.input_ids[0])
        cos, sin = self._rotary(hidden.float(), batch.positions)
        half = cos.shape[-1] // 2  # the other half is the same
        turn = torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])
        for layer in self._layers:
            hidden = layer(hidden, turn, batch, kv_cache)
        return self._head(self._norm(hidden))


class Layer:
    """A layer of a decoder.

    Args:
        layer: transformers'.
        last: whether only rows that sample are wanted of it.
    """

    def __init__(self, layer: Any, *, last: bool) -> None:
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
        )
        self._output = make_linear(attention.o_proj.weight[:, of_output], attention.o_proj.bias)
        self._query_norm, self._key_norm = (
            RMSNorm(getattr(attention, name), pairs) if hasattr(attention, name) else None
            for name in ("q_norm", "k_norm")
        )
        self._gate, self._up, self._down = map(linear_of, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self._activation = None if isinstance(mlp.act_fn, nn.SiLU) else mlp.act_fn
        self._attention_norm = RMSNorm(layer.input_layernorm)
        self._mlp_norm = RMSNorm(layer.post_attention_layernorm)

    def __call__(self, hidden: torch.Tensor, turn: torch.Tensor, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Args:
            hidden: `[T, H]`.
            turn: complex `[T, 1, D / 2]`, what RoPE multiplies by.

        Returns:
            `[T, H]`, of the last layer `[S, H]`.
        """
        heads, kv_heads = self._heads, self._kv_heads
        qkv = self._qkv(self._attention_norm(hidden)).view(len(hidden), heads + 2 * kv_heads, self._dim)
        query, key = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
        if self._query_norm is not None and self._key_norm is not None:
            query = self._query_norm(query)
            key.copy_(self._key_norm(key))
        query = turned(query, turn)
        key.copy_(turned(key, turn))
        kv = qkv[:, heads:].view(-1, 2, kv_heads, self._dim)
        seen = attend(query, kv, batch, kv_cache.tokens[self._index], scaling=self._scaling, window=self._window)
        if self._last:
            seen, hidden = seen[batch.sample_index], hidden[batch.sample_index]
            if not len(hidden):
                return hidden
        hidden = self._output.plus(seen, hidden)
        rows = self._mlp_norm(hidden)
        if self._activation is None:
            inner = self._up.times(rows, self._gate(rows, silu=True))
        else:
            inner = self._up.times(rows, self._activation(self._gate(rows)))
        return self._down.plus(inner, hidden)


class RMSNorm:
    """Rows divided by their root mean square, times a weight.

    Args:
        norm: transformers'.
        order: int64 `[H]`, of the weights, if another.
    """

    def __init__(self, norm: Any, order: torch.Tensor | None = None) -> None:
        weight = norm.weight.detach()
        self._weight = weight if order is None else weight[order]
        self._eps: float = norm.variance_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., H]`."""
        return functional.rms_norm(x, self._weight.shape, self._weight, self._eps)


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """What RoPE makes of heads `[T, *, D]` whose pairs of numbers are neighbours.

    Args:
        turn: complex `[T, 1, D / 2]`.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def linear_of(layer: nn.Linear) -> Linear:
    return make_linear(layer.weight, layer.bias)
