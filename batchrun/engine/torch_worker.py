"""The worker that runs the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter

import torch

from batchrun.engine.batch import Batch, StepTensors
from batchrun.engine.kv_cache import KVCache, PageTables
from batchrun.engine.model import LoadedModel
from batchrun.engine.sampler import Sampler
from batchrun.request import Requests
from batchrun.schedule.step import Step, StepOutput


class TorchWorker:
    """Runs steps with a model, one at a time.

    Args:
        model: loaded.
        requests: those that the steps speak of.
        eos_token_ids: the model's ends of text.
        page_size: tokens of a KV page.
        num_pages: pages of the pool.
    """

    def __init__(
        self,
        model: LoadedModel,
        requests: Requests,
        *,
        eos_token_ids: frozenset[int],
        page_size: int,
        num_pages: int,
    ) -> None:
        self._model = model
        self._sampler = Sampler(requests, eos_token_ids)
        self._tables = PageTables(page_size)
        self._kv_cache: KVCache | None = KVCache(
            model.num_layers,
            model.num_kv_heads,
            model.head_dim,
            num_pages=num_pages,
            page_size=page_size,
            dtype=model.dtype,
            device=model.device,
            by_pages=model.attention == "triton",
        )
        self._make_batch = self._cpu_batch if model.attention == "cpu" else self._triton_batches(page_size)
        self._done: deque[StepOutput] = deque()

    def submit(self, step: Step) -> None:
        """Run a step."""
        if self._kv_cache is None:
            raise RuntimeError("the worker is closed")
        began = perf_counter()
        self._tables.apply(step)
        with torch.inference_mode():
            logits = self._model.logits(self._make_batch(step), self._kv_cache)
            token_ids, ended = self._sampler.sample(logits, step.request[step.samples], step.num_sampled[step.samples])
        self._done.append(StepOutput(token_ids, ended, perf_counter() - began))

    def _cpu_batch(self, step: Step) -> StepTensors:
        group_size = self._model.num_heads // self._model.num_kv_heads
        return Batch(step, self._tables, group_size, self._model.dtype)

    def _triton_batches(self, page_size: int) -> Callable[[Step], StepTensors]:
        from batchrun_kernels.attention import SharedPrefixAttention

        from batchrun.engine.triton_attention import TritonBatch

        model = self._model
        attention = SharedPrefixAttention(
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            page_size=page_size,
            dtype=model.dtype,
            device=model.device,
        )
        return lambda step: TritonBatch(step, self._tables, attention, model.device)

    def collect(self) -> StepOutput:
        return self._done.popleft()

    def close(self) -> None:
        self._kv_cache = None
