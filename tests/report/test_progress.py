"""Progress in tokens: a bar where a person looks, rare plain lines where a file does, nothing where it is off."""

from __future__ import annotations

import io
import itertools
import re
import sys

import pytest
from rich.console import Console

from batchrun.report.progress import Progress


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def a_pipe() -> Console:
    return Console(file=io.StringIO(), width=80)


def a_terminal() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True, force_interactive=True, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_pipe_gets_a_plain_line_every_30_seconds(clock):
    console = a_pipe()
    with Progress(console, total_rows=100_000, enabled=True, clock=clock) as progress:
        for _ in range(90):
            clock.now += 1.0
            progress.advance(rows=500, sampled=50, finished=2)
    assert written(console).splitlines() == [
        "15 %, 2 min 50 s left: 15,000 of 100,000 tokens, 500/s (50.0/s output), 60 answered",
        "30 %, 2 min 20 s left: 30,000 of 100,000 tokens, 500/s (50.0/s output), 120 answered",
        "45 %, 1 min 50 s left: 45,000 of 100,000 tokens, 500/s (50.0/s output), 180 answered",
    ]


def test_a_pipe_gets_no_more_lines_than_that_however_slow_or_many_the_steps(clock):
    console = a_pipe()
    shown_at = []
    with Progress(console, total_rows=10**6, enabled=True, clock=clock) as progress:
        for pause in [0.01] * 5000 + [45.0] * 3 + [0.5] * 100:
            clock.now += pause
            before = len(written(console))
            progress.advance(1, 0, 0)
            if len(written(console)) > before:
                shown_at.append(clock.now)
    assert len(shown_at) >= 4
    assert all(later - earlier >= 30 for earlier, later in itertools.pairwise(shown_at))
    assert "\x1b" not in written(console)
    assert "\r" not in written(console)


def test_time_left_follows_the_rate_of_late_and_the_expectation(clock):
    console = a_pipe()
    with Progress(console, total_rows=10_000, enabled=True, clock=clock) as progress:
        clock.now += 30
        progress.advance(6_000, 0, 0)  # 200 a second
        clock.now += 30
        progress.advance(1_500, 0, 0)  # 50 a second of late
        clock.now += 30
        progress.set_total(18_000)
        progress.advance(1_500, 0, 0)
        clock.now += 30
        progress.advance(0, 0, 0)
        clock.now += 30
        progress.set_total(9_000)
        progress.advance(0, 0, 0)
    ends = [line.split(":")[0] for line in written(console).splitlines()]
    assert ends == [
        "60 %, 20.0 s left",
        "75 %, 50.0 s left",
        "50 %, 3 min 0 s left",
        "50 %, time left unknown",
        "100 %, about to finish",
    ]


def test_more_rows_than_expected_are_no_more_than_all(clock):
    console = a_pipe()
    with Progress(console, total_rows=100, enabled=True, clock=clock) as progress:
        clock.now += 30
        progress.advance(250, 0, 0)
    assert written(console).startswith("100 %, about to finish: 250 of 100 tokens")


def test_almost_done_is_not_done(clock):
    console = a_pipe()
    with Progress(console, total_rows=1000, enabled=True, clock=clock) as progress:
        clock.now += 30
        progress.advance(999, 0, 0)
    assert written(console).startswith("99 %")


@pytest.mark.parametrize("console", [a_pipe(), a_terminal()], ids=["pipe", "terminal"])
def test_quiet_writes_nothing(console, clock):
    with Progress(console, total_rows=100, enabled=False, clock=clock) as progress:
        clock.now += 1000
        progress.advance(50, 0, 0)
    assert written(console) == ""


def test_a_terminal_gets_a_bar_at_most_five_times_a_second_and_a_clean_end(clock):
    console = a_terminal()
    with Progress(console, total_rows=100_000, enabled=True, clock=clock) as progress:
        for _ in range(1000):
            clock.now += 0.01
            progress.advance(rows=50, sampled=5, finished=1)
        drawn = written(console)
    last = drawn.splitlines()[-2:]
    assert re.fullmatch(r"\S*━+ +49 %, 10\.\d s left", last[0])
    assert re.fullmatch(r"49,\d{3} of 100,000 tokens, 5,000/s \(500/s output\), 9\d\d answered", last[1])
    assert 40 <= drawn.count("answered") <= 50
    assert written(console).endswith("\x1b[2K")  # the bar is wiped


def test_the_bar_leaves_standard_output_alone(clock):
    before = sys.stdout
    with Progress(a_terminal(), total_rows=100, enabled=True, clock=clock):
        assert sys.stdout is before


def test_the_bar_goes_when_a_run_fails(clock):
    console = a_terminal()
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(console, total_rows=100, enabled=True, clock=clock) as progress,
    ):
        clock.now += 1
        progress.advance(10, 0, 0)
        raise KeyboardInterrupt
    assert "\x1b[?25h" in written(console)  # the cursor is shown again
