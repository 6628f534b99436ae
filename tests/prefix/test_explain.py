"""The tree of shared runs against a count of every run, and what a line is told against the steps themselves."""

from __future__ import annotations

from collections import defaultdict
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEAR_ROWS, make_requests

from batchrun.execution.loop import run_loop
from batchrun.execution.simulate import SimulatedWorker
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import Plan, PlanOptions, make_plan
from batchrun.prefix.explain import Explanation, PrefixRead, Timetable, explain, shared_runs
from batchrun.prefix.forest import build_forest
from batchrun.request import Answers, LineFault, Requests, TextColumn
from batchrun.schedule.scheduler import Scheduler
from batchrun.schedule.step import Step, StepOutput

PAGE_SIZE, PAGE_BYTES = 4, 1000
prompts_of_jobs = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=10), min_size=1, max_size=15)


def text(ids) -> str:
    return " ".join(map(str, ids))


# --- shared runs


@settings(max_examples=200, deadline=None)
@given(prompts_of_jobs, st.integers(1, 6))
def test_what_is_listed_and_what_is_not_add_up_to_what_sharing_spares(prompts, count):
    tokens = make_requests(prompts, [1] * len(prompts)).tokens
    forest = build_forest(tokens)
    runs = shared_runs(forest, tokens.ids, text, count)
    spared = [run.spared for run in runs.listed]
    assert sum(spared) + runs.others_spared == forest.prompt_logical - forest.prompt_physical
    assert len(runs.listed) + runs.others == int((forest.requests > 1).sum())
    assert len(runs.listed) == min(count, int((forest.requests > 1).sum()))
    for run in runs.listed:
        below = sum(prompt[: run.depth + run.tokens] == _path(forest, tokens, run.node) for prompt in prompts)
        assert run.requests == below > 1
        assert run.spared == (run.requests - 1) * run.tokens
        assert run.text == text(_path(forest, tokens, run.node)[run.depth :])
    # Those that are left out of a shorter list are counted there, and nobody loses the runs below it.
    everything = shared_runs(forest, tokens.ids, text, 1000)
    assert everything.largest(count) == runs
    for listed in (runs.listed, everything.largest(2).listed):
        nodes = [run.node for run in listed]
        assert nodes == sorted(nodes)
        for run in listed:
            above = int(forest.parent[run.node])
            while above >= 0 and above not in nodes:
                above = int(forest.parent[above])
            assert run.parent == above


def _path(forest, tokens, node: int) -> list[int]:
    request = int(forest.order[forest.first[node]])
    return tokens[request].tolist()[: int(forest.depth[node] + forest.length[node])]


# --- one line


def planned(requests: Requests, answers: list[int]):
    """Forest, plan and timetable of some requests whose prompts are each computed in one step; and from these steps
    themselves, the pages of each request, summed over them."""
    options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=1000)
    forest = build_forest(requests.tokens)
    budget = MemoryBudget(PAGE_SIZE, 1000, PAGE_BYTES, 0)
    plan = make_plan(requests, forest, DEAR_ROWS, budget, options)
    plan.expected_new_tokens[:] = answers
    first, last = (np.full(len(requests), -1, dtype=np.int32) for _ in range(2))
    held: dict[int, int] = defaultdict(int)
    page_steps: dict[int, int] = defaultdict(int)

    def on_step(step: Step, output: StepOutput) -> None:
        for slot in step.releases.tolist():
            held[slot] = 0
        for slot in step.grant_sequence.tolist():
            held[slot] += 1
        for slot, request in zip(step.sequence.tolist(), step.request.tolist(), strict=True):
            if request >= 0:
                first[request] = step.index if first[request] < 0 else first[request]
                last[request] = step.index
                page_steps[request] += held[slot]

    scheduler = Scheduler(plan, requests)
    end = run_loop(scheduler, SimulatedWorker(plan.expected_new_tokens, lambda work: 0.5), on_step=on_step)
    timetable = Timetable(
        order=plan.order,
        expected_new_tokens=plan.expected_new_tokens,
        first_step=first,
        last_step=last,
        ends=np.cumsum(end.log.columns["seconds"]),
        page_size=PAGE_SIZE,
        page_bytes=PAGE_BYTES,
    )
    return forest, plan, timetable, page_steps


def explained(requests: Requests, forest, plan: Plan, timetable: Timetable, custom_id: str, faults=()) -> Explanation:
    found = explain(custom_id, faults, own_answers(requests), requests, forest, plan.groups, timetable, text)
    assert found is not None
    return found


def own_answers(requests: Requests) -> Answers:
    """Each request gives one answer."""
    return Answers.of(requests, np.arange(len(requests), dtype=np.int32))


