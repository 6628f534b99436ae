"""Greedy tokens of the worker equal `transformers.generate` run one request at a time."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from batchrun_kernels import cpu
from factories import ARCHITECTURES, load_reference
from oracles import DEAR_ROWS, make_requests

from batchrun.engine import decoder as decoder_module
from batchrun.engine.batch import StepTensors
from batchrun.engine.device import Device
from batchrun.engine.kv_cache import KVCache
from batchrun.engine.model import Attention, load_model
from batchrun.engine.torch_worker import TorchWorker, kv_memory
from batchrun.errors import ModelRefused
from batchrun.execution.loop import run_loop
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Requests, SamplingParams
from batchrun.schedule.scheduler import Counters, Scheduler
from batchrun.schedule.step import Step, StepOutput

ModelFactory = Callable[..., Path]
NEW_TOKENS = 10
EOS = 1
MOST_ROWS = 12


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
    module = load_reference(model)
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


class FullWorker(TorchWorker):
    """Has memory for passes of a few rows."""

    def _logits(self, batch: StepTensors, kv_cache: KVCache) -> torch.Tensor:
        if batch.num_rows > MOST_ROWS:
            raise torch.OutOfMemoryError("out of memory")
        return super()._logits(batch, kv_cache)


def run_worker(
    model: Path,
    requests: Requests,
    worker_type: type[TorchWorker] = TorchWorker,
    *,
    pages: int = 70,
    step_tokens: int = 19,
    depth: int = 1,
    eos_token_ids: frozenset[int] = frozenset({EOS}),
) -> tuple[dict[int, list[int]], Counters, list[StepOutput]]:
    loaded = load_model(model, json.loads((model / "config.json").read_text()), "float32", "cpu")
    budget = MemoryBudget(page_size=4, pages=pages, page_bytes=1, weight_bytes=0)
    options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=step_tokens)
    plan = make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, options)
    worker = worker_type(loaded, requests, eos_token_ids=eos_token_ids, page_size=4, num_pages=pages)
    answers: dict[int, list[int]] = {}
    outputs: list[StepOutput] = []
    scheduler = Scheduler(plan, requests, depth=depth)
    run_loop(
        scheduler,
        worker,
        on_finished=lambda finished: answers.update({finished.request: finished.token_ids.tolist()}),
        on_step=lambda step, output: outputs.append(output),
    )
    worker.close()
    return answers, scheduler.counters, outputs


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_two_steps_in_flight_give_the_same_answers(model_dir: ModelFactory, temperature: float) -> None:
    """Inputs are taken from what the step before has sampled, without the host; what ends answers is known late."""
    model = model_dir("llama")
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    sampling = SamplingParams(temperature=temperature)
    requests = replace(requests, sampling=[sampling], sampling_id=np.zeros(len(PROMPTS), dtype=np.int32))
    whole, _, _ = run_worker(model, requests, eos_token_ids=frozenset())
    # Tokens in the middle of some answers end them.
    ends = frozenset(whole[request][4] for request in (0, 2, 5))
    expected, counters, _ = run_worker(model, requests, eos_token_ids=ends)
    assert counters.idle_rows == 0
    assert any(len(answer) < NEW_TOKENS for answer in expected.values())
    found, counters, _ = run_worker(model, requests, eos_token_ids=ends, depth=2)
    assert found == expected
    assert 0 < counters.idle_rows <= len(PROMPTS)


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_that_memory_is_too_small_for_are_run_in_parts_and_then_made_smaller(
    model_dir: ModelFactory, depth: int
) -> None:
    model = model_dir("llama")
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    expected, counters, _ = run_worker(model, requests, step_tokens=64)
    assert counters.memory_retries == 0
    found, counters, outputs = run_worker(model, requests, FullWorker, step_tokens=64, depth=depth)
    assert found == expected
    in_parts = [step for step, output in enumerate(outputs) if output.parts > 1]
    assert len(in_parts) == counters.memory_retries > 0
    assert outputs[0].parts >= 64 // MOST_ROWS
    assert len(in_parts) < len(outputs) // 2


def test_a_run_that_has_no_memory_for_a_row_says_so(model_dir: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "MOST_ROWS", 0)
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    with pytest.raises(torch.OutOfMemoryError):
        run_worker(model_dir("llama"), requests, FullWorker)


def answers_of(
    model: Path,
    requests: Requests,
    *,
    pages: int,
    page_size: int,
    step_tokens: int,
    scattered: bool = False,
    attention: Attention = "compiled",
) -> list[list[int]]:
    config = json.loads((model / "config.json").read_text())
    loaded = load_model(model, config, "float32", "cpu", attention=None if attention == "compiled" else attention)
    assert loaded.attention == attention
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


@pytest.mark.parametrize("architecture", ["llama", "llama-biases", "qwen2-window", "qwen3"])
def test_equals_generate_by_transformers_own_layers(
    model_dir: ModelFactory, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of models whose layers the decoder does not know."""
    monkeypatch.setattr(decoder_module, "DECODED", ())
    model = model_dir(architecture)
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    found = answers_of(model, requests, pages=70, page_size=4, step_tokens=19)
    assert [without_end(each) for each in found] == [without_end(each) for each in generated(model)]


