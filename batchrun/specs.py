"""The dozen integers that planning needs to know of a model and of a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What transformers' configuration classes put where config.json says nothing and other models have another rule.
_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256},
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "gpt_oss": {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "phi3": {"original_max_position_embeddings": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
    "smollm3": {"num_key_value_heads": 4},
}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a parsed `config.json` that describes the language model: a model that takes images too keeps it
    under `text_config`."""
    return {"model_type": "gemma3_text", **config["text_config"]} if config.get("model_type") == "gemma3" else config


def rope_parameters(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The RoPE parameters of a language model's configuration, one entry for each kind of layer that has its own."""
    # Where a config has both, transformers takes the older name.
    older, newer = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    by_layer = [own for own in (*older.values(), *newer.values()) if isinstance(own, Mapping)]
    if by_layer:
        return [*by_layer, *([older] if "factor" in older else [])]
    return [older or newer]


def rope_type(model_type: str, rope: Mapping[str, Any]) -> str:
    """The type of RoPE that some parameters of a model mean."""
    stated = str(rope.get("rope_type") or rope.get("type") or "default")
    return "longrope" if model_type == "phi3" and stated in ("su", "yarn") else stated  # older names


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of a decoder-only model, read from its `config.json` without loading anything else.

    Attributes:
        model_type: transformers' name of the architecture.
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: its shape.
        max_context: longest prompt and answer together that it is run with, in tokens.
        sliding_window: keys a row sees at most in layers that have a window, or None.
        checkpoint_dtype: name of the dtype of its weights.
        expert_layers: layers with experts in place of one MLP; the others have an MLP of `intermediate_size`.
        num_experts, experts_per_token, expert_size: experts of such a layer, those that a row goes through, and the
            intermediate size of each.
        longrope_limit: whether `max_context` is the length up to which `longrope` turns all sequences alike, while
            the model was made for more.
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
    expert_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    longrope_limit: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read the spec from a parsed `config.json`.

        Raises:
            KeyError: a field that every decoder configuration has is missing.
        """
        whole, config = config, text_config(config)
        model_type = str(config["model_type"])
        config = _DEFAULTS.get(model_type, {}) | dict(config)
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        layers = int(config["num_hidden_layers"])
        window = config.get("sliding_window")
        if config.get("use_sliding_window") is False:
            window = None
        experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
        dense = set(config.get("mlp_only_layers") or ())
        sparse_step = int(config.get("decoder_sparse_step") or 1)
        made_for = int(config["max_position_embeddings"])
        ropes = [rope for rope in rope_parameters(config) if rope_type(model_type, rope) == "longrope"]
        context = min([made_for, *(_longrope_context(config, rope) for rope in ropes)])
        return cls(
            model_type=str(whole["model_type"]),
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            max_context=context,
            sliding_window=int(window) if window is not None else None,
            checkpoint_dtype=next(
                (str(each[name]) for each in (whole, config) for name in ("dtype", "torch_dtype") if each.get(name)),
                "float32",
            ),
            expert_layers=sum((i + 1) % sparse_step == 0 and i not in dense for i in range(layers)) if experts else 0,
            num_experts=experts,
            experts_per_token=int(config["num_experts_per_tok"]) if experts else 0,
            expert_size=int(config.get("moe_intermediate_size") or config["intermediate_size"]) if experts else 0,
            longrope_limit=context < made_for,
        )

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    @property
    def linear_parameters(self) -> int:
        """Weights that every token row is multiplied with (the LM head not counted: sampled rows only); of experts,
        those that a row goes through."""
        return self._layers_with(self.experts_per_token)

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers, all experts included."""
        return self._layers_with(self.num_experts)

    @property
    def mlp_width(self) -> float:
        """Intermediate states of a row, in the mean over layers."""
        return (
            self.expert_layers * self.experts_per_token * self.expert_size
            + (self.num_layers - self.expert_layers) * self.intermediate_size
        ) / self.num_layers

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights, embeddings and LM head (as if not tied) included."""
        return (self.layer_parameters + 2 * self.vocab_size * self.hidden_size) * DTYPE_BYTES[dtype]

    def _layers_with(self, experts: int) -> int:
        """Weights of all layers, of so many experts each."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        dense = (self.num_layers - self.expert_layers) * 3 * self.hidden_size * self.intermediate_size
        sparse = self.expert_layers * self.hidden_size * (3 * experts * self.expert_size + self.num_experts)
        return self.num_layers * attention + dense + sparse


def _longrope_context(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """The length up to which `longrope` has its short factors, as transformers finds it."""
    stated = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return int(stated or config["max_position_embeddings"])


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
