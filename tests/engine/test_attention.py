"""The engine's attention equals the reference on every step of any job: levels, chunks, decodes, windows, page layouts.

The steps are the scheduler's own; the keys that a row may see are told from the steps alone, place by place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
import torch
from batchrun_kernels.cpu import CpuKernels
from batchrun_kernels.reference import shared_prefix_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEAR_ROWS, make_requests

from batchrun.engine import attention as attention_module
from batchrun.engine import batch as batch_module
from batchrun.engine.attention import attend, refuse_unknown
from batchrun.engine.batch import AttentionCalls, Batch, CompiledBatch
from batchrun.engine.device import Device
from batchrun.engine.kv_cache import KVCache, PageTables
from batchrun.errors import ModelRefused
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Requests
from batchrun.schedule.scheduler import Scheduler
from batchrun.schedule.step import Step, StepOutput

AnyBatch = TypeVar("AnyBatch", Batch, CompiledBatch)


class Follower:
    """Which places of the pool each row of a step sees, told from the step alone, place by place."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[int, list[int]] = {}

    def places(self, slot: int, length: int) -> list[int]:
        pages = self.pages[slot]
        return [pages[own // self.page_size] * self.page_size + own % self.page_size for own in range(length)]

    def apply(self, step: Step) -> list[int]:
        """Take in what a step releases and grants; returns the pages that it grants."""
        for slot in step.releases.tolist():
            del self.pages[slot]
        for slot, page in zip(step.grant_sequence.tolist(), step.grant_page.tolist(), strict=True):
            self.pages.setdefault(slot, []).append(page)
        return step.grant_page.tolist()

    def visible(self, step: Step, window: int | None) -> list[torch.Tensor]:
        reads = step.prefix_reads
        seen = []
        row = 0
        for c, slot in enumerate(step.sequence.tolist()):
            for k in range(int(step.length[c])):
                position = int(step.depth[c] + step.start[c]) + k
                keys: list[tuple[int, int]] = []  # (position, place)
                for j in range(reads.level.size):
                    if reads.first_row[j] <= row < reads.first_row[j] + reads.rows[j]:
                        places = self.places(int(reads.sequence[j]), int(reads.length[j]))
                        keys += [(int(reads.position[j]) + i, place) for i, place in enumerate(places)]
                own = self.places(slot, int(step.start[c]) + k + 1)
                keys += [(int(step.depth[c]) + i, place) for i, place in enumerate(own)]
                assert sorted(at for at, _ in keys) == list(range(position + 1))
                low = -1 if window is None else position - window
                seen.append(torch.tensor([place for at, place in keys if at > low]))
                row += 1
        return seen


def bound(batch: AnyBatch) -> AnyBatch:
    batch.bind(Device().upload(batch.arrays), None)
    return batch


def steps_of(
    requests: Requests, *, page_size: int, pages: int, step_tokens: int, scattered: bool, seed: int = 0
) -> list[Step]:
    """The scheduler's steps for a job; `scattered` gives every page another number, so that none are neighbours."""
    budget = MemoryBudget(page_size=page_size, pages=pages, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=step_tokens)
    scheduler = Scheduler(make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, options), requests)
    pages_at = np.random.default_rng(seed).permutation(pages).astype(np.int32) if scattered else np.arange(pages)
    steps = []
    while (step := scheduler.schedule()) is not None:
        count = int(step.samples.sum())
        scheduler.update(step, StepOutput(np.ones(count, np.int32), np.zeros(count, bool), 0.0))
        steps.append(replace(step, grant_page=pages_at[step.grant_page]))
    return steps


def tree(*levels: int, branching: int, own: tuple[int, ...]) -> list[list[int]]:
    """Prompts that share `levels[0]` tokens with all others, the next `levels[1]` with a `branching`th of them, and so
    on; prompt i ends in `own[i % len(own)]` tokens of its own."""
    leaves = branching ** len(levels)
    prompts: list[list[int]] = [[] for _ in range(leaves)]
    token = 0
    for level, length in enumerate(levels):
        width = leaves // branching**level
        for first in range(0, leaves, width):
            for leaf in range(first, first + width):
                prompts[leaf] += range(token, token + length)
            token += length
    for leaf, prompt in enumerate(prompts):
        prompt += range(token, token + own[leaf % len(own)])
        token += own[leaf % len(own)]
    return prompts


def kinds_of(work: AttentionCalls, step: Step) -> set[str]:
    """What kinds of calls make up the attention of a layer, in words."""
    levels = int(step.prefix_reads.level.max(initial=-1)) + 1
    first = np.cumsum(step.length) - step.length
    own = np.arange(step.num_rows) - np.repeat(first - step.start, step.length)
    kinds = set()
    for read in work.reads:
        if read.partial < levels:
            kinds.add("prefix")
            kinds.add(f"prefix of level {read.partial}")
            if read.rows == 1:
                kinds.add("prefix of one row")
            if read.mask is not None:
                kinds.add("masked prefix")
            if read.blind is not None:
                kinds.add("rows blind to a prefix")
        elif read.partial > levels:
            kinds.add("earlier chunks")
        elif read.rows == 1 and own[read.first] >= batch_module._SHORT_KV:
            kinds.add("long decode")
        elif read.rows <= batch_module._SHORT_ROWS and own[read.first] < batch_module._SHORT_KV:
            kinds.add("decodes" if read.rows == 1 else "short chunks")
            if read.real is not None:
                kinds.add("padded chunks")
        else:
            kinds.add("windowed chunk")
        kinds.add("view" if read.kv.index is None else "gather")
    for chunk in work.causal:
        kinds.add("causal chunks" if chunk.chunks > 1 else "causal chunk")
    return kinds


def check(
    prompts: list[list[int]],
    *,
    heads: tuple[int, int] = (6, 3),
    head_dim: int = 8,
    windows: tuple[int | None, ...] = (None, None),
    page_size: int = 4,
    pages: int = 400,
    step_tokens: int = 1000,
    scattered: bool = False,
    new_tokens: int = 3,
    softcap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    expect: set[str] = frozenset(),  # type: ignore[assignment]
) -> None:
    """Run all steps of a job through a layer for each of `windows`, and compare each row with the reference; `expect`
    names kinds of torch's calls that have to occur. Compiled kernels give the same."""
    kernels = CpuKernels(dtype)
    requests = make_requests(prompts, [new_tokens] * len(prompts), ignore_eos=True)
    tables, follower = PageTables(page_size), Follower(page_size)
    heads_q, heads_kv = heads
    group = heads_q // heads_kv
    cache = KVCache(len(windows), heads_kv, head_dim, num_pages=pages, page_size=page_size, dtype=dtype, device="cpu")
    pools = [*cache.keys, *cache.values]
    for pool in pools:
        pool.fill_(float("nan"))  # so that a place read before it is written shows
    generator = torch.Generator().manual_seed(0)
    s_aux = torch.randn(heads_q, generator=generator) if sinks else None
    kinds: set[str] = set()
    for step in steps_of(requests, page_size=page_size, pages=pages, step_tokens=step_tokens, scattered=scattered):
        tables.apply(step)
        for page in follower.apply(step):
            for pool in pools:
                pool[page * page_size : (page + 1) * page_size] = float("nan")
        batch = bound(Batch(step, tables, group, dtype))
        compiled = bound(CompiledBatch(step, tables, kernels, group, heads_kv))
        for layer, window in enumerate(windows):
            work = batch.work(window)
            kinds |= kinds_of(work, step)
            if work.partials == 1:  # then every row of it has to be written
                batch.partial_results(window, heads_q, head_dim)[0].fill_(float("nan"))
            # As a layer has them: query, key and value heads of a row side by side.
            heads = torch.randn(step.num_rows, heads_q + 2 * heads_kv, head_dim, generator=generator).to(dtype)
            query = heads[:, :heads_q].contiguous()
            kv = heads[:, heads_q:].unflatten(1, (2, heads_kv))
            by_place_of_sinks = None if s_aux is None else s_aux.float().view(heads_kv, group).T.flatten()
            outs = [
                attend(
                    query,
                    kv,
                    by,
                    cache.tokens[layer],
                    scaling=0.4,
                    window=window,
                    softcap=softcap,
                    sinks=by_place_of_sinks,
                )
                for by in (batch, compiled)
            ]
            shape = step.num_rows, group, heads_kv, head_dim
            expected, _ = shared_prefix_attention(
                query.view(shape).transpose(1, 2).flatten(1, 2),
                cache.keys[layer],
                cache.values[layer],
                follower.visible(step, window),
                scale=0.4,
                softcap=softcap,
                sinks=s_aux,
            )
            for out in outs:
                found = out.view(shape).transpose(1, 2).flatten(1, 2).float()
                error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
                assert float(error.max()) < tolerance, (step.index, window)  # NaN is not below
    assert expect <= kinds


# Grids over one thing at a time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(), (9,), (9, 5), (9, 5, 6)])
@pytest.mark.parametrize("scattered", [False, True])
def test_levels(levels: tuple[int, ...], scattered: bool) -> None:
    if not levels:
        prompts = [[1, 2, 3], [4] * 9, [5] * 30]
        check(prompts, scattered=scattered, expect={"causal chunk", "short chunks", "padded chunks", "decodes"})
        return
    read = {"gather" if scattered else "view", *(f"prefix of level {level}" for level in range(len(levels)))}
    check(tree(*levels, branching=2, own=(1, 4, 7)), scattered=scattered, expect=read)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (2, 1), (6, 3), (9, 3), (7, 1), (14, 2)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_heads(heads: tuple[int, int], head_dim: int) -> None:
    check(
        tree(6, 5, branching=2, own=(2, 18)),
        heads=heads,
        head_dim=head_dim,
        new_tokens=2,
        expect={"prefix", "short chunks", "causal chunk", "decodes"},
    )


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("length", [15, 16, 17])
@pytest.mark.parametrize("scattered", [False, True])
def test_page_boundaries(page_size: int, length: int, scattered: bool) -> None:
    check(tree(length, branching=3, own=(length, 1, 2)), page_size=page_size, scattered=scattered, expect={"prefix"})


@pytest.mark.parametrize("step_tokens", [1, 3, 17, 40])
def test_chunks_mixed_with_decodes(step_tokens: int) -> None:
    """Chunks that begin inside a prompt, inside a prefix, and beside the decodes of others."""
    kinds = {1: {"decodes"}, 3: {"short chunks"}, 17: {"earlier chunks"}, 40: {"causal chunk", "decodes"}}
    check(tree(21, 18, branching=2, own=(1, 19, 40, 2)), step_tokens=step_tokens, expect=kinds[step_tokens])


def test_groups_of_one_duplicates_and_prompts_that_are_prefixes_of_others() -> None:
    shared = list(range(20))
    prompts = [shared, shared, shared, shared[:11], [*shared, 30, 31], [*shared, 30, 32], [50] * 9, [60], [60]]
    check(prompts, step_tokens=25, expect={"prefix of level 0", "prefix of level 1", "prefix of one row"})


@pytest.mark.parametrize("window", [1, 2, 7, 16, 30])
@pytest.mark.parametrize("step_tokens", [5, 33, 1000])
def test_windows(window: int, step_tokens: int) -> None:
    """Layers with and without a window in one model, as Qwen2 has them."""
    prompts = tree(9, 7, branching=2, own=(1, 25, 4))
    expect = {"masked prefix"} if window in (7, 16) else set()
    if window == 7 and step_tokens == 1000:
        expect |= {"rows blind to a prefix", "windowed chunk"}
    check(prompts, windows=(None, window, None, window + 3), step_tokens=step_tokens, new_tokens=6, expect=expect)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("windows", [(None,), (500,), (40, None)])
def test_long_own_kv(scattered: bool, windows: tuple[int | None, ...]) -> None:
    """Own KV longer than what short chunks of several sequences are put together for."""
    expect = {"long decode", "gather" if scattered else "view"}
    expect.add("earlier chunks" if None in windows else "windowed chunk")
    check(
        [[1] * 530, [2] * 515, [3] * 7],
        heads=(2, 1),
        windows=windows,
        step_tokens=300,
        scattered=scattered,
        expect=expect,
    )


def test_neighbouring_chunks_of_equal_length() -> None:
    check(tree(10, branching=5, own=(20, 20, 20, 33, 33)), expect={"causal chunks"})


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("windows", [(None,), (7, None)])
@pytest.mark.parametrize(("softcap", "sinks"), [(0.5, False), (None, True), (0.5, True)])
def test_soft_caps_and_sinks(
    monkeypatch: pytest.MonkeyPatch,
    softcap: float | None,
    sinks: bool,
    windows: tuple[int | None, ...],
    scattered: bool,
) -> None:
    """In calls of all kinds; scores of soft-capped layers in several blocks of rows."""
    monkeypatch.setattr(attention_module, "_SCORES_AT_ONCE", 2000)
    expect = {"prefix of level 1", "decodes", "short chunks", "long decode"}
    expect |= {"masked prefix", "rows blind to a prefix", "windowed chunk"} if 7 in windows else {"causal chunk"}
    check(
        [*tree(9, 7, branching=2, own=(1, 25, 4)), [90] * 530],
        windows=windows,
        softcap=softcap,
        sinks=sinks,
        scattered=scattered,
        new_tokens=6,
        expect=expect,
    )


def test_half_precision() -> None:
    check(tree(40, 20, branching=2, own=(1, 30)), dtype=torch.bfloat16, tolerance=2e-2)
    check(tree(40, 20, branching=2, own=(1, 30)), windows=(25,), dtype=torch.bfloat16, tolerance=2e-2)


def test_pages_are_used_again() -> None:
    """A pool so small that sequences live on the pages of others before them."""
    check([[i] * 9 for i in range(12)], pages=8, step_tokens=20)


# Any job ----------------------------------------------------------------------------------------------------------


@given(
    prompts=st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=30)
        | st.tuples(st.integers(0, 1), st.integers(1, 40)).map(lambda run: [run[0]] * run[1]),
        min_size=1,
        max_size=8,
    ),
    group=st.sampled_from([1, 2, 3, 7]),
    window=st.none() | st.integers(1, 40),
    page_size=st.sampled_from([1, 3, 16]),
    extra_pages=st.integers(0, 20),
    step_tokens=st.integers(1, 60),
    scattered=st.booleans(),
    short_rows=st.sampled_from([1, 3, 16]),
    short_kv=st.sampled_from([1, 8, 512]),
)
@settings(max_examples=80, deadline=None)
def test_any_job(
    prompts: list[list[int]],
    group: int,
    window: int | None,
    page_size: int,
    extra_pages: int,
    step_tokens: int,
    scattered: bool,
    short_rows: int,
    short_kv: int,
) -> None:
    """With lower bounds on what counts as short, small jobs take every path."""
    pages = sum(-(-(len(prompt) + 3) // page_size) + 1 for prompt in prompts) + extra_pages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "_SHORT_ROWS", short_rows)
        patch.setattr(batch_module, "_SHORT_KV", short_kv)
        check(
            prompts,
            heads=(2 * group, 2),
            head_dim=16,
            windows=(window, window),
            page_size=page_size,
            pages=pages,
            step_tokens=step_tokens,
            scattered=scattered,
        )


# What is not computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "dropout"), [({"something_new": True}, 0.0), ({}, 0.1)])
def test_what_is_not_computed_is_refused(features: dict[str, object], dropout: float) -> None:
    with pytest.raises(ModelRefused):
        refuse_unknown(features, None, dropout)
