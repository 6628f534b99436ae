"""Memory of whole commands on jobs of many short lines: the most that each of their processes ever held.

Jobs have 1x, 4x and 16x the lines. Every command runs in a process of its own, as a user gives it: `plan`, `run` (whose
model lives in a second process, the engine's), `run` with its results put into the order of the input, and `resume`,
which is a run that was stopped after about half of its lines. The model is tiny, so that what is measured is what there
is of each line. Bytes a line are what a process holds more for each line more; the exponent is that of a fit of the
seconds (log against log).

    python scripts/bench/bench_memory.py
    python scripts/bench/bench_memory.py --lines 62500 250000 --only plan run
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

COMMANDS: dict[str, list[str]] = {
    "plan": [],
    "run": [],
    "run, in input order": ["--results-order", "input"],
    "resume": [],
}
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
_LOOK_SECONDS = 0.02
_RESULT_BYTES = 600  # of a line of results.jsonl, about


def make_model(path: Path) -> None:
    """A model of one small layer, random weights, and a byte tokenizer. In a process of its own, so that this one has
    no torch in it."""
    made = f"""
import json, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**{SHAPE!r}, eos_token_id=None, bos_token_id=None)).save_pretrained({str(path)!r})
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({{character: i for i, character in enumerate(alphabet)}}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save({str(path / "tokenizer.json")!r})
"""
    subprocess.run([sys.executable, "-c", made], check=True)
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def write_job(path: Path, lines: int) -> None:
    """Completions of two tokens, some 20 tokens each: 100 headers that many share, and a number."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(lines):
            body = {"prompt": f"table {i % 100:02}: {i:07}", "max_tokens": 2, "temperature": 0}
            line = {"custom_id": f"request-{i:07}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def peak(pid: int) -> int | None:
    """The most bytes of memory that a process has held so far; None if it is gone."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def watched(command: list[str]) -> dict[str, Any]:
    """Run a command; seconds, its exit code, and the peak of its process and of the one that it starts."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "batchrun.cli", *command], stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    peaks = {"command": 0, "engine": 0}
    while process.poll() is None:
        # What was read last counts: a child that is not yet the program it will be has the memory of its parent.
        peaks["command"] = peak(process.pid) or peaks["command"]
        try:
            for child in children.read_text().split():
                peaks["engine"] = peak(int(child)) or peaks["engine"]
        except OSError:
            pass
        time.sleep(_LOOK_SECONDS)
    return {"exit_code": process.returncode, "seconds": time.perf_counter() - began, **peaks}


def stop_halfway(command: list[str], out: Path, lines: int) -> int:
    """Start a run and stop it when about half of its lines are done; how many are."""
    results = out / "results.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "batchrun.cli", *command], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (results.exists() and results.stat().st_size > lines * _RESULT_BYTES / 2):
        time.sleep(_LOOK_SECONDS)
    process.terminate()
    assert process.wait() == 75
    completed: int = json.loads((out / "run.json").read_bytes())["request_counts"]["completed"]
    return completed


def measure(name: str, lines: int, folder: Path) -> dict[str, Any]:
    """One command on a job of so many lines."""
    job, out = folder / "job.jsonl", folder / "job.run"
    write_job(job, lines)
    settings = ["--model", str(folder / "model"), "--device", "cpu", "--dtype", "float32"]
    if name == "plan":
        found = watched(["plan", str(job), *settings]) | {"engine": 0}  # which it has none of
    else:
        settings += ["--out", str(out), "--quiet", *COMMANDS[name]]
        done = stop_halfway(["run", str(job), *settings], out, lines) if name == "resume" else 0
        found = watched(["run", str(job), *settings])
        counts = json.loads((out / "run.json").read_bytes())["request_counts"]
        assert counts == {"total": lines, "completed": lines, "failed": 0, "remaining": 0}, counts
        with (out / "results.jsonl").open("rb") as file:
            assert sum(1 for _ in file) == lines
        found["results_mb"] = (out / "results.jsonl").stat().st_size / 1e6
        found["done_before"] = done
    assert found["exit_code"] == 0, found
    found |= {"lines": lines, "job_mb": job.stat().st_size / 1e6}
    subprocess.run(["rm", "-rf", out, job], check=True)
    return found


def add_growth(rows: list[dict[str, Any]]) -> None:
    """Bytes a line and exponents, in each row after the first."""
    for less, more in pairwise(rows):
        for process in ("command", "engine"):
            if more[process]:
                more[f"{process}_bytes_a_line"] = (more[process] - less[process]) / (more["lines"] - less["lines"])
    if len(rows) > 1:
        lines, seconds = (np.log([row[name] for row in rows]) for name in ("lines", "seconds"))
        rows[-1]["exponent_of_seconds"] = float(np.polyfit(lines, seconds, 1)[0])


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    print(
        f"{'command':20}{'lines':>10}{'seconds':>9}{'command MB':>12}{'B a line':>10}{'engine MB':>11}{'B a line':>10}"
    )
    for name, rows in found.items():
        for row in rows:
            figures = []
            for process, width in (("command", 12), ("engine", 11)):
                grown = row.get(f"{process}_bytes_a_line")
                figures.append(f"{row[process] / 1e6:{width}.0f}{'' if grown is None else f'{grown:.0f}':>10}")
            print(f"{name:20}{row['lines']:10,}{row['seconds']:9.1f}{''.join(figures)}")
        if "exponent_of_seconds" in rows[-1]:
            print(f"{'':20}seconds grow with exponent {rows[-1]['exponent_of_seconds']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[62_500, 250_000, 1_000_000], help="sizes of the job")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        for command in args.only:
            found[command] = [measure(command, lines, folder) for lines in args.lines]
            add_growth(found[command])
    show(found)
    document = {
        "commands": found,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("batchrun", "torch", "transformers", "numpy", "orjson")},
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
