"""Make the benchmark workloads: job files of random token ids, seeded, with distinct tokens per group and per request.

Prompts are token ids, so that any model whose vocabulary is large enough can run them. Answers run to their limits; in
`skew` that has to be found out.

    python scripts/make_job.py micro --vocab-size 16384 -o micro.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
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


def mixed(rng: Ids, requests: int) -> Iterator[tuple[list[int], int]]:
    """Half decode-heavy (short prompts, long answers), half prefill-heavy (a long document shared by two questions)."""
    for i in range(requests // 4):
        document = rng.take(448)
        for _ in range(2):
            yield rng.take(16), 96 + 32 * (i % 3)
            yield document + rng.take(32), 4


def skew(rng: Ids, groups: int, requests: int) -> Iterator[tuple[list[int], int]]:
    """Zipf group sizes, log-normal prompt and answer lengths."""
    draw = np.random.default_rng(rng.seed + 2)
    share = 1 / np.arange(1, groups + 1)
    sizes = np.maximum((requests * share / share.sum()).astype(int), 1)
    for size in sizes.tolist():
        shared = rng.take(int(np.clip(draw.lognormal(5, 0.8), 16, 1024)))
        for _ in range(size):
            own, output = np.clip(draw.lognormal((3.5, 3.2), (0.6, 0.8)), 4, (256, 256)).astype(int).tolist()
            yield shared + rng.take(own), output


def many(rng: Ids, requests: int) -> Iterator[tuple[list[int], int]]:
    """Short requests, few tokens each; a header that all share."""
    header = rng.take(8)
    for _ in range(requests):
        yield header + rng.take(8), 2


class Ids:
    """Random token ids."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.seed = seed
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def take(self, count: int) -> list[int]:
        return self._rng.integers(FIRST_ID, self._vocab_size, count).tolist()


WORKLOADS: dict[str, Callable[[Ids], Iterator[tuple[list[int], int]]]] = {
    "micro": lambda ids: micro(ids, 4, 512, 16, 32, 32),
    "pressure": lambda ids: micro(ids, 12, 512, 8, 32, 32),
    "tree": lambda ids: tree(ids, 32),
    "none": lambda ids: micro(ids, 32, 0, 1, 256, 32),
    "mixed": lambda ids: mixed(ids, 64),
    "skew": lambda ids: skew(ids, 12, 96),
    "many": lambda ids: many(ids, 1_000_000),
}
KV_TOKENS = {"pressure": 3072}  # of the pool, where the workload is about memory


def workload(name: str, *, vocab_size: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """The prompts and answer lengths of a workload, shuffled.

    Args:
        name: one of `WORKLOADS`, at the size for a CPU.
    """
    ids = Ids(seed, vocab_size)
    made = WORKLOADS[name](ids)
    requests = list(made)
    order = np.random.default_rng(seed + 1).permutation(len(requests))
    return [requests[i] for i in order]


def write_job(path: Path, requests: list[tuple[list[int], int]], *, ignore_eos: bool = True) -> None:
    """Write a job of greedy completions that run to their limits; where end of text is ignored, that is known."""
    with path.open("w") as file:
        for i, (prompt, output) in enumerate(requests):
            body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": ignore_eos}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = workload(args.name, vocab_size=args.vocab_size, seed=args.seed)
    write_job(args.out, made, ignore_eos=args.name != "skew")


if __name__ == "__main__":
    main()
