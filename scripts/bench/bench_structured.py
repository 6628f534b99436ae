"""Structured outputs: what they cost a run, and the library that is used beside the one that is not.

    python scripts/bench/bench_structured.py run          # 64 rows with a grammar against 64 without
    python scripts/bench/bench_structured.py libraries    # llguidance against xgrammar, where both are installed

The model has SmolLM2-135M's shape and random weights; the tokenizer is a byte-level BPE of 16,384 tokens at most,
trained on the texts of this repository.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "tests")]

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z]{1,20}@[a-z]{1,20}\\.(com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["new", "known", "lost", "won"]}, "maxItems": 5},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
# An answer that no token limit lets end, so that all rows go on as long as those without a grammar.
LONG = {"type": "array", "items": PERSON, "minItems": 1000}
END = 1


def make_tokenizer(folder: Path, size: int = 16384) -> Path:
    """Write tokenizer.json; 0 is padding, `END` ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = [path for suffix in ("py", "md", "json", "jsonl") for path in sorted(ROOT.glob(f"*/**/*.{suffix}"))]
    texts = [path.read_text(encoding="utf-8") for path in files if path.is_file() and ".venv" not in path.parts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|pad|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


# --- a run --------------------------------------------------------------------------------------------------------


def bench_run(rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Runs in turn, by one engine, so that each pair has the same machine; after one of each that does not count."""
    from bench_run import make_model

    from batchrun.config import load_config
    from batchrun.pipeline import run_job, start_engine
    from batchrun.subject import Subject

    kinds = {"free": {"ignore_eos": True}, "grammar": {"structured_outputs": {"json": LONG}}}
    execute: dict[str, list[float]] = {kind: [] for kind in kinds}
    decode: dict[str, list[float]] = {kind: [] for kind in kinds}  # steps of decodes alone, of all runs
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model")
        make_tokenizer(root / "model")
        for kind, how in kinds.items():
            lines = [
                {
                    "id": f"{i}",
                    "prompt": f"Write person {i} of the list as JSON: ",
                    "max_tokens": tokens,
                    "seed": i,
                    **how,
                }
                for i in range(rows)
            ]
            (root / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = load_config(model=str(root / "model"))
        with closing(start_engine(Subject.resolve(config, weights=True), config)) as engine:
            for repeat in range(-1, repeats):
                for kind in kinds if repeat % 2 else reversed(kinds):
                    out = root / f"{kind}{repeat}.run"
                    options = load_config(model=str(root / "model"), out=str(out))
                    report = run_job(str(root / f"{kind}.jsonl"), options, engine=engine).report
                    assert report.tokens.output == rows * tokens
                    if repeat < 0:
                        continue
                    execute[kind].append(report.seconds.execute or 0.0)
                    records = [json.loads(line)["record"] for line in (out / "steps.jsonl").read_text().splitlines()]
                    decode[kind] += [step["seconds"] for step in records if not step["prefill_rows"]]
                    print(f"{kind:8} {execute[kind][-1]:8.2f} s, {report.steps} steps", flush=True)
    pairs = sorted(grammar / free - 1 for grammar, free in zip(execute["grammar"], execute["free"], strict=True))
    quarters = {kind: statistics.quantiles(found, n=4) for kind, found in decode.items()}
    return {
        "rows": rows,
        "tokens": tokens,
        "execute": execute,
        "slower_by_medians": statistics.median(execute["grammar"]) / statistics.median(execute["free"]) - 1,
        "slower_by_fastest": min(execute["grammar"]) / min(execute["free"]) - 1,
        "slower_in_pairs": pairs,
        "decode_steps": {kind: len(found) for kind, found in decode.items()},
        "decode_step_ms_quartiles": {kind: [1e3 * q for q in found] for kind, found in quarters.items()},
        "decode_slower_by_quartiles": [
            grammar / free - 1 for grammar, free in zip(quarters["grammar"], quarters["free"], strict=True)
        ],
        "versions": {name: version(name) for name in ("batchrun", "torch", "llguidance")},
    }


# --- the libraries ------------------------------------------------------------------------------------------------

# Compiles a schema and returns what fills the mask of its next token and what takes a token; raises if it cannot.
Walk = tuple[Callable[[np.ndarray], None], Callable[[int], None]]


def with_llguidance(tokens: list[bytes]) -> Callable[[str], Walk]:
    from llguidance.numpy import fill_next_token_bitmask

    from batchrun.grammar import Grammars
    from batchrun.request import Grammar

    grammars = Grammars(tokens)

    def start(schema: str) -> Walk:
        matcher = grammars.matcher(Grammar("json", schema))
        return lambda row: fill_next_token_bitmask(matcher._matcher, row[None]), lambda token: matcher.consume([token])

    return start


def with_xgrammar(tokens: list[bytes]) -> Callable[[str], Walk]:
    import torch
    import xgrammar

    info = xgrammar.TokenizerInfo([*tokens, b"</s>"], xgrammar.VocabType.RAW, stop_token_ids=[len(tokens)])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=True)

    def start(schema: str) -> Walk:
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(schema, any_whitespace=True))

        def take(token: int) -> None:
            if not matcher.accept_token(token):
                raise RuntimeError("an allowed token was not accepted")

        return lambda row: matcher.fill_next_token_bitmask(torch.from_numpy(row[None])), take

    return start


def walk(start: Callable[[str], Walk], schema: str, tokens: list[bytes], seed: int, most: int = 400) -> dict[str, Any]:
    """A text by tokens that are drawn alike from all that are allowed."""
    random = np.random.default_rng(seed)
    row = np.zeros(len(tokens) // 32 + 1, dtype=np.int32)
    began = time.perf_counter()
    fill, take = start(schema)
    found: dict[str, Any] = {"compile": time.perf_counter() - began, "fill": [], "text": None}
    written = b""
    for _ in range(most):
        began = time.perf_counter()
        fill(row)
        found["fill"].append(time.perf_counter() - began)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[: len(tokens) + 1])
        if not allowed.size:
            break
        # An end is taken where there is one, so that texts end.
        token = int(allowed[-1]) if allowed[-1] == len(tokens) else int(random.choice(allowed))
        if token == len(tokens):
            found["text"] = written
            break
        take(token)
        written += tokens[token]
    return found


def bench_libraries(schemas: int) -> dict[str, Any]:
    from jsonschema import Draft202012Validator
    from schemas import make_schemas
    from tokenizers import Tokenizer as Backend

    from batchrun.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text("{}")
        path = make_tokenizer(Path(folder))
        size = Backend.from_file(str(path)).get_vocab_size()
        tokens = load_tokenizer(Path(folder)).vocabulary(size)
    print(f"{size} tokens", flush=True)
    asked = [PERSON, *make_schemas(schemas)]
    found: dict[str, Any] = {"tokens": size, "schemas": len(asked)}
    for name, library in (("llguidance", with_llguidance), ("xgrammar", with_xgrammar)):
        try:
            version(name)
        except Exception:
            print(f"{name} is not installed", flush=True)
            continue
        began = time.perf_counter()
        start = library(tokens)
        vocabulary = time.perf_counter() - began
        compiles, fills, refused, wrong, finished = [], [], [], [], 0
        for i, schema in enumerate(asked):
            try:
                walked = walk(start, json.dumps(schema), tokens, seed=i)
            except Exception as error:
                refused.append(f"{i}: {str(error).splitlines()[0][:80]}")
                continue
            compiles.append(walked["compile"])
            fills += walked["fill"]
            if walked["text"] is not None:
                finished += 1
                try:
                    Draft202012Validator(schema).validate(json.loads(walked["text"]))
                except Exception as error:
                    wrong.append(f"{i}: {str(error).splitlines()[0][:80]}")
        found[name] = {
            "version": version(name),
            "vocabulary_ms": 1e3 * vocabulary,
            "compile_ms": {"median": 1e3 * statistics.median(compiles), "most": 1e3 * max(compiles)},
            "mask_us": {
                "mean": 1e6 * statistics.fmean(fills),
                "median": 1e6 * statistics.median(fills),
                "p99": 1e6 * float(np.quantile(fills, 0.99)),
                "most": 1e6 * max(fills),
            },
            "masks": len(fills),
            "finished": finished,
            "refused": refused,
            "wrong": wrong,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "libraries"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--schemas", type=int, default=200)
    args = parser.parse_args()
    if args.what == "run":
        document = bench_run(args.rows, args.tokens, args.repeats)
    else:
        document = bench_libraries(args.schemas)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
