"""Whatever the job, the memory and the order: every row sees its whole context, every request gets its answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEAR_ROWS, ContextWorker, answer, make_requests

from batchrun.execution.loop import run_loop
from batchrun.execution.simulate import SimulatedWorker
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.order import ORDERS
from batchrun.planning.planner import Plan, PlanOptions, make_plan, pages_needed
from batchrun.prefix.forest import build_forest
from batchrun.prefix.groups import GROUPINGS
from batchrun.request import FinishReason, Grammar, Requests, SamplingParams
from batchrun.schedule.pages import PagePool
from batchrun.schedule.scheduler import Finished, Scheduler
from batchrun.schedule.step import StepOutput


def plan_of(requests: Requests, *, pages: int, page_size: int, **options: object) -> Plan:
    settings_of = {"schedule_order": "dfs", "grouping": "tree", "step_tokens": 16} | options
    budget = MemoryBudget(page_size=page_size, pages=pages, page_bytes=1, weight_bytes=0)
    return make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, PlanOptions(**settings_of))  # type: ignore[arg-type]


def run(
    plan: Plan, requests: Requests, worker: ContextWorker | SimulatedWorker, depth: int = 1
) -> tuple[Scheduler, list[Finished]]:
    scheduler = Scheduler(plan, requests, depth=depth)
    finished: list[Finished] = []
    run_loop(scheduler, worker, on_finished=finished.append)
    return scheduler, finished


def some_look_back(requests: Requests) -> Requests:
    """Of three requests one wants to know what it has sampled, and one, with a grammar, cannot go on before."""
    sampling = [
        SamplingParams(0.0),
        SamplingParams(0.0, presence_penalty=1.0),
        SamplingParams(0.0, grammar=Grammar("regex", ".*")),
    ]
    return replace(requests, sampling=sampling, sampling_id=np.arange(len(requests), dtype=np.int32) % 3)


jobs = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 9)), min_size=1, max_size=14
)


@given(
    job=jobs,
    page_size=st.sampled_from([1, 3, 4]),
    extra=st.integers(0, 20),
    step_tokens=st.integers(1, 24),
    order=st.sampled_from(sorted(ORDERS)),
    grouping=st.sampled_from(sorted(GROUPINGS)),
    end=st.sampled_from([None, 7]),
    first_guess=st.sampled_from([1, 4, 100]),
    depth=st.sampled_from([1, 2]),
)
@settings(max_examples=400, deadline=None)
def test_every_request_gets_the_answer_it_would_get_alone(
    job: list[tuple[list[int], int]],
    page_size: int,
    extra: int,
    step_tokens: int,
    order: str,
    grouping: str,
    end: int | None,
    first_guess: int,
    depth: int,
) -> None:
    prompts, limits = [p for p, _ in job], [n for _, n in job]
    requests = some_look_back(make_requests(prompts, limits))
    options = {"step_tokens": step_tokens, "schedule_order": order, "grouping": grouping, "first_guess": first_guess}
    # Just enough pages for the request that needs most, and a few more.
    plan = plan_of(requests, pages=1, page_size=page_size, **options)
    pages = int(pages_needed(plan.groups, requests, plan.budget).max()) + extra
    plan = plan_of(requests, pages=pages, page_size=page_size, **options)
    worker = ContextWorker(requests, page_size, pages, end=end)
    scheduler, finished = run(plan, requests, worker, depth)

    assert sorted(f.request for f in finished) == list(range(len(job)))
    for f in finished:
        alone = answer(prompts[f.request], limits[f.request], end)
        assert f.token_ids.tolist() == alone
        assert f.ended == (alone[-1] == end)
        assert f.reason is (FinishReason.STOP if f.ended else FinishReason.LENGTH)
        assert f.cached_tokens == plan.groups.request_depth[f.request]
    assert scheduler.pool.num_used == 0
    assert scheduler.pool.peak_used <= pages
    rows = sum(step.num_rows for step in worker.steps)
    counters = scheduler.counters
    assert counters.sampled == sum(f.token_ids.size for f in finished)
    fewest = int(plan.groups.length.sum() + (requests.tokens.lengths - plan.groups.request_depth).sum())
    assert fewest <= counters.prompt_computed <= fewest + counters.recomputed
    # A row is a prompt token, or the input of a token sampled after the first, or was computed before.
    # With two steps in flight, a row too far is computed where a token ends an answer.
    assert rows == fewest + counters.sampled - len(job) + counters.recomputed + counters.idle_rows
    ended_early = sum(f.ended and f.token_ids.size < limits[f.request] for f in finished)
    assert counters.idle_rows <= (ended_early if depth == 2 else 0)
    for step in worker.steps:
        decodes = int((step.samples & (step.num_sampled > 0) & (step.length == 1)).sum())
        assert step.num_rows <= max(step_tokens, decodes)


def test_readers_of_a_prefix_start_in_the_step_that_completes_it() -> None:
    requests = make_requests([[5] * 8 + [i] for i in range(4)], [2] * 4)
    plan = plan_of(requests, pages=100, page_size=4, step_tokens=100)
    worker = ContextWorker(requests, 4, 100)
    run(plan, requests, worker)
    assert [step.num_rows for step in worker.steps] == [8 + 4, 4]
    first = worker.steps[0]
    assert first.request.tolist() == [-1, 0, 1, 2, 3]
    assert first.prefix_reads.first_row.tolist() == [8]
    assert first.prefix_reads.rows.tolist() == [4]


def test_prefill_fills_the_steps_that_decode() -> None:
    requests = make_requests([[i] * 6 for i in range(1, 9)], [4] * 8, ignore_eos=True)
    plan = plan_of(requests, pages=100, page_size=4, step_tokens=8)
    worker = ContextWorker(requests, 4, 100)
    run(plan, requests, worker)
    mixed = [s for s in worker.steps if 0 < int((s.num_sampled[s.samples] > 0).sum()) < s.num_rows]
    assert len(mixed) >= 6
    # Full steps until the last prompt has been computed.
    last_prefill = max(i for i, s in enumerate(worker.steps) if (s.num_sampled == 0).any())
    assert all(s.num_rows == 8 for s in worker.steps[:last_prefill])


def test_pages_of_a_prefix_are_neighbours_and_live_as_long_as_its_readers() -> None:
    prompts = [[g] * 9 + [10 + i] for g in range(3) for i in range(3)]
    requests = make_requests(prompts, [3] * 9, ignore_eos=True)
    plan = plan_of(requests, pages=7, page_size=4, step_tokens=100)
    worker = ContextWorker(requests, 4, 7)
    scheduler, _ = run(plan, requests, worker)
    for step in worker.steps:
        prefix = step.grant_page[np.isin(step.grant_sequence, step.sequence[step.request < 0])]
        assert (np.diff(prefix) == 1).all()
    assert scheduler.counters.preemptions == scheduler.counters.prefix_evictions == 0
    assert scheduler.counters.prompt_computed == 3 * 9 + 9


@pytest.mark.parametrize("order", ["input", "shuffle"])
def test_orders_that_scatter_readers_evict_prefixes_and_still_finish(order: str) -> None:
    prompts = [[g] * 9 + [10 + i] for i in range(6) for g in range(5)]
    requests = make_requests(prompts, [2] * 30, ignore_eos=True)
    plan = plan_of(requests, pages=8, page_size=4, schedule_order=order)
    worker = ContextWorker(requests, 4, 8)
    scheduler, finished = run(plan, requests, worker)
    assert len(finished) == 30
    assert scheduler.counters.prefix_evictions > 0


@pytest.mark.parametrize(("first_guess", "preempts"), [(2, True), (200, False)])
def test_estimates_wrong_by_ten_times_cost_time_and_no_answer(first_guess: int, preempts: bool) -> None:
    requests = make_requests([[i, i] for i in range(1, 25)], [20] * 24)
    plan = plan_of(requests, pages=24, page_size=2, first_guess=first_guess)
    worker = ContextWorker(requests, 2, 24)
    scheduler, finished = run(plan, requests, worker)
    assert (scheduler.counters.preemptions > 0) == preempts
    assert [f.token_ids.tolist() for f in sorted(finished, key=lambda f: f.request)] == [
        answer([i, i], 20, None) for i in range(1, 25)
    ]


def test_a_request_larger_than_all_others_together_runs_and_keeps_nobody_out() -> None:
    prompts = [[1] * 40, *([i, i] for i in range(2, 10))]
    requests = make_requests(prompts, [20, *[4] * 8], ignore_eos=True)
    plan = plan_of(requests, pages=30, page_size=2, step_tokens=64)  # just what the first one takes alone
    worker = ContextWorker(requests, 2, 30)
    scheduler, finished = run(plan, requests, worker)
    assert sorted(f.request for f in finished) == list(range(9))
    assert scheduler.counters.preemptions == 0
    assert scheduler.pool.peak_used == 30


def test_equal_requests_share_all_but_their_last_token() -> None:
    requests = make_requests([[1, 2, 3, 4, 5]] * 20, [3] * 20, ignore_eos=True)
    plan = plan_of(requests, pages=22, page_size=4, step_tokens=64)
    worker = ContextWorker(requests, 4, 22)
    scheduler, _ = run(plan, requests, worker)
    assert scheduler.counters.prompt_computed == 4 + 20
    assert len(worker.steps) == 3


def test_a_simulated_run_takes_the_steps_of_a_real_one() -> None:
    prompts = [[g] * 20 + [g, i] for g in range(4) for i in range(6)]
    requests = make_requests(prompts, [1 + i % 5 for i in range(24)], ignore_eos=True)
    plan = plan_of(requests, pages=40, page_size=4)
    real = ContextWorker(requests, 4, 40)
    run(plan, requests, real)
    scheduler = Scheduler(plan, requests)
    simulated = SimulatedWorker(plan.expected_new_tokens)
    for expected in real.steps:
        step = scheduler.schedule()
        assert step is not None
        for column in ("sequence", "request", "start", "length", "samples", "releases", "grant_sequence", "grant_page"):
            assert np.array_equal(getattr(step, column), getattr(expected, column)), column
        simulated.submit(step)
        scheduler.update(step, simulated.collect())
    assert scheduler.schedule() is None


def test_the_pool_prefers_neighbours_and_gives_no_page_twice() -> None:
    pool = PagePool(8)
    assert pool.take(0, 3).tolist() == [0, 1, 2]
    assert pool.take(1, 1).tolist() == [3]
    pool.release(0)
    assert pool.take(2, 4).tolist() == [4, 5, 6, 7]
    assert pool.take(3, 2, after=0).tolist() == [1, 2]
    assert pool.take_one_each(np.array([4]), np.array([7])).tolist() == [0]  # no page after the last one
    assert (pool.num_free, pool.peak_used) == (0, 8)
    with pytest.raises(ValueError, match="1 pages asked for, 0 free"):
        pool.take(5, 1)
    with pytest.raises(ValueError, match="1 pages asked for, 0 free"):
        pool.take_one_each(np.array([5]), np.array([-1]))
    pool.release(3)
    pool.release(1)
    assert pool.take_one_each(np.array([1, 4, 2]), np.array([-1, 0, 7])).tolist() == [2, 1, 3]
    assert pool.held_by(2) == [4, 5, 6, 7, 3]
    for owner in (1, 2, 4):
        pool.release(owner)
    assert pool.num_used == 0


@given(
    job=jobs,
    page_size=st.sampled_from([1, 3, 4]),
    extra=st.integers(0, 20),
    step_tokens=st.integers(1, 24),
    order=st.sampled_from(sorted(ORDERS)),
    grouping=st.sampled_from(sorted(GROUPINGS)),
    depth=st.sampled_from([1, 2]),
)
@settings(max_examples=400, deadline=None)
def test_answers_of_known_length_are_never_preempted(
    job: list[tuple[list[int], int]],
    page_size: int,
    extra: int,
    step_tokens: int,
    order: str,
    grouping: str,
    depth: int,
) -> None:
    requests = make_requests([p for p, _ in job], [n for _, n in job], ignore_eos=True)
    options = {"step_tokens": step_tokens, "schedule_order": order, "grouping": grouping}
    plan = plan_of(requests, pages=1, page_size=page_size, **options)
    pages = int(pages_needed(plan.groups, requests, plan.budget).max()) + extra
    plan = plan_of(requests, pages=pages, page_size=page_size, **options)
    scheduler, finished = run(plan, requests, SimulatedWorker(plan.expected_new_tokens), depth)
    assert len(finished) == len(job)
    assert scheduler.counters.preemptions == scheduler.counters.idle_rows == 0


def test_under_pressure_the_pool_is_filled_and_nothing_is_computed_twice() -> None:
    """The `pressure` job: 12 prefixes of 512 tokens with 8 readers each, and KV for 3,072 tokens."""
    rng = np.random.default_rng(0)
    prompts = [
        [*prefix, *rng.integers(0, 1000, 32).tolist()]
        for prefix in rng.integers(0, 1000, (12, 512)).tolist()
        for _ in range(8)
    ]
    shuffled = [prompts[i] for i in rng.permutation(96)]
    requests = make_requests(shuffled, [32] * 96, ignore_eos=True)
    plan = plan_of(requests, pages=192, page_size=16, step_tokens=1024)
    scheduler, finished = run(plan, requests, SimulatedWorker(plan.expected_new_tokens))
    assert len(finished) == 96
    assert scheduler.counters.preemptions == scheduler.counters.prefix_evictions == 0
    assert scheduler.counters.prompt_computed == 12 * 512 + 96 * 32
    assert scheduler.pool.peak_used >= 0.97 * 192


@given(job=jobs, page_size=st.sampled_from([1, 4]), step_tokens=st.integers(2, 24), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_step_is_what_its_parts_are_one_after_the_other(
    job: list[tuple[list[int], int]], page_size: int, step_tokens: int, data: st.DataObject
) -> None:
    """Every step is cut anywhere, once or twice: each row sees what it saw, and the same rows sample."""
    requests = some_look_back(make_requests([p for p, _ in job], [n for _, n in job]))
    plan = plan_of(requests, pages=200, page_size=page_size, step_tokens=step_tokens)
    worker, scheduler = ContextWorker(requests, page_size, 200), Scheduler(plan, requests)
    finished: list[Finished] = []
    while (step := scheduler.schedule()) is not None:
        parts = [step]
        for _ in range(2):
            last = parts.pop()
            cut = data.draw(st.integers(1, max(last.num_rows - 1, 1)))
            parts += last.split(cut) if last.num_rows > 1 else [last]
        outputs = []
        for part in parts:
            worker.submit(part)
            outputs.append(worker.collect())
        token_ids, ended = (np.concatenate([getattr(o, name) for o in outputs]) for name in ("token_ids", "ended"))
        assert sum(part.work.rows for part in parts) == step.num_rows
        assert sum(part.work.pairs for part in parts) == step.work.pairs
        finished += scheduler.update(step, StepOutput(token_ids, ended, 0.0, parts=len(parts)))
    for f in finished:
        assert f.token_ids.tolist() == answer(job[f.request][0], job[f.request][1], None)
    assert len(finished) == len(job)
