"""The one place where the sections meet the engine: a model, a worker, the loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import batchrun.engine.triton_attention  # noqa: F401  registers itself
from batchrun.devices import DEPTH
from batchrun.engine.device import make_device
from batchrun.engine.model import LoadedModel, logits_of
from batchrun.engine.torch_worker import TorchWorker
from batchrun.execution.loop import run_loop
from batchrun.planning.cost import CostModel, Work
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Requests
from batchrun.schedule.scheduler import Counters, Scheduler
from batchrun.schedule.step import Step, StepOutput

ATTENTION = "batchrun_triton"  # what a module is made with: its `attn_implementation`


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run did.

    Attributes:
        answers: token ids of the requests that ended, by request.
        seconds: of the loop, from the first step to the end of the last.
        host_seconds: of these, spent on scheduling and on answers.
        work: of all steps.
        stopped: whether `should_stop` ended it.
    """

    answers: dict[int, list[int]]
    seconds: float
    host_seconds: float
    work: Work
    counters: Counters
    stopped: bool


def run_engine(
    module: Any,
    requests: Requests,
    cost: CostModel,
    *,
    page_size: int,
    pages: int,
    step_tokens: int,
    grouping: str = "auto",
    eos_token_ids: frozenset[int] = frozenset(),
    on_step: Callable[[Step], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Ran:
    """Run requests with a model of transformers' that was made with `ATTENTION`, where it is."""
    shape = cost.model
    model = LoadedModel(
        logits=logits_of(module),
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        dtype=module.dtype,
        device=module.device.type,
        attention="triton",
    )
    plan = make_plan(
        requests,
        build_forest(requests.tokens),
        cost,
        MemoryBudget(page_size, pages, page_bytes=1, weight_bytes=0),  # bytes are for reports
        PlanOptions("dfs", grouping, step_tokens),
    )
    device = make_device(model.device)
    worker = TorchWorker(
        model,
        requests,
        eos_token_ids=eos_token_ids,
        page_size=page_size,
        num_pages=plan.budget.pages,
        device=device,
    )
    scheduler = Scheduler(plan, requests, depth=DEPTH[device.name])
    answers: dict[int, list[int]] = {}
    works: list[Work] = []

    def after(step: Step, output: StepOutput) -> None:
        works.append(step.work)
        on_step(step)

    synchronize = torch.cuda.synchronize if model.device == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    end = run_loop(
        scheduler,
        worker,
        on_finished=lambda done: answers.update({done.request: done.token_ids.tolist()}),
        on_step=after,
        should_stop=should_stop,
    )
    synchronize()
    seconds = time.perf_counter() - began
    worker.close()
    host = float(end.log.columns["host_seconds"].sum())
    return Ran(answers, seconds, host, sum(works, Work()), scheduler.counters, end.stopped)
