"""From a job file to token ids: checking lines, reading them, tokenising chats that share a system prompt, and what
memory that takes.

Jobs are of generated text, and the tokenizer is a byte-level BPE trained on such text. Rates are a core's (processor
time) for reading and the clock's for tokenising, which takes all cores; medians of alternating repeats. Memory is the
peak of a process of its own, at 1x, 4x and 16x the work; what a request takes is how much more one with more requests
holds.

    python scripts/bench/bench_intake.py
    python scripts/bench/bench_intake.py --scale 0.1 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from batchrun.config import load_config
from batchrun.formats.job import lint_job, open_job, read_job
from batchrun.intake import read_requests
from batchrun.request import JobLine, Requests
from batchrun.specs import ModelSpec
from batchrun.tokenizer import Tokenizer, load_tokenizer

VOCABULARY = 8000
# The split of Llama 3's tokenizer.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SYSTEM_TOKENS = 2000
Line = dict[str, Any]


# --- text and jobs --------------------------------------------------------------------------------------------------


class Text:
    """Sentences of made-up words, the common ones as common as in a language (Zipf)."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(0)  # one language for all
        syllables = np.array([head + tail for head in "bcdfghklmnprstvw" for tail in ["a", "ei", "i", "on", "u", "er"]])
        self._words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(30_000)])
        share = 1 / np.arange(1, self._words.size + 1)
        self._share = share / share.sum()
        self._rng = np.random.default_rng(seed)

    def words(self, count: int) -> str:
        words = self._rng.choice(self._words, count, p=self._share).tolist()
        return " ".join(" ".join(words[i : i + 12]).capitalize() + "." for i in range(0, count, 12))


def make_model(path: Path) -> None:
    """A model directory that has a tokenizer and a chat template, and no model."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trained

    text = Text(1)
    bpe = Trained(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator((text.words(2000) for _ in range(200)), trainer)
    bpe.add_special_tokens(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"])
    bpe.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))


def chats(count: int, system_words: int, user_words: int) -> Iterator[Line]:
    """Chat lines in OpenAI's batch form: one system prompt, and a question each."""
    text = Text(2)
    system = text.words(system_words)
    questions = [text.words(user_words) for _ in range(500)]
    for i in range(count):
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": f"{i}: {questions[i % 500]}"},
        ]
        body = {"model": "m", "messages": messages, "max_tokens": 100, "temperature": 0}
        yield {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def hinted(lines: Iterator[Line]) -> Iterator[Line]:
    for i, line in enumerate(lines):
        yield line | {"batchrun": {"expected_tokens": 1 + i % 500}}


def sampled(lines: Iterator[Line]) -> Iterator[Line]:
    """With settings as vLLM has them."""
    for line in lines:
        settings = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "stop": ["\n\n"], "ignore_eos": False}
        yield line | {"body": line["body"] | settings}


def prompts(count: int, words: int) -> Iterator[Line]:
    """Plain lines with a prompt."""
    text = Text(3)
    questions = [text.words(words) for _ in range(500)]
    for i in range(count):
        yield {"id": i, "prompt": f"{i}: {questions[i % 500]}", "max_tokens": 100}


