"""A Llama model directory as one GGUF file, without a tokenizer: `convert_gguf.py MODEL DTYPE FILE`."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding: pairs are neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def main() -> None:
    model, dtype, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    file = gguf.GGUFWriter(out, "llama")
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(heads)
    file.add_head_count_kv(kv_heads)
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_rope_dimension_count(config["head_dim"])
    file.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    file.add_vocab_size(config["vocab_size"])
    file.add_tokenizer_model("none")
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    file.add_file_type({"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}[dtype])
    with safe_open(model / "model.safetensors", "numpy") as weights:
        for name in weights.keys():  # noqa: SIM118 (it is no dict)
            weight, stem = weights.get_tensor(name), name.removesuffix(".weight")
            if stem.startswith("model.layers."):
                number, stem = stem.removeprefix("model.layers.").split(".", 1)
                target = f"blk.{number}.{LAYER[stem]}.weight"
            else:
                target = TOP[stem] + ".weight"
            if stem in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = interleaved(weight, heads if stem.endswith("q_proj") else kv_heads)
            matrix = weight.ndim == 2
            file.add_tensor(
                target,
                gguf.quants.quantize(np.ascontiguousarray(weight), kind) if matrix else weight,
                raw_dtype=kind if matrix else gguf.GGMLQuantizationType.F32,
            )
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


main()
