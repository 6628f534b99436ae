"""What happened, in numbers: a record of each step and the report of a job.

`plan` and `run` fill the same types, so that planned and measured stand side by side; a plan leaves None what only
a run can know.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

GROUPS_SHOWN = 100


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it ran.

    Attributes:
        index: number of the step, from 0.
        rows: rows (tokens) it computed, `prefill_rows + decode_rows`.
        sampled: rows it sampled.
        prefill_rows: rows of prompts and shared prefixes.
        decode_rows: rows of tokens that were sampled before.
        pages_used: KV pages taken while it ran.
        seconds: time on the device; in a plan, what is expected.
        host_seconds: time to schedule it and to take in what it brought.
        running: requests under way when it was made.
        waiting: requests that were not let in yet, or wait to be computed again.
        held_back: whether it had room for rows of one of these, and the KV memory was spoken for.
    """

    index: int
    rows: int
    sampled: int
    prefill_rows: int
    decode_rows: int
    pages_used: int
    seconds: float
    host_seconds: float = 0.0
    running: int = 0
    waiting: int = 0
    held_back: bool = False


_STEP_COLUMNS = np.dtype(
    [
        ("index", np.int64),
        ("rows", np.int64),
        ("sampled", np.int64),
        ("prefill_rows", np.int64),
        ("decode_rows", np.int64),
        ("pages_used", np.int64),
        ("seconds", np.float64),
        ("host_seconds", np.float64),
        ("running", np.int64),
        ("waiting", np.int64),
        ("held_back", np.bool_),
    ]
)
_step_row = attrgetter(*(_STEP_COLUMNS.names or ()))


class StepLog:
    """The records of all steps of a job, in columns; doubles its buffer, so that appending is cheap."""

    __slots__ = ("_buffer", "_size")

    def __init__(self, capacity: int = 1024) -> None:
        self._buffer = np.empty(max(capacity, 1), dtype=_STEP_COLUMNS)
        self._size = 0

    def append(self, record: StepRecord) -> None:
        """Add the record of the next step."""
        if self._size == self._buffer.size:
            grown = np.empty(2 * self._size, dtype=_STEP_COLUMNS)
            grown[: self._size] = self._buffer
            self._buffer = grown
        self._buffer[self._size] = _step_row(record)
        self._size += 1

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, step: int) -> StepRecord:
        return StepRecord(*self.columns[step].item())

    @property
    def columns(self) -> npt.NDArray[np.void]:
        """All records as a structured array `[steps]`: `columns["rows"]` is int64 `[steps]`, `columns["seconds"]`
        float64; a view, good until the next append."""
        return self._buffer[: self._size]


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """What became of the lines of a job; `total = completed + failed + remaining` always.

    Raises:
        ValueError: the counts do not add up.
    """

    total: int
    completed: int  # lines of results.jsonl: success
    failed: int  # lines of errors.jsonl
    remaining: int

    def __post_init__(self) -> None:
        counts = (self.completed, self.failed, self.remaining)
        if min(counts) < 0 or sum(counts) != self.total:
            raise ValueError(f"total {self.total} must be completed + failed + remaining, which are {counts}")


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of a job.

    Attributes:
        prompt_logical: sum of the prompts' lengths.
        prompt_physical: tokens of the prefix forest: each distinct prefix once.
        prompt_computed: prompt rows that are really run, recomputed ones included.
        output: tokens of the answers; in a plan, those expected.
    """

    prompt_logical: int
    prompt_physical: int
    prompt_computed: int
    output: int

    @property
    def saving(self) -> float:
        """Share of the prompt tokens that sharing spares, 0 to 1."""
        return 1 - self.prompt_physical / self.prompt_logical if self.prompt_logical else 0.0


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time went; None for a stage that did not happen."""

    total: float | None = None
    load: float | None = None
    tokenize: float | None = None
    plan: float | None = None
    execute: float | None = None


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """What `Seconds.execute` went to: all but `held_back` add up to it.

    Attributes:
        prefill: steps of prompts alone.
        mixed: steps of prompts and of answers.
        decode: steps of answers alone, but for the tail.
        tail: steps of answers alone when nothing waits any more and less than half of the most requests are under way.
        host: what the steps themselves do not account for: scheduling, writing, the way to the worker.
        recovery: finding that the worker was lost, and starting it again.
        held_back: of the steps above, those that had room for more rows while requests waited: the KV memory was spoken
            for.
    """

    prefill: float
    mixed: float
    decode: float
    tail: float
    host: float
    recovery: float
    held_back: float

    @property
    def device(self) -> float:
        """The steps alone."""
        return self.prefill + self.mixed + self.decode + self.tail


