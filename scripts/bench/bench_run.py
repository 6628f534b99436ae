"""batchrun against transformers' padded `generate`, on the same model and requests, in one process.

Runs alternate, and the ratio is that of the medians. That the answers are the same is shown by
tests/test_exactness.py, on models whose answers can be told apart. The model here has SmolLM2-135M's shape and random
weights.

    python scripts/bench/bench_run.py --workload micro --repeats 3
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

import batchrun
from batchrun.workloads import WORKLOADS, make_workload, write_job

SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def make_model(path: Path) -> None:
    """Write the model directory: random seeded weights, a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=1, bos_token_id=None)).save_pretrained(path)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def run_transformers(model: torch.nn.Module, requests: list[tuple[list[int], int]]) -> float:
    """Seconds of one padded `generate` over all requests, which have equal answer lengths."""
    width = max(len(prompt) for prompt, _ in requests)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in requests])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
    output = requests[0][1]
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=output, min_new_tokens=output, pad_token_id=0
        )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="micro")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-peer", action="store_true", help="time batchrun alone")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    made = make_workload(args.workload, vocab_size=SHAPE["vocab_size"])
    requests = made.requests
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model")
        write_job(root / "job.jsonl", made)
        peer = AutoModelForCausalLM.from_pretrained(root / "model", dtype=getattr(torch, args.dtype)).eval()
        ours, theirs = [], []
        for repeat in range(args.repeats):
            report = batchrun.run(
                root / "job.jsonl", model=str(root / "model"), out=root / f"{repeat}.run", dtype=args.dtype
            )
            ours.append(report.seconds.execute)
            print(f"batchrun      {ours[-1]:8.2f} s execute, {report.seconds.total:.2f} s in all", flush=True)
            if not args.skip_peer:
                theirs.append(run_transformers(peer, requests))
                print(f"transformers  {theirs[-1]:8.2f} s padded generate", flush=True)
    document = {
        "workload": args.workload,
        "dtype": args.dtype,
        "requests": len(requests),
        "batchrun_seconds": ours,
        "transformers_padded_seconds": theirs,
        "ratio_of_medians": statistics.median(theirs) / statistics.median(ours) if theirs else None,
        "saving": report.saving,
        "steps": report.steps,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("batchrun", "torch", "transformers")},
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
