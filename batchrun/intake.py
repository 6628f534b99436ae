"""From the lines of a job to `Requests`: tokenised, with every default resolved, and a fault noted for each line that
cannot run. Text is let go line by line; what stays is token ids and columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from batchrun.chat import ChatReader, UnknownFormat
from batchrun.columns import Column
from batchrun.config import RunConfig, derive_seed, resolve_max_tokens, resolve_sampling
from batchrun.grammar import Grammars
from batchrun.request import (
    ENDPOINTS,
    Endpoint,
    Grammar,
    GrowingTexts,
    JobLine,
    LineFault,
    LineOptions,
    Requests,
    SamplingParams,
    ToolChoice,
)
from batchrun.specs import ModelSpec
from batchrun.tokenizer import Int32, PromptEncoder, Tokenizer
from batchrun.tokens import TokenTableBuilder

_NO_TEMPLATE = "the model has no chat template; give one with --chat-template FILE, or use /v1/completions"
_NOT_IN_EVERY_TEMPLATE = {"tools", "reasoning_effort", "documents"}  # fields of a chat that would be lost silently
# Characters, or token ids, tokenised at once: enough for all cores, and little memory (the tokenizer takes some 100
# bytes a token for a while).
_BATCH = 1 << 20
_PLACE = {endpoint: place for place, endpoint in enumerate(ENDPOINTS)}
_LINE = 512  # what a line counts for besides its prompts: its objects, of which a short one has more than text

Prompts = tuple[str | tuple[int, ...], ...]  # of one line, as texts or as token ids


@dataclass(frozen=True, slots=True)
class Intake:
    """What came of reading a job.

    Attributes:
        requests: those that can run.
        defaulted: bool `[R]`, requests whose token limit may be cut to the KV memory: nobody set it, and it is what is
            left of the context, or it is that of a retry.
        faults: lines that the tokenizer or the model's context refuses, in file order.
        silent: lines that nobody set a token limit for.
        clipped: lines whose token limit was cut to the context.
        calls_not_read: lines with tools, where it is not known how the model writes calls of them.
    """

    requests: Requests
    defaulted: np.ndarray
    faults: list[LineFault]
    silent: int
    clipped: int
    calls_not_read: int


@dataclass(slots=True)
class _Columns:
    """The columns of `Requests` as they grow: a few bytes a request, where lists of objects would take hundreds."""

    tokens: TokenTableBuilder = field(default_factory=TokenTableBuilder)
    line: Column = field(default_factory=lambda: Column("i"))
    sampling_id: Column = field(default_factory=lambda: Column("i"))
    max_new_tokens: Column = field(default_factory=lambda: Column("i"))
    seed: Column = field(default_factory=lambda: Column("Q"))
    expected_tokens: Column = field(default_factory=lambda: Column("i"))
    defaulted: Column = field(default_factory=lambda: Column("B"))
    line_numbers: Column = field(default_factory=lambda: Column("i"))
    custom_ids: GrowingTexts = field(default_factory=GrowingTexts)
    endpoints: Column = field(default_factory=lambda: Column("B"))


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
    silent = clipped = calls_not_read = 0

    @lru_cache(maxsize=4096)  # most lines say the same
    def sampling_of(options: LineOptions) -> SamplingParams:
        sampling = resolve_sampling(options, config.sampling, generation_config, config.ignore_generation_config)
        if options.bad_words:
            sampling = replace(sampling, bad_words=tokenizer.encode_words(options.bad_words))
        return sampling

    @lru_cache(maxsize=4096)
    def sampling_id(options: LineOptions, continues: bool) -> int:
        return known.setdefault(replace(sampling_of(options), continues=continues), len(known))

    eos_token_ids = tokenizer.eos_token_ids(generation_config)

    @cache
    def grammars() -> Grammars:  # only where a line has one
        return Grammars(tokenizer.vocabulary(spec.vocab_size))

    reader = ChatReader(tokenizer.chat_template, tokenizer.special_tokens)

    def followed(line: JobLine, grammar: Grammar, written: Prompts) -> LineOptions | LineFault:
        """The options of a line with its grammar as this model's answer follows it, or why it cannot follow it."""
        options, name = line.options, line.options.grammar_field
        code = "invalid_request"
        try:
            if line.endpoint is Endpoint.CHAT:
                grammar = reader.in_chat(grammar, str(written[0]))
            reason = grammars().fault(grammar)
            if reason is not None:
                reason = f"it cannot be compiled: {reason}"
            elif not sampling_of(options).ends(eos_token_ids):
                reason = "no token may end the answer: leave ignore_eos out, or give stop_token_ids"
            else:
                return replace(options, grammar=grammar)
        except UnknownFormat as unknown:
            code, reason = "unsupported_field", str(unknown)
        return LineFault(line.number, line.custom_id, code, f"{name}: {reason}", name)

    encoder = PromptEncoder(tokenizer)
    for batch in _batches(lines, tokenizer, reader):
        for (line, written), prompts in zip(batch, _encode(batch, encoder), strict=True):
            options = line.options
            fault: LineFault | None = None
            if isinstance(prompts, LineFault):
                fault = prompts
            else:
                prompts = _truncated(line, prompts, spec)
                fault = _fault(line, prompts, spec)
            if fault is None and options.grammar is not None and not isinstance(written, LineFault):
                answer = followed(line, options.grammar, written)
                if isinstance(answer, LineFault):
                    fault = answer
                else:
                    options = answer
            if fault is not None:
                faults.append(fault)
                continue
            assert not isinstance(prompts, LineFault)
            defaulted = cut = False
            continues = line.endpoint is Endpoint.COMPLETIONS or bool(
                line.template_kwargs and line.template_kwargs.get("continue_final_message")
            )
            # A line of several prompts has the choices of the first first.
            for choice, ids in enumerate(ids for ids in prompts for _ in range(options.n or 1)):
                limit, defaulted, clip = resolve_max_tokens(
                    options, line.endpoint, len(ids), config.max_tokens, spec.max_context
                )
                columns.tokens.append(ids)
                columns.line.append(len(columns.custom_ids))
                columns.sampling_id.append(sampling_id(options, continues))
                columns.max_new_tokens.append(limit)
                # By the line's number, so that no other line, bad or resumed, changes it.
                columns.seed.append(derive_seed(config.seed, line.number, choice, options.seed))
                columns.expected_tokens.append(min(options.expected_tokens or 0, limit))
                columns.defaulted.append((defaulted and line.endpoint is Endpoint.CHAT) or options.may_be_cut)
                cut |= clip
            silent += defaulted
            clipped += cut
            calls_not_read += options.tool_choice is ToolChoice.AUTO and not reader.reads_calls
            columns.line_numbers.append(line.number)
            columns.custom_ids.append(line.custom_id)
            columns.endpoints.append(_PLACE[line.endpoint])
    requests = Requests(
        tokens=columns.tokens.build(),
        line=columns.line.joined(),
        sampling_id=columns.sampling_id.joined(),
        sampling=list(known),
        max_new_tokens=columns.max_new_tokens.joined(),
        seed=columns.seed.joined(),
        expected_tokens=columns.expected_tokens.joined(),
        line_numbers=columns.line_numbers.joined(),
        custom_ids=columns.custom_ids.joined(),
        endpoints=columns.endpoints.joined(),
    )
    return Intake(requests, columns.defaulted.joined().view(bool), faults, silent, clipped, calls_not_read)


