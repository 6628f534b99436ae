"""What limited a run is told from what was measured: the largest part of the time names it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plans import TOKENS, a_plan, a_report

from batchrun.report.limit import what_limited
from batchrun.report.records import BoundSeconds, Seconds, StepSeconds

NOTHING = StepSeconds(prefill=0, mixed=0, decode=0, tail=0, host=0, recovery=0, held_back=0)
FAST = Seconds(total=10.0, load=0.1, tokenize=0.1, plan=0.1, execute=9.0)


@pytest.mark.parametrize(
    ("seconds", "steps", "kind", "part"),
    [
        (Seconds(10.0, 6.0, 0.5, 0.5, 2.0), replace(NOTHING, decode=2.0), "start", "took 7.0 s of 10.0 s (70.0 %)"),
        (FAST, replace(NOTHING, decode=2.0, host=7.0), "host", "7.0 s of 10.0 s (70.0 %)"),
        (FAST, replace(NOTHING, decode=2.0, recovery=7.0), "recovery", "took 7.0 s of 10.0 s (70.0 %), for 4 restarts"),
        (FAST, replace(NOTHING, decode=9.0, held_back=6.0), "kv_memory", "of 256 rows that steps have room for"),
        (FAST, replace(NOTHING, decode=3.0, tail=6.0), "tail", "6.0 s of 10.0 s (60.0 %)"),
        (Seconds(10.0, 0.1, 0.1, 0.1, 1.0), replace(NOTHING, decode=1.0), "other", "8.7 s of 10.0 s"),
    ],
)
def test_the_largest_part_names_it(seconds, steps, kind, part):
    limit = what_limited(a_report(seconds=seconds, step_seconds=steps), a_plan())
    assert limit is not None
    assert limit.kind == kind
    assert part in limit.words
    assert 0 < limit.share <= 1


@pytest.mark.parametrize(
    ("bound", "computed", "kind", "part"),
    [
        (BoundSeconds(compute=6.0, memory=2.0, weights=1.5), 4000, "prefill", "80.0 % of their rows prompts"),
        (BoundSeconds(compute=6.0, memory=2.0, weights=1.5), 6000, "prefill", "100.0 % of their rows prompts"),
        (BoundSeconds(compute=6.0, memory=2.0, weights=1.5), 1000, "compute", "most of their rows answers"),
        (BoundSeconds(compute=1.0, memory=6.0, weights=4.0), 4000, "weights", "reading KV 2.0 s"),
        (BoundSeconds(compute=1.0, memory=6.0, weights=2.0), 4000, "kv_reading", "reading KV 4.0 s"),
        (BoundSeconds(compute=1.0, memory=0.9, weights=0.5), 4000, "steps", "88.9 % of their time is beyond what"),
    ],
)
def test_full_steps_are_told_apart_by_their_bound(bound, computed, kind, part):
    report = a_report(
        seconds=FAST,
        step_seconds=replace(NOTHING, mixed=9.0),
        bound=bound,
        tokens=replace(TOKENS, prompt_computed=computed),
        rows=5000,
    )
    limit = what_limited(report, None)
    assert limit is not None
    assert limit.kind == kind
    assert part in limit.words
    assert "took 9.0 s of 10.0 s (90.0 %)" in limit.words


def test_nothing_limited_a_run_that_ran_nothing():
    assert what_limited(a_report(step_seconds=None), None) is None
    assert what_limited(a_report(seconds=FAST, step_seconds=NOTHING, steps=0), None) is None
