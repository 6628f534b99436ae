"""A worker that does arithmetic in place of attention: `batchrun plan` is `batchrun run` with this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from batchrun.planning.cost import Work
from batchrun.schedule.step import Step, StepOutput


class SimulatedWorker:
    """Answers every step at once: each answer ends at its expected length.

    Args:
        expected_new_tokens: int32 `[R]`, tokens each request samples; at its limit or before.
        price: what a step costs, in seconds.
    """

    def __init__(
        self, expected_new_tokens: npt.NDArray[np.int32], price: Callable[[Work], float] = lambda work: 0.0
    ) -> None:
        self._expected = expected_new_tokens
        self._price = price
        self._submitted: deque[Step] = deque()

    def submit(self, step: Step) -> None:
        self._submitted.append(step)

    def collect(self) -> StepOutput:
        step = self._submitted.popleft()
        samples = step.samples
        return StepOutput(
            token_ids=np.zeros(int(samples.sum()), dtype=np.int32),
            ended=step.num_sampled[samples] + 1 >= self._expected[step.request[samples]],
            seconds=self._price(step.work),
        )

    def restart(self) -> None:
        self._submitted.clear()

    def close(self) -> None:
        self._submitted.clear()
