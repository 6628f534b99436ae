"""The nouns a user knows: a line of a job, the requests it makes, their sampling, and what came of them.

A **line** of the job file asks for one or more **answers**, each to one prompt. Nearly every line asks for one;
`/v1/completions` with a list of prompts asks for as many as the list is long, and its result line has as many choices.
A **request** is computed once and gives one answer, or several where lines ask for the very same. The planner and the
engine know requests only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.columns import GrowingRows, Rows, gather
from batchrun.tokens import Span, TokenTable


class Endpoint(StrEnum):
    """The API a line is written for; it decides the shape of the result."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


ENDPOINTS = tuple(Endpoint)  # in columns, a line's endpoint is its place here


class FinishReason(StrEnum):
    """Why an answer ended: by itself (end of text, stop string, stop token), or by its token limit. Result lines say
    `tool_calls` of one that ended by itself and calls tools of its own choice."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


class ToolChoice(StrEnum):
    """Whether an answer may call tools, must call some, or must call the one that is named."""

    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


class Grammar(NamedTuple):
    """What an answer must be a text of.

    Attributes:
        kind: `json` (a JSON schema), `regex`, `choice` (a list of texts in JSON), `grammar` (Lark or GBNF), or `tools`
            (calls of some functions, or `otherwise` JSON by a schema, in JSON). What depends on how a model writes a
            chat (`chat.ChatReader.in_chat`) is `calls`, as this model writes them, and `thought`, another grammar
            behind a thought.
        text: in the words of its kind.
    """

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of an answer are chosen and when it ends, with every default resolved.

    Equal values are one object in `Requests.sampling`. The seed and the token limit differ from request to
    request, so they are columns of `Requests`.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id and what is added to its logit
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of words; the last of a word never follows the others
    logprobs: int | None = None  # likeliest tokens to name at each place, beside the one sampled; None: no logprobs
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None  # likeliest tokens to name at each place of the prompt, beside its own
    echo: bool = False  # whether the text begins with the prompt
    prompt_only: bool = False  # whether the text is the prompt and nothing else; a token is sampled and not told of
    n: int = 1  # answers to a prompt
    tool_choice: ToolChoice | None = None  # whose calls are looked for in the text; None: nobody's
    parallel_tool_calls: bool = True  # whether there may be more than one
    include_reasoning: bool = True  # whether the result has what the model thought
    grammar: Grammar | None = None  # what the answer must be a text of
    continues: bool = False  # whether the text goes on where the prompt's ends; else it stands by itself

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def looks_back(self) -> bool:
        """Whether the choice of a token depends on those sampled before."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.grammar) or any(len(word) > 1 for word in self.bad_words)

    @property
    def scores(self) -> int | None:
        """Likeliest tokens that are wanted at each place of the prompt; None: no logprobs of it are wanted."""
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((number for number in wanted if number is not None), default=None)

    def ends(self, eos_token_ids: Collection[int]) -> tuple[int, ...]:
        """The tokens that end an answer, ascending.

        Args:
            eos_token_ids: the model's ends of text.
        """
        return tuple(sorted({*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)}))


@dataclass(frozen=True, slots=True)
class LineOptions:
    """What a line itself says about its answers; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    bad_words: tuple[str, ...] | None = None
    logprobs: int | None = None  # likeliest tokens to name at each place
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    prompt_only: bool | None = None
    n: int | None = None  # answers to each prompt
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    grammar: Grammar | None = None
    grammar_field: str | None = None  # the field that has it
    truncate_prompt_tokens: int | None = None  # the last so many tokens of a prompt count; -1: as many as fit
    max_tokens: int | None = None  # max_completion_tokens where the line has it, else max_tokens
    may_be_cut: bool = False  # whether max_tokens is no more than a wish where KV memory does not hold so many
    seed: int | None = None
    expected_tokens: int | None = None  # a hint on the answer's length, which changes no result


@dataclass(slots=True)  # not frozen: that would triple the time to make one, and a job has millions
class JobLine:
    """One sound line of a job, as read.

    Exactly one of `messages` and `prompts` is set, by `endpoint`.
    """

    number: int  # 1-based, blank lines counted
    custom_id: str
    endpoint: Endpoint
    options: LineOptions
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None  # for the chat template, as are the next
    template_kwargs: dict[str, Any] | None = None
    prompts: tuple[str | tuple[int, ...], ...] | None = None
    add_special_tokens: bool | None = None  # whether the tokenizer adds its own to texts; None: not to a chat's
    model: str | None = None
    unknown_fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LineFault:
    """Why one line of a job cannot run.

    Attributes:
        number: the line, 1-based, blank lines counted.
        custom_id: the line's own, or `line-<number>`.
        code: `invalid_json_line`, `invalid_row`, `invalid_request`, `duplicate_custom_id`, `unsupported_url`,
            `unsupported_field`, `context_length_exceeded`, `empty_prompt`.
        message: what is wrong with it and what would be right.
        param: the field at fault (`temperature`; those of a body are named within it), or None.
    """

    number: int
    custom_id: str
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete once; a row of `Requests` as an object."""

    index: int  # input order
    line: int  # index into `Requests.line_numbers` and `Requests.custom_ids`
    custom_id: str
    prompt: Span
    sampling: SamplingParams
    max_new_tokens: int
    seed: int


