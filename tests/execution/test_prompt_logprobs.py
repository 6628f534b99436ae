"""Logprobs of prompts are kept by place, whatever of a prompt is computed again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from oracles import make_requests

from batchrun.execution.logprobs import PromptTable
from batchrun.schedule.step import StepOutput, StepScores


def output(*found: tuple[int, int, float]) -> StepOutput:
    """Of a step, from requests, places and logprobs."""
    request, place, own = (np.array(column) for column in zip(*found, strict=True))
    scores = StepScores(
        request=request.astype(np.int32),
        place=place.astype(np.int32),
        own=own.astype(np.float32),
        rank=place.astype(np.int32),
        top_ids=np.stack((place, 10 * place), axis=1).astype(np.int32),
        top=np.stack((own, own - 1), axis=1).astype(np.float32),
    )
    return StepOutput(np.empty(0, dtype=np.int32), np.empty(0, dtype=bool), 0.0, scores=scores)


def test_of_a_prompt_that_is_computed_again_the_last_logprobs_count():
    requests = make_requests([[1, 2, 3, 4], [5, 6, 7], [8]], [1, 1, 1])
    requests = replace(requests, sampling=[replace(requests.sampling[0], prompt_logprobs=1)])
    table = PromptTable(requests)
    table.add(output((0, 1, -1.0), (0, 2, -2.0), (1, 1, -5.0)))  # a chunk of one, and the begin of another
    table.add(output((0, 1, -1.5), (0, 2, -2.5)))  # from the start again, after a worker was lost or KV taken away
    table.add(output((1, 2, -6.0), (0, 3, -3.5)))
    table.add(StepOutput(np.empty(0, dtype=np.int32), np.empty(0, dtype=bool), 0.0))
    first, second, third = (table.take(request) for request in range(3))
    assert first is not None and second is not None and third is not None
    assert first.own.sampled.tolist() == [-1.5, -2.5, -3.5]
    assert first.ranks.tolist() == [1, 2, 3]
    assert first.own.top_ids.tolist() == [[1], [2], [3]]  # as many as are wanted
    assert first.own.top.tolist() == [[-1.5], [-2.5], [-3.5]]
    assert second.own.sampled.tolist() == [-5.0, -6.0]
    assert third.own.sampled.size == 0  # nothing is before its only token


def test_without_such_requests_nothing_is_kept():
    table = PromptTable(make_requests([[1, 2]], [1]))
    assert table.take(0) is None
