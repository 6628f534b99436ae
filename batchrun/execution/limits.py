"""What ends a run early, such that the same command goes on with it, and what ends a request."""

from __future__ import annotations

import time
from datetime import datetime

import numpy as np
import numpy.typing as npt

from batchrun.schedule.step import Step


class Limits:
    """Whether a run has come to one of its limits.

    Args:
        until: seconds of Unix time. The system's clock is looked at again and again, so that a change of it counts.
        timeout: seconds from the beginning; a change of the clock does not count.
        max_errors: failed lines of this start that are put up with.
        began: when that was, by `time.perf_counter`.
    """

    def __init__(self, *, until: float | None, timeout: float | None, max_errors: int | None, began: float) -> None:
        self._until = until
        self._timeout = timeout
        self._max_errors = max_errors
        self._began = began

    def reached(self, failed: int) -> str | None:
        """Which limit it is, in words, or None.

        Args:
            failed: lines that have failed since the beginning.
        """
        if self._until is not None and time.time() >= self._until:
            return f"it is {datetime.fromtimestamp(self._until):%Y-%m-%d %H:%M:%S} (--until)"
        if self._timeout is not None and time.perf_counter() - self._began >= self._timeout:
            return f"{self._timeout:g} s have passed (--timeout)"
        if self._max_errors is not None and failed > self._max_errors:
            return f"{failed:,} lines have failed, more than {self._max_errors:,} (--max-errors)"
        return None


class RequestClock:
    """How long requests have been under way, from their first step, or the first after the worker was lost.

    Args:
        requests: how many there are.
        limit: seconds that a request may take.
    """

    def __init__(self, requests: int, limit: float) -> None:
        self.limit = limit
        self._began = np.full(requests, np.nan)

    def forget(self) -> None:
        """The worker was lost, and has to be started again: who was under way is so anew from their next step."""
        self._began[:] = np.nan

    def late(self, step: Step, under_way: npt.NDArray[np.int32]) -> list[int]:
        """Requests of a step that was computed which have taken too long.

        Args:
            under_way: int32, requests whose answers are not there yet.
        """
        now = time.monotonic()
        there = np.intersect1d(step.request, under_way)
        self._began[there[np.isnan(self._began[there])]] = now
        late: list[int] = there[now - self._began[there] > self.limit].tolist()
        return late
