"""Make the benchmark workloads: job files of random token ids, seeded, with distinct tokens per group and per request.

Prompts are token ids, so that any model whose vocabulary is large enough can run them; every answer runs to its limit.

    python scripts/make_job.py micro --vocab-size 16384 -o micro.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FIRST_ID = 16  # below are the ids that models like to give special tokens


def micro(rng: Ids, groups: int, prefix: int, requests: int, own: int, output: int) -> Iterator[tuple[list[int], int]]:
    """One level of sharing: `groups` prefixes, each read by `requests` requests."""
    for _ in range(groups):
        shared = rng.take(prefix)
        for _ in range(requests):
            yield shared + rng.take(own), output


def tree(rng: Ids, output: int) -> Iterator[tuple[list[int], int]]:
    """Three levels: system 256 -> few-shot 512 -> document 256 -> question 32, degrees 4, 4 and 8."""
    for _ in range(4):
        system = rng.take(256)
        for _ in range(4):
            shots = rng.take(512)
            document = rng.take(256)
            for _ in range(8):
                yield system + shots + document + rng.take(32), output


class Ids:
    """Random token ids."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def take(self, count: int) -> list[int]:
        return self._rng.integers(FIRST_ID, self._vocab_size, count).tolist()


def workload(name: str, *, vocab_size: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """The prompts and answer lengths of a workload, shuffled.

    Args:
        name: `micro`, `pressure`, `tree` or `none`, at the size for a CPU.
    """
    ids = Ids(seed, vocab_size)
    made = {
        "micro": lambda: micro(ids, 4, 512, 16, 32, 32),
        "pressure": lambda: micro(ids, 12, 512, 8, 32, 32),
        "tree": lambda: tree(ids, 32),
        "none": lambda: micro(ids, 32, 0, 1, 256, 32),
    }[name]
    requests = list(made())
    order = np.random.default_rng(seed + 1).permutation(len(requests))
    return [requests[i] for i in order]


def write_job(path: Path, requests: list[tuple[list[int], int]]) -> None:
    """Write a job of greedy completions that run to their limits."""
    with path.open("w") as file:
        for i, (prompt, output) in enumerate(requests):
            body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["micro", "pressure", "tree", "none"])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_job(args.out, workload(args.name, vocab_size=args.vocab_size, seed=args.seed))


if __name__ == "__main__":
    main()