class TextColumn(Sequence[str]):
    """Texts one after another: each takes 8 bytes more than it is long, and some 60 in a list.

    Args:
        rows: the texts in UTF-8, uint8.
    """

    def __init__(self, rows: Rows) -> None:
        self._bytes, self._offsets = rows

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextColumn:
        """A column of some texts."""
        growing = GrowingTexts()
        for text in texts:
            growing.append(text)
        return growing.joined()

    def __len__(self) -> int:
        return self._offsets.size - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes().decode("utf-8", "surrogatepass")

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> TextColumn:
        """A column of some of the texts."""
        start = self._offsets[rows]
        return TextColumn(gather(self._bytes, start, self._offsets[rows + 1] - start))


class GrowingTexts:
    """Texts that are added one by one."""

    def __init__(self) -> None:
        self._rows = GrowingRows("B")

    def append(self, text: str) -> None:
        self._rows.append(text.encode("utf-8", "surrogatepass"))

    def __len__(self) -> int:
        return len(self._rows)

    def joined(self) -> TextColumn:
        """All texts; none is left here."""
        return TextColumn(self._rows.joined())


@dataclass(slots=True)
class Requests:
    """Every request of a job, in columns: a job may have millions.

    Shape letters: R requests, N lines that have requests.

    Attributes:
        tokens: row i is the prompt of request i.
        line: int32 `[R]`, index of the request's line; requests of a line are adjacent and in choice order.
        sampling_id: int32 `[R]`, index into `sampling`.
        sampling: the distinct sampling settings of the job.
        max_new_tokens: int32 `[R]`, the token limit, at least 1, already clipped to the context.
        seed: uint64 `[R]`.
        expected_tokens: int32 `[R]`, hint on the answer's length, at most its limit; 0 where there is none.
        line_numbers: int32 `[N]`, 1-based line of the job file.
        custom_ids: `[N]`.
        endpoints: uint8 `[N]`, places in `ENDPOINTS`.
    """

    tokens: TokenTable
    line: npt.NDArray[np.int32]
    sampling_id: npt.NDArray[np.int32]
    sampling: list[SamplingParams]
    max_new_tokens: npt.NDArray[np.int32]
    seed: npt.NDArray[np.uint64]
    expected_tokens: npt.NDArray[np.int32]
    line_numbers: npt.NDArray[np.int32]
    custom_ids: TextColumn
    endpoints: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return self.line.size

    def __getitem__(self, index: int) -> Request:
        line = int(self.line[index])
        return Request(
            index=index,
            line=line,
            custom_id=self.custom_ids[line],
            prompt=self.tokens.span(index),
            sampling=self.sampling[self.sampling_id[index]],
            max_new_tokens=int(self.max_new_tokens[index]),
            seed=int(self.seed[index]),
        )

    def take(self, rows: npt.NDArray[np.int64]) -> Requests:
        """Only some of the requests, and of the lines only those that they are of.

        Args:
            rows: int64, ascending.
        """
        lines, line = np.unique(self.line[rows], return_inverse=True)
        return Requests(
            tokens=self.tokens.take(rows),
            line=line.astype(np.int32),
            sampling_id=self.sampling_id[rows],
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens[rows],
            seed=self.seed[rows],
            expected_tokens=self.expected_tokens[rows],
            line_numbers=self.line_numbers[lines],
            custom_ids=self.custom_ids.take(lines),
            endpoints=self.endpoints[lines],
        )

    def take_lines(self, lines: npt.NDArray[np.int64]) -> Requests:
        """Only the requests of some lines, int64 indices into `line_numbers`."""
        return self.take(np.flatnonzero(np.isin(self.line, lines)))

    def for_sampling(self) -> Requests:
        """Only what sampling asks for: all that a worker wants to know, and little to send to it. Prompts are left
        out where nobody's are looked at, and else empty but for those that are: their tokens are penalised, or
        their logprobs are wanted."""
        looked_at = np.array([s.repetition_penalty != 1 or s.scores is not None for s in self.sampling], dtype=bool)
        nothing = TokenTable(self.tokens.ids[:0], np.zeros(1, dtype=np.int64))
        return Requests(
            tokens=self.tokens.only(looked_at[self.sampling_id]) if looked_at.any() else nothing,
            line=self.line[:0],
            sampling_id=self.sampling_id,
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens[:0],
            seed=self.seed,
            expected_tokens=self.expected_tokens[:0],
            line_numbers=self.line_numbers[:0],
            custom_ids=self.custom_ids.take(np.empty(0, dtype=np.int64)),
            endpoints=self.endpoints[:0],
        )

    @property
    def scored(self) -> npt.NDArray[np.bool_]:
        """Whether logprobs of the prompt are wanted, bool `[R]`: such a request computes all of it by itself."""
        scored = [sampling.scores is not None for sampling in self.sampling]
        return np.asarray(scored, dtype=bool)[self.sampling_id]

    @property
    def ignore_eos(self) -> npt.NDArray[np.bool_]:
        """Whether the answer's length is known beforehand: it runs to its limit and nothing can stop it."""
        exact = [s.ignore_eos and not s.stop and not s.stop_token_ids for s in self.sampling]
        return np.asarray(exact, dtype=bool)[self.sampling_id]


