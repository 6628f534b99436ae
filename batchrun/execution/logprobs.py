"""Keeps the logprobs of answers under way, and of their prompts, until they are whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.request import Logprobs, PromptLogprobs, Requests
from batchrun.schedule.step import Step, StepOutput

Int64 = npt.NDArray[np.int64]

_PAGE = 64  # tokens of a page
_FIRST_ROOM = 16  # answers, and pages
_NEW, _GONE = -1, -2  # in place of a row


class _Numbers:
    """Numbers from 0 on that are taken and come back. `room`: all are below it."""

    def __init__(self) -> None:
        self.room = 0
        self._vacant: list[int] = []

    def take(self, count: int) -> Int64:
        while len(self._vacant) < count:
            more = max(self.room, _FIRST_ROOM)
            self._vacant += range(self.room + more - 1, self.room - 1, -1)
            self.room += more
        return np.array([self._vacant.pop() for _ in range(count)], dtype=np.int64)

    def give_back(self, numbers: Int64) -> None:
        self._vacant += numbers.tolist()


class LogprobTable:
    """Logprobs of the answers under way that want them: in pages, as one answer may be much longer than the others.

    Args:
        requests: whose sampling says how many alternatives each wants.
    """

    def __init__(self, requests: Requests) -> None:
        wanted = np.array([-1 if s.logprobs is None else s.logprobs for s in requests.sampling], dtype=np.int64)
        self._alternatives, self._sampling_id = wanted, requests.sampling_id
        self._row_of = np.full(len(requests) if (wanted >= 0).any() else 0, _NEW, dtype=np.int64)
        self._rows, self._pages = _Numbers(), _Numbers()
        self._page_of = np.zeros((1, 1), dtype=np.int64)  # by row of an answer and page within it, plus 1; 0: none yet
        width = max(int(wanted.max(initial=-1)), 0)
        # By page and token within it.
        self._sampled = np.empty((0, _PAGE), dtype=np.float32)
        self._top_ids = np.empty((0, _PAGE, width), dtype=np.int32)
        self._top = np.empty((0, _PAGE, width), dtype=np.float32)

    def add(self, step: Step, output: StepOutput) -> None:
        """Take the logprobs of a step. Of a token that is sampled again, after a worker was lost, the last count."""
        found = output.logprobs
        if found is None:
            return
        requests = step.request[step.samples][found.rows]
        there = self._row_of[requests] != _GONE  # with two steps in flight, an end is learnt one step late
        requests, nth = requests[there], step.num_sampled[step.samples][found.rows][there]
        new = requests[self._row_of[requests] == _NEW]
        self._row_of[new] = self._rows.take(new.size)
        rows, (nth_page, place), width = self._row_of[requests], np.divmod(nth, _PAGE), found.top_ids.shape[1]
        self._page_of = _grown(self._page_of, (self._rows.room, int(nth_page.max(initial=0)) + 1))
        new_page = self._page_of[rows, nth_page] == 0
        self._page_of[rows[new_page], nth_page[new_page]] = self._pages.take(int(new_page.sum())) + 1
        for name in ("_sampled", "_top_ids", "_top"):
            setattr(self, name, _grown(getattr(self, name), (self._pages.room, _PAGE)))
        page = self._page_of[rows, nth_page] - 1
        self._sampled[page, place] = found.sampled[there]
        self._top_ids[page, place, :width] = found.top_ids[there]
        self._top[page, place, :width] = found.top[there]

    def take(self, request: int, tokens: int) -> Logprobs | None:
        """The logprobs of an answer of so many tokens, which is then forgotten; None where it wants none."""
        alternatives = int(self._alternatives[self._sampling_id[request]])
        if alternatives < 0:
            return None
        nth_page, place = np.divmod(np.arange(tokens), _PAGE)
        page = self._page_of[self._row_of[request], nth_page] - 1
        self.forget(request)
        return Logprobs(
            self._sampled[page, place],
            self._top_ids[page, place, :alternatives],
            self._top[page, place, :alternatives],
        )

    def forget(self, request: int) -> None:
        """The request gives no answer, or has given it."""
        if not self._row_of.size:
            return
        row = self._row_of[request]
        if row >= 0:
            pages = self._page_of[row]
            self._pages.give_back(pages[pages > 0] - 1)
            self._page_of[row] = 0
            self._rows.give_back(row[None])
        self._row_of[request] = _GONE


def _grown(table: npt.NDArray[Any], room: tuple[int, int]) -> npt.NDArray[Any]:
    """A table with room for so much in its first two dimensions: where there is not enough, for twice as much as before
    at least."""
    there = table.shape[:2]
    if room[0] <= there[0] and room[1] <= there[1]:
        return table
    size = [max(wanted, 2 * has) if wanted > has else has for wanted, has in zip(room, there, strict=True)]
    grown = np.zeros((*size, *table.shape[2:]), dtype=table.dtype)  # which takes no memory before it is written to
    grown[: there[0], : there[1]] = table
    return grown


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
