"""What an adapter gets and gives, as two JSON files: a peer's environment needs nothing but Python to read them.

An adapter is a program, `adapter.py JOB RESULT`, that loads a model, answers all requests of the job greedily, each
with exactly as many tokens as it asks for, and writes how long that took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Prompt = list[int]
ROOMY_TOKENS = 65_536  # more than the distinct tokens of any workload


@dataclass(frozen=True)
class Job:
    """A workload for one peer.

    Attributes:
        model: directory or file of the model in the peer's form.
        dtype: `float32` or `bfloat16`.
        threads: processor threads to use.
        prompts: token ids of each request, in the order in which the peer is given them.
        outputs: tokens to answer each with; end of text is ignored.
        kv_tokens: tokens that KV memory may hold at a time, or None where memory is roomy.
        scratch: an empty folder to write in.
    """

    model: str
    dtype: str
    threads: int
    prompts: list[Prompt]
    outputs: list[int]
    kv_tokens: int | None
    scratch: str

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer."""
        return max(len(p) + n for p, n in zip(self.prompts, self.outputs, strict=True))

    @property
    def room(self) -> int:
        """Tokens of KV to set aside: what memory holds, or where it is roomy enough for all requests side by side."""
        everything = sum(map(len, self.prompts)) + sum(self.outputs) + 64 * len(self.prompts)
        return self.kv_tokens or min(everything, ROOMY_TOKENS)


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        load_seconds: from the first import until the peer can answer, warming up included.
        generation_seconds: from the first request given to the last token got, on the clock.
        outputs: token ids of each answer, in the job's order.
        details: what else the peer says, for the JSON document.
    """

    load_seconds: float
    generation_seconds: float
    outputs: list[list[int]]
    details: dict[str, Any] = field(default_factory=dict)


def read_job() -> Job:
    """The job that this process was started for."""
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def write_result(result: Result) -> None:
    """Leave the result for the process that waits for it."""
    Path(sys.argv[2]).write_text(json.dumps(asdict(result)))


def serve(load: Callable[[Job], Any], generate: Callable[[Any, Job], list[list[int]]]) -> None:
    """Load, answer, take the times, write the result. `load` does the imports, so that they count as loading."""
    job = read_job()
    began = time.perf_counter()
    engine = load(job)
    loaded, used = time.perf_counter(), time.process_time()
    outputs = generate(engine, job)
    ended = time.perf_counter()
    details = {"processor_seconds": time.process_time() - used}
    write_result(Result(loaded - began, ended - loaded, outputs, details))


@dataclass(frozen=True)
class Shared:
    """A run of tokens that several prompts begin with.

    Attributes:
        length: tokens, from the beginning of the prompt; at least one token of each member follows.
        members: indices of the prompts.
        level: how many shorter shared runs it contains.
    """

    length: int
    members: list[int]
    level: int


def shared_runs(prompts: list[Prompt], least: int = 16) -> list[Shared]:
    """What prompts share, shortest levels first: what a user who knows the job would tell a peer by hand.

    Args:
        least: tokens by which a run must be longer than the one it contains.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    found: list[Shared] = []

    def split(members: list[int], known: int, level: int) -> None:
        shortest = min(len(prompts[i]) for i in members) - 1
        common = min(in_common(prompts[members[0]], prompts[members[-1]]), shortest)
        if common - known >= least:
            found.append(Shared(common, members, level))
            known, level = common, level + 1
        parts: dict[int, list[int]] = {}
        for i in members:
            parts.setdefault(prompts[i][common], []).append(i)
        for part in parts.values():
            if 1 < len(part) < len(members):
                split(part, known, level)

    if len(order) > 1:
        split(order, 0, 0)
    return sorted(found, key=lambda run: run.level)


def groups(prompts: list[Prompt]) -> list[Shared]:
    """Every prompt once, with those it shares the most tokens with; one that shares nothing stands alone."""
    deepest: dict[int, Shared] = {}
    for run in shared_runs(prompts):
        deepest |= dict.fromkeys(run.members, run)
    members: dict[tuple[int, int], list[int]] = {}
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        run = deepest.get(i)
        members.setdefault((id(run), 0) if run else (0, i + 1), []).append(i)
    return [Shared(deepest[some[0]].length if some[0] in deepest else 0, some, 0) for some in members.values()]


def waves(job: Job, order: Iterable[int], room: int, slack: int = 0) -> Iterator[list[int]]:
    """Requests that stand together and fit together, what they share counted once.

    Args:
        order: indices of the requests.
        room: tokens that fit.
        slack: tokens that each request takes beyond its own, where memory is handed out in blocks.
    """
    wave: list[int] = []
    taken = 0
    for i in order:
        new = len(job.prompts[i]) + job.outputs[i] + slack
        own = new - max((in_common(job.prompts[i], job.prompts[j]) for j in wave), default=0)
        if wave and taken + own > room:
            yield wave
            wave, taken, own = [], 0, new
        wave.append(i)
        taken += own
    if wave:
        yield wave


def in_common(a: Prompt, b: Prompt) -> int:
    """How many tokens two prompts begin with alike."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)
