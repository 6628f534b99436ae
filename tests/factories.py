"""Tiny real model directories, made on the spot: safetensors, tokenizer, chat template, generation config."""

from __future__ import annotations

import json
import shutil
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
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, **(BASE | changes | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide that they are left out
                parameter.add_(0.3 * torch.randn_like(parameter))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(path, chat_template=chat_template)
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "pad_token_id": 0, "do_sample": False, **(generation_config or {})})
    )
    return path
