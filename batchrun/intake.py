"""From the lines of a job to `Requests`: tokenised, with every default resolved, and a fault noted for each line that
cannot run. Text is let go line by line; what stays is token ids and columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from batchrun.config import RunConfig, derive_seed, resolve_max_tokens, resolve_sampling
from batchrun.request import Endpoint, JobLine, LineFault, Requests, SamplingParams
from batchrun.specs import ModelSpec
from batchrun.tokenizer import Tokenizer
from batchrun.tokens import TokenTableBuilder

_NO_TEMPLATE = "the model has no chat template; give one with --chat-template FILE, or use /v1/completions"
_BATCH = 1024  # lines tokenised at once, so that the tokenizer can use all cores


@dataclass(frozen=True, slots=True)
class Intake:
    """What came of reading a job.

    Attributes:
        requests: those that can run.
        defaulted: bool `[R]`, requests whose token limit nobody set: it is what is left of the context.
        faults: lines that the tokenizer or the model's context refuses, in file order.
        silent: lines that nobody set a token limit for.
        clipped: lines whose token limit was cut to the context.
    """

    requests: Requests
    defaulted: np.ndarray
    faults: list[LineFault]
    silent: int
    clipped: int


@dataclass(slots=True)
class _Columns:
    tokens: TokenTableBuilder = field(default_factory=TokenTableBuilder)
    line: list[int] = field(default_factory=list)
    sampling_id: list[int] = field(default_factory=list)
    max_new_tokens: list[int] = field(default_factory=list)
    seed: list[int] = field(default_factory=list)
    defaulted: list[bool] = field(default_factory=list)
    line_numbers: list[int] = field(default_factory=list)
    custom_ids: list[str] = field(default_factory=list)
    endpoints: list[Endpoint] = field(default_factory=list)


def read_requests(
    lines: Iterable[JobLine],
    tokenizer: Tokenizer,
    spec: ModelSpec,
    generation_config: Mapping[str, Any],
    config: RunConfig,
) -> Intake:
    """Tokenise the sound lines of a job.

    Args:
        lines: in file order.

    Raises:
        UsageError: the chat template is not valid, or `generation_config.json` asks for what cannot be done.
    """
    columns = _Columns()
    faults: list[LineFault] = []
    known: dict[SamplingParams, int] = {}
    silent = clipped = 0
    stream = iter(lines)
    while batch := list(islice(stream, _BATCH)):
        for line, prompts in zip(batch, _encode(batch, tokenizer), strict=True):
            fault = _fault(line, prompts, spec)
            if fault is not None:
                faults.append(fault)
                continue
            sampling = resolve_sampling(
                line.options, config.sampling, generation_config, config.ignore_generation_config
            )
            defaulted = cut = False
            assert not isinstance(prompts, str)
            for choice, ids in enumerate(prompts):
                limit, defaulted, clip = resolve_max_tokens(
                    line.options, line.endpoint, len(ids), config.max_tokens, spec.max_context
                )
                columns.tokens.append(ids)
                columns.line.append(len(columns.custom_ids))
                columns.sampling_id.append(known.setdefault(sampling, len(known)))
                columns.max_new_tokens.append(limit)
                # By the line's number, so that no other line, bad or resumed, changes it.
                columns.seed.append(derive_seed(config.seed, line.number, choice, line.options.seed))
                columns.defaulted.append(defaulted and line.endpoint is Endpoint.CHAT)
                cut |= clip
            silent += defaulted
            clipped += cut
            columns.line_numbers.append(line.number)
            columns.custom_ids.append(line.custom_id)
            columns.endpoints.append(line.endpoint)
    requests = Requests(
        tokens=columns.tokens.build(),
        line=np.array(columns.line, dtype=np.int32),
        sampling_id=np.array(columns.sampling_id, dtype=np.int32),
        sampling=list(known),
        max_new_tokens=np.array(columns.max_new_tokens, dtype=np.int32),
        seed=np.array(columns.seed, dtype=np.uint64),
        line_numbers=np.array(columns.line_numbers, dtype=np.int32),
        custom_ids=columns.custom_ids,
        endpoints=columns.endpoints,
    )
    return Intake(requests, np.array(columns.defaulted, dtype=bool), faults, silent, clipped)


def _encode(batch: list[JobLine], tokenizer: Tokenizer) -> Iterator[list[list[int]] | str]:
    """The prompts of each line as token ids, or why they cannot be had."""
    chats = [line.messages for line in batch if line.messages is not None]
    if tokenizer.has_chat_template:
        encoded_chats = iter(tokenizer.encode_chats(chats))
    else:
        encoded_chats = iter([_NO_TEMPLATE] * len(chats))
    texts = [prompt for line in batch for prompt in line.prompts or () if isinstance(prompt, str)]
    encoded_texts = iter(tokenizer.encode_batch(texts))
    for line in batch:
        if line.messages is not None:
            chat = next(encoded_chats)
            yield chat if isinstance(chat, str) else [chat]
        else:
            yield [next(encoded_texts) if isinstance(prompt, str) else list(prompt) for prompt in line.prompts or ()]


def _fault(line: JobLine, prompts: list[list[int]] | str, spec: ModelSpec) -> LineFault | None:
    """Why a line cannot run, now that its tokens are known."""

    def fault(code: str, message: str, param: str) -> LineFault:
        return LineFault(line.number, line.custom_id, code, message, param)

    param = "messages" if line.messages is not None else "prompt"
    if isinstance(prompts, str):
        return fault("invalid_request", prompts, param)
    for ids in prompts:
        if not ids:
            return fault("empty_prompt", "the prompt has no tokens", param)
        if max(ids) >= spec.vocab_size:
            return fault(
                "invalid_request", f"token id {max(ids)} is not below the vocabulary's {spec.vocab_size}", param
            )
        if len(ids) >= spec.max_context:
            return fault(
                "context_length_exceeded",
                f"the prompt has {len(ids)} tokens; the model's context of {spec.max_context} leaves no room for an "
                "answer",
                param,
            )
    return None
