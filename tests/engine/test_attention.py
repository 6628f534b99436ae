"""The engine's attention equals the reference on every step of any job: levels, chunks, decodes, windows, page layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from batchrun_kernels.reference import shared_prefix_attention
from oracles import make_requests

from batchrun.engine.attention import batchrun_attention
from batchrun.engine.batch import Batch
from batchrun.engine.kv_cache import KVCache, PageTables
from batchrun.errors import ModelRefused
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Requests
from batchrun.schedule.scheduler import Scheduler
from batchrun.schedule.step import Step, StepOutput
from batchrun.specs import ModelSpec

# Rows are dear and merges cheap, so that small jobs share on all levels.
MODEL = ModelSpec("llama", 50, 4096, 16384, 1, 1, 1, 1, 4096, None, "float32")


@dataclass
class Layer(torch.nn.Module):
    """All that the attention asks of a layer."""

    layer_idx: int

    def __post_init__(self) -> None:
        super().__init__()


class Follower:
    """Which places of the pool each row of a step sees, told from the step alone, place by place."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[int, list[int]] = {}

    def places(self, slot: int, length: int) -> list[int]:
        pages = self.pages[slot]
        return [pages[own // self.page_size] * self.page_size + own % self.page_size for own in range(length)]

    def apply(self, step: Step) -> None:
        for slot in step.releases.tolist():
            del self.pages[slot]
        for slot, page in zip(step.grant_sequence.tolist(), step.grant_page.tolist(), strict=True):
            self.pages.setdefault(slot, []).append(page)

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


def steps_of(
    requests: Requests, *, page_size: int, pages: int, step_tokens: int, scattered: bool, seed: int = 0
) -> list[Step]:
    """The scheduler's steps for a job; `scattered` gives every page another number, so that none are neighbours."""
    budget = MemoryBudget(page_size=page_size, pages=pages, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=step_tokens)
    scheduler = Scheduler(make_plan(requests, build_forest(requests.tokens), MODEL, budget, options), requests)
    pages_at = np.random.default_rng(seed).permutation(pages).astype(np.int32) if scattered else np.arange(pages)
    steps = []
    while (step := scheduler.schedule()) is not None:
        count = int(step.samples.sum())
        scheduler.update(step, StepOutput(np.ones(count, np.int32), np.zeros(count, bool), 0.0))
        steps.append(replace(step, grant_page=pages_at[step.grant_page]))
    return steps


def tree(*levels: int, branching: int, own: tuple[int, ...]) -> list[list[int]]:
    """Prompts that share `levels[0]` tokens with all others, the next `levels[1]` with a `branching`th of them, ...; and
    end in `own[i % len(own)]` tokens of their own."""
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


def check(
    prompts: list[list[int]],
    *,
    heads: tuple[int, int] = (6, 3),
    head_dim: int = 8,
    windows: tuple[int | None, ...] = (None,),
    page_size: int = 4,
    pages: int = 400,
    step_tokens: int = 1000,
    scattered: bool = False,
    new_tokens: int = 3,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    """Run all steps of a job through one layer for each window, and compare each row with the reference."""
    requests = make_requests(prompts, [new_tokens] * len(prompts), ignore_eos=True)
    tables, follower = PageTables(page_size), Follower(page_size)
    heads_q, heads_kv = heads
    cache = KVCache(
        len(windows), heads_kv, head_dim, num_pages=pages, page_size=page_size, dtype=dtype, device="cpu"
    )
    for pool in (*cache.keys, *cache.values):
        pool.fill_(float("nan"))  # so that a place read before it is written shows
    generator = torch.Generator().manual_seed(0)
    for step in steps_of(
        requests, page_size=page_size, pages=pages, step_tokens=step_tokens, scattered=scattered
    ):
        tables.apply(step)
        follower.apply(step)
        batch = Batch(step, tables, heads_q // heads_kv, dtype)
        for layer, window in enumerate(windows):
            # As transformers hands them over: [1, heads, T, D], token-major in memory.
            query, key, value = (
                torch.randn(1, step.num_rows, n, head_dim, generator=generator).to(dtype).transpose(1, 2)
                for n in (heads_q, heads_kv, heads_kv)
            )
            out, _ = batchrun_attention(
                Layer(layer), query, key, value, None, scaling=0.4, sliding_window=window, batch=batch, kv_cache=cache
            )
            expected, _ = shared_prefix_attention(
                query[0].transpose(0, 1),
                cache.keys[layer],
                cache.values[layer],
                follower.visible(step, window),
                scale=0.4,
            )
            error = (out[0].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert out.shape == (1, step.num_rows, heads_q, head_dim)
            assert float(error.max()) < tolerance, (step.index, window)  # NaN is not below


@pytest.mark.parametrize("levels", [(), (9,), (9, 5), (9, 5, 6)])
@pytest.mark.parametrize("scattered", [False, True])
def test_levels(levels: tuple[int, ...], scattered: bool) -> None:
    check(tree(*levels, branching=2, own=(1, 4, 7)) if levels else [[1, 2, 3], [4] * 9], scattered=scattered)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (2, 1), (4, 1), (9, 3), (7, 1), (8, 1)])
@pytest.mark.parametrize("head_dim", [8, 20, 64])
def test_heads(heads: tuple[int, int], head_dim: int) -> None:
    check(tree(6, 5, branching=2, own=(2, 18)), heads=heads, head_dim=head_dim)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("length", [15, 16, 17])
def test_page_boundaries(page_size: int, length: int) -> None:
    check(tree(length, branching=3, own=(length, 1, 2)), page_size=page_size, scattered=True)


@pytest.mark.parametrize("step_tokens", [1, 3, 17, 40])
def test_chunks_mixed_with_decodes(step_tokens: int) -> None:
    check(tree(21, 18, branching=2, own=(1, 19, 40, 2)), step_tokens=step_tokens)


@pytest.mark.parametrize("window", [1, 2, 7, 16, 30])
@pytest.mark.parametrize("step_tokens", [5, 33, 1000])
def test_windows(window: int, step_tokens: int) -> None:
    """Layers with and without a window in one model, as Qwen2 has them."""
    prompts = tree(9, 7, branching=2, own=(1, 25, 4))
    check(prompts, windows=(None, window, None, window + 3), step_tokens=step_tokens, new_tokens=6)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("windows", [(None,), (500,), (40, None)])
def test_long_own_kv(scattered: bool, windows: tuple[int | None, ...]) -> None:
    """Own KV longer than what short chunks of several sequences are put together for."""
    check(
        [[1] * 530, [2] * 515, [3] * 7],
        heads=(2, 1),
        windows=windows,
        step_tokens=300,
        scattered=scattered,
    )


def test_neighbouring_chunks_of_equal_length() -> None:
    check(tree(10, branching=5, own=(20, 20, 20, 33, 33)))


def test_half_precision() -> None:
    check(tree(40, 20, branching=2, own=(1, 30)), dtype=torch.bfloat16, tolerance=2e-2)


def test_pages_are_used_again() -> None:
    """A pool so small that sequences live on the pages of others before them."""
    check([[i] * 9 for i in range(12)], pages=8, step_tokens=20)


@pytest.mark.parametrize(
    "asked", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"something_new": True}, {"dropout": 0.1}]
)
def test_what_is_not_computed_is_refused(asked: dict[str, object]) -> None:
    requests = make_requests([[1, 2, 3]], [1])
    step = steps_of(requests, page_size=4, pages=4, step_tokens=8, scattered=False)[0]
    tables = PageTables(4)
    tables.apply(step)
    cache = KVCache(1, 2, 8, num_pages=4, page_size=4, dtype=torch.float32, device="cpu")
    rows = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ModelRefused):
        batchrun_attention(
            Layer(0), rows, rows, rows, None, batch=Batch(step, tables, 1, torch.float32), kv_cache=cache, **asked
        )
