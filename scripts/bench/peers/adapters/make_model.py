"""A Llama model directory with random seeded weights, and a tokenizer with one character a token, so that an answer's
text tells its token ids: `make_model.py SHAPE DTYPE FIRST_CHARACTER FOLDER`, the shape as JSON."""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    shape, dtype, first, path = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=1, bos_token_id=None))
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({chr(first + i): i for i in range(shape["vocab_size"])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


main()
