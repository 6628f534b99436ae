"""What a step costs: work counted row by row, prices that add, and device files that say what they do not know."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEAR_ROWS, DEVICE, ContextWorker, make_requests

from batchrun.config import configs_dir
from batchrun.errors import UsageError
from batchrun.execution.loop import run_loop
from batchrun.execution.simulate import SimulatedWorker
from batchrun.models import load_device_spec
from batchrun.planning.cost import CostModel, Work
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import Plan, PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Requests
from batchrun.schedule.scheduler import Scheduler
from batchrun.schedule.step import Step
from batchrun.specs import COST_UNITS, DTYPE_BYTES, ModelSpec

MODEL = ModelSpec("llama", 1000, 48, 96, 3, 4, 2, 12, 512, None, "float32")
PAGES, PAGE_SIZE = 1000, 4
PRICES = {unit: 10.0**-place for place, unit in enumerate(COST_UNITS)}
FITTED = replace(DEVICE, fitted={"float32": {**PRICES, "error": 0.05}})

jobs = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 6)), min_size=1, max_size=12
)
works = st.builds(Work, **{field.name: st.integers(0, 10**6) for field in fields(Work)})


def plan_of(job: list[tuple[list[int], int]], step_tokens: int) -> tuple[Plan, Requests]:
    requests = make_requests([prompt for prompt, _ in job], [limit for _, limit in job], ignore_eos=True)
    budget = MemoryBudget(page_size=PAGE_SIZE, pages=PAGES, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=step_tokens)
    return make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, options), requests


def steps_of(job: list[tuple[list[int], int]], step_tokens: int) -> list[Step]:
    plan, requests = plan_of(job, step_tokens)
    worker = ContextWorker(requests, PAGE_SIZE, PAGES)
    run_loop(Scheduler(plan, requests), worker)
    return worker.steps


def counted(step: Step) -> Work:
    """The work of a step, row by row: each row looks at what it sees."""
    reads = step.prefix_reads
    pairs = merges = 0
    prefixes: list[dict[int, tuple[int, int]]] = []  # of each row: by level, the sequence read and how much of it
    own: dict[int, set[int]] = {}
    row = 0
    for chunk in range(step.sequence.size):
        for k in range(int(step.length[chunk])):
            position = int(step.depth[chunk] + step.start[chunk]) + k
            seen = {
                int(reads.level[j]): (int(reads.sequence[j]), int(reads.length[j]))
                for j in range(reads.level.size)
                if reads.first_row[j] <= row < reads.first_row[j] + reads.rows[j]
            }
            keys = set(range(int(step.start[chunk]) + k + 1))
            assert sum(length for _, length in seen.values()) + len(keys) == position + 1
            own.setdefault(int(step.sequence[chunk]), set()).update(keys)
            pairs += position + 1
            merges += len(seen)
            prefixes.append(seen)
            row += 1
    # What neighbouring rows read alike is read once.
    runs = [
        length
        for before, seen in zip([{}, *prefixes], prefixes, strict=False)
        for level, (sequence, length) in seen.items()
        if before.get(level) != (sequence, length)
    ]
    return Work(
        steps=1,
        rows=row,
        sampled=int(np.count_nonzero(step.samples)),
        chunks=len(own),
        reads=len(runs),
        pairs=pairs,
        prefix_kv=sum(runs),
        suffix_kv=sum(map(len, own.values())),
        merges=merges,
    )


# --- work


@settings(max_examples=150, deadline=None)
@given(jobs, st.integers(1, 40))
def test_the_work_of_a_step_is_what_its_rows_see(job, step_tokens):
    for step in steps_of(job, step_tokens):
        assert step.work == counted(step)


def test_steps_that_share_read_a_prefix_once_for_all_its_rows():
    """Four readers of eight tokens, which end in one step: four rows of each read the prefix in one go."""
    job = [([7] * 8 + [i], 3) for i in range(4)]
    first, *decodes = [step.work for step in steps_of(job, 100)]
    assert (first.rows, first.chunks, first.reads, first.prefix_kv) == (8 + 4, 5, 1, 8)
    assert first.pairs == 8 * 9 // 2 + 4 * 9
    assert [(work.rows, work.reads, work.prefix_kv, work.suffix_kv, work.merges) for work in decodes] == [
        (4, 1, 8, 4 * 2, 4),
        (4, 1, 8, 4 * 3, 4),
    ]


@settings(deadline=None)
@given(st.lists(works, min_size=1, max_size=5))
def test_work_adds(parts):
    whole = reduce(add, parts, Work())
    for field in fields(Work):
        assert getattr(whole, field.name) == sum(getattr(part, field.name) for part in parts)


@settings(max_examples=50, deadline=None)
@given(jobs, st.integers(1, 40))
def test_a_job_is_priced_as_its_steps_are(job, step_tokens):
    """Also by a simulation, whose steps are those of the run."""
    cost = CostModel(MODEL, FITTED, "float32")
    done = [step.work for step in steps_of(job, step_tokens)]
    total = reduce(add, done)
    assert cost.seconds(total) == pytest.approx(sum(map(cost.seconds, done)))

    plan, requests = plan_of(job, step_tokens)
    log = run_loop(Scheduler(plan, requests), SimulatedWorker(plan.expected_new_tokens, cost.seconds)).log.columns
    assert log["seconds"].tolist() == [cost.seconds(work) for work in done]
    assert total.rows == log["rows"].sum()
    assert total.sampled == sum(limit for _, limit in job)


# --- prices


@settings(deadline=None)
@given(works)
def test_a_fitted_price_is_that_of_the_units(work):
    cost = CostModel(MODEL, FITTED, "float32")
    expected = sum(count * PRICES[unit] for count, unit in zip(cost.units(work), COST_UNITS, strict=True))
    assert cost.seconds(work) == pytest.approx(expected)


def test_units_of_a_step_written_out():
    cost = CostModel(MODEL, FITTED, "float32")
    work = Work(steps=1, rows=5, sampled=2, chunks=3, reads=1, pairs=40, prefix_kv=8, suffix_kv=12, merges=4)
    layer = 48 * 12 * 2 * (4 + 2) + 3 * 48 * 96  # weights
    units = dict(zip(COST_UNITS, cost.units(work), strict=True))
    assert units == {
        "step": 1,
        "layer": 3,
        "linear_operation": 2 * (3 * layer * 5 + 1000 * 48 * 2),
        "weight_byte": 4 * (3 * layer + 1000 * 48),
        "element": 3 * 5 * (48 + 96),
        "attention_operation": 3 * 40 * 4 * 12 * 4,  # a score and a sum, of 12 products each, in 4 heads
        "kv_byte": 4 * (8 + 12 + 5) * 3 * 2 * 2 * 12,
        "chunk": 3 * 3,
        "read": 3 * 1,
        "merged_element": 3 * 4 * 4 * 12,
    }


@settings(deadline=None)
@given(works, st.sampled_from(sorted(DTYPE_BYTES)))
def test_a_device_that_was_not_calibrated_is_expected_to_need_longer_than_its_peaks_do(work, dtype):
    device = replace(DEVICE, flops=dict.fromkeys(DTYPE_BYTES, 1e11))
    cost = CostModel(MODEL, device, dtype)
    seconds, bound = cost.seconds(work), cost.bound(work)
    low, high = cost.spread(seconds)
    assert not cost.fitted
    assert bound.seconds == max(bound.compute, bound.memory)
    assert bound.seconds == pytest.approx(low)
    assert low <= seconds <= high
    assert bound.limit == ("compute" if bound.compute == bound.seconds else "memory")


def test_a_fitted_expectation_stands_in_its_error():
    low, high = CostModel(MODEL, FITTED, "float32").spread(10.0)
    assert (low, high) == pytest.approx((10 / 1.1, 11.0))


@pytest.mark.parametrize("device", [DEVICE, FITTED], ids=["peaks", "fitted"])
def test_what_the_choice_of_prefixes_weighs(device):
    cost = CostModel(MODEL, device, "float32")
    costs = cost.group_costs()
    assert costs.row > costs.kv_token > 0
    assert costs.merge > 0
    if device is FITTED:
        assert costs.read == 3 * PRICES["read"]


# --- device files


def test_a_dtype_without_constants_is_priced_by_peaks():
    device = replace(FITTED, flops={"float32": 1e11, "float16": 1e10})
    assert CostModel(MODEL, device, "float32").fitted
    half = CostModel(MODEL, device, "float16")
    assert not half.fitted
    work = Work(steps=1, rows=10**6)
    assert half.seconds(work) > half.bound(work).seconds > 0


def test_a_dtype_without_a_peak_is_refused():
    with pytest.raises(UsageError, match="device cpu has no flops for bfloat16"):
        CostModel(MODEL, DEVICE, "bfloat16")


@pytest.mark.parametrize("change", [{"sorcery": 1.0}, None], ids=["one too many", "one missing"])
def test_constants_of_other_units_are_refused(change):
    constants = {**PRICES, "error": 0.05}
    if change is None:
        del constants["read"]
    else:
        constants |= change
    with pytest.raises(UsageError, match="device cpu was made for other units"):
        CostModel(MODEL, replace(DEVICE, fitted={"float32": constants}), "float32")


@pytest.mark.parametrize("name", sorted(path.stem for path in (configs_dir() / "devices").glob("*.toml")))
def test_shipped_devices_price_every_dtype(name):
    """Also one that is not here: what is fitted was measured, and the rest has peaks alone."""
    device = load_device_spec(name)
    assert device.page_size >= 1
    assert device.step_tokens % 128 == 0
    assert device.hardware
    for dtype in DTYPE_BYTES:
        cost = CostModel(MODEL, device, dtype)
        assert cost.fitted == (dtype in device.fitted)
        work = Work(steps=1, rows=512, sampled=8, chunks=9, reads=8, pairs=10**5, prefix_kv=512, suffix_kv=300)
        assert 0 < cost.seconds(work) < float("inf")
    if device.kind == "cuda":  # none was at hand
        assert not device.fitted
        assert "data sheet" in device.hardware
