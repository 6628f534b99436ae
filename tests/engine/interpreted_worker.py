"""The engine with the Triton kernels under the interpreter; run by test_triton_worker.py in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import pytest
import torch
from batchrun_kernels.attention import SharedPrefixAttention
from oracles import DEAR_ROWS, make_requests

from batchrun.engine.device import Device
from batchrun.engine.model import Attention, load_model
from batchrun.engine.torch_worker import TorchWorker
from batchrun.execution.loop import run_loop
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.schedule.scheduler import Scheduler


class Watched(Device):
    """Where a graph would be captured of a call, no work list may come from the host."""

    def __init__(self) -> None:
        self.graphed_calls = 0

    def graphed(self, key: Hashable, places: Hashable, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.graphed_calls += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(SharedPrefixAttention, "plan")
            return super().graphed(key, places, call)


ModelFactory = Callable[..., Path]
NEW_TOKENS = 3
EOS = 1


def make_prompts() -> list[list[int]]:
    """Two levels of sharing, with ends inside pages and on their edges, and a prompt that shares nothing."""
    random = np.random.default_rng(0)

    def some(count: int) -> list[int]:
        return random.integers(3, 300, count).tolist()

    top = some(32)
    middle = [top + some(21), top + some(5)]
    return [*(middle[i % 2] + some(1 + 5 * i) for i in range(4)), top, top, some(19)]


def answers(
    prompts: list[list[int]],
    model: Path,
    attention: Attention,
    *,
    step_tokens: int,
    pages: int = 80,
    depth: int = 1,
) -> tuple[list[list[int]], set[str]]:
    """The greedy tokens of all prompts, and which kinds of steps there were."""
    requests = make_requests(prompts, [NEW_TOKENS + 6 * (i < 3) for i in range(len(prompts))])
    loaded = load_model(model, json.loads((model / "config.json").read_text()), "float32", "cpu", attention=attention)
    budget = MemoryBudget(page_size=16, pages=pages, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=step_tokens)
    plan = make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, options)
    device = Watched()
    worker = TorchWorker(loaded, requests, eos_token_ids=frozenset({EOS}), page_size=16, num_pages=pages, device=device)
    found: dict[int, list[int]] = {}
    kinds: set[str] = set()

    def on_step(step, output):
        decodes = (step.num_sampled > 0) & step.samples
        if decodes.any() and not decodes.all():
            kinds.add("mixed")
        if (step.start > 0)[~decodes].any():
            kinds.add("chunked")
        if step.prefix_reads.level.max(initial=-1) >= 1:
            kinds.add("levels")
        if output.padded_rows:
            kinds.add("padded")
        if device.graphed_calls:
            kinds.add("graphed")

    run_loop(
        Scheduler(plan, requests, depth=depth),
        worker,
        on_finished=lambda finished: found.update({finished.request: finished.token_ids.tolist()}),
        on_step=on_step,
    )
    assert worker._kv_cache is not None
    pool = weakref.ref(worker._kv_cache.keys[0].untyped_storage())
    gc.collect()  # what Triton's interpreter leaves holds the pools too
    gc.disable()  # which runs rarely where a model is loaded
    try:
        worker.close()
        assert pool() is None, "a run after this one finds its memory taken"
    finally:
        gc.enable()
    return [found[request] for request in range(len(requests))], kinds


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"head_dim": 16}),
        ("llama-odd-heads", {}),
        ("qwen3", {}),
        ("mistral-window", {"head_dim": 16}),
        ("gemma2-window", {}),
        ("gemma3_text", {}),
        ("gpt_oss-window", {}),
        ("granite", {"head_dim": 16}),
        ("mixtral-window", {"head_dim": 16}),
        ("olmo2", {"hidden_size": 64}),
        ("phi3-window", {"hidden_size": 64}),
        ("qwen3_moe", {}),
        ("smollm3-window", {"hidden_size": 64}),
    ],
)
def test_the_kernels_give_the_tokens_of_the_cpu(model_dir: ModelFactory, architecture: str, options: dict) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    model = model_dir(architecture, **options)
    prompts = make_prompts()
    # Small chunks, so that prefill of one prompt is mixed with decodes of others.
    expected, kinds = answers(prompts, model, "cpu", step_tokens=23)
    assert kinds == {"mixed", "chunked", "levels"}
    # As on a GPU: two steps in flight, and steps of decodes padded to what a graph would be captured for.
    found, kinds = answers(prompts, model, "triton", step_tokens=23, depth=2)
    assert kinds == {"mixed", "chunked", "levels", "padded", "graphed"}
    assert found == expected
    assert len({tuple(answer) for answer in expected}) > 3, "the model says the same to everything"
    # The first step of a model makes its work lists on the way, even one of decodes alone.
    single = [prompt[:1] for prompt in prompts[:3]]
    found, kinds = answers(single, model, "triton", step_tokens=23)
    assert kinds == {"padded", "graphed"}
    assert found == answers(single, model, "cpu", step_tokens=23)[0]
