"""How far a run is, in tokens: a live bar on a terminal, now and then a plain line where there is none."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchrun.report.wording import duration, rate

BAR_SECONDS = 0.2  # least time between two drawings of the bar
LINE_SECONDS = 30.0  # the same between two plain lines
WINDOW_SECONDS = 30.0  # rates are those of the last so many seconds


class Progress:
    """Shows the progress of a run while it lasts; a context manager.

    Args:
        console: that of standard error.
        total_rows: rows (tokens) the run is expected to compute.
        enabled: False shows nothing.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self, console: Console, *, total_rows: int, enabled: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._total = total_rows
        self._clock = clock
        self._rows = 0
        self._sampled = 0
        self._finished = 0
        self._live: Live | None = None
        if enabled and console.is_interactive:
            # Standard output may be a document (--json) and is not to be drawn into.
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._every = BAR_SECONDS if self._live else LINE_SECONDS if enabled else float("inf")
        self._next = float("inf")
        self._marks: deque[tuple[float, int, int]] = deque()  # (time, rows, sampled) of the last WINDOW_SECONDS

    def __enter__(self) -> Progress:
        now = self._clock()
        self._next = now + self._every
        self._marks.append((now, 0, 0))
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def set_total(self, rows: int) -> None:
        """From now on, `rows` are expected in all."""
        self._total = rows

    def advance(self, rows: int, sampled: int, finished: int) -> None:
        """A step computed `rows` rows, `sampled` of them gave an output token, and `finished` requests ended."""
        self._rows += rows
        self._sampled += sampled
        self._finished += finished
        now = self._clock()
        if now >= self._next:
            self._next = now + self._every
            self._show(now)

    def _show(self, now: float) -> None:
        share = min(self._rows / self._total, 1.0) if self._total else 1.0
        tokens_per_second, output_per_second = self._rates(now)
        left = self._total - self._rows
        if left <= 0:
            remaining = "about to finish"
        elif tokens_per_second:
            remaining = f"{duration(left / tokens_per_second)} left"
        else:
            remaining = "time left unknown"
        # Rounded down, so that 100 % means that nothing is left.
        head = f"{int(100 * share):3d} %, {remaining}"
        details = (
            f"{self._rows:,} of {self._total:,} tokens, {rate(tokens_per_second)}/s "
            f"({rate(output_per_second)}/s output), {self._finished:,} answered"
        )
        if self._live is None:
            self._console.print(Text(f"{head.strip()}: {details}"), soft_wrap=True)
            return
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(ProgressBar(total=1.0, completed=share), head)
        self._live.update(Group(bar, Text(details, no_wrap=True, overflow="crop")), refresh=True)

    def _rates(self, now: float) -> tuple[float, float]:
        """Rows and output tokens per second, of late."""
        self._marks.append((now, self._rows, self._sampled))
        while len(self._marks) > 2 and self._marks[1][0] <= now - WINDOW_SECONDS:
            self._marks.popleft()
        then, rows, sampled = self._marks[0]
        elapsed = now - then
        return ((self._rows - rows) / elapsed, (self._sampled - sampled) / elapsed) if elapsed > 0 else (0.0, 0.0)