@pytest.mark.parametrize("attention", ["compiled", "torch"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("architecture", ["phi3", "gemma2-window", "gpt_oss-window"])
def test_equals_generate_with_one_kv_head_and_with_as_many_as_heads(
    model_dir: ModelFactory, architecture: str, kv_heads: int, attention: Attention
) -> None:
    """Layers leave queries in different orders of memory."""
    model = model_dir(architecture, num_key_value_heads=kv_heads)
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    found = answers_of(model, requests, pages=70, page_size=4, step_tokens=19, attention=attention)
    assert [without_end(each) for each in found] == [without_end(each) for each in generated(model)]


@pytest.mark.parametrize("architecture", ["llama-biases", "qwen2-window", "gemma2-window", "gpt_oss-window"])
def test_equals_generate_without_compiled_kernels(model_dir: ModelFactory, architecture: str) -> None:
    model = model_dir(architecture)
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    for pages, page_size, step_tokens, scattered in ((200, 16, 1000, False), (70, 4, 19, True)):
        found = answers_of(
            model,
            requests,
            pages=pages,
            page_size=page_size,
            step_tokens=step_tokens,
            scattered=scattered,
            attention="torch",
        )
        assert [without_end(each) for each in found] == [without_end(each) for each in generated(model)]


def test_without_a_compiler_torch_computes_and_the_log_says_so_once(
    model_dir: ModelFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)  # nothing is compiled yet
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    model = model_dir("llama")
    requests = make_requests(PROMPTS, [NEW_TOKENS] * len(PROMPTS))
    found, _, _ = run_worker(model, requests)
    assert [without_end(found[request]) for request in range(len(PROMPTS))] == [
        without_end(each) for each in generated(model)
    ]
    [said] = [record for record in caplog.records if record.name.startswith("batchrun")]
    assert said.levelname == "WARNING"
    assert "there is no C compiler" in said.getMessage()


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


class MeasuringDevice(Device):
    """Runs the largest step, and says what a GPU would: what is left."""

    def kv_memory(self, share: float, largest_step: Callable[[], None]) -> int:
        largest_step()
        return int(share * 1000)


def test_memory_for_kv_is_measured_beside_the_largest_step(model_dir: ModelFactory) -> None:
    model = model_dir("llama")
    loaded = load_model(model, json.loads((model / "config.json").read_text()), "float32", "cpu")
    rows: list[int] = []
    pools: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(loaded, name)

        def logits(self, batch: StepTensors, kv_cache: KVCache) -> torch.Tensor:
            logits = loaded.logits(batch, kv_cache)
            rows.append(len(logits))
            pools.append(len(kv_cache.tokens[0]))
            return logits

    assert kv_memory(Watched(), MeasuringDevice(), share=0.9, rows=100, page_size=16) == 900  # type: ignore[arg-type]
    assert rows == [100]
    assert pools == [16], "pages would be counted as what a step takes"
    assert kv_memory(loaded, Device(), share=0.9, rows=100, page_size=16) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is mapped")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_are_not_in_memory_twice(dtype: str, model_dir: ModelFactory) -> None:
    """A view of one weight would keep the whole file that it was read from."""
    model = model_dir("qwen2")  # of those with biases
    loaded = load_model(model, json.loads((model / "config.json").read_text()), dtype, "cpu")
    gc.collect()
    assert loaded.vocab_size
    assert str(model) not in Path("/proc/self/maps").read_text()
