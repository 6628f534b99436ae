"""A worker that does arithmetic in place of attention: `batchrun plan` is `batchrun run` with this one."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from batchrun.schedule.step import Step, StepOutput


class SimulatedWorker:
    """Answers every step at once: each answer ends at its expected length.

    Args:
        expected_new_tokens: int32 `[R]`, tokens each request samples; at its limit or before.
    """

    def __init__(self, expected_new_tokens: npt.NDArray[np.int32]) -> None:
        self._expected = expected_new_tokens
        self._submitted: deque[Step] = deque()

    def submit(self, step: Step) -> None:
        self._submitted.append(step)

    def collect(self) -> StepOutput:
        step = self._submitted.popleft()
        samples = step.samples
        return StepOutput(
            token_ids=np.zeros(int(samples.sum()), dtype=np.int32),
            ended=step.num_sampled[samples] + 1 >= self._expected[step.request[samples]],
            seconds=0.0,
        )

    def close(self) -> None:
        self._submitted.clear()
