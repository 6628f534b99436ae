"""Requests that bring the worker down are found and left out; all others get the answers that they get alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEAR_ROWS, ContextWorker, answer, make_requests

from batchrun.errors import BatchrunError
from batchrun.execution.loop import run_loop
from batchrun.execution.recovery import Recovery
from batchrun.execution.worker import WorkerLost
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import Plan, PlanOptions, make_plan, pages_needed
from batchrun.prefix.forest import build_forest
from batchrun.request import Grammar, Requests
from batchrun.schedule.scheduler import Finished, Scheduler
from batchrun.schedule.step import Step, StepOutput


@dataclass(frozen=True)
class Fault:
    """What a request brings about: a crash or logits that are no numbers, from its n-th sampled token on; or in as many
    steps as there are `times`."""

    kind: str
    sampled: int
    times: int | None = None


class FaultyWorker(ContextWorker):
    """Is lost, or gives no numbers, when some requests are in a step."""

    most_pages: int | None = None  # beyond which it is killed, as for want of memory

    def __init__(self, requests: Requests, page_size: int, pages: int, faults: dict[int, Fault]) -> None:
        super().__init__(requests, page_size, pages)
        self.faults = faults
        self.met = dict.fromkeys(faults, 0)
        self.lost = 0

    def strikes(self, step: Step, kind: str) -> list[int]:
        """Requests of the step with a fault of the kind that strikes now; only rows that sample give numbers."""
        struck = []
        there = step.samples if kind == "numbers" else np.ones(step.request.size, dtype=bool)
        for request, sampled in zip(step.request[there].tolist(), step.num_sampled[there].tolist(), strict=True):
            fault = self.faults.get(request)
            if fault is None or fault.kind != kind or sampled < fault.sampled:
                continue
            if fault.times is None or self.met[request] < fault.times:
                self.met[request] += 1
                struck.append(request)
        return struck

    def collect(self) -> StepOutput:
        step = self.under_way[0]
        used = set(np.flatnonzero(self.owner >= 0).tolist()) | set(step.grant_page.tolist())
        if self.most_pages is not None and len(used) > self.most_pages:
            self.lost += 1
            raise WorkerLost("killed", killed=True)
        if self.strikes(step, "crash"):
            self.lost += 1
            raise WorkerLost("crashed")
        output = super().collect()
        for request in self.strikes(step, "numbers"):
            output.token_ids[step.request[step.samples] == request] = -1
            self.sampled[request].pop()
        return output


def plan_of(requests: Requests, page_size: int, extra: int, step_tokens: int, **more: Any) -> Plan:
    order = more.pop("order", "dfs")
    forest, options = build_forest(requests.tokens), PlanOptions(order, "tree", step_tokens, **more)
    plan = make_plan(requests, forest, DEAR_ROWS, MemoryBudget(page_size, 1, 1, 0), options)
    pages = int(pages_needed(plan.groups, requests, plan.budget).max()) + extra
    return make_plan(requests, forest, DEAR_ROWS, MemoryBudget(page_size, pages, 1, 0), options)


jobs = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=10), st.integers(1, 8)), min_size=1, max_size=16
)


@given(
    job=jobs,
    page_size=st.sampled_from([1, 4]),
    extra=st.integers(0, 30),
    step_tokens=st.integers(1, 30),
    depth=st.sampled_from([1, 2]),
    end=st.sampled_from([None, 7]),
    guess=st.sampled_from([1, 256]),
    probe=st.sampled_from([0.0, 0.4]),
    order=st.sampled_from(["dfs", "decode_ratio"]),
    data=st.data(),
)
@settings(max_examples=600, deadline=None)
def test_those_at_fault_are_left_out_and_no_other(
    job: list[tuple[list[int], int]],
    page_size: int,
    extra: int,
    step_tokens: int,
    depth: int,
    end: int | None,
    guess: int,
    probe: float,
    order: str,
    data: st.DataObject,
) -> None:
    """Whether or not their lengths are known, are guessed too short, so that some are preempted, or are probed."""
    requests = make_requests([p for p, _ in job], [n for _, n in job], ignore_eos=end is None)
    faults = data.draw(
        st.dictionaries(
            st.integers(0, len(job) - 1),
            st.builds(Fault, st.sampled_from(["crash", "numbers"]), st.integers(0, 4), st.sampled_from([None, 1])),
            max_size=3,
        )
    )
    plan = plan_of(requests, page_size, extra, step_tokens, first_guess=guess, probe=probe, order=order)
    worker = FaultyWorker(requests, page_size, plan.budget.pages, faults)
    worker.end = end
    scheduler = Scheduler(plan, requests, depth=depth)
    finished: list[Finished] = []
    left_out: dict[int, str] = {}
    recovery = Recovery(scheduler, lambda request, attempts, cause: left_out.update({request: cause}))
    ended = run_loop(scheduler, worker, on_finished=finished.append, recovery=recovery)

    assert not ended.stopped
    # A fault strikes only where the request samples so many tokens.
    answers = [answer(*asked, end) for asked in job]
    lasting = {r for r, fault in faults.items() if fault.times is None and fault.sampled < len(answers[r])}
    assert set(left_out) == lasting
    assert sorted([*(f.request for f in finished), *left_out]) == list(range(len(job)))
    for f in finished:
        assert f.token_ids.tolist() == answers[f.request]
    assert scheduler.pool.num_used == 0
    assert (recovery.crashes > 0) == any(worker.met.values())
    for request, cause in left_out.items():
        assert ("crashed" if faults[request].kind == "crash" else "not numbers") in cause


def test_numbers_that_are_none_count_also_where_the_request_was_put_back_meanwhile() -> None:
    """With two steps in flight it may lose its pages before it is known what it sampled."""
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    requests = make_requests(prompts, [12] * 6)  # of unknown lengths, guessed too short
    waiting = 0

    class Watched(FaultyWorker):
        def strikes(self, step: Step, kind: str) -> list[int]:
            nonlocal waiting
            struck = super().strikes(step, kind)
            waiting += bool(set(struck) - set(scheduler.requests_in_steps().tolist()))
            return struck

    for extra in range(0, 16, 3):
        plan = plan_of(requests, 1, extra, 30, first_guess=1)
        for request in range(6):
            for sampled in range(1, 12):
                worker = Watched(requests, 1, plan.budget.pages, {request: Fault("numbers", sampled, times=1)})
                scheduler = Scheduler(plan, requests, depth=2)
                finished: list[Finished] = []
                recovery = Recovery(scheduler, lambda *left_out: pytest.fail(f"{left_out}"))
                run_loop(scheduler, worker, on_finished=finished.append, recovery=recovery)
                answers = {f.request: f.token_ids.tolist() for f in finished}
                assert answers == {i: answer(prompts[i], 12, None) for i in range(6)}
                assert recovery.crashes == 1
    assert waiting > 10


def test_a_probe_that_is_left_out_takes_nobody_elses_place() -> None:
    """What it was to teach orders the rest anew, while some of these were looked at already in the old order."""
    prompts = [[group] * 6 + [100 + i] for group in range(4) for i in range(12)]
    limits = [2 + 9 * (i // 12) for i in range(48)]
    requests = make_requests(prompts, limits)
    for seed in range(20):
        plan = plan_of(requests, 1, 20, 30, first_guess=1, probe=0.2, order="decode_ratio", seed=seed)
        last = max(plan.order[: plan.probe].tolist(), key=lambda request: limits[request])
        fault = Fault("numbers", limits[last] - 1)
        worker = FaultyWorker(requests, 1, plan.budget.pages, {last: fault})
        scheduler = Scheduler(plan, requests, depth=1)
        finished: list[Finished] = []
        left_out: list[tuple[int, int, str]] = []
        recovery = Recovery(scheduler, lambda *told, into=left_out: into.append(told))
        run_loop(scheduler, worker, on_finished=finished.append, recovery=recovery)
        assert [told[0] for told in left_out] == [last]
        assert sorted([last, *(f.request for f in finished)]) == list(range(48))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_worker_that_is_killed_for_want_of_memory_goes_on_with_less(depth: int) -> None:
    """A quarter of the pool is what the machine has: all answers come, after two times, and nobody is suspected."""
    requests = make_requests([[i % 7, i % 11, i] for i in range(200)], [9] * 200, ignore_eos=True)
    plan = plan_of(requests, 4, 400, 512)
    worker = FaultyWorker(requests, 4, plan.budget.pages, {})
    worker.most_pages = plan.budget.pages // 4
    scheduler = Scheduler(plan, requests, depth=depth)
    finished: list[Finished] = []
    recovery = Recovery(scheduler, lambda request, attempts, cause: pytest.fail(cause))
    run_loop(scheduler, worker, on_finished=finished.append, recovery=recovery)
    assert sorted(f.request for f in finished) == list(range(200))
    for f in finished:
        assert f.token_ids.tolist() == answer(requests.tokens[f.request].tolist(), 9, None)
    assert recovery.crashes == worker.lost == 2
    assert scheduler.pool.size == plan.budget.pages // 4
    assert worker.most_pages < scheduler.pool.peak_used <= plan.budget.pages


def test_shrinking_ends_where_the_largest_request_still_fits() -> None:
    requests = make_requests([[1] * 30, [2]], [3, 3], ignore_eos=True)
    plan = plan_of(requests, 4, 100, 64)
    scheduler = Scheduler(plan, requests)
    sizes = [scheduler.pool.size]
    while scheduler.shrink():
        sizes.append(scheduler.pool.size)
        assert sizes[-1] <= sizes[-2]
    assert sizes[-1] == max(8, sizes[0] // 16)
    assert len(sizes) == 5


def test_one_crash_in_a_thousand_costs_little() -> None:
    """Three of 500 requests, found in some twelve crashes each; what others have sampled is not sampled again."""
    requests = make_requests([[i % 7, i % 11, i] for i in range(500)], [6] * 500, ignore_eos=True)
    plan = plan_of(requests, 4, 2000, 512)
    worker = FaultyWorker(requests, 4, plan.budget.pages, {r: Fault("crash", 2) for r in (17, 250, 499)})
    scheduler = Scheduler(plan, requests)
    left_out: list[int] = []
    recovery = Recovery(scheduler, lambda request, attempts, cause: left_out.append(request))
    run_loop(scheduler, worker, recovery=recovery)
    assert sorted(left_out) == [17, 250, 499]
    assert recovery.crashes == worker.lost <= 3 * 13
    assert scheduler.counters.sampled == 497 * 6 + 3 * 2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_worker_that_is_lost_again_and_again_ends_the_run(depth: int) -> None:
    """Nothing can be done about a device that is broken; what is finished stays."""
    requests = make_requests([[i] for i in range(300)], [4] * 300, ignore_eos=True)
    plan = plan_of(requests, 4, 600, 512)
    worker = FaultyWorker(requests, 4, plan.budget.pages, {r: Fault("crash", 0) for r in range(300)})
    scheduler = Scheduler(plan, requests, depth=depth)
    recovery = Recovery(scheduler, lambda request, attempts, cause: None)
    with pytest.raises(BatchrunError, match="lost 32 times") as caught:
        run_loop(scheduler, worker, recovery=recovery)
    assert "crashed" in caught.value.message


def test_without_recovery_a_lost_worker_ends_the_loop() -> None:
    requests = make_requests([[1]], [2], ignore_eos=True)
    plan = plan_of(requests, 4, 4, 16)
    worker = FaultyWorker(requests, 4, plan.budget.pages, {0: Fault("crash", 1)})
    with pytest.raises(WorkerLost, match="crashed"):
        run_loop(Scheduler(plan, requests), worker)


def test_no_token_of_a_step_that_was_lost_is_kept() -> None:
    """Both steps in flight are gone: the requests are where they were two steps before."""
    requests = make_requests([[1, 2], [3]], [5, 5], ignore_eos=True)
    plan = plan_of(requests, 4, 4, 16)
    scheduler, worker = Scheduler(plan, requests, depth=2), ContextWorker(requests, 4, plan.budget.pages)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None
    assert second is not None
    worker.submit(first)
    scheduler.update(first, worker.collect())
    assert scheduler.schedule() is not None
    scheduler.restart()
    assert scheduler.pool.num_used == 0
    again = scheduler.schedule()
    assert again is not None
    assert again.length.tolist() == [3, 2]  # the prompt and the one token that is certain
    assert again.num_sampled.tolist() == [1, 1]
    assert np.array_equal(np.sort(again.request), [0, 1])
    assert (again.token_ids >= 0).all()


class StuckWorker(ContextWorker):
    """Has no token for some requests from their third on."""

    def __init__(self, requests: Requests, page_size: int, pages: int, stuck: set[int]) -> None:
        super().__init__(requests, page_size, pages)
        self.stuck = stuck

    def collect(self) -> StepOutput:
        step = self.under_way[0]
        output = super().collect()
        requests, sampled = step.request[step.samples].tolist(), step.num_sampled[step.samples].tolist()
        for place, (request, before) in enumerate(zip(requests, sampled, strict=True)):
            if request in self.stuck and before == 2:
                output.token_ids[place] = -1
                output.stuck[place] = "no way on"
        return output


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_whose_grammar_allows_nothing_is_left_out_at_once(depth: int) -> None:
    prompts = [[7] * 9 + [i] for i in range(6)]
    requests = make_requests(prompts, [6] * 6, ignore_eos=True)
    requests.sampling[0] = replace(requests.sampling[0], grammar=Grammar("regex", ".*"))
    plan = plan_of(requests, 4, 9, 16)
    scheduler, worker = Scheduler(plan, requests, depth=depth), StuckWorker(requests, 4, plan.budget.pages, {1, 4})
    left_out: list[tuple[int, int, str]] = []
    finished: list[Finished] = []
    recovery = Recovery(scheduler, lambda *told: left_out.append(told))
    run_loop(scheduler, worker, on_finished=finished.append, recovery=recovery)
    assert sorted((request, attempts) for request, attempts, _ in left_out) == [(1, 1), (4, 1)]
    assert all("no way on" in cause for _, _, cause in left_out)
    assert recovery.crashes == 0
    assert {f.request: f.token_ids.tolist() for f in finished} == {i: answer(prompts[i], 6, None) for i in (0, 2, 3, 5)}
    assert scheduler.pool.num_used == 0
