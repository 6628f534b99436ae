"""The worker that runs the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batchrun.engine.batch import Batch, CompiledBatch, StepTensors
from batchrun.engine.device import Device, make_device
from batchrun.engine.kv_cache import KVCache, PageTables
from batchrun.engine.masks import Masks
from batchrun.engine.model import LoadedModel
from batchrun.engine.sampler import Sampled, Sampler, concat_sampled
from batchrun.engine.scores import PromptScores, ScoredRows, score
from batchrun.request import Requests, SamplingParams, TextColumn
from batchrun.schedule.step import PastTokens, PrefixReads, Step, StepLogprobs, StepOutput, StepScores
from batchrun.tokens import TokenTable

# Steps of decodes alone are padded to one of these, so that a graph captured for so many rows can be replayed; in steps
# of more rows the device has enough to do while the host launches.
_GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A step whose results are not collected yet."""

    step: Step
    token_ids: Callable[[], npt.NDArray[Any]]
    logprobs: list[Callable[[], npt.NDArray[Any]]]
    seconds: Callable[[], float]
    padded_rows: int
    parts: int
    stuck: dict[int, str]
    scores: list[tuple[ScoredRows, list[Callable[[], npt.NDArray[Any]]]]]


@dataclass(frozen=True, slots=True)
class _Part:
    """What a forward pass sampled and why it could not where it could not, the rows that it computed, and those of them
    that sample."""

    sampled: Sampled
    stuck: dict[int, str]
    rows: int
    samples: int
    scored: tuple[ScoredRows, tuple[torch.Tensor, ...]] | None


