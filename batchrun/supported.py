"""Which models are run: those that tests have shown to give transformers' own tokens. All others are refused with the
reason, from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchrun.errors import ModelRefused
from batchrun.specs import rope_parameters, rope_type, text_config

MODEL_TYPES = (
    "gemma2",
    "gemma3",  # its text part
    "gemma3_text",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
# `dynamic` and `longrope` turn a sequence by its length, but all alike up to a length that no sequence may exceed.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
LAYER_TYPES = ("full_attention", "sliding_attention")
QUANTIZATIONS = ("compressed-tensors", "mxfp4", "torchao")  # of weights alone
TORCHAO_TYPES = ("Int8WeightOnlyConfig",)
COMPRESSED_FORMATS = ("pack-quantized",)
_QUANTIZATION_HINT = (
    f"checkpoints with weights alone quantised, by compressed-tensors ({', '.join(COMPRESSED_FORMATS)}), mxfp4, or "
    f"torchao ({', '.join(TORCHAO_TYPES)}); or give the model's half-precision or float32 checkpoint"
)


def check_supported(config: Mapping[str, Any]) -> None:
    """See that a model is one that batchrun runs exactly.

    Args:
        config: its parsed `config.json`.

    Raises:
        ModelRefused: with the reason.
    """
    text = config
    for what in ("Models", "Text models"):
        if text.get("model_type") not in MODEL_TYPES:
            kind = text.get("model_type")
            raise _refused(f"{what} of type {kind!r} have not been shown to run exactly.", ", ".join(MODEL_TYPES))
        text = text_config(config)
    for rope in rope_parameters(text):
        kind = rope_type(text["model_type"], rope)
        if kind not in ROPE_TYPES:
            raise _refused(f"RoPE of type {kind!r} has not been shown to be computed exactly.", ", ".join(ROPE_TYPES))
    for kind in text.get("layer_types") or ():
        if kind not in LAYER_TYPES:
            raise _refused(f"Layers of type {kind!r} have not been shown to run exactly.", ", ".join(LAYER_TYPES))
    if text.get("use_bidirectional_attention"):
        raise _refused("The model attends to tokens that come later, so it cannot continue a text.", "causal models")
    # Of a model that takes images transformers looks at both places.
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if quantization:
        _check_quantization(quantization)


def _check_quantization(quantization: Mapping[str, Any]) -> None:
    """See that a checkpoint's weights are quantised and nothing else is.

    What is quantised as it is computed is rounded to whole steps: the last bits of a sum, which depend on how many rows
    are computed together, would become differences that show.

    Raises:
        ModelRefused: with the reason.
    """
    method = quantization.get("quant_method")
    if method not in QUANTIZATIONS:
        raise _refused(f"Checkpoints quantised by {method!r} have not been shown to run exactly.", _QUANTIZATION_HINT)
    if method == "compressed-tensors":
        groups = list((quantization.get("config_groups") or {}).values())
        for name in ("input_activations", "output_activations"):
            if any(group.get(name) for group in groups):
                raise _refused(
                    f"The checkpoint quantises {name.replace('_', ' ')}, which makes the last bits of a computation "
                    "count.",
                    _QUANTIZATION_HINT,
                )
        if quantization.get("kv_cache_scheme"):
            raise _refused("The checkpoint quantises its KV, which is not computed here.", _QUANTIZATION_HINT)
        kind = quantization.get("format")
        if kind not in COMPRESSED_FORMATS:
            raise _refused(
                f"Weights of compressed-tensors' format {kind!r} have not been shown to run exactly.",
                _QUANTIZATION_HINT,
            )
        if len(groups) != 1:
            raise _refused(
                f"The checkpoint is quantised in {len(groups)} ways at once, of which transformers undoes one alone.",
                _QUANTIZATION_HINT,
            )
    if method == "torchao":
        kind = ((quantization.get("quant_type") or {}).get("default") or {}).get("_type")
        if kind not in TORCHAO_TYPES:
            raise _refused(
                f"Checkpoints quantised by torchao's {kind} have not been shown to run exactly.", _QUANTIZATION_HINT
            )


def _refused(message: str, supported: str) -> ModelRefused:
    return ModelRefused(message, hint=f"Supported: {supported}.", code="model_refused")
