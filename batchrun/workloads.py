"""The standard workloads: jobs of random token ids, seeded, with distinct tokens for each prefix and each request.

Prompts are token ids, so that any model can run them. Answers run to their limits; in `skew` that has to be found out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from batchrun.errors import UsageError

SIZES = ("cpu", "gpu")

_FIRST_ID = 16  # below are the ids that models like to give special tokens
_LEAST_VOCABULARY = 64

Made = Iterator[tuple[list[int], int]]  # prompts, and the lengths of their answers
Count = Callable[[int], int]  # of prefixes, or of requests that share none, at the scale asked for


class Groups(NamedTuple):
    """Groups of requests that share a prefix; lengths in tokens.

    Attributes:
        groups: how many.
        prefix: length of the prefix of each.
        requests: of each.
        own: length of what each request has besides.
        output: length of each answer.
    """

    groups: int
    prefix: int
    requests: int
    own: int
    output: int


MICRO = {"cpu": Groups(4, 512, 16, 32, 32), "gpu": Groups(400, 2000, 16, 200, 100)}
_PRESSURE = {"cpu": Groups(12, 512, 8, 32, 32), "gpu": Groups(400, 2000, 16, 200, 100)}
_GROUPS_HELD = {"cpu": 3, "gpu": 24}  # that KV memory holds under pressure, or a quarter of them if that is less
_UNSHARED = {"cpu": Groups(32, 0, 1, 256, 32), "gpu": Groups(512, 0, 1, 2000, 100)}


class Ids:
    """Random token ids.

    Args:
        seed: of the draws.
        vocab_size: ids are below it.
        part: of all lengths that is taken, so that prompts fit into a small context.
    """

    def __init__(self, seed: int, vocab_size: int, part: float = 1.0) -> None:
        self.seed = seed
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size
        self._part = part

    def take(self, length: int) -> list[int]:
        """Token ids, as many as are left of a length."""
        return self._rng.integers(_FIRST_ID, self._vocab_size, self.left_of(length)).tolist()

    def left_of(self, length: int) -> int:
        """What the part taken leaves of a length: at least one token, unless it was none."""
        return max(1, int(self._part * length)) if length else 0


def micro(ids: Ids, groups: int, prefix: int, requests: int, own: int, output: int) -> Made:
    """One level of sharing: `groups` prefixes, each read by `requests` requests."""
    for _ in range(groups):
        shared = ids.take(prefix)
        for _ in range(requests):
            yield shared + ids.take(own), output


def _grouped(shapes: dict[str, Groups]) -> Callable[[Ids, str, Count], Made]:
    return lambda ids, size, count: micro(ids, count(shapes[size].groups), *shapes[size][1:])


def _tree(ids: Ids, size: str, count: Count) -> Made:
    """Two levels: 4 systems of 256 tokens, below each 4 of 768 (512 of examples and 256 of a document), and 8 questions
    for each of those."""
    for _ in range(count({"cpu": 4, "gpu": 64}[size])):
        system = ids.take(256)
        for _ in range(4):
            shots = ids.take(512)
            document = ids.take(256)
            for _ in range(8):
                yield system + shots + document + ids.take(32), 32


def _mixed(ids: Ids, size: str, count: Count) -> Made:
    """Half decode-heavy (short prompts, long answers), half prefill-heavy (a long document shared by two questions)."""
    documents, length = {"cpu": (16, 448), "gpu": (512, 1792)}[size]
    for i in range(count(documents)):
        document = ids.take(length)
        for _ in range(2):
            yield ids.take(16), 96 + 32 * (i % 3)
            yield document + ids.take(32), 4


def _skew(ids: Ids, size: str, count: Count) -> Made:
    """Zipf group sizes, log-normal prompt and answer lengths."""
    groups, requests = map(count, {"cpu": (12, 96), "gpu": (400, 6400)}[size])
    draw = np.random.default_rng(ids.seed + 2)
    share = 1 / np.arange(1, groups + 1)
    sizes = np.maximum((requests * share / share.sum()).astype(int), 1)
    for readers in sizes.tolist():
        shared = ids.take(int(np.clip(draw.lognormal(5, 0.8), 16, 1024)))
        for _ in range(readers):
            own, output = np.clip(draw.lognormal((3.5, 3.2), (0.6, 0.8)), 4, (256, 256)).astype(int).tolist()
            yield shared + ids.take(own), output


def _many(ids: Ids, size: str, count: Count) -> Made:
    """Short requests, few tokens each; a header that all share."""
    header = ids.take(8)
    for _ in range(count(1_000_000)):
        yield header + ids.take(8), 2


class _Kind(NamedTuple):
    """A workload before its size is known: what it is, and what makes its requests in order."""

    about: str
    requests: Callable[[Ids, str, Count], Made]


WORKLOADS = {
    "micro": _Kind("groups of requests that share a long prefix", _grouped(MICRO)),
    "pressure": _Kind("the same, with KV memory for few of the groups", _grouped(_PRESSURE)),
    "tree": _Kind("prefixes that share prefixes", _tree),
    "none": _Kind("nothing is shared: it must not be slower for the looking", _grouped(_UNSHARED)),
    "mixed": _Kind("long answers to short prompts beside short answers about long documents", _mixed),
    "skew": _Kind("groups and lengths as uneven as in real jobs; answers may end early", _skew),
    "many": _Kind("a million short requests: what the host does", _many),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload at a size.

    Attributes:
        name: one of `WORKLOADS`.
        requests: prompts and the lengths of their answers, shuffled.
        kv_tokens: tokens that there is KV memory for, where the workload is about memory; None: as many as there are.
        ignore_eos: whether answers go on past ends of text, so that their lengths are known.
        part: of all lengths that was taken to fit the context; 1 where nothing was cut.
    """

    name: str
    requests: list[tuple[list[int], int]]
    kv_tokens: int | None
    ignore_eos: bool
    part: float


