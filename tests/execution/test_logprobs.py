"""Logprobs of answers are kept until an answer is whole, in memory for the tokens that there are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from oracles import make_requests

from batchrun.execution.logprobs import LogprobTable
from batchrun.schedule.step import PrefixReads, Step, StepLogprobs, StepOutput

NONE = np.empty(0, dtype=np.int32)


def step(request: list[int], num_sampled: list[int]) -> Step:
    """A step that samples a token of each request."""
    count = len(request)
    ones, zeros = np.ones(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
    return Step(
        index=0,
        sequence=np.arange(count, dtype=np.int32),
        request=np.array(request, dtype=np.int32),
        start=zeros,
        length=ones,
        depth=zeros,
        samples=ones.astype(bool),
        num_sampled=np.array(num_sampled, dtype=np.int32),
        token_ids=zeros,
        prefix_reads=PrefixReads(*([NONE] * 6)),
        releases=NONE,
        grant_sequence=NONE,
        grant_page=NONE,
    )


def output(request: list[int], num_sampled: list[int], shift: float = 0.0) -> StepOutput:
    """With values that tell the request and the token."""
    own = np.array([1000 * r + n + shift for r, n in zip(request, num_sampled, strict=True)], dtype=np.float32)
    ids = np.stack((own, own + 1), axis=1)
    found = StepLogprobs(
        rows=np.arange(own.size, dtype=np.int32), sampled=own, top_ids=ids.astype(np.int32), top=-ids.astype(np.float32)
    )
    return StepOutput(np.zeros(own.size, dtype=np.int32), np.zeros(own.size, dtype=bool), 0.0, logprobs=found)


def make_table(count: int) -> LogprobTable:
    requests = make_requests([[1]] * count, [1] * count)
    return LogprobTable(replace(requests, sampling=[replace(requests.sampling[0], logprobs=2)]))


def check(table: LogprobTable, request: int, tokens: int, shift: float = 0.0) -> None:
    found = table.take(request, tokens)
    assert found is not None
    own = 1000 * request + np.arange(tokens) + shift
    assert found.sampled.tolist() == own.tolist()
    assert found.top_ids[:, 0].tolist() == own.astype(int).tolist()
    assert found.top[:, 1].tolist() == (-own - 1).tolist()


def test_one_long_answer_takes_no_memory_for_the_others():
    """The others end one by one, and new ones take their places."""
    count, long = 600, 800
    table = make_table(count)
    under_way = dict.fromkeys(range(20), 0)
    waiting = iter(range(20, count))
    for _ in range(long):
        requests, sampled = list(under_way), list(under_way.values())
        table.add(step(requests, sampled), output(requests, sampled))
        for request in requests:
            under_way[request] += 1
            if request and under_way[request] == 20 + request % 7:
                check(table, request, under_way.pop(request))
                if (new := next(waiting, None)) is not None:
                    under_way[new] = 0
    check(table, 0, long)
    assert len(under_way) == 1 and next(waiting, None) is None
    assert table._top.shape[0] <= 64  # pages: 13 of the long answer, 19 of the others, and room to grow


def test_what_is_sampled_again_counts_and_what_is_forgotten_is_gone():
    table = make_table(3)
    for nth in range(70):
        table.add(step([0, 1], [nth, nth]), output([0, 1], [nth, nth]))
    table.forget(1)
    for nth in range(70):  # request 0 from its begin, after a worker was lost; 1 is learnt to have ended one step late
        table.add(step([0, 1, 2], [nth] * 3), output([0, 1, 2], [nth] * 3, shift=0.5))
    check(table, 2, 66, shift=0.5)
    check(table, 0, 70, shift=0.5)
    assert make_table(1).take(0, 0) is not None
