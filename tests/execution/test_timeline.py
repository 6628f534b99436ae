"""The slowest requests are those that took longest from their first step to their last."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import DEAR_ROWS, make_requests

from batchrun.execution import timeline as timeline_module
from batchrun.execution.loop import run_loop
from batchrun.execution.simulate import SimulatedWorker
from batchrun.execution.timeline import Timeline
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.report.records import StepLog, StepRecord
from batchrun.schedule.scheduler import Scheduler


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_requests_are_ranked_by_the_time_of_their_steps(monkeypatch, block):
    monkeypatch.setattr(timeline_module, "_BLOCK", block)
    lengths = [3, 9, 1, 9, 5, 2]
    requests = make_requests([[i, i + 1] for i in range(0, 12, 2)], lengths, ignore_eos=True)
    budget = MemoryBudget(page_size=4, pages=100, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="input", grouping="none", step_tokens=64)
    plan = make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, options)
    timeline, log = Timeline(6), StepLog()
    running = []
    run_loop(
        Scheduler(plan, requests),
        SimulatedWorker(requests.max_new_tokens, lambda work: 2.0),
        on_step=lambda step, output: (timeline.step(step), running.append(int((step.request >= 0).sum()))),
        on_finished=timeline.finished,
        log=log,
    )
    slowest = timeline.slowest(requests, log.columns, limit=4)
    assert [slow.line for slow in slowest] == [2, 4, 5, 1]
    assert [slow.seconds for slow in slowest] == [18.0, 18.0, 10.0, 6.0]
    assert [slow.output_tokens for slow in slowest] == [9, 9, 5, 3]
    assert (slowest[0].first_step, slowest[0].last_step, slowest[0].prompt_tokens) == (0, 8, 2)
    # All were let in at once, and each leaves when it has its answer.
    assert log.columns["running"].tolist() == running == [6, 5, 4, 3, 3, 2, 2, 2, 2]
    assert log.columns["waiting"].tolist() == [0] * 9


def test_requests_that_the_memory_does_not_let_in_wait():
    requests = make_requests([[i, i + 1] for i in range(0, 12, 2)], [7] * 6, ignore_eos=True)
    budget = MemoryBudget(page_size=4, pages=4, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="input", grouping="none", step_tokens=64)
    plan = make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, options)
    end = run_loop(Scheduler(plan, requests), SimulatedWorker(requests.max_new_tokens))
    columns = end.log.columns
    assert columns["running"].max() == 2
    assert columns["waiting"][0] == 4
    assert (np.diff(columns["waiting"]) <= 0).all()
    assert columns["waiting"][-1] == 0


def test_lost_steps_have_no_place_in_the_log():
    requests = make_requests([[1, 2], [3, 4]], [2, 2])
    timeline, log = Timeline(2), StepLog()
    for index in (0, 5, 6):  # steps 1 to 4 were lost with a worker
        log.append(StepRecord(index, 1, 1, 1, 0, 1, 1.0 + index))
    timeline.first[:], timeline.last[:] = [0, 5], [6, -1]
    timeline.last[1] = 5
    assert [(slow.line, slow.seconds, slow.output_tokens) for slow in timeline.slowest(requests, log.columns)] == [
        (1, 14.0, None),
        (2, 6.0, None),
    ]
    assert Timeline(2).slowest(requests, log.columns) == ()
