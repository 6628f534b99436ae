"""Puts the answers of a line together, and writes the line when it has them all."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from batchrun.chat import ChatReader
from batchrun.formats.results import result_line, unrun_line
from batchrun.formats.rundir import ResultSink
from batchrun.prefix.groups import PrefixGroups
from batchrun.request import (
    ENDPOINTS,
    Answers,
    Endpoint,
    FinishReason,
    Logprobs,
    PromptLogprobs,
    Requests,
    Result,
    ToolChoice,
    Usage,
)
from batchrun.schedule.scheduler import Finished
from batchrun.tokenizer import Tokenizer

_PROMPT_END = 16  # tokens of a prompt that tell whether it ends in a thought


class LineCollector:
    """Puts the answers of a line together, and writes the line when it has them all. An answer that several lines ask
    for goes to each of them."""

    def __init__(
        self,
        answers: Answers,
        requests: Requests,
        groups: PrefixGroups,
        model: str,
        sink: ResultSink,
        tokenizer: Tokenizer,
        attempts: npt.NDArray[np.int64],
    ) -> None:
        """`attempts`: int64 `[N]`, how often each line was tried before."""
        self._answers = answers
        self._requests = requests
        self._tokenizer = tokenizer
        self._attempts = attempts
        self._reader = ChatReader(tokenizer.chat_template, tokenizer.special_tokens)
        self._groups = groups
        self._model = model
        self._sink = sink
        self._missing = np.bincount(answers.line, minlength=len(answers.custom_ids)).astype(np.int32)
        # The answers of request r, the one that it was made for first, are _by_request[_begin[r]:_begin[r + 1]].
        self._by_request = np.argsort(answers.request, kind="stable").astype(np.int32)
        self._begin = np.concatenate(([0], np.cumsum(np.bincount(answers.request)))).astype(np.int32)
        self._partial: dict[int, list[Result]] = {}
        self._failed: set[int] = set()

    def add(
        self,
        finished: Finished,
        prompt_tokens: int,
        text: str,
        reason: FinishReason,
        logprobs: Logprobs | None = None,
        prompt: PromptLogprobs | None = None,
    ) -> list[FinishReason]:
        """Give an answer to all lines that ask for it; returns why it ended, as each of those that have not failed says
        it."""
        rows = self._rows(finished.request)
        sampling = self._requests.sampling[self._requests.sampling_id[finished.request]]
        reasons = []
        of_prompt = {"prompt": prompt, "echo": sampling.echo, "prompt_logprobs": sampling.prompt_logprobs}
        for row in rows:
            cached = finished.cached_tokens if row == rows[0] else prompt_tokens
            usage = Usage(prompt_tokens, cached, finished.token_ids.size)
            result = Result(row, text, finished.token_ids, reason, usage, logprobs, **of_prompt)
            if ENDPOINTS[self._answers.endpoints[self._answers.line[row]]] is Endpoint.CHAT:
                result = self._taken_apart(finished, result)
            if int(self._answers.line[row]) not in self._failed:
                self._add(result)
                reasons.append(result.finish_reason)
        return reasons

    def fail(self, request: int, code: str, message: str, *, attempts: int) -> int:
        """A request gives no answer, and so the lines that ask for it get none; returns how many had not failed yet."""
        answers, lines = self._answers, {int(self._answers.line[row]) for row in self._rows(request)} - self._failed
        for line in sorted(lines):
            self._partial.pop(line, None)
            number = int(answers.line_numbers[line])
            tried = attempts + int(self._attempts[line])
            self._sink.write_error(unrun_line(answers.custom_ids[line], number, code, message, attempts=tried))
        self._failed |= lines
        return len(lines)

    def _taken_apart(self, finished: Finished, result: Result) -> Result:
        """The answer of a chat, with what is no text of it apart."""
        requests, reader, decode = self._requests, self._reader, self._tokenizer.decode
        sampling = requests.sampling[requests.sampling_id[finished.request]]
        choice = sampling.tool_choice
        if choice is None and not reader.thinks:
            return result
        whole = result.text
        if choice is not None or reader.channels:
            ids = (finished.token_ids[:-1] if finished.ended else finished.token_ids).tolist()
            whole = decode(ids, skip_special_tokens=False, continues=sampling.continues)
            if result.finish_reason is FinishReason.STOP and not finished.ended:  # by a stop string
                uncut = decode(ids, skip_special_tokens=sampling.skip_special_tokens, continues=sampling.continues)
                whole = whole[: len(whole) - (len(uncut) - len(result.text))]
        in_thought = False
        if reader.thinks:
            end = requests.tokens[finished.request][-_PROMPT_END:]
            in_thought = reader.begins_in_thought(decode(end.tolist(), skip_special_tokens=False))
        read = reader.read(result.text, whole, calls=choice is not None, in_thought=in_thought)
        calls = read.tool_calls if sampling.parallel_tool_calls else read.tool_calls[:1]
        reason = result.finish_reason
        if calls and reason is FinishReason.STOP and choice is not ToolChoice.NAMED:  # as at OpenAI's
            reason = FinishReason.TOOL_CALLS
        thought = read.reasoning if sampling.include_reasoning else None
        return replace(result, text=read.content, reasoning=thought, tool_calls=calls, finish_reason=reason)

    def _rows(self, request: int) -> list[int]:
        rows: list[int] = self._by_request[self._begin[request] : self._begin[request + 1]].tolist()
        return rows

    def _add(self, result: Result) -> None:
        answers, line = self._answers, int(self._answers.line[result.index])
        results = self._partial.setdefault(line, [])
        results.append(result)
        if len(results) < self._missing[line]:
            return
        results = sorted(self._partial.pop(line), key=lambda result: result.index)
        # As at OpenAI's, the tokens of a prompt count once for all answers to it.
        first = results[0].index
        n = int(answers.n[first])
        results = [
            replace(result, usage=replace(result.usage, prompt_tokens=0, cached_tokens=0)) if at % n else result
            for at, result in enumerate(results)
        ]
        group = int(self._groups.request_group[answers.request[first]])
        made_for = [self._rows(int(answers.request[result.index]))[0] for result in results]
        copied = not any(row == result.index for row, result in zip(made_for, results, strict=True))
        self._sink.write_result(
            result_line(
                results,
                custom_id=answers.custom_ids[line],
                line=int(answers.line_numbers[line]),
                endpoint=ENDPOINTS[answers.endpoints[line]],
                model=self._model,
                created=int(time.time()),
                seed=int(answers.seed[first]),
                group=group if group >= 0 else None,
                dedup_of=answers.custom_ids[answers.line[made_for[0]]] if copied else None,
                attempts=int(self._attempts[line]) + 1,
                token=self._tokenizer.token,
            )
        )
