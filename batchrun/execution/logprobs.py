"""Keeps the logprobs of answers under way, and of their prompts, until they are whole."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchrun.request import Logprobs, PromptLogprobs, Requests
from batchrun.schedule.step import Step, StepOutput

_FIRST_ROOM = 16  # answers, and tokens of each
_NEW, _GONE = -1, -2  # in place of a row


class LogprobTable:
    """Logprobs of the answers under way that want them, in columns: a row an answer, a column a token.

    Args:
        requests: whose sampling says how many alternatives each wants.
    """

    def __init__(self, requests: Requests) -> None:
        wanted = np.array([-1 if s.logprobs is None else s.logprobs for s in requests.sampling], dtype=np.int64)
        self._alternatives, self._sampling_id = wanted, requests.sampling_id
        self._row_of = np.full(len(requests) if (wanted >= 0).any() else 0, _NEW, dtype=np.int64)
        self._vacant: list[int] = []
        width = max(int(wanted.max(initial=-1)), 0)
        self._sampled = np.empty((0, _FIRST_ROOM), dtype=np.float32)
        self._top_ids = np.empty((0, _FIRST_ROOM, width), dtype=np.int32)
        self._top = np.empty((0, _FIRST_ROOM, width), dtype=np.float32)

    def add(self, step: Step, output: StepOutput) -> None:
        """Take the logprobs of a step. Of a token that is sampled again, after a worker was lost, the last count."""
        found = output.logprobs
        if found is None:
            return
        requests = step.request[step.samples][found.rows]
        there = self._row_of[requests] != _GONE  # with two steps in flight, an end is learnt one step late
        requests, nth = requests[there], step.num_sampled[step.samples][found.rows][there]
        new = requests[self._row_of[requests] == _NEW]
        self._row_of[new] = self._take(new.size)
        self._make_room(int(nth.max(initial=0)) + 1)
        rows, width = self._row_of[requests], found.top_ids.shape[1]
        self._sampled[rows, nth] = found.sampled[there]
        self._top_ids[rows, nth, :width] = found.top_ids[there]
        self._top[rows, nth, :width] = found.top[there]

    def take(self, request: int, tokens: int) -> Logprobs | None:
        """The logprobs of an answer of so many tokens, which is then forgotten; None where it wants none."""
        alternatives = int(self._alternatives[self._sampling_id[request]])
        if alternatives < 0:
            return None
        row = int(self._row_of[request])
        self.forget(request)
        return Logprobs(
            self._sampled[row, :tokens].copy(),
            self._top_ids[row, :tokens, :alternatives].copy(),
            self._top[row, :tokens, :alternatives].copy(),
        )

    def forget(self, request: int) -> None:
        """The request gives no answer, or has given it."""
        if self._row_of.size:
            if self._row_of[request] >= 0:
                self._vacant.append(int(self._row_of[request]))
            self._row_of[request] = _GONE

    def _take(self, count: int) -> npt.NDArray[np.int64]:
        while len(self._vacant) < count:
            rows = self._sampled.shape[0]
            more = max(rows, _FIRST_ROOM)
            self._resize(rows + more, self._sampled.shape[1])
            self._vacant += range(rows + more - 1, rows - 1, -1)
        return np.array([self._vacant.pop() for _ in range(count)], dtype=np.int64)

    def _make_room(self, tokens: int) -> None:
        columns = self._sampled.shape[1]
        if tokens > columns:
            self._resize(self._sampled.shape[0], max(tokens, 2 * columns))

    def _resize(self, rows: int, columns: int) -> None:
        for name in ("_sampled", "_top_ids", "_top"):
            old = getattr(self, name)
            grown = np.empty((rows, columns, *old.shape[2:]), dtype=old.dtype)
            grown[: old.shape[0], : old.shape[1]] = old
            setattr(self, name, grown)


class PromptTable:
    """Logprobs of the prompts under way whose are wanted.

    Args:
        requests: whose sampling says how many alternatives each wants.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._under_way: dict[int, PromptLogprobs] = {}

    def add(self, output: StepOutput) -> None:
        """Take the logprobs of a step; of a token that is computed again the last count."""
        found = output.scores
        if found is None:
            return
        edges = np.flatnonzero(np.diff(found.request)) + 1
        for begin, end in zip([0, *edges.tolist()], [*edges.tolist(), found.request.size], strict=True):
            request = int(found.request[begin])
            if request not in self._under_way:
                self._under_way[request] = self._empty(request)
            kept = self._under_way[request]
            places = found.place[begin:end] - 1
            kept.own.sampled[places], kept.ranks[places] = found.own[begin:end], found.rank[begin:end]
            width = min(found.top.shape[1], kept.own.top.shape[1])
            kept.own.top_ids[places, :width] = found.top_ids[begin:end, :width]
            kept.own.top[places, :width] = found.top[begin:end, :width]

    def take(self, request: int) -> PromptLogprobs | None:
        """The logprobs of a prompt, which are then forgotten; None where none are wanted."""
        requests = self._requests
        if requests.sampling[requests.sampling_id[request]].scores is None:
            return None
        return self._under_way.pop(request, None) or self._empty(request)

    def _empty(self, request: int) -> PromptLogprobs:
        requests = self._requests
        ids, width = requests.tokens[request], requests.sampling[requests.sampling_id[request]].scores or 0
        count = ids.size - 1
        own = Logprobs(
            np.zeros(count, dtype=np.float32),
            np.zeros((count, width), dtype=np.int32),
            np.zeros((count, width), dtype=np.float32),
        )
        return PromptLogprobs(ids, own, np.zeros(count, dtype=np.int32))