def make_workload(
    name: str,
    *,
    vocab_size: int,
    max_context: int | None = None,
    size: str = "cpu",
    scale: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Make a workload. Equal arguments make equal requests.

    Args:
        name: one of `WORKLOADS`.
        vocab_size: of the model.
        max_context: longest prompt and answer together that the model takes; where a workload has longer ones, all of
            its lengths are cut in the same proportion.
        size: one of `SIZES`: what keeps such a device busy for a while.
        scale: of the number of groups, or of requests where there are none.
        seed: of the token ids and of the order.

    Raises:
        UsageError: the vocabulary or the context is too small.
    """
    if vocab_size < _LEAST_VOCABULARY:
        raise UsageError(
            f"Workloads need a vocabulary of at least {_LEAST_VOCABULARY} tokens; this one has {vocab_size}."
        )

    def count(of_one: int) -> int:
        return max(1, round(scale * of_one))

    def at(part: float) -> tuple[list[tuple[list[int], int]], Ids]:
        ids = Ids(seed, vocab_size, part)
        made = WORKLOADS[name].requests(ids, size, count)
        return [(prompt, ids.left_of(output)) for prompt, output in made], ids

    part = 1.0
    requests, ids = at(part)
    if max_context is not None and (longest := _longest(requests)) > max_context:
        part = max_context / longest
        requests, ids = at(part)
        if _longest(requests) > max_context:
            raise UsageError(
                f"The workload {name} does not fit into a context of {max_context} tokens.", hint="Choose others."
            )
    kv_tokens = None
    if name == "pressure":
        _, prefix, readers, own, output = _PRESSURE[size]
        held = min(-(-count(_PRESSURE[size].groups) // 4), _GROUPS_HELD[size])
        kv_tokens = held * (ids.left_of(prefix) + readers * (ids.left_of(own) + ids.left_of(output)))
    order = np.random.default_rng(seed + 1).permutation(len(requests))
    return Workload(name, [requests[i] for i in order], kv_tokens, name != "skew", part)


def _longest(requests: list[tuple[list[int], int]]) -> int:
    return max(len(prompt) + output for prompt, output in requests)


def write_job(path: Path, workload: Workload) -> None:
    """Write a workload as a job of greedy completions; where ends of text are ignored, answers are as long as it says.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("w") as file:
        for i, (prompt, output) in enumerate(workload.requests):
            body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": workload.ignore_eos}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