def write_job(path: Path, lines: Iterator[Line]) -> int:
    """Write the job; returns the number of lines."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
            count += 1
    return count


# --- measurements ---------------------------------------------------------------------------------------------------


def measure_lines(folder: Path, scale: float, repeats: int) -> dict[str, Any]:
    """Checking and reading lines of several sizes, in MB a second of one core, and beside it what orjson alone takes,
    turn about."""
    jobs = {
        "chat": chats(int(8000 * scale), 900, 150),
        "chat, middling": chats(int(30_000 * scale), 100, 180),
        "chat, sampled": sampled(chats(int(30_000 * scale), 100, 180)),
        "chat, with hints": hinted(chats(int(30_000 * scale), 100, 180)),
        "plain": prompts(int(30_000 * scale), 330),
        "chat, short": chats(int(100_000 * scale), 2, 3),
        "plain, short": prompts(int(100_000 * scale), 6),
    }
    found = {}
    for name, lines in jobs.items():
        path = folder / "lines.jsonl"
        count = write_job(path, lines)
        size = path.stat().st_size
        seconds: dict[str, list[float]] = {"orjson": [], "lint": [], "read": []}
        texts = path.read_bytes().splitlines()
        for _ in range(repeats):
            began = time.process_time()
            for text in texts:
                orjson.loads(text)
            seconds["orjson"].append(time.process_time() - began)
            began = time.process_time()
            lint = lint_job(open_job(path))
            seconds["lint"].append(time.process_time() - began)
            began = time.process_time()
            sound = sum(isinstance(line, JobLine) for line in read_job(open_job(path)))
            seconds["read"].append(time.process_time() - began)
            assert lint.sound == sound == count
        path.unlink()
        medians = {job: statistics.median(taken) for job, taken in seconds.items()}
        found[name] = {"bytes_a_line": size / count, "us_a_line": 1e6 * medians["lint"] / count} | {
            f"{job}_mb_a_core_s": size / 1e6 / taken for job, taken in medians.items()
        }
        found[name]["share_of_orjson"] = medians["orjson"] / medians["lint"]
    return found


class Uncut(Tokenizer):
    """The same tokenizer, with nothing known of its sections: every prompt is encoded as a whole."""

    def section_starts(self) -> None:
        return None


def measure_tokenize(folder: Path, scale: float, repeats: int) -> dict[str, Any]:
    """Tokenising a chat job with a shared system prompt: shared sections once, and every prompt as a whole."""
    (folder / "model").mkdir()
    make_model(folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    path = folder / "chats.jsonl"
    count = write_job(path, chats(int(3000 * scale), system_words(tokenizer), 80))
    lines = [line for line in read_job(open_job(path)) if isinstance(line, JobLine)]
    path.unlink()
    ways = {"once": tokenizer, "whole": Uncut(tokenizer._fast)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    ids: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for way, each in ways.items():
            began = time.perf_counter()
            ids[way] = tokens_of(lines, each).tokens.ids
            seconds[way].append(time.perf_counter() - began)
    assert np.array_equal(ids["once"], ids["whole"])
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    return {
        "requests": count,
        "tokens_a_request": ids["once"].size / count,
        "tokens_a_s_once": ids["once"].size / medians["once"],
        "tokens_a_s_whole": ids["whole"].size / medians["whole"],
        "us_a_request_once": 1e6 * medians["once"] / count,
        "ratio": medians["whole"] / medians["once"],
        "ratios": [whole / once for whole, once in zip(seconds["whole"], seconds["once"], strict=True)],
    }


def system_words(tokenizer: Tokenizer) -> int:
    """Words that make a system prompt of about `SYSTEM_TOKENS` tokens."""
    [ids] = tokenizer.encode_batch([Text(4).words(1200)])
    return 1200 * SYSTEM_TOKENS // len(ids)


def tokens_of(lines: Any, tokenizer: Tokenizer) -> Requests:
    spec = ModelSpec("llama", tokenizer.vocab_size, 64, 64, 1, 1, 1, 64, 1 << 20, None, "float32")
    intake = read_requests(lines, tokenizer, spec, {}, load_config(model="none"))
    assert not intake.faults
    return intake.requests


# Requests at 1x, words of a question, and whether it stands behind a system prompt.
MEMORY_JOBS = {"chats of 10 kB": (2500, 80, True), "prompts of 100 B": (60_000, 6, False)}


def measure_memory(folder: Path, scale: float) -> dict[str, Any]:
    """The peak memory of a process that checks a job, reads it and tokenises it."""
    tokenizer = load_tokenizer(folder / "model")
    found: dict[str, Any] = {}
    for name, (size, words, chat) in MEMORY_JOBS.items():
        rows: list[dict[str, float]] = []
        for times in (1, 4, 16):
            path = folder / "memory.jsonl"
            count = int(size * scale) * times
            write_job(path, chats(count, system_words(tokenizer), words) if chat else prompts(count, words))
            command = [sys.executable, __file__, "--peak-of", str(path), str(folder / "model"), str(words)]
            shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"mb_of_job": path.stat().st_size / 1e6} | json.loads(shown))
            path.unlink()
        for less, more in pairwise(rows):
            beside = [row["mb_of_peak"] - row["mb_of_tokens"] for row in (less, more)]
            more["bytes_a_request_beside"] = 1e6 * (beside[1] - beside[0]) / (more["requests"] - less["requests"])
        found[name] = rows
    return found


def peak_of(job: Path, model: Path, words: int) -> dict[str, float]:
    """Check, read and tokenise a job in this process."""

    def lines(path: Path) -> Iterator[JobLine]:
        source = open_job(path)
        lint_job(source)
        return (line for line in read_job(source) if isinstance(line, JobLine))

    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other.jsonl"
        # Fills what the encoder keeps of such questions, which does not grow with a job.
        write_job(other, prompts(8_000_000 // (words + 60), words))
        tokens_of(lines(other), tokenizer)
    requests = tokens_of(lines(job), tokenizer)
    # Not getrusage: that has the peak of the process that started this one, before it became this program.
    [peak] = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return {
        "requests": len(requests),
        "mb_of_tokens": requests.tokens.ids.nbytes / 1e6,
        "mb_of_peak": int(peak) * 1024 / 1e6,
    }


# --- what is shown ---------------------------------------------------------------------------------------------------


def show(document: dict[str, Any]) -> Iterator[str]:
    yield f"{'lines':20}{'bytes':>8}{'us a line':>11}{'lint MB/s':>11}{'read MB/s':>11}{'orjson MB/s':>13} a core"
    for name, row in document["lines"].items():
        yield (
            f"{name:20}{row['bytes_a_line']:8.0f}{row['us_a_line']:11.1f}"
            f"{row['lint_mb_a_core_s']:11.0f}{row['read_mb_a_core_s']:11.0f}{row['orjson_mb_a_core_s']:13.0f}"
        )
    if "tokenize" not in document:
        return
    row = document["tokenize"]
    yield ""
    yield (
        f"{row['requests']:,} chats of {row['tokens_a_request']:.0f} tokens, one system prompt, tokens a second: "
        f"{row['tokens_a_s_once']:,.0f} with what is shared tokenised once, {row['tokens_a_s_whole']:,.0f} without; "
        f"ratio {row['ratio']:.1f} (each repeat: {', '.join(f'{ratio:.1f}' for ratio in row['ratios'])}); "
        f"{row['us_a_request_once']:.0f} us a request"
    )
    yield ""
    yield f"{'memory':20}{'requests':>10}{'job MB':>9}{'tokens MB':>11}{'peak MB':>10}{'beside, B a request':>22}"
    for name, rows in document["memory"].items():
        for row in rows:
            beside = row.get("bytes_a_request_beside")
            yield (
                f"{name:20}{row['requests']:10,}{row['mb_of_job']:9.0f}{row['mb_of_tokens']:11.1f}"
                f"{row['mb_of_peak']:10.1f}{'' if beside is None else f'{beside:.0f}':>22}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the jobs; 1 takes some minutes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lines-only", action="store_true", help="lines alone, not tokenising and memory")
    parser.add_argument("--peak-of", nargs=3, metavar=("JOB", "MODEL", "WORDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        job, model, words = args.peak_of
        print(json.dumps(peak_of(Path(job), Path(model), int(words))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = {"lines": measure_lines(folder, args.scale, args.repeats)}
        if not args.lines_only:
            document["tokenize"] = measure_tokenize(folder, args.scale, args.repeats)
            document["memory"] = measure_memory(folder, args.scale)
        document |= {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("batchrun", "tokenizers", "transformers", "orjson", "numpy")},
        }
    print("\n".join(show(document)))
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
