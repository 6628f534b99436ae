"""How much of its time a GPU has nothing to do, seen by torch's profiler over some steps of a run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

_WATCHED = (40, 60)  # steps: after the first ones, and few enough to be told quickly


def idle_share(busy: Iterable[tuple[float, float]]) -> float | None:
    """Share of the time from the first begin to the last end in which no interval is; None for no intervals."""
    intervals = sorted(busy)
    if not intervals:
        return None
    first = reached = intervals[0][0]
    idle = 0.0
    for begin, end in intervals:
        idle += max(0.0, begin - reached)
        reached = max(reached, end)
    return idle / (reached - first) if reached > first else None


class IdleMeter:
    """Watches some steps with torch's profiler: when kernels and copies ran.

    Attributes:
        share: of the time of these steps in which the GPU had nothing to do; None until it is known.
        seconds: what starting and stopping took, which is no time of the run.
    """

    def __init__(self) -> None:
        self.share: float | None = None
        self.seconds = 0.0
        self._profiler: Any = None  # while it watches
        self._ended: Any = None

    def after(self, index: int) -> None:
        """To be called after each step, with its number."""
        import torch

        if index not in _WATCHED:
            return
        torch.cuda.synchronize()  # the step that is under way is time of the run
        began = time.perf_counter()
        if index == _WATCHED[0]:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        elif self._profiler is not None:
            self.close()
            self.share = idle_share(
                (event.time_range.start, event.time_range.end)
                for event in self._ended.events()
                if event.device_type == torch.autograd.DeviceType.CUDA
            )
        self.seconds += time.perf_counter() - began

    def close(self) -> None:
        """To be called when the run ends: where that was while it was watched, another could not be."""
        if self._profiler is not None:
            self._profiler.stop()
            self._ended, self._profiler = self._profiler, None