def step_seconds(steps: npt.NDArray[np.void], execute: float, recovery: float) -> StepSeconds:
    """Sort the time of steps by what they did.

    Args:
        steps: `[steps]` as in `StepLog.columns`.
        execute: seconds that they took in all, with what lay between them.
        recovery: as in `StepSeconds`; part of `execute`.
    """
    seconds, prefill = steps["seconds"], steps["prefill_rows"] > 0
    answers = steps["decode_rows"] > 0
    few = (steps["waiting"] == 0) & (2 * steps["running"] < steps["running"].max(initial=0))

    def spent(chosen: npt.NDArray[np.bool_]) -> float:
        return float(seconds[chosen].sum())

    return StepSeconds(
        prefill=spent(prefill & ~answers),
        mixed=spent(prefill & answers),
        decode=spent(~prefill & ~few),
        tail=spent(~prefill & few),
        host=max(execute - recovery - float(seconds.sum()), 0.0),
        recovery=recovery,
        held_back=spent(steps["held_back"]),
    )


@dataclass(frozen=True, slots=True)
class StartSummary:
    """What the steps of one start of a run did, in all.

    Attributes:
        steps: forward passes.
        prefill_rows, decode_rows: rows they computed.
        sampled: tokens they sampled.
        peak_pages: the most KV pages taken at once.
        seconds: on the device.
    """

    steps: int
    prefill_rows: int
    decode_rows: int
    sampled: int
    peak_pages: int
    seconds: float


def sum_up(log: StepLog) -> StartSummary:
    """What the steps of a log did in all."""
    steps = log.columns
    return StartSummary(
        steps=len(log),
        prefill_rows=int(steps["prefill_rows"].sum()),
        decode_rows=int(steps["decode_rows"].sum()),
        sampled=int(steps["sampled"].sum()),
        peak_pages=int(steps["pages_used"].max(initial=0)),
        seconds=float(steps["seconds"].sum()),
    )


@dataclass(frozen=True, slots=True)
class Throughput:
    """What was done per second of `Seconds.execute`; None where nothing was executed."""

    requests_per_second: float | None = None  # lines that got all of their answers
    input_tokens_per_second: float | None = None  # prompt tokens, shared or not, of the requests answered
    output_tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class KvUse:
    """KV memory of a job; `page_size` in tokens, `pages` those there are, `peak_pages` the most taken at once."""

    page_size: int
    pages: int
    peak_pages: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a job is expected to take on a device, steps alone: no loading, no tokenising.

    Attributes:
        seconds: expected.
        low, high: the range that it stands in.
        bound_compute, bound_memory: the least that the device's peaks allow, for matrix operations and for memory.
        bound_weights: of `bound_memory`, what reading the weights once a step takes.
        device: name of the device's file.
        hardware: what the device's figures were measured on, or whose data sheet they are of.
        calibrated: whether the price of a step was measured there.
        requests: how many were simulated, where a job is too large to simulate all; figures are scaled to the job.
    """

    seconds: float
    low: float
    high: float
    bound_compute: float
    bound_memory: float
    bound_weights: float
    device: str
    hardware: str
    calibrated: bool
    requests: int

    @property
    def bound(self) -> float:
        """The least time that the device's peaks allow."""
        return max(self.bound_compute, self.bound_memory)


@dataclass(frozen=True, slots=True)
class BoundSeconds:
    """The least time that the device's peaks allow for the steps that were run.

    Attributes:
        compute: for matrix operations.
        memory: for reading and writing memory.
        weights: of `memory`, what reading the weights once a step takes.
    """

    compute: float
    memory: float
    weights: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.compute, self.memory)


