"""Tiny real model directories, made on the spot: safetensors, tokenizer, chat template, generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 42 100 2026; signs: + - * / = ( ) [ ] { } < > ! ? . , ; :",
    "system user assistant tool question answer table apple pear plum shelf price stock",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. Où est la bibliothèque ? 日本語 🙂",
] * 4
VOCAB_SIZE = 384

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Far from the usual 0.02, so that choices have clear gaps and answers vary.
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 7}
_GPT_OSS: dict[str, Any] = {
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    },
}

# What a test matrix goes over: name -> (model type, what differs from BASE).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-odd-heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("mistral", {"sliding_window": 24, "head_dim": 12}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    # What makes a model different is strong enough for its answers to change without it.
    "gemma2": ("gemma2", _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma2-window": (
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "sliding_window": 24},
    ),
    "gemma3_text": (
        "gemma3_text",
        _GEMMA
        | {
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "num_hidden_layers": 3,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        },
    ),
    "gemma3": ("gemma3", _GEMMA | {"sliding_window": 24, "sliding_window_pattern": 2}),
    "gpt_oss": ("gpt_oss", _GPT_OSS | {"sliding_window": 512}),
    "gpt_oss-window": ("gpt_oss", _GPT_OSS | {"sliding_window": 24, "num_hidden_layers": 3}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.6,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 4.0,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 24}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 512}),
    "phi3-window": ("phi3", {"sliding_window": 24}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
                "long_factor": [1.0, 3.0, 6.0, 12.0, 24.0, 32.0],
            },
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "num_hidden_layers": 3,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "smollm3",
        {"no_rope_layer_interval": 2, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 24},
    ),
}


def make_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a byte-level BPE tokenizer of `VOCAB_SIZE` tokens at most; 0 is padding, 1 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|pad|>", "<|im_end|>", "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def copy_without_weights(model: Path, path: Path) -> None:
    """A model directory with all but the weights."""
    shutil.copytree(model, path, ignore=shutil.ignore_patterns("*.safetensors"))


def make_config(architecture: str, **overrides: Any) -> Any:
    """transformers' configuration of an architecture; arguments as for `make_model`."""
    from transformers import AutoConfig

    model_type, changes = ARCHITECTURES[architecture]
    settings = BASE | changes | overrides
    if model_type != "gemma3":
        return AutoConfig.for_model(model_type, **settings)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoConfig.for_model(
        model_type,
        text_config={"model_type": "gemma3_text", **settings},
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **vision},
        mm_tokens_per_image=4,
        eos_token_id=settings["eos_token_id"],
    )


def make_model(
    path: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    generation_config: dict[str, Any] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    **overrides: Any,
) -> Path:
    """Write a model directory and return it.

    Args:
        architecture: a name in `ARCHITECTURES`.
        overrides: fields of `config.json`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = make_config(architecture, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks")):  # ones and zeros would hide that they are left out
                parameter.add_(0.3 * torch.randn_like(parameter))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(path, chat_template=chat_template)
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "pad_token_id": 0, "do_sample": False, **(generation_config or {})})
    )
    return path


def load_reference(model: Path, **options: Any) -> Any:
    """transformers' own model in a directory, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if getattr(AutoConfig.from_pretrained(model).get_text_config(), "attn_logit_softcapping", None):
        # What it takes by itself left soft-caps out before 5.21.
        options["attn_implementation"] = "eager"
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)


def quantise_mxfp4(model: Path) -> None:
    """Put experts of 4-bit floats in blocks of 32 with a common exponent in place of those of a `gpt_oss` model."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = weights.pop(name).shape
        blocks = (experts, outside, inside // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8, generator=generator)
        weights[f"{name}_scales"] = torch.randint(122, 125, blocks, dtype=torch.uint8, generator=generator)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    _say_quantised(model, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})


def quantise_compressed(model: Path, bits: int) -> None:
    """Round the weights of linear layers, all but the LM head, as compressed-tensors packs them: 8-bit integers with a
    scale a row, or 4-bit integers with a scale for 16 neighbours."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weight = weights.pop(name)
        groups = weight.unflatten(1, (-1, 16 if bits == 4 else weight.shape[1]))
        scale = groups.abs().amax(dim=2, keepdim=True) / (2 ** (bits - 1) - 1)
        rounded = (groups / scale).round().to(torch.int8).flatten(1)
        weights[f"{name}_scale"] = scale[..., 0].contiguous()
        weights[f"{name}_packed"] = pack_to_int32(rounded, bits)
        weights[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    how = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    how |= {"strategy": "group", "group_size": 16} if bits == 4 else {"strategy": "channel"}
    _say_quantised(
        model,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": how, "input_activations": None}},
            "ignore": ["lm_head"],
        },
    )


def quantise_torchao(model: Path) -> None:
    """Have transformers store the weights of linear layers as torchao's 8-bit integers with a scale a row."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    how = TorchAoConfig(Int8WeightOnlyConfig())
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=how)
    module.save_pretrained(model)


def _say_quantised(model: Path, how: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": how}))


# Name -> architecture, what differs from it, what quantises it, and the library that this takes.
QUANTISED: dict[str, tuple[str, dict[str, Any], Callable[[Path], None], str | None]] = {
    "mxfp4": ("gpt_oss-window", {"hidden_size": 64, "intermediate_size": 64}, quantise_mxfp4, None),
    "compressed-tensors, 8 bits": ("llama", {}, lambda model: quantise_compressed(model, 8), "compressed_tensors"),
    "compressed-tensors, 4 bits": ("qwen3", {}, lambda model: quantise_compressed(model, 4), "compressed_tensors"),
    "torchao, Int8WeightOnlyConfig": ("llama", {}, quantise_torchao, "torchao"),
}