def _batches(
    lines: Iterable[JobLine], tokenizer: Tokenizer, reader: ChatReader
) -> Iterator[list[tuple[JobLine, Prompts | LineFault]]]:
    """The lines with their prompts, chats rendered, some at a time."""
    batch: list[tuple[JobLine, Prompts | LineFault]] = []
    size = 0
    for line in lines:
        prompts = _prompts(line, tokenizer, reader)
        batch.append((line, prompts))
        size += _LINE if isinstance(prompts, LineFault) else _LINE + sum(map(len, prompts))
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _prompts(line: JobLine, tokenizer: Tokenizer, reader: ChatReader) -> Prompts | LineFault:
    if line.messages is None:
        return line.prompts or ()
    if not tokenizer.has_chat_template:
        return _invalid(line, _NO_TEMPLATE)
    given = {*(line.template_kwargs or {}), *(["tools"] if line.tools else [])}
    for name in sorted(_NOT_IN_EVERY_TEMPLATE & given):
        if name not in tokenizer.template_for(bool(line.tools)):
            message = (
                f"{name} is not known to the model's chat template; leave it out, or give another template with "
                "--chat-template FILE"
            )
            return LineFault(line.number, line.custom_id, "unsupported_field", message, name)
    try:
        return (tokenizer.render_chat(reader.for_template(line.messages), line.tools, line.template_kwargs),)
    except ValueError as refusal:
        return _invalid(line, str(refusal))