@dataclass(frozen=True, slots=True)
class OrderTried:
    """A schedule order as it was simulated, on the whole job or on a part of it.

    Attributes:
        name: of the order.
        seconds: expected.
        steps: until the end.
        prompt_computed: prompt rows run.
        peak_pages: most KV pages taken at once.
        evictions: shared prefixes dropped and computed again.
    """

    name: str
    seconds: float
    steps: int
    prompt_computed: int
    peak_pages: int
    evictions: int


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """A prefix-sharing group: `requests` of them share their first `prefix_tokens` tokens."""

    id: int
    prefix_tokens: int
    requests: int


@dataclass(frozen=True, slots=True)
class SlowRequest:
    """One of the requests that took longest from the step that it began in to its last one.

    Attributes:
        custom_id, line: of its line.
        prompt_tokens: of its prompt, shared ones included.
        output_tokens: of its answer; None if it has none.
        first_step, last_step: that it had rows in.
        seconds: that the device took for these steps and those between them.
    """

    custom_id: str
    line: int
    prompt_tokens: int
    output_tokens: int | None
    first_step: int
    last_step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Warned:
    """A warning, once for all `count` places where it applies."""

    code: str
    count: int
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a job did, or what a plan says it will do.

    Attributes:
        request_counts: what became of the lines.
        duplicates: answers that were not computed, since that of another request must be the same.
        tokens, saving: what was computed, and the share of prompt tokens that sharing spared.
        seconds, throughput: time and rates; None where unknown.
        expected: how long the steps of the whole plan were expected to take; None where nothing was run.
        bound: the least time of those that were run; None where nothing was.
        step_seconds: what the steps' time went to; None where nothing was run.
        steps: forward passes.
        rows: tokens that they computed.
        kv: KV memory.
        idle_rows: places of a step that a finished answer held without work.
        padded_rows: rows computed beyond those of the steps.
        preemptions: sequences put back to be computed again later.
        memory_retries: steps that were computed in parts, because the device had not enough memory for them.
        worker_restarts: times that the worker was lost and started again.
        prefix_evictions: shared prefixes whose KV was dropped while a reader was still to come.
        finish_reasons: number of answers by reason (`stop`, `length`, `tool_calls`), as their lines have it.
        errors: number of failed lines by code.
        warnings: what a person should know, each kind once.
        groups: the largest prefix-sharing groups, largest first.
        slowest: the requests that took longest, the longest first.
        schedule_order: name of the order that requests were admitted in.
        model, device, dtype: what ran it.
        environment: versions and machine.
    """

    request_counts: RequestCounts
    duplicates: int
    tokens: TokenCounts
    saving: float
    seconds: Seconds
    throughput: Throughput
    expected: Estimate | None
    bound: BoundSeconds | None
    step_seconds: StepSeconds | None
    steps: int
    rows: int
    kv: KvUse
    idle_rows: int
    padded_rows: int
    preemptions: int
    memory_retries: int
    worker_restarts: int
    prefix_evictions: int
    finish_reasons: dict[str, int]
    errors: dict[str, int]
    warnings: tuple[Warned, ...]
    groups: tuple[GroupSummary, ...]
    slowest: tuple[SlowRequest, ...]
    schedule_order: str
    model: str
    device: str
    dtype: str
    environment: dict[str, Any]

    @property
    def bound_share(self) -> float | None:
        """The least time that the device's peaks allow for what was run, as a share of the time it took."""
        execute = self.seconds.execute
        return self.bound.seconds / execute if self.bound is not None and execute else None

    def warned_of(self, code: str) -> bool:
        """Whether there is a warning with this code."""
        return any(warned.code == code for warned in self.warnings)


def largest_groups(groups: Iterable[GroupSummary], limit: int = GROUPS_SHOWN) -> tuple[GroupSummary, ...]:
    """The `limit` groups that spare most prompt tokens, most first; of equals the lower id first."""
    return tuple(
        heapq.nsmallest(limit, groups, key=lambda group: (-group.prefix_tokens * (group.requests - 1), group.id))
    )
