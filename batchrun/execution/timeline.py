"""When each request ran: the steps that it first and last had rows in, and which took longest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchrun.report.records import SlowRequest
from batchrun.request import Requests
from batchrun.schedule.scheduler import Finished
from batchrun.schedule.step import Step

SLOWEST = 20
_BLOCK = 1 << 16  # requests looked at at once


class Timeline:
    """The steps of each request.

    Attributes:
        first, last: int32 `[R]`, the steps in which each request first and last had rows; -1 for one that had none.
        answered: int32 `[R]`, tokens of its answer; -1 for one that has none.
    """

    def __init__(self, requests: int) -> None:
        self.first, self.last, self.answered = (np.full(requests, -1, dtype=np.int32) for _ in range(3))

    def step(self, step: Step) -> None:
        """A step ran."""
        requests = step.request[step.request >= 0]
        self.first[requests[self.first[requests] < 0]] = step.index
        self.last[requests] = step.index

    def finished(self, finished: Finished) -> None:
        """A request has its answer."""
        self.answered[finished.request] = finished.token_ids.size

    def slowest(self, requests: Requests, steps: npt.NDArray[np.void], limit: int = SLOWEST) -> tuple[SlowRequest, ...]:
        """The requests that took longest from their first step to their last, the longest first.

        Args:
            requests: of which these are.
            steps: the records of the steps, `[steps]` as in `StepLog.columns`.
            limit: how many at most.
        """
        ends = np.cumsum(steps["seconds"])
        ran, spent = np.empty(0, dtype=np.int64), np.empty(0)
        for low in range(0, self.last.size, _BLOCK):  # of each block with those before it, the longest
            more = low + np.flatnonzero(self.last[low : low + _BLOCK] >= 0)
            # Steps that were lost with a worker have no record: then a step's number is not its place.
            first, last = (np.searchsorted(steps["index"], column[more]) for column in (self.first, self.last))
            ran = np.concatenate((ran, more))
            spent = np.concatenate((spent, ends[last] - ends[first] + steps["seconds"][first]))
            longest = np.lexsort((ran, -spent))[:limit]
            ran, spent = ran[longest], spent[longest]
        return tuple(
            SlowRequest(
                custom_id=requests.custom_ids[int(requests.line[request])],
                line=int(requests.line_numbers[requests.line[request]]),
                prompt_tokens=requests.tokens.span(request).length,
                output_tokens=int(self.answered[request]) if self.answered[request] >= 0 else None,
                first_step=int(self.first[request]),
                last_step=int(self.last[request]),
                seconds=seconds,
            )
            for request, seconds in zip(ran.tolist(), spent.tolist(), strict=True)
        )