def _encode(
    batch: list[tuple[JobLine, Prompts | LineFault]], encoder: PromptEncoder
) -> Iterator[list[Int32] | LineFault]:
    """The prompts of each line as token ids."""
    encoded = {}
    for added in (False, True):
        texts = [
            prompt
            for line, prompts in batch
            if _adds_special_tokens(line) is added and not isinstance(prompts, LineFault)
            for prompt in prompts
            if isinstance(prompt, str)
        ]
        encoded[added] = iter(encoder.encode(texts, add_special_tokens=added))
    for line, prompts in batch:
        if isinstance(prompts, LineFault):
            yield prompts
        else:
            yield [
                next(encoded[_adds_special_tokens(line)])
                if isinstance(prompt, str)
                else np.array(prompt, dtype=np.int32)
                for prompt in prompts
            ]


def _adds_special_tokens(line: JobLine) -> bool:
    """Whether the tokenizer adds its own; those of a chat its template has written."""
    return line.endpoint is not Endpoint.CHAT if line.add_special_tokens is None else line.add_special_tokens


def _truncated(line: JobLine, prompts: list[Int32], spec: ModelSpec) -> list[Int32]:
    """The prompts as far as the line wants them: the last tokens of each."""
    keep = line.options.truncate_prompt_tokens
    if keep is None:
        return prompts
    if keep == -1:  # as vLLM has it: whatever fits, whether or not the whole answer does
        keep = spec.max_context - 1
    return [ids[-keep:] for ids in prompts]


_OF_LONGROPE = "; the model takes more, but longrope turns longer sequences otherwise, which is not supported"


def _fault(line: JobLine, prompts: list[Int32], spec: ModelSpec) -> LineFault | None:
    """Why a line cannot run, now that its tokens are known."""
    if line.options.logit_bias and (last := line.options.logit_bias[-1][0]) >= spec.vocab_size:  # the largest id
        message = f"token id {last} is not below the vocabulary's {spec.vocab_size}"
        return LineFault(line.number, line.custom_id, "invalid_request", message, "logit_bias")
    for ids in prompts:
        if not ids.size:
            return _invalid(line, "the prompt has no tokens", "empty_prompt")
        if (largest := int(ids.max())) >= spec.vocab_size:
            return _invalid(line, f"token id {largest} is not below the vocabulary's {spec.vocab_size}")
        if ids.size >= spec.max_context:
            return _invalid(
                line,
                f"the prompt has {ids.size} tokens; the model's context of {spec.max_context} leaves no room for an "
                f"answer{_OF_LONGROPE if spec.longrope_limit else ''}",
                "context_length_exceeded",
            )
    return None


def _invalid(line: JobLine, message: str, code: str = "invalid_request") -> LineFault:
    param = "messages" if line.messages is not None else "prompt"
    return LineFault(line.number, line.custom_id, code, message, param)