@dataclass(frozen=True, slots=True)
class Answers:
    """Every answer that the lines of a job ask for, in columns, and the request that gives it.

    Shape letters: A answers, N lines.

    Attributes:
        request: int32 `[A]`, index of the request. Of several answers that one request gives, the first is the one that
            it was made for; the others are its duplicates.
        line: int32 `[A]`, index of the line; answers of a line are adjacent and in choice order.
        seed: uint64 `[A]`.
        n: int32 `[A]`, answers that the line asks for to this prompt; they are neighbours.
        line_numbers: int32 `[N]`, 1-based line of the job file.
        custom_ids: `[N]`.
        endpoints: uint8 `[N]`, places in `ENDPOINTS`.
    """

    request: npt.NDArray[np.int32]
    line: npt.NDArray[np.int32]
    seed: npt.NDArray[np.uint64]
    n: npt.NDArray[np.int32]
    line_numbers: npt.NDArray[np.int32]
    custom_ids: TextColumn
    endpoints: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, asked: Requests, request: npt.NDArray[np.int32]) -> Answers:
        """The answers that the lines ask for, one a row of `asked`, where request `request[i]` gives answer i."""
        n = np.array([sampling.n for sampling in asked.sampling], dtype=np.int32)[asked.sampling_id]
        return cls(request, asked.line, asked.seed, n, asked.line_numbers, asked.custom_ids, asked.endpoints)

    def __len__(self) -> int:
        return self.request.size


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, or of all answers of a line."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, those whose KV a shared prefix computed
    completion_tokens: int


class ToolCall(NamedTuple):
    """A call of a tool; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class TokenText(NamedTuple):
    """What a token stands for: its text, U+FFFD in it where the bytes are no whole character, and its bytes."""

    text: str
    bytes: bytes


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of an answer's tokens, by the model's own distribution at each place.

    Attributes:
        sampled: float32 `[tokens]`, of the tokens of the answer.
        top_ids: int32 `[tokens, K]`, the likeliest tokens at each place, likeliest first.
        top: float32 `[tokens, K]`, theirs.
    """

    sampled: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens from the second on, each after those before it.

    Attributes:
        ids: int32 `[tokens]`, the whole prompt.
        own: of its tokens but the first.
        ranks: int32 `[tokens - 1]`, their places among all tokens, 1 for the likeliest.
    """

    ids: npt.NDArray[np.int32]
    own: Logprobs
    ranks: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Result:
    """One answer of a line; `index` is its row in `Answers`."""

    index: int
    text: str
    token_ids: npt.NDArray[np.int32] = field(repr=False)
    finish_reason: FinishReason
    usage: Usage
    logprobs: Logprobs | None = field(default=None, repr=False)
    prompt: PromptLogprobs | None = field(default=None, repr=False)
    echo: bool = False  # whether logprobs are to begin with those of the prompt
    prompt_logprobs: int | None = None  # as in `SamplingParams`
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
