"""The dozen integers that planning needs to know of a model and of a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_HEAD_DIM = {"qwen3": 128}  # of transformers' configuration classes, where it is not hidden_size / heads
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of a decoder-only model, read from its `config.json` without loading anything else.

    Attributes:
        model_type: transformers' name of the architecture.
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: its shape.
        max_context: longest position it was made for, in tokens.
        sliding_window: keys a row sees at most, or None.
        checkpoint_dtype: name of the dtype of its weights.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    sliding_window: int | None
    checkpoint_dtype: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read the spec from a parsed `config.json`.

        Raises:
            KeyError: a field that every decoder configuration has is missing.
        """
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        window = config.get("sliding_window")
        if config.get("use_sliding_window") is False:
            window = None
        return cls(
            model_type=str(config["model_type"]),
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or _HEAD_DIM.get(config["model_type"]) or hidden // heads),
            max_context=int(config["max_position_embeddings"]),
            sliding_window=int(window) if window is not None else None,
            checkpoint_dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    @property
    def linear_parameters(self) -> int:
        """Weights that every token row is multiplied with (the LM head not counted: sampled rows only)."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights, embeddings and LM head (as if not tied) included."""
        return (self.linear_parameters + 2 * self.vocab_size * self.hidden_size) * DTYPE_BYTES[dtype]


# The units in which `planning.cost` counts work, and a device file prices it; seconds of one each.
COST_UNITS = (
    "step",  # a forward pass
    "layer",  # a layer of a forward pass
    "linear_operation",  # of linear layers and LM head; a multiplication and an addition are two
    "weight_byte",  # read once a step
    "element",  # of hidden and intermediate states: norms, activations, residuals
    "attention_operation",
    "kv_byte",  # read or written
    "chunk",  # a sequence that advances, in a layer
    "read",  # a shared prefix read, in a layer
    "merged_element",  # of a partial attention result
)


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What planning needs to know of a device.

    Attributes:
        name: the device file's name.
        kind: `cpu` or `cuda`.
        memory_bytes: memory that weights, KV and activations share.
        kv_share: share of the memory that weights leave which is taken for KV unless the user says how much; the rest
            is for activations, and on a CPU for the host and its neighbours.
        page_size: KV allocation unit in tokens.
        step_tokens: rows a step at which matrix products saturate the device.
        flops: peak of matrix operations a second, by dtype.
        bandwidth: peak bytes a second from memory.
        fitted: by dtype, seconds of each of `COST_UNITS`, and `error`, the mean absolute error of the fit over steps
            as a share; empty where the device was not calibrated.
        hardware: what the figures were measured on, or whose data sheet they are of.
    """

    name: str
    kind: str
    memory_bytes: int
    kv_share: float
    page_size: int
    step_tokens: int
    flops: Mapping[str, float]
    bandwidth: float
    fitted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    hardware: str = ""
