"""What all sections share: how much is run and for how long, and how a call is timed."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Result = dict[str, Any]  # of a section: `passed` and what a table shows


@dataclass(frozen=True, slots=True)
class Setting:
    """How a section is run.

    Attributes:
        tiny: very small, on the CPU under Triton's interpreter, where times mean nothing.
        end: `time.monotonic()` from which on no more cases are begun.
        scale: share of the requests of the `micro` workload.
        workers: processes that check kernels side by side, since most of that time is compilation; 0 for this process.
    """

    tiny: bool
    end: float
    scale: float
    workers: int

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def take(self, cases: Iterable[T]) -> Iterator[T]:
        """Cases until time is up, but the first in any case."""
        for nth, case in enumerate(cases):
            if nth and not self.seconds_left():
                return
            yield case

    def try_each(self, cases: Iterable[T], call: Callable[[T], R]) -> Iterator[tuple[T, R | None, str]]:
        """Cases until time is up, what the call gives for each, and how it failed, if it did: the others are wanted all
        the same, as long as the device answers."""
        for case in self.take(cases):
            try:
                yield case, call(case), ""
            except Exception:
                yield case, None, traceback.format_exc()[-3000:]
                if not self.answers():
                    return

    def answers(self) -> bool:
        """Whether the device still does what it is told: an access to what is not there ends its context for good."""
        import torch

        try:
            if not self.tiny:
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Median seconds of a call on the device: between CUDA events around each of many, L2 flushed before each."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=10, rep=60, return_mode="median")) / 1e3
    return host_seconds_of(call, repeats=1)


def host_seconds_of(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of a call on the host."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device reaches, measured.

    Attributes:
        bandwidth: bytes a second of a copy, read and written.
        flops: operations a second of a matrix product of the dtype.
    """

    bandwidth: float
    flops: float


def measure_rates(setting: Setting, dtype: str) -> Rates:
    """Copy a large tensor and multiply two large matrices."""
    import torch

    size, width = (1 << 12, 32) if setting.tiny else (1 << 30, 8192)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=setting.device) for _ in range(2))
    a, b, c = (torch.randn(width, width, device=setting.device).to(getattr(torch, dtype)) for _ in range(3))
    return Rates(
        bandwidth=2 * size / seconds_of(lambda: target.copy_(source), setting.device),
        flops=2 * width**3 / seconds_of(lambda: torch.matmul(a, b, out=c), setting.device),
    )
