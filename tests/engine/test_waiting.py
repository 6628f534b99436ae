"""On a GPU a step is submitted without waiting for the device, and a graph can hold nothing that does. Here on meta
tensors: they have no numbers, so whoever asks for one raises."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import ARCHITECTURES, make_config
from oracles import DEAR_ROWS, make_requests
from transformers import AttentionInterface, AutoModelForCausalLM

from batchrun.engine.batch import Batch
from batchrun.engine.device import Device
from batchrun.engine.model import LoadedModel, load_model, logits_of, settle_rope
from batchrun.engine.torch_worker import TorchWorker
from batchrun.execution.loop import run_loop
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Requests, SamplingParams
from batchrun.schedule.scheduler import Scheduler

PROMPTS = [[5, 6, 7, 8, nth] for nth in range(9, 13)]
NEW_TOKENS = 4


def no_attention(
    module: torch.nn.Module, query: torch.Tensor, *others: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """What has the shape of the result: that our own attention waits for nothing is a matter of its kernels."""
    return torch.empty_like(query).transpose(1, 2), None


AttentionInterface.register("none", no_attention)


class MetaDevice(Device):
    """Takes tensors as a GPU does and has no numbers."""

    name = "meta"

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.name) for name, tensor in super().upload(arrays).items()}

    def send(self, array: np.ndarray) -> torch.Tensor:
        return super().send(array).to(self.name)

    def download(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        assert tensor.is_meta
        return torch.zeros(tensor.shape, dtype=tensor.dtype).numpy


def meta_model(architecture: str) -> LoadedModel:
    """A model of transformers' whose weights have no numbers. In bfloat16, as the products of experts need it."""
    config = make_config(architecture)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, attn_implementation="none", dtype=torch.bfloat16)
    settle_rope(module.eval().to("meta"))
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return LoadedModel(
        logits=logits_of(module),
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        dtype=torch.bfloat16,
        device="meta",
        attention="torch",
    )


def run_on_meta(architecture: str, sampling: SamplingParams) -> int:
    """The number of answers of a run with two steps in flight."""
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    requests = replace(requests, sampling=[sampling])
    budget = MemoryBudget(page_size=4, pages=40, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=8)
    plan = make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, options)
    worker = TorchWorker(
        meta_model(architecture),
        requests,
        eos_token_ids=frozenset({1}),
        page_size=4,
        num_pages=40,
        device=MetaDevice(),
    )
    finished: list[int] = []
    run_loop(Scheduler(plan, requests, depth=2), worker, on_finished=lambda done: finished.append(done.request))
    worker.close()
    return len(finished)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_layer_waits_for_the_device(architecture: str) -> None:
    assert run_on_meta(architecture, SamplingParams(temperature=0.0)) == len(PROMPTS)


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
        {"temperature": 0.0, "min_tokens": 2, "logprobs": 3},
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 0.0, "logit_bias": ((5, 1.0), (7, -3.0)), "bad_words": ((5, 6), (9,))},
    ],
    ids=", ".join,
)
def test_no_way_of_sampling_waits_for_the_device(asked: dict[str, Any]) -> None:
    assert run_on_meta("llama", SamplingParams(**asked)) == len(PROMPTS)


class Watched(Device):
    """Notes what a graph would be captured of."""

    def __init__(self, waits: bool) -> None:
        self.keys: list[Hashable] = []
        self._waits = waits

    def waits_for_experts(self, dtype: torch.dtype) -> bool:
        return self._waits

    def graphed(self, key: Hashable, places: Hashable, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.keys.append(key)
        return super().graphed(key, places, call)


class WorkerWithGraphs(TorchWorker):
    """Has keys for its graphs, as on a GPU."""

    class _Batch(Batch):
        graph_key = ("one", None)

    def _cpu_batch(self, step: Any) -> Batch:
        return self._Batch(step, self._tables, 2, self._model.dtype)


@pytest.mark.parametrize(("architecture", "waits", "captured"), [
    ("mixtral", True, False), ("mixtral", False, True), ("llama", True, True),
])  # fmt: skip
def test_experts_whose_products_wait_are_not_captured(
    model_dir: Callable[..., Path], architecture: str, waits: bool, captured: bool
) -> None:
    model = model_dir(architecture)
    loaded = load_model(model, json.loads((model / "config.json").read_text()), "float32", "cpu")
    requests: Requests = make_requests(PROMPTS, [2] * len(PROMPTS))
    budget = MemoryBudget(page_size=4, pages=40, page_bytes=1, weight_bytes=0)
    plan = make_plan(
        requests, build_forest(requests.tokens), DEAR_ROWS, budget, PlanOptions("dfs", "tree", step_tokens=64)
    )
    device = Watched(waits)
    worker = WorkerWithGraphs(loaded, requests, eos_token_ids=frozenset(), page_size=4, num_pages=40, device=device)
    run_loop(Scheduler(plan, requests), worker, on_finished=lambda done: None)
    worker.close()
    assert bool(device.keys) == captured
