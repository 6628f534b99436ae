"""Forecasts from the bundled job: orders compared, and a part of a job that stands for the whole."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from batchrun.config import load_config
from batchrun.errors import UsageError
from batchrun.formats.job import open_job, read_job
from batchrun.planning.order import CANDIDATES
from batchrun.prepare import Prepared, choose_order, estimate, prepare, simulate
from batchrun.request import JobLine
from batchrun.subject import Subject

JOB = Path(__file__).resolve().parent.parent / "configs" / "demo" / "job.jsonl"


def prepared(**options: object) -> Prepared:
    config = load_config(model="demo", **({"dtype": "float32"} | options))
    subject = Subject.resolve(config, weights=False)
    lines = (line for line in islice(read_job(open_job(str(JOB))), config.limit) if isinstance(line, JobLine))
    return prepare(subject, lines, config)[0]


def test_auto_takes_the_order_that_is_shortest_in_simulation():
    # Memory for two of the twelve tables, so that an order that scatters their readers computes them again and again.
    job = prepared(kv_memory="1200KB", scheduler={"step_tokens": 64})
    chosen, tried = choose_order(job)
    assert sorted(order.name for order in tried) == sorted(CANDIDATES)
    by_name = {order.name: order for order in tried}
    fastest = min(order.seconds for order in tried)
    assert chosen.plan.options.schedule_order == tried[0].name
    assert tried[0].seconds <= 1.006 * fastest
    assert by_name["input"].evictions > 0
    assert by_name["input"].seconds > 1.1 * tried[0].seconds
    assert sorted(chosen.plan.order.tolist()) == list(range(480))
    # What was found for the order is what the chosen plan comes to.
    assert simulate(chosen).seconds == pytest.approx(tried[0].seconds)


def test_an_order_that_was_given_stands():
    job = prepared(schedule_order="shuffle", limit=20)
    same, tried = choose_order(job)
    assert same is job
    assert tried == ()


def test_a_part_of_a_job_stands_for_the_whole():
    job, _ = choose_order(prepared(kv_memory="1200KB"))
    whole, part = simulate(job), simulate(job, 160)
    assert whole.requests == 480
    assert whole.scale == 1
    assert 40 < part.requests <= 160
    assert part.seconds == pytest.approx(whole.seconds, rel=0.2)
    assert (part.first_step >= 0).sum() == part.requests
    simulated = part.first_step >= 0
    assert np.array_equal(simulated, part.last_step >= 0)
    assert (part.first_step[simulated] <= part.last_step[simulated]).all()
    # By whole groups: of a table either all questions were simulated or none.
    table = np.array([custom_id.split("-")[0] for custom_id in job.requests.custom_ids])
    assert {simulated[table == name].mean() for name in np.unique(table)} == {0.0, 1.0}
    expected = estimate(job, part)
    assert expected.requests == part.requests
    assert expected.low <= expected.seconds <= expected.high
    assert 0 < expected.bound <= expected.seconds


def test_a_group_that_is_larger_than_the_part_is_taken_in_part():
    """Else a job whose prompts all begin alike would be simulated whole."""
    job, _ = choose_order(prepared(kv_memory="1200KB"))
    part = simulate(job, 7)
    assert 0 < part.requests <= 7
    assert part.scale > 10


def test_the_probe_goes_first_in_whatever_order_is_chosen():
    job = prepared(scheduler={"probe": 0.1})
    chosen, _ = choose_order(job)
    size = job.plan.probe
    assert 20 < size == chosen.plan.probe
    assert set(chosen.plan.order[:size].tolist()) == set(job.plan.order[:size].tolist())
    assert sorted(chosen.plan.order.tolist()) == list(range(480))


@pytest.mark.parametrize("device", ["h200", "h100", "a100"])
def test_a_plan_for_a_device_that_is_not_here(device):
    job = prepared(device_spec=device, dtype="auto")
    expected = estimate(job, simulate(job))
    assert expected.device == device
    assert not expected.calibrated
    assert "data sheet" in expected.hardware
    assert expected.low == pytest.approx(expected.bound, rel=0.3)
    assert expected.low < expected.seconds < expected.high


@pytest.mark.parametrize("page_size", [8, 24, 256])
def test_pages_that_a_gpu_has_no_kernel_for_are_refused_before_anything_is_loaded(page_size):
    with pytest.raises(UsageError, match=f"Pages of {page_size} tokens"):
        prepared(device_spec="h200", dtype="auto", scheduler={"page_size": page_size})
    assert prepared(scheduler={"page_size": page_size}, limit=4).plan.budget.page_size == page_size


def test_a_run_is_not_planned_with_the_figures_of_a_gpu_that_is_not_here():
    with pytest.raises(UsageError, match="figures of h200"):
        Subject.resolve(load_config(model="demo", device_spec="h200"), weights=True)
    with pytest.raises(UsageError, match="h200"):
        Subject.resolve(load_config(model="demo", device_spec="h20"), weights=False)
