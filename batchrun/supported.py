"""Which models are run: those that tests have shown to give transformers' own tokens. All others are refused with the
reason, from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchrun.errors import ModelRefused

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# The other kinds depend on the longest position of a batch: packed rows of other requests would change them.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_supported(config: Mapping[str, Any]) -> None:
    """See that a model is one that batchrun runs exactly.

    Args:
        config: its parsed `config.json`.

    Raises:
        ModelRefused: with the reason.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ModelRefused(
            f"Models of type {model_type!r} have not been shown to run exactly.",
            hint=f"Supported: {', '.join(MODEL_TYPES)}.",
            code="model_refused",
        )
    # Where a config has both, transformers takes the older name.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelRefused(
            f"RoPE of type {rope_type!r} depends on the other requests of a batch and is not supported.",
            hint=f"Supported: {', '.join(ROPE_TYPES)}.",
            code="model_refused",
        )
    if config.get("quantization_config"):
        raise ModelRefused(
            "Quantised checkpoints are not supported.",
            hint="Give the model's half-precision or float32 checkpoint.",
            code="model_refused",
        )
