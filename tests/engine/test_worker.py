"""Greedy tokens of the worker equal `transformers.generate` run one request at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import ARCHITECTURES
from oracles import DEAR_ROWS, make_requests
from transformers import AutoModelForCausalLM

from batchrun.engine.linear import PackedLinear, can_pack
from batchrun.engine.model import load_model
from batchrun.engine.torch_worker import TorchWorker
from batchrun.errors import ModelRefused
from batchrun.execution.loop import run_loop
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Requests
from batchrun.schedule.scheduler import Scheduler
from batchrun.schedule.step import Step

ModelFactory = Callable[..., Path]
NEW_TOKENS = 10
EOS = 1


def make_prompts() -> list[list[int]]:
    """Two levels of sharing, a prompt that is another's prefix, twins, and one that shares nothing."""
    random = np.random.default_rng(0)

    def some(count: int) -> list[int]:
        return random.integers(3, 300, count).tolist()

    top = some(37)
    middle = [top + some(21), top + some(5)]
    prompts = [middle[i % 2] + some(int(random.integers(1, 24))) for i in range(6)]
    return [*prompts, top, top, top[:16], some(40), some(1)]


PROMPTS = make_prompts()


@cache
def generated(model: Path) -> list[list[int]]:
    """What transformers answers."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


class ScatteredWorker(TorchWorker):
    """Gives every page another number, so that the pages of a sequence are no neighbours."""

    def __init__(self, *args: object, num_pages: int, **options: object) -> None:
        super().__init__(*args, num_pages=num_pages, **options)  # type: ignore[arg-type]
        self._number = np.random.default_rng(1).permutation(num_pages).astype(np.int32)

    def submit(self, step: Step) -> None:
        super().submit(replace(step, grant_page=self._number[step.grant_page]))


def answers_of(
    model: Path, requests: Requests, *, pages: int, page_size: int, step_tokens: int, scattered: bool = False
) -> list[list[int]]:
    config = json.loads((model / "config.json").read_text())
    loaded = load_model(model, config, "float32", "cpu")
    budget = MemoryBudget(page_size=page_size, pages=pages, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=step_tokens)
    plan = make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, options)
    worker = (ScatteredWorker if scattered else TorchWorker)(
        loaded, requests, eos_token_ids=frozenset({EOS}), page_size=page_size, num_pages=pages
    )
    answers: dict[int, list[int]] = {}
    reads = []
    run_loop(
        Scheduler(plan, requests),
        worker,
        on_finished=lambda finished: answers.update({finished.request: finished.token_ids.tolist()}),
        on_step=lambda step, output: reads.append(step.prefix_reads.level.max(initial=-1)),
    )
    worker.close()
    assert max(reads) >= 1, "the job was meant to read several levels of prefixes"
    return [answers[request] for request in range(len(requests))]


def without_end(answer: list[int]) -> list[int]:
    return answer[:-1] if answer and answer[-1] == EOS else answer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("pages", "page_size", "step_tokens", "scattered"), [(200, 16, 1000, False), (70, 4, 19, True)]
)
def test_equals_generate(
    model_dir: ModelFactory, architecture: str, pages: int, page_size: int, step_tokens: int, scattered: bool
) -> None:
    """A roomy run with large steps; one with small chunks, scattered pages and a pool so small that they go around."""
    model = model_dir(architecture)
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    found = answers_of(model, requests, pages=pages, page_size=page_size, step_tokens=step_tokens, scattered=scattered)
    expected = generated(model)
    assert [without_end(each) for each in found] == [without_end(each) for each in expected]
    assert len({tuple(answer) for answer in expected}) > len(PROMPTS) // 2, "the model says the same to everything"


def test_sharded_weights_are_the_same_model(model_dir: ModelFactory) -> None:
    sharded = model_dir("llama", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    found = answers_of(sharded, requests, pages=200, page_size=16, step_tokens=64)
    assert [without_end(each) for each in found] == [without_end(each) for each in generated(sharded)]


def test_weights_of_another_model_are_refused(model_dir: ModelFactory, tmp_path: Path) -> None:
    model = model_dir("llama")
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match="lack"):
        load_model(tmp_path, config, "float32", "cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (1, 0), (5,)])
def test_packed_linear_is_the_linear(bias: bool, shape: tuple[int, ...]) -> None:
    if not can_pack(torch.float32):
        pytest.skip("this build of torch has no packed product")
    linear = torch.nn.Linear(24, 40, bias=bias)
    x = torch.randn(*shape, 24)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x))
