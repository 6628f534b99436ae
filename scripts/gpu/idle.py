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
        self._profiler: Any = None

    def after(self, index: int) -> None:
        """To be called after each step, with its number."""
        import torch

        began = time.perf_counter()
        if index == _WATCHED[0]:
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        elif index == _WATCHED[1]:
            torch.cuda.synchronize()
            self._profiler.stop()
            self.share = idle_share(
                (event.time_range.start, event.time_range.end)
                for event in self._profiler.events()
                if event.device_type == torch.autograd.DeviceType.CUDA
            )
        else:
            return
        self.seconds += time.perf_counter() - began