@settings(max_examples=60, deadline=None)
@given(prompts_of_jobs, st.data())
def test_what_is_said_of_a_line_is_what_its_steps_do(prompts, data):
    answers = data.draw(st.lists(st.integers(1, 12), min_size=len(prompts), max_size=len(prompts)))
    requests = make_requests(prompts, answers, ignore_eos=True)
    forest, plan, timetable, page_steps = planned(requests, answers)
    lines = [explained(requests, forest, plan, timetable, f"r{index}") for index in range(len(prompts))]
    reads: dict[int, dict[int, PrefixRead]] = defaultdict(dict)  # by group and request
    for index, (prompt, line) in enumerate(zip(prompts, lines, strict=True)):
        [request] = line.requests
        others = [*prompts[:index], *prompts[index + 1 :], []]
        assert (line.line, line.faults) == (index + 1, ())
        assert request.prompt_tokens == len(prompt)
        assert request.shared_tokens == max(in_common(prompt, other) for other in others)
        assert request.identical == others.count(prompt)
        assert (request.answer_tokens, request.max_new_tokens) == (answers[index], answers[index])
        assert request.place == plan.order.tolist().index(index) + 1
        assert request.cached_tokens == plan.groups.request_depth[index]
        assert sum(read.tokens for read in request.reads) - request.cached_tokens in (0, 1)
        assert request.page_steps == page_steps[index]
        assert request.pages == -(-(len(prompt) - request.cached_tokens + answers[index] - 1) // PAGE_SIZE)
        assert request.kv_bytes == request.pages * PAGE_BYTES
        assert request.steps is not None
        assert request.seconds == (0.5 * request.steps[0], 0.5 * (request.steps[1] + 1))
        for read in request.reads:
            reads[read.group][index] = read
            assert text(prompt[read.depth : read.depth + read.tokens]) == read.text
    for readers in reads.values():
        begin = min(int(timetable.first_step[index]) for index in readers)
        end = max(int(timetable.last_step[index]) for index in readers)
        for index, read in readers.items():
            assert read.requests == len(readers)
            assert set(read.with_lines) <= {f"r{other}" for other in readers if other != index}
            assert len(read.with_lines) == min(3, len(readers) - 1)
            assert read.pages == -(-read.tokens // PAGE_SIZE)
            assert read.page_steps == read.pages * (end - begin + 1)
    # Every page step of a prefix is somebody's.
    assert sum(line.requests[0].prefix_page_steps for line in lines) == pytest.approx(
        sum(next(iter(readers.values())).page_steps for readers in reads.values())
    )


def in_common(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def a_job():
    requests = make_requests([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8], [9, 9]], [3, 3, 3], ignore_eos=True)
    return requests, *planned(requests, [3, 3, 3])[:3]


def test_a_line_of_several_prompts_has_one_explanation_each():
    requests, forest, plan, timetable = a_job()
    requests.line[:] = [0, 0, 1]
    requests.custom_ids = TextColumn.of(["pair", "alone"])
    requests.line_numbers = np.array([4, 9], dtype=np.int32)
    found = explained(requests, forest, plan, timetable, "pair")
    assert (found.line, len(found.requests)) == (4, 2)
    assert [len(request.reads) for request in found.requests] == [1, 1]
    assert found.requests[0].reads[0].with_lines == ()  # the other reader is of the same line
    assert explained(requests, forest, plan, timetable, "alone").requests[0].reads == ()


def test_bad_lines_and_unknown_ones():
    requests, forest, plan, timetable = a_job()
    faults = [LineFault(7, "bad", "empty_prompt", "why"), LineFault(8, "r1", "duplicate_custom_id", "again")]
    bad = explained(requests, forest, plan, timetable, "bad", faults)
    assert (bad.line, bad.requests, bad.faults) == (7, (), (faults[0],))
    doubled = explained(requests, forest, plan, timetable, "r1", faults)
    assert (doubled.line, len(doubled.requests), doubled.faults) == (2, 1, (faults[1],))
    answers = own_answers(requests)
    assert explain("nobody", faults, answers, requests, forest, plan.groups, timetable, text) is None


def test_a_duplicate_is_explained_by_the_request_that_it_is_computed_with():
    requests, forest, plan, timetable = a_job()
    asked = make_requests([[1, 2, 3, 4, 5, 6, 7], [9, 9], [1, 2, 3, 4, 5, 6, 8], [9, 9]], [3] * 4)
    requests.custom_ids = TextColumn.of(["r0", "r2", "r1"])
    answers = Answers.of(asked, np.array([0, 2, 1, 2], dtype=np.int32))
    found = explain("r3", [], answers, requests, forest, plan.groups, timetable, text)
    [request] = found.requests
    assert (found.custom_id, found.line) == ("r3", 4)
    assert (request.duplicate_of, request.answers, request.prompt_tokens) == ("r1", 2, 2)
    for custom_id, count in (("r1", 2), ("r0", 1)):
        [request] = explain(custom_id, [], answers, requests, forest, plan.groups, timetable, text).requests
        assert (request.duplicate_of, request.answers) == (None, count)


def test_what_was_not_simulated_is_not_made_up():
    requests, forest, plan, timetable = a_job()
    timetable.first_step[0] = timetable.last_step[0] = -1
    [request] = explained(requests, forest, plan, timetable, "r0").requests
    assert (request.steps, request.seconds, request.page_steps) == (None, None, 0)
    assert request.reads[0].page_steps > 0  # by the reader that was
    timetable.first_step[1] = timetable.last_step[1] = -1
    [request] = explained(requests, forest, plan, timetable, "r0").requests
    assert request.reads[0].page_steps == 0
