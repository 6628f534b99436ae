"""transformers' model, loaded: run by its own layers with our attention or, on the CPU where it can, by `decoder`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from batchrun_kernels.cpu import CpuKernels, NotCompiled
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import CompressedTensorsConfig, Mxfp4Config

from batchrun.engine.batch import StepTensors
from batchrun.engine.decoder import Decoder, can_decode
from batchrun.engine.kv_cache import KVCache
from batchrun.engine.linear import pack_linears
from batchrun.errors import ModelRefused
from batchrun.specs import ModelSpec
from batchrun.supported import check_supported

Attention = Literal["compiled", "torch", "triton"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        logits: runs a step; the logits of the rows that sample, `[S, vocabulary]`.
        num_layers, num_heads, num_kv_heads, head_dim: its attention.
        vocab_size: logits of a row.
        dtype: of weights and KV.
        device: where they are.
        attention: what computes it: on the CPU `compiled` kernels, or `torch` where these cannot be compiled; on a GPU
            `triton`.
        kernels: those compiled.
        experts: whether the rows of a step go to experts, each to its own.
    """

    logits: Callable[[Any, KVCache], torch.Tensor]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: torch.dtype
    device: str
    attention: Attention
    kernels: CpuKernels | None = None
    experts: bool = False


def load_model(
    path: Path, config: dict[str, Any], dtype: str, device: str, *, attention: Attention | None = None
) -> LoadedModel:
    """Load the model in a directory: safetensors only, no code of the model's own.

    Args:
        config: its parsed `config.json`.
        dtype: a name in `specs.DTYPE_BYTES`.
        device: `cpu` or `cuda`.
        attention: what computes it, if not what is made for the device.

    Raises:
        ModelRefused: it is not one that is run exactly, or its weights do not fit its configuration.
    """
    check_supported(config)
    kernels = None
    if device == "cpu" and attention in (None, "compiled"):
        kernels = _compiled(getattr(torch, dtype))
    attention = attention or ("triton" if device != "cpu" else "torch" if kernels is None else "compiled")
    if attention == "triton":
        import batchrun.engine.triton_attention  # noqa: F401  registers itself; a run on the CPU needs no triton
    transformers_logging.disable_progress_bar()  # ours are the only ones
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="batchrun_triton" if attention == "triton" else "batchrun",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_dequantization(config),
            **({"device_map": device} if device != "cpu" and find_spec("accelerate") else {}),  # no copy on the host
        )
    except ImportError as error:  # of a library that reads quantised weights
        raise ModelRefused(
            f"The weights in {path} cannot be loaded: {error}", hint="pip install 'batchrun[quantized]'"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelRefused(f"The weights in {path} cannot be loaded: {error}") from error
    module, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelRefused(
            f"The weights in {path} lack {len(missing)} tensors that the model needs, such as {missing[0]}.",
            hint="Copy the model again; the files may be of another model.",
        )
    text = module.model
    if hasattr(text, "language_model"):  # a model that takes images: of it the text part is run
        for name in [name for name, _ in text.named_children() if name != "language_model"]:
            delattr(text, name)
        text = text.language_model
    module.eval().to(device)
    settle_rope(module)
    head_dim = text.layers[0].self_attn.head_dim
    logits: Callable[[Any, KVCache], torch.Tensor]
    if attention != "triton" and can_decode(module):
        logits = Decoder(module, kernels).logits
    else:
        if device == "cpu":
            pack_linears(module, kernels)
        logits = logits_of(module)
    return LoadedModel(
        logits=logits,
        num_layers=len(text.layers),
        num_heads=text.config.num_attention_heads,
        num_kv_heads=text.config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=text.config.vocab_size,
        dtype=module.dtype,
        device=device,
        attention=attention,
        kernels=kernels,
        experts=ModelSpec.from_config(config).num_experts > 0,
    )


def _compiled(dtype: torch.dtype) -> CpuKernels | None:
    """The compiled kernels for a dtype, if they can be had."""
    try:
        return CpuKernels(dtype)
    except NotCompiled as why:
        _log.warning("The CPU kernels were not compiled (%s): torch computes, more slowly.", why)
        return None


def logits_of(module: Any) -> Callable[[Any, KVCache], torch.Tensor]:
    """What runs a step by transformers' own layers."""

    def logits(batch: StepTensors, kv_cache: KVCache) -> torch.Tensor:
        result = module(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            batch=batch,
            kv_cache=kv_cache,
            use_cache=False,
            logits_to_keep=batch.sample_index,
        )
        return result.logits[0]  # type: ignore[no-any-return]

    return logits


def settle_rope(module: Any) -> None:
    """Have RoPE of the types that turn a sequence by its length turn all alike, as they do up to the longest that is
    run: to look for the longest of a step, transformers waits for the device, which no graph can hold."""
    for part in module.modules():
        if getattr(part, "rope_type", None) in ("dynamic", "longrope"):
            part.rope_type = "default"


def _dequantization(config: dict[str, Any]) -> dict[str, Any]:
    """What tells transformers to undo the quantisation of weights while it loads them, where it can: the same products
    as if they were undone each time, by layers that can be packed. Nothing for other checkpoints."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    kinds = {"compressed-tensors": CompressedTensorsConfig, "mxfp4": Mxfp4Config}
    return {"quantization_config": kinds[method](dequantize=True)} if method in kinds else {}
