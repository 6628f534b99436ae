"""Plans: memory that adds up, orders that lose nobody, and one small job whose steps are written out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEVICE, make_requests

from batchrun.errors import UsageError
from batchrun.execution.loop import run_loop
from batchrun.execution.simulate import SimulatedWorker
from batchrun.intake import Intake
from batchrun.planning.cost import CostModel
from batchrun.planning.lengths import OutputLengths
from batchrun.planning.memory import MemoryBudget, make_budget
from batchrun.planning.order import ORDERS, _dual_scan, _unit_of_group
from batchrun.planning.planner import Plan, PlanOptions, fit_to_pool, make_plan, pages_needed
from batchrun.prefix.forest import build_forest
from batchrun.prepare import plan_what_fits
from batchrun.request import Requests, SamplingParams
from batchrun.schedule.scheduler import Scheduler
from batchrun.schedule.step import Step
from batchrun.specs import ModelSpec

MODEL = ModelSpec(
    model_type="llama",
    vocab_size=384,
    hidden_size=48,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_context=512,
    sliding_window=None,
    checkpoint_dtype="float32",
)
QUICK = settings(max_examples=40, deadline=None)
COST = CostModel(MODEL, DEVICE, "float32")


def budget(pages: int, page_size: int = 4) -> MemoryBudget:
    return MemoryBudget(page_size=page_size, pages=pages, page_bytes=1, weight_bytes=0)


def plan_of(requests: Requests, order: str = "dfs", *, memory: MemoryBudget | None = None, **options) -> Plan:
    chosen = PlanOptions(**({"schedule_order": order, "grouping": "tree", "step_tokens": 64} | options))
    return make_plan(requests, build_forest(requests.tokens), COST, memory or budget(1000), chosen)


@st.composite
def jobs(draw: st.DrawFn, ignore_eos: bool = False) -> Requests:
    """Jobs whose prompts share prefixes at several levels, in any order."""
    stems = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4))
    tails = st.lists(st.integers(0, 3), min_size=0, max_size=5)
    prompts = draw(st.lists(st.builds(lambda stem, tail: stem + tail, st.sampled_from(stems), tails), min_size=1))
    limits = draw(st.lists(st.integers(1, 30), min_size=len(prompts), max_size=len(prompts)))
    return make_requests(prompts, limits, ignore_eos=ignore_eos)


# --- memory


@QUICK
@given(st.integers(1, 10**9), st.sampled_from(["float32", "bfloat16"]), st.integers(1, 64))
def test_the_pool_takes_what_it_was_given_and_wastes_less_than_a_page(kv_memory, dtype, page_size):
    made = make_budget(MODEL, DEVICE, dtype, kv_memory=kv_memory, page_size=page_size)
    assert made.page_size == page_size
    assert made.page_bytes == page_size * MODEL.kv_bytes_per_token(dtype)
    assert 0 <= kv_memory - made.kv_bytes < made.page_bytes


def test_without_a_wish_the_pool_is_half_of_what_the_weights_leave():
    made = make_budget(MODEL, DEVICE, "float32", kv_memory=None)
    assert made.page_size == DEVICE.page_size
    left = DEVICE.memory_bytes - made.weight_bytes
    assert made.weight_bytes == MODEL.weight_bytes("float32")
    assert 0 <= left / 2 - made.kv_bytes < made.page_bytes


def test_weights_that_fill_the_device_leave_no_pages():
    tiny = dataclasses.replace(DEVICE, memory_bytes=1000)
    assert make_budget(MODEL, tiny, "float32", kv_memory=None).pages == 0


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_begun_page_is_a_page(tokens, pages):
    assert budget(10).pages_for(tokens) == pages


# --- lengths


def test_lengths_are_exact_or_guessed_or_learnt():
    requests = make_requests([[1], [2], [3], [4]], [10, 500, 500, 3])
    requests.sampling = [SamplingParams(), SamplingParams(ignore_eos=True)]
    requests.sampling_id[1] = 1
    lengths = OutputLengths(requests, first_guess=100)
    assert lengths.exact.tolist() == [False, True, False, False]
    assert lengths.expected().tolist() == [10, 500, 100, 3]  # no guess beyond a limit; what is exact is no guess

    lengths.observe(np.array([1], dtype=np.int32), np.array([500], dtype=np.int32))
    assert lengths.expected().tolist() == [10, 500, 100, 3]  # exact ones teach nothing

    lengths.observe(np.array([0, 3], dtype=np.int32), np.array([5, 3], dtype=np.int32))
    guess = int(lengths.expected(np.array([2], dtype=np.int32))[0])
    assert 4 < guess < 10  # near the mean seen, with a margin above it


def test_a_group_is_believed_the_more_the_more_it_has_seen():
    prompts = [[7, 7, 7, i] for i in range(20)] + [[9, 9, 9, i] for i in range(20)] + [[5]]
    requests = make_requests(prompts, [1000] * 41)
    lengths = OutputLengths(requests, plan_of(requests).groups)
    lengths.observe(np.arange(16), np.full(16, 10))
    lengths.observe(np.arange(20, 22), np.full(2, 100))
    of_short, of_long, alone = lengths.expected(np.array([18, 38, 40])).tolist()
    job = (16 * 10 + 2 * 100) / 18
    assert 10 <= of_short < alone < of_long < 100
    assert job <= alone <= 1.3 * job
    lengths.observe(np.arange(22, 36), np.full(14, 100))
    assert 90 <= lengths.expected(np.array([38]))[0] <= 130


def test_a_hint_is_believed_before_what_was_seen_and_never_beyond_the_limit():
    requests = make_requests([[1], [2], [3]], [50, 50, 50])
    requests.expected_tokens = np.array([7, 0, 90], dtype=np.int32)
    lengths = OutputLengths(requests, first_guess=30)
    assert lengths.expected().tolist() == [7, 30, 50]
    lengths.observe(np.array([1]), np.array([20]))
    assert lengths.expected()[[0, 2]].tolist() == [7, 50]


def test_an_answer_that_outgrew_its_estimate_is_expected_to_be_as_long_as_those_that_are_longer():
    requests = make_requests([[i] for i in range(1, 12)], [1000] * 11)
    lengths = OutputLengths(requests)
    assert lengths.longer(np.array([10]), np.array([40])).tolist() == [60]  # nothing seen: half as much again
    lengths.observe(np.arange(10), np.array([10, 10, 10, 10, 10, 10, 50, 60, 70, 200]))
    past_20, past_70, past_all = lengths.longer(np.array([10, 10, 10]), np.array([20, 70, 300])).tolist()
    assert 95 <= past_20 <= 120  # the mean of 50, 60, 70 and 200 is 95
    assert 200 <= past_70 <= 240
    assert past_all == 450
    assert lengths.longer(np.array([10]), np.array([999])).tolist() == [1000]


@pytest.mark.parametrize("extra", [{"stop": ("x",)}, {"stop_token_ids": (5,)}])
def test_a_length_is_not_exact_where_a_stop_can_end_the_answer(extra):
    requests = make_requests([[1]], [9])
    requests.sampling = [SamplingParams(ignore_eos=True, **extra)]
    assert not OutputLengths(requests).exact.any()


# --- orders


@pytest.mark.parametrize("order", ORDERS)
@QUICK
@given(requests=jobs())
def test_every_order_admits_every_request_once(order, requests):
    assert sorted(plan_of(requests, order).order.tolist()) == list(range(len(requests)))


@pytest.mark.parametrize("order", ["dfs", "decode_ratio", "density"])
@QUICK
@given(requests=jobs())
def test_the_readers_of_every_prefix_are_neighbours(order, requests):
    plan = plan_of(requests, order)
    place = np.empty(len(requests), dtype=int)
    place[plan.order] = np.arange(len(requests))
    groups = plan.groups
    unit = _unit_of_group(groups, plan.budget.pages * plan.budget.page_size)
    # A header of the whole job is always in memory, so that its readers may be apart.
    for group in range(len(groups)) if order == "dfs" else np.flatnonzero(unit >= 0).tolist():
        readers = [r for r in range(len(requests)) if group in path(groups, int(groups.request_group[r]))]
        assert len(readers) == groups.requests[group]
        assert np.ptp(place[readers]) == len(readers) - 1


def path(groups, group: int) -> list[int]:
    return [] if group < 0 else [g for g in groups.path[group].tolist() if g >= 0]


def test_decode_ratio_starts_with_what_decodes_most_for_its_prefill():
    # Prefix 3 + two suffixes of 1 are 5 prefill tokens: 5 decode tokens are a ratio of 1, 20 are one of 4.
    # The request alone has 1 prefill token and a ratio of 2.
    prompts = [[1, 2, 3, 4], [7, 8, 9, 1], [5], [1, 2, 3, 6], [7, 8, 9, 2]]
    requests = make_requests(prompts, [2, 10, 2, 3, 10], ignore_eos=True)
    assert plan_of(requests, "decode_ratio").order.tolist() == [1, 4, 2, 0, 3]
    assert plan_of(requests, "dfs").order.tolist() == [0, 3, 2, 1, 4]
    assert plan_of(requests, "input").order.tolist() == [0, 1, 2, 3, 4]


def test_a_header_of_the_whole_job_is_no_unit():
    """All share four tokens, and then one of two prefixes: the two are put in order, whatever the header."""
    prompts = [[1, 1, 1, 1] + [2 + g] * 6 + [20 + i] for i in range(8) for g in range(2)]
    requests = make_requests(prompts, [2 if i % 2 == 0 else 20 for i in range(16)], ignore_eos=True)
    order = plan_of(requests, "decode_ratio").order
    assert (order[:8] % 2 == 1).all()  # the group that decodes most goes first
    small = plan_of(requests, "decode_ratio", memory=budget(12)).order  # where the header is no small part of the pool
    assert small.tolist() == plan_of(requests, "dfs").order.tolist()


def test_density_mixes_what_computes_with_what_decodes():
    """Eight long prompts with short answers and eight short prompts with long ones: neither kind is left to the end."""
    prompts = [[i] * (60 if i % 2 else 2) for i in range(16)]
    requests = make_requests(prompts, [2 if i % 2 else 60 for i in range(16)], ignore_eos=True)
    kinds = [request % 2 for request in plan_of(requests, "density").order.tolist()]
    memory = np.array([(60 + 1) * 2 if kind else (2 + 30) * 60 for kind in kinds])
    prefill = np.array([60 if kind else 2 for kind in kinds])
    # Both have begun by the time that a third of the KV memory has been used, and both go on to the end of it.
    third = np.searchsorted(np.cumsum(memory), memory.sum() / 3) + 1
    assert set(kinds[:third]) == {0, 1}
    decode_first = plan_of(requests, "decode_ratio").order.tolist()
    assert [request % 2 for request in decode_first] == [0] * 8 + [1] * 8
    assert prefill[:8].sum() > 8 * 2


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    st.lists(st.floats(0.1, 10), min_size=30, max_size=30),
)
def test_a_dual_scan_takes_every_block_once_and_from_the_ends(density, memory):
    dense = np.sort(np.array(density))[::-1]
    weight = np.array(memory[: dense.size])
    turn = _dual_scan(dense, weight, float((dense * weight).sum() / weight.sum()))
    assert sorted(turn.tolist()) == list(range(dense.size))
    last = int(np.argmax(turn))  # where both ends meet
    assert (np.diff(turn[: last + 1]) > 0).all()
    assert (np.diff(turn[last:]) < 0).all()


def test_a_probe_goes_first_and_has_only_answers_of_unknown_length():
    requests = make_requests([[i % 5, i] for i in range(400)], [50] * 400)
    requests.sampling = [SamplingParams(), SamplingParams(ignore_eos=True)]
    requests.sampling_id[:200] = 1
    plan = plan_of(requests, probe=0.1)
    assert 5 <= plan.probe <= 40
    assert (plan.order[: plan.probe] >= 200).all()
    assert sorted(plan.order.tolist()) == list(range(400))
    assert plan_of(requests).probe == 0


def test_what_a_probe_shows_orders_the_rest():
    """Groups whose answers turn out to be long go first, though nothing told so before."""
    prompts = [[g] * 8 + [100 + i] for g in range(6) for i in range(120)]
    requests = make_requests(prompts, [64] * 720)
    long = np.arange(720) // 120 == 4
    answers = np.where(long, 64, 2).astype(np.int32)
    plan = plan_of(requests, "decode_ratio", memory=budget(24), probe=0.03, step_tokens=32)
    started: list[int] = []
    scheduler = Scheduler(plan, requests)
    run_loop(
        scheduler,
        SimulatedWorker(answers),
        on_step=lambda step, output: started.extend(step.request[(step.request >= 0) & (step.start == 0)].tolist()),
    )
    assert sorted(set(started)) == list(range(720))
    probe = set(plan.order[: plan.probe].tolist())
    after = [request for request in dict.fromkeys(started) if request not in probe]
    # Some had to be let in while the probe's last answers were to come; the first after them are the long ones.
    place = {request: i for i, request in enumerate(after)}
    waiting = [r for r in range(720) if r not in probe]
    mean = {kind: np.mean([place[r] for r in waiting if long[r] == kind]) for kind in (True, False)}
    unordered = plan.order[plan.probe :].tolist()
    before = np.mean([unordered.index(r) for r in waiting if long[r]])
    assert mean[True] < before


def test_shuffle_hangs_on_the_seed_alone():
    requests = make_requests([[i] for i in range(50)], [1] * 50)
    one, same, other = (plan_of(requests, "shuffle", seed=seed).order.tolist() for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert one != sorted(one)


@pytest.mark.parametrize(("option", "word"), [("schedule_order", "decode_ratio"), ("grouping", "tree")])
def test_an_unknown_policy_is_refused_with_those_there_are(option, word):
    with pytest.raises(UsageError) as caught:
        plan_of(make_requests([[1]], [1]), **{option: "sideways"})
    assert "sideways" in caught.value.message
    assert word in (caught.value.hint or "")


# --- what fits


def test_merging_costs_little_beside_computing_a_row():
    # 8 * 2 layers * 4 heads * 12 over 2 * (2 * (48 * 12 * 2 * 6 + 3 * 48 * 96)) operations.
    costs = COST.group_costs()
    assert costs.merge / costs.row == pytest.approx(768 / 82944)


@QUICK
@given(jobs(), st.integers(0, 12), st.integers(1, 5), st.data())
def test_what_is_left_after_the_fit_fits_and_no_limit_is_cut_further_than_needed(requests, pages, page_size, data):
    memory = budget(pages, page_size)
    groups = plan_of(requests, memory=memory).groups
    defaulted = np.array(data.draw(st.lists(st.booleans(), min_size=len(requests), max_size=len(requests))))
    before = requests.max_new_tokens.copy()
    cut, misfits = fit_to_pool(groups, requests, memory, defaulted)
    after = requests.max_new_tokens
    assert (pages_needed(groups, requests, memory)[~misfits] <= pages).all()
    assert (pages_needed(groups, requests, memory)[misfits] > pages).all()
    changed = after != before
    assert cut == changed.sum()
    assert not (changed & ~defaulted).any()
    assert (after[changed] >= 1).all()
    requests.max_new_tokens[changed] += 1
    assert (pages_needed(groups, requests, memory)[changed] > pages).all()
    # A request that nothing was asked for fits as soon as one token of an answer does.
    requests.max_new_tokens = np.ones_like(before)
    assert not (misfits & defaulted & (pages_needed(groups, requests, memory) <= pages)).any()


@QUICK
@given(jobs(), st.integers(0, 12), st.integers(1, 5), st.integers(1, 20), st.data())
def test_all_that_a_plan_keeps_can_run_to_its_limit_however_small_the_pool(
    requests, pages, page_size, first_guess, data
):
    count = len(requests)
    greedy = data.draw(st.booleans())
    requests.sampling = [SamplingParams(0.0 if greedy else 1.0, ignore_eos=True)]  # every answer runs to its limit
    requests.line = np.sort(np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))))
    requests.line = np.unique(requests.line, return_inverse=True)[1].astype(np.int32)
    lines = int(requests.line[-1]) + 1
    requests.line_numbers = requests.line_numbers[:lines]
    prompts = [requests.tokens[row].tolist() for row in range(count)]
    defaulted = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    before = requests.max_new_tokens.copy()
    intake = Intake(requests, defaulted, faults=[], silent=0, clipped=0, calls_not_read=0)
    options = PlanOptions("dfs", "tree", step_tokens=8, first_guess=first_guess)
    fitting = plan_what_fits(intake, COST, budget(pages, page_size), options)
    kept, answers, faults = fitting.requests, fitting.answers, fitting.faults

    assert sorted([*answers.line_numbers.tolist(), *(fault.number for fault in faults)]) == list(range(1, lines + 1))
    assert all(fault.code == "context_length_exceeded" for fault in faults)
    # Refused is what does not fit even alone and without sharing, and nothing else.
    least = requests.tokens.lengths + np.where(defaulted, 1, before) - 1
    too_large = np.unique(requests.line[least > pages * page_size])
    assert {fault.number for fault in faults} == set((too_large + 1).tolist())
    # Each answer of the others is given by a request that asks for just that.
    asked = np.flatnonzero(~np.isin(requests.line, too_large))
    assert len(answers) == asked.size
    given = [
        (kept.tokens[row].tolist(), limit)
        for row, limit in zip(answers.request, kept.max_new_tokens[answers.request], strict=True)
    ]
    assert [prompt for prompt, _ in given] == [prompts[row] for row in asked]
    limits = np.array([limit for _, limit in given], dtype=np.int64)
    assert ((limits == before[asked]) | (defaulted[asked] & (limits < before[asked]))).all()
    assert fitting.clipped == (limits < before[asked]).sum()
    wanted = {  # limits that were cut may have become equal
        (tuple(prompts[row]), limit, bool(defaulted[row]), 0 if greedy else row)
        for row, limit in zip(asked.tolist(), limits.tolist(), strict=True)
    }
    assert len(kept) == len(wanted)
    sampled = [step.request[step.samples] for step in steps_of(fitting.plan, kept)]
    counts = np.bincount(np.concatenate([*sampled, np.empty(0, dtype=int)]).astype(int), minlength=len(kept))
    assert counts.tolist() == kept.max_new_tokens.tolist()


# --- steps


def steps_of(plan: Plan, requests: Requests) -> list[Step]:
    steps: list[Step] = []
    run_loop(
        Scheduler(plan, requests),
        SimulatedWorker(plan.expected_new_tokens),
        on_step=lambda step, output: steps.append(step),
    )
    return steps


def test_the_steps_of_a_small_job_written_out():
    """Two prompts that share four tokens and one that shares none, two tokens each, in steps of six rows."""
    requests = make_requests([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [9, 9]], [2, 2, 2], ignore_eos=True)
    plan = plan_of(requests, memory=budget(8), step_tokens=6)
    assert (plan.prompt_logical, plan.prompt_physical, plan.saving) == (12, 8, 1 - 8 / 12)

    def written(step: Step) -> dict[str, list]:
        reads = step.prefix_reads
        return {
            "sequence": step.sequence.tolist(),
            "request": step.request.tolist(),
            "start": step.start.tolist(),
            "length": step.length.tolist(),
            "depth": step.depth.tolist(),
            "samples": step.samples.tolist(),
            "num_sampled": step.num_sampled.tolist(),
            "token_ids": step.token_ids.tolist(),
            "reads": np.stack(
                [reads.level, reads.first_row, reads.rows, reads.sequence, reads.length, reads.position], axis=1
            ).tolist(),
            "releases": step.releases.tolist(),
            "grants": np.stack([step.grant_sequence, step.grant_page], axis=1).tolist(),
        }

    assert [written(step) for step in steps_of(plan, requests)] == [
        {  # The shared prefix, and the first two prompts behind it: both read it in the step that computes it.
            "sequence": [0, 1, 2],
            "request": [-1, 0, 1],
            "start": [0, 0, 0],
            "length": [4, 1, 1],
            "depth": [0, 4, 4],
            "samples": [False, True, True],
            "num_sampled": [0, 0, 0],
            "token_ids": [1, 2, 3, 4, 5, 6],
            "reads": [[0, 4, 2, 0, 4, 0]],
            "releases": [],
            "grants": [[0, 0], [1, 1], [2, 2]],
        },
        {  # Two decodes (the simulated worker samples 0) mixed with the third prompt.
            "sequence": [1, 2, 3],
            "request": [0, 1, 2],
            "start": [1, 1, 0],
            "length": [1, 1, 2],
            "depth": [4, 4, 0],
            "samples": [True, True, True],
            "num_sampled": [1, 1, 0],
            "token_ids": [0, 0, 9, 9],
            "reads": [[0, 0, 2, 0, 4, 0]],
            "releases": [],
            "grants": [[3, 3]],
        },
        {  # The last decode; both readers are done, so that the prefix is gone as well.
            "sequence": [3],
            "request": [2],
            "start": [2],
            "length": [1],
            "depth": [0],
            "samples": [True],
            "num_sampled": [1],
            "token_ids": [0],
            "reads": [],
            "releases": [1, 2, 0],
            "grants": [],
        },
    ]


@QUICK
@given(jobs(ignore_eos=True), st.integers(1, 9), st.sampled_from(list(ORDERS)))
def test_a_plan_samples_every_token_of_answers_whose_length_is_known(requests, step_tokens, order):
    memory = budget(30)
    plan = plan_of(requests, order, memory=memory, step_tokens=step_tokens)
    _, misfits = fit_to_pool(plan.groups, requests, memory, np.zeros(len(requests), dtype=bool))
    if misfits.any():
        return
    steps = steps_of(plan, requests)
    sampled = np.concatenate([step.request[step.samples] for step in steps])
    assert np.bincount(sampled, minlength=len(requests)).tolist() == requests.max_new_tokens.tolist()
