"""The nouns a user knows: a line of a job, the requests it makes, their sampling, and what came of them.

A **line** of the job file makes one or more **requests**: one prompt, one answer each. Nearly every line makes
one; `/v1/completions` with a list of prompts makes as many as the list is long, and its result line has as many
choices. The planner and the engine know requests only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.tokens import Span, TokenTable


class Endpoint(StrEnum):
    """The API a line is written for; it decides the shape of the result."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class FinishReason(StrEnum):
    """Why an answer ended: by itself (end of text, stop string, stop token), or by its token limit."""

    STOP = "stop"
    LENGTH = "length"


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

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


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
    max_tokens: int | None = None  # max_completion_tokens where the line has it, else max_tokens
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
    prompts: tuple[str | tuple[int, ...], ...] | None = None
    model: str | None = None
    unknown_fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LineFault:
    """Why one line of a job cannot run.

    Attributes:
        number: the line, 1-based, blank lines counted.
        custom_id: the line's own, or `line-<number>`.
        code: `invalid_json_line`, `invalid_request`, `duplicate_custom_id`, `unsupported_url`,
            `unsupported_field`, `context_length_exceeded`, `empty_prompt`.
        message: what is wrong with it and what would be right.
        param: the field at fault (`body.temperature`), or None.
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
    """Texts one after another in UTF-8: each takes 8 bytes more than it is long, and some 60 in a list."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


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
        endpoints: `[N]`.
    """

    tokens: TokenTable
    line: npt.NDArray[np.int32]
    sampling_id: npt.NDArray[np.int32]
    sampling: list[SamplingParams]
    max_new_tokens: npt.NDArray[np.int32]
    seed: npt.NDArray[np.uint64]
    expected_tokens: npt.NDArray[np.int32]
    line_numbers: npt.NDArray[np.int32]
    custom_ids: Sequence[str]
    endpoints: list[Endpoint]

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

    def take_lines(self, lines: npt.NDArray[np.int64]) -> Requests:
        """Only the requests of the given lines.

        Args:
            lines: int64, indices into `line_numbers`, ascending.
        """
        rows = np.flatnonzero(np.isin(self.line, lines))
        return Requests(
            tokens=self.tokens.take(rows),
            line=np.searchsorted(lines, self.line[rows]).astype(np.int32),
            sampling_id=self.sampling_id[rows],
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens[rows],
            seed=self.seed[rows],
            expected_tokens=self.expected_tokens[rows],
            line_numbers=self.line_numbers[lines],
            custom_ids=TextColumn(self.custom_ids[line] for line in lines.tolist()),
            endpoints=[self.endpoints[line] for line in lines],
        )

    def for_sampling(self) -> Requests:
        """Only what sampling asks for: all that a worker wants to know, and little to send to it."""
        return Requests(
            tokens=TokenTable(np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int64)),
            line=self.line[:0],
            sampling_id=self.sampling_id,
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens[:0],
            seed=self.seed,
            expected_tokens=self.expected_tokens[:0],
            line_numbers=self.line_numbers[:0],
            custom_ids=[],
            endpoints=[],
        )

    @property
    def ignore_eos(self) -> npt.NDArray[np.bool_]:
        """Whether the answer's length is known beforehand: it runs to its limit and nothing can stop it."""
        exact = [s.ignore_eos and not s.stop and not s.stop_token_ids for s in self.sampling]
        return np.asarray(exact, dtype=bool)[self.sampling_id]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, or of all answers of a line."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, those whose KV a shared prefix computed
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """One finished request."""

    index: int
    text: str
    token_ids: npt.NDArray[np.int32] = field(repr=False)
    finish_reason: FinishReason
    usage: Usage