class TorchWorker:
    """Runs steps with a model, one after the other; nothing is waited for but in `collect`.

    Args:
        model: loaded.
        requests: those that the steps speak of.
        eos_token_ids: the model's ends of text.
        page_size: tokens of a KV page.
        num_pages: pages of the pool.
        device: where the model is.
        deterministic: whether attention on a GPU gives a row the same bits whatever else is in its step.
        vocabulary: as for `grammar.Grammars`; needed where a request has a grammar.
    """

    def __init__(
        self,
        model: LoadedModel,
        requests: Requests,
        *,
        eos_token_ids: frozenset[int],
        page_size: int,
        num_pages: int,
        device: Device | None = None,
        deterministic: bool = False,
        vocabulary: Sequence[bytes] | None = None,
    ) -> None:
        self._model = model
        self._deterministic = deterministic
        self._device = device or make_device(model.device)
        self._device.keep_memory()
        self._sampler = Sampler(requests, eos_token_ids, model.device)
        self._scores = PromptScores(requests)
        self._masks = Masks(requests, vocabulary, eos_token_ids) if vocabulary is not None else None
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
        self._captures = not (model.experts and self._device.waits_for_experts(model.dtype))
        self._make_batch = self._triton_batches(page_size) if model.attention == "triton" else self._cpu_batch
        self._sampled: torch.Tensor | None = None  # by the step before
        self._under_way: deque[_UnderWay] = deque()

    def submit(self, step: Step) -> None:
        """Run a step; on a GPU, let it run."""
        stop = self._device.start_clock()
        self._tables.apply(step)
        with torch.inference_mode():
            pieces = list(self._scores.pieces(step, self._model.vocab_size))
            parts = [part for piece in pieces for part in self._run(piece)]
            sampled = concat_sampled([part.sampled for part in parts])
            self._sampled = sampled.token_ids
            token_ids = self._device.download(self._sampled)
            logprobs = [self._device.download(column) for column in sampled.logprobs or ()]
            scores = [(rows, [self._device.download(c) for c in found]) for rows, found in _scored(parts)]
        rows = sum(part.rows for part in parts)
        first = np.cumsum([part.samples for part in parts]) - [part.samples for part in parts]
        stuck = {int(at) + row: why for at, part in zip(first, parts, strict=True) for row, why in part.stuck.items()}
        too_large = len(parts) - len(pieces) + 1  # for memory, that is
        under_way = _UnderWay(step, token_ids, logprobs, stop(), rows - step.num_rows, too_large, stuck, scores)
        self._under_way.append(under_way)

    def _run(self, step: Step) -> list[_Part]:
        """Run a step, in parts where there is not enough memory to run it at once."""
        try:
            return [self._forward(step)]
        except Exception as error:
            if step.num_rows == 1 or not self._device.is_full(error):
                raise
        # Behind the handler, which holds on to what the pass that failed had made.
        self._device.give_back()
        return [part for half in step.split(step.num_rows // 2) for part in self._run(half)]

    def _forward(self, step: Step) -> _Part:
        finding = self._masks.begin(step) if self._masks is not None else None
        batch = self._make_batch(step)
        assert self._kv_cache is not None
        requests = step.request[step.samples]
        past = PastTokens(step.past.length[step.samples], step.past.token_ids) if step.past is not None else None
        sampling = self._sampler.prepare(requests, step.num_sampled[step.samples], self._model.vocab_size, past)
        scored = self._scores.rows(step)
        arrays: dict[str, npt.NDArray[Any]] = {**batch.arrays, **sampling.arrays}
        if scored is not None:  # a step that is padded has no such rows
            wanted = np.append(arrays["sample_index"], scored.row)
            order = np.argsort(wanted)  # kernels want them so
            arrays["sample_index"] = wanted[order]
            arrays["of_samples"], arrays["of_scores"] = np.split(np.argsort(order), [requests.size])
            arrays["scored_token"] = scored.token
        tensors = self._device.upload(arrays)
        batch.bind(tensors, self._sampled)
        logits = self._logits(batch, self._kv_cache)
        scores = None
        if scored is not None:
            scores = scored, score(logits[tensors["of_scores"]], tensors["scored_token"], scored.alternatives)
            logits = logits[tensors["of_samples"]]
        logits = logits[: requests.size]
        mask: tuple[torch.Tensor, torch.Tensor] | None = None
        stuck: dict[int, str] = {}
        if finding is not None:
            found = finding.result()
            mask, stuck = (self._device.send(found.rows), self._device.send(found.bits)), found.stuck
        sampled = self._sampler.sample(logits, sampling, tensors, self._sampled, mask)
        return _Part(sampled, stuck, batch.num_rows, requests.size, scores)

    def collect(self) -> StepOutput:
        done = self._under_way.popleft()
        token_ids = done.token_ids().astype(np.int32)
        requests = done.step.request[done.step.samples]
        logprobs = None
        if done.logprobs:
            sampled, top_ids, top = (column() for column in done.logprobs)
            rows = self._sampler.logprob_rows(requests)
            logprobs = StepLogprobs(rows, sampled, top_ids.astype(np.int32), top)
        ended = self._sampler.ended(requests, token_ids)
        return StepOutput(
            token_ids,
            ended,
            done.seconds(),
            done.padded_rows,
            done.parts,
            logprobs,
            _step_scores([(rows, [column() for column in columns]) for rows, columns in done.scores]),
            done.stuck,
        )

    def close(self) -> None:
        if self._masks is not None:
            self._masks.close()
        self._kv_cache = self._sampled = None
        self._make_batch = _closed  # what it was holds this worker and, on a GPU, descriptors of the pools
        self._under_way.clear()
        self._device.give_back()  # graphs have places in that memory

    def _logits(self, batch: StepTensors, kv_cache: KVCache) -> torch.Tensor:
        if batch.graph_key is None or not self._captures:
            return self._model.logits(batch, kv_cache)
        rows, places = batch.graph_key
        return self._device.graphed(rows, places, lambda: self._model.logits(batch, kv_cache))

    def _cpu_batch(self, step: Step) -> StepTensors:
        model = self._model
        group_size = model.num_heads // model.num_kv_heads
        if model.kernels is not None:
            return CompiledBatch(step, self._tables, model.kernels, group_size, model.num_kv_heads)
        return Batch(step, self._tables, group_size, model.dtype)

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
            deterministic=self._deterministic,
        )
        windows: list[int | None] = []
        return lambda step: TritonBatch(step, self._tables, attention, windows, _padded_rows(step))


def _closed(step: Step) -> StepTensors:
    raise RuntimeError("the worker is closed")


def _scored(parts: list[_Part]) -> list[tuple[ScoredRows, tuple[torch.Tensor, ...]]]:
    return [part.scored for part in parts if part.scored is not None]


def _step_scores(found: list[tuple[ScoredRows, list[npt.NDArray[Any]]]]) -> StepScores | None:
    """The scores of the parts of a step as one."""
    if not found:
        return None
    width = max(rows.alternatives for rows, _ in found)

    def padded(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.pad(column, ((0, 0), (0, width - column.shape[1])))

    return StepScores(
        request=np.concatenate([rows.request for rows, _ in found]),
        place=np.concatenate([rows.place for rows, _ in found]),
        own=np.concatenate([own for _, (own, _, _, _) in found]),
        rank=np.concatenate([rank for _, (_, rank, _, _) in found]).astype(np.int32),
        top_ids=np.concatenate([padded(ids) for _, (_, _, ids, _) in found]).astype(np.int32),
        top=np.concatenate([padded(top) for _, (_, _, _, top) in found]),
    )


def _padded_rows(step: Step) -> int | None:
    """How many rows a step of decodes alone is padded to; None for any other."""
    if not (step.samples & (step.length == 1)).all():
        return None
    return next((rows for rows in _GRAPH_ROWS if rows >= step.num_rows), None)


def kv_memory(model: LoadedModel, device: Device, *, share: float, rows: int, page_size: int) -> int | None:
    """Bytes of the device that are left for KV beside the weights and a pass of many rows; None where that is not
    measured.

    Args:
        share: of the device's memory that may be used in all.
        rows: of the largest step; all of them sample, by the settings that take most memory.
    """

    def largest_step() -> None:
        slots = np.arange(rows, dtype=np.int32)
        nothing, zeros, ones = slots[:0], np.zeros(rows, dtype=np.int32), np.ones(rows, dtype=np.int32)
        requests = Requests(
            tokens=TokenTable(ids=zeros, offsets=np.arange(rows + 1, dtype=np.int64)),
            line=slots,
            sampling_id=zeros,
            sampling=[SamplingParams(temperature=1.0, top_p=0.9, min_p=0.1)],
            max_new_tokens=ones,
            seed=zeros.astype(np.uint64),
            expected_tokens=ones,
            line_numbers=slots,
            custom_ids=TextColumn.of([]),
            endpoints=slots[:0].astype(np.uint8),
        )
        step = Step(
            index=0,
            sequence=slots,
            request=slots,
            start=zeros,
            length=ones,
            depth=zeros,
            samples=np.ones(rows, dtype=bool),
            num_sampled=zeros,
            token_ids=zeros,
            prefix_reads=PrefixReads(*(nothing for _ in fields(PrefixReads))),
            releases=nothing,
            grant_sequence=slots,
            grant_page=zeros,  # all write the same to one: pages are no part of what is measured
        )
        worker = TorchWorker(
            model, requests, eos_token_ids=frozenset(), page_size=page_size, num_pages=1, device=device
        )
        worker.submit(step)
        worker.collect()
        worker.close()

    left = device.kv_memory(share, largest_step)
    if left is None or not device.graphs:
        return left
    return max(left - sum(_GRAPH_ROWS) * model.vocab_size * model.dtype.itemsize, 0)  # a graph keeps its logits
