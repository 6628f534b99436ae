"""Result and error lines: OpenAI's batch output shape, with extras of ours under the one key `batchrun`."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import orjson

from batchrun.request import Endpoint, LineFault, Logprobs, Result, TokenText


def encode_json(value: Any, *, indent: bool = False) -> bytes:
    """`value` as UTF-8 JSON with a last newline; dataclasses and numpy arrays may be anywhere in it.

    On one line, unless `indent`: control characters are written as escapes. JSON text cannot hold lone surrogates
    (a model, a custom_id or a file name can): each becomes U+FFFD.
    """
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY | (orjson.OPT_INDENT_2 if indent else 0)
    try:
        return orjson.dumps(value, default=_plain, option=option)
    except orjson.JSONEncodeError as error:
        if "surrogates" not in str(error):
            raise
        return orjson.dumps(_without_lone_surrogates(value), default=_plain, option=option)


def result_line(
    choices: Sequence[Result],
    *,
    custom_id: str,
    line: int,
    endpoint: Endpoint,
    model: str,
    created: int,
    seed: int,
    group: int | None,
    dedup_of: str | None = None,
    attempts: int = 1,
    token: Callable[[int], TokenText] | None = None,
) -> bytes:
    """The line of `results.jsonl` for one finished line of the job.

    All but `created` follows from the arguments' content, so that a rerun gives the same bytes otherwise.

    Args:
        choices: its answers in choice order, at least one.
        line: its number in the job file, 1-based.
        model: the name the model was given by.
        created: when it finished, in seconds of Unix time.
        seed: the seed of its first choice.
        group: id of the prefix-sharing group of its first choice, or None.
        dedup_of: custom_id of the line whose answer it got, where none of its answers was computed for it; else None.
        attempts: how often the line was tried, this time included.
        token: what a token id stands for; needed where an answer has logprobs.
    """
    digest = _digest(line, custom_id)
    prompt_tokens = sum(choice.usage.prompt_tokens for choice in choices)
    completion_tokens = sum(choice.usage.completion_tokens for choice in choices)
    chat = endpoint is Endpoint.CHAT
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                **({"message": _message(choice, f"{digest}-{index}")} if chat else {"text": choice.text}),
                "logprobs": _logprobs(choice, chat, token),
                "finish_reason": choice.finish_reason,
                **({} if chat else _prompt_logprobs(choice, token)),
            }
            for index, choice in enumerate(choices)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(choice.usage.cached_tokens for choice in choices)},
        },
        **(_prompt_logprobs(choices[0], token) if chat else {}),
    }
    response = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
    return _batch_line(custom_id, line, response, None, group=group, attempts=attempts, seed=seed, dedup_of=dedup_of)


def _call_id(digest: str, number: int) -> str:
    """The id of a call: 9 letters and digits, as the templates of Mistral's models demand where it comes back."""
    return base64.b32encode(hashlib.blake2b(f"{digest}-{number}".encode(), digest_size=6).digest()).decode().lower()[:9]


def _message(choice: Result, digest: str) -> dict[str, Any]:
    """What the assistant says."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if choice.tool_calls else "")}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [
            {"id": _call_id(digest, i), "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(choice.tool_calls)
        ]
    return message


def _logprobs(choice: Result, chat: bool, token: Callable[[int], TokenText] | None) -> dict[str, Any] | None:
    """The logprobs of an answer in the shape of its API."""
    found = choice.logprobs
    if found is None or token is None:
        return None
    tokens = [token(token_id) for token_id in choice.token_ids[: found.sampled.size].tolist()]
    sampled = found.sampled.tolist()
    likeliest = _likeliest(found, found.top.shape[1], token)
    if chat:
        return {
            "content": [
                {**_token(one, value), "top_logprobs": [_token(*other) for other in others]}
                for one, value, others in zip(tokens, sampled, likeliest, strict=True)
            ],
            "refusal": None,
        }
    unknown: list[None] = []  # nothing stands before the first token of a prompt
    if choice.echo and (prompt := choice.prompt) is not None:
        tokens = [token(token_id) for token_id in prompt.ids.tolist()] + tokens
        sampled = prompt.own.sampled.tolist() + sampled
        likeliest = _likeliest(prompt.own, found.top.shape[1], token) + likeliest
        unknown = [None]
    ends = list(accumulate(len(one.text) for one in tokens))
    return {
        "tokens": [one.text for one in tokens],
        "token_logprobs": [*unknown, *sampled],
        # As at OpenAI's, the sampled token is among them, one more where it is not among the likeliest.
        "top_logprobs": [
            *unknown,
            *(
                {other.text: value for other, value in others} | {one.text: own}
                for one, own, others in zip(tokens[len(unknown) :], sampled, likeliest, strict=True)
            ),
        ],
        "text_offset": [0, *ends[:-1]] if ends else [],
    }


def _likeliest(
    found: Logprobs, alternatives: int, token: Callable[[int], TokenText]
) -> list[list[tuple[TokenText, float]]]:
    """The likeliest tokens at each place, as many as are to be named, and their logprobs."""
    ids, values = found.top_ids[:, :alternatives].tolist(), found.top[:, :alternatives].tolist()
    return [[(token(one), value) for one, value in zip(*place, strict=True)] for place in zip(ids, values, strict=True)]


def _prompt_logprobs(choice: Result, token: Callable[[int], TokenText] | None) -> dict[str, Any]:
    """The logprobs of a prompt as vLLM has them, where they were asked for: by token id, its own token first."""
    prompt, wanted = choice.prompt, choice.prompt_logprobs
    if prompt is None or wanted is None or token is None:
        return {}

    def one(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": token(token_id).text}

    own = zip(prompt.ids[1:].tolist(), prompt.own.sampled.tolist(), prompt.ranks.tolist(), strict=True)
    others = zip(prompt.own.top_ids[:, :wanted].tolist(), prompt.own.top[:, :wanted].tolist(), strict=True)
    places: list[dict[str, Any] | None] = [None]  # of the first token
    for (token_id, logprob, rank), (ids, logprobs) in zip(own, others, strict=True):
        place = {str(token_id): one(token_id, logprob, rank)}
        for nth, (other, value) in enumerate(zip(ids, logprobs, strict=True), 1):
            place.setdefault(str(other), one(other, value, nth))
        places.append(place)
    return {"prompt_logprobs": places}


def _token(token: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.bytes)}


def error_line(fault: LineFault) -> bytes:
    """The line of `errors.jsonl` for a line of the job that was rejected."""
    body = {
        "error": {
            "message": fault.message,
            "type": "invalid_request_error",
            "param": fault.param,
            "code": fault.code,
        }
    }
    response = {
        "status_code": 400,
        "request_id": f"req_{_digest(fault.number, fault.custom_id)}",
        "body": body,
    }
    return _batch_line(fault.custom_id, fault.number, response, None)


def unrun_line(custom_id: str, line: int, code: str, message: str, *, attempts: int = 0) -> bytes:
    """The line of `errors.jsonl` for a sound line of the job that got no answer and never will."""
    return _batch_line(custom_id, line, None, {"code": code, "message": message}, attempts=attempts)


def read_line_number(raw: bytes) -> tuple[int, str | None]:
    """The job line that a result or error line answers, and the error's code (None for a result).

    Raises:
        ValueError: `raw` is not a whole line that this module wrote.
    """
    entry = orjson.loads(raw)
    try:
        number = entry["batchrun"]["line"]
        fault = entry["error"] or entry["response"]["body"].get("error")
        code = fault["code"] if fault else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not a result line: it lacks batchrun.line or response") from error
    if type(number) is not int or not 1 <= number < 2**63:
        raise ValueError("not a result line: batchrun.line is no line's number")
    if code is not None and type(code) is not str:
        raise ValueError("not an error line: its code is no text")
    return number, code


def read_attempts(raw: bytes) -> int:
    """How often the line of the job that a result or error line answers was tried.

    Raises:
        ValueError: `raw` is not a whole result or error line.
    """
    try:
        attempts = orjson.loads(raw)["batchrun"]["attempts"]
    except (KeyError, TypeError) as error:
        raise ValueError("not a result line: it lacks batchrun.attempts") from error
    if type(attempts) is not int or not 0 <= attempts < 2**31:
        raise ValueError("not a result line: batchrun.attempts is no number of times")
    return attempts


class Ending(NamedTuple):
    """How a line of the job ended, as its result line says."""

    line: int
    choices: int
    by_length: bool  # one of them at least
    prompt_tokens: int  # of all choices
    completion_tokens: int


def read_ending(raw: bytes) -> Ending:
    """How the line of the job that a result line answers ended.

    Raises:
        ValueError: `raw` is not a whole result line.
    """
    entry = orjson.loads(raw)
    try:
        body = entry["response"]["body"]
        reasons = [choice["finish_reason"] for choice in body["choices"]]
        prompt, completion = (int(body["usage"][name]) for name in ("prompt_tokens", "completion_tokens"))
        return Ending(entry["batchrun"]["line"], len(reasons), "length" in reasons, prompt, completion)
    except (KeyError, TypeError) as error:
        raise ValueError("not a result line: it lacks choices or usage") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Told:
    """What a result or error line says of its line of the job.

    Attributes:
        custom_id, line: of the job's line.
        texts, finish_reasons: of its choices, in their order; none for an error.
        error: the error's code; None for a result.
    """

    custom_id: str
    line: int
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    error: str | None


def _said(message: dict[str, Any]) -> str:
    """All that a message says: what it thought and the tools that it calls are as much of it as its text."""
    thought, calls = message.get("reasoning_content"), message.get("tool_calls")
    text: str = message["content"] if message["content"] is not None or not calls else ""
    thought = f"<think>{thought}</think>" if thought is not None else ""
    return (
        thought
        + text
        + "".join(f"\n{call['function']['name']}({call['function']['arguments']})" for call in calls or ())
    )


def read_told(raw: bytes) -> Told:
    """Read a result or error line.

    Raises:
        ValueError: `raw` is not a whole line that this module wrote.
    """
    line, code = read_line_number(raw)
    entry = orjson.loads(raw)
    try:
        choices = entry["response"]["body"]["choices"] if code is None else []
        texts = tuple(_said(choice["message"]) if "message" in choice else choice["text"] for choice in choices)
        reasons = tuple(choice["finish_reason"] for choice in choices)
        custom_id = entry["custom_id"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a result line: {error!r}") from error
    if not all(isinstance(part, str) for part in (custom_id, *texts, *reasons)):
        raise ValueError("not a result line: a text is no text")
    return Told(custom_id, line, texts, reasons, code)


class Outcome(NamedTuple):
    """What became of a line of the job, in the columns of a table."""

    custom_id: str
    text: str | None = None  # of the first choice; None for an error
    finish_reason: str | None = None
    reasoning: str | None = None
    tool_calls: str | None = None  # JSON
    choices: list[dict[str, str | None]] | None = None  # text and finish_reason of each, where there are several
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    error_code: str | None = None
    error_message: str | None = None


def read_outcome(raw: bytes) -> Outcome:
    """What a result or error line says.

    Raises:
        ValueError: `raw` is not a whole line that this module wrote.
    """
    _, code = read_line_number(raw)
    entry = orjson.loads(raw)
    try:
        if code is not None:
            error = entry["error"] or entry["response"]["body"]["error"]
            return Outcome(entry["custom_id"], error_code=code, error_message=error["message"])
        body = entry["response"]["body"]
        usage = body["usage"]
        messages = [choice.get("message") or {"content": choice["text"]} for choice in body["choices"]]
        texts = [
            {"text": message["content"], "finish_reason": choice["finish_reason"]}
            for message, choice in zip(messages, body["choices"], strict=True)
        ]
        calls = messages[0].get("tool_calls")
        return Outcome(
            custom_id=entry["custom_id"],
            **texts[0],
            reasoning=messages[0].get("reasoning_content"),
            tool_calls=orjson.dumps(calls).decode() if calls else None,
            choices=texts if len(texts) > 1 else None,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a result line: {error!r}") from error


def read_created(raw: bytes) -> int:
    """When the line of the job that a result line answers was finished, in seconds of Unix time.

    Raises:
        ValueError: `raw` is not a whole result line.
    """
    try:
        created = orjson.loads(raw)["response"]["body"]["created"]
    except (KeyError, TypeError) as error:
        raise ValueError("not a result line: it lacks response.body.created") from error
    if not isinstance(created, int):
        raise ValueError("not a result line: response.body.created is no number")
    return created


def _batch_line(
    custom_id: str,
    line: int,
    response: dict[str, Any] | None,
    error: dict[str, str] | None,
    *,
    group: int | None = None,
    attempts: int = 0,
    seed: int | None = None,
    dedup_of: str | None = None,
) -> bytes:
    extras = {"line": line, "group": group, "attempts": attempts, "dedup_of": dedup_of, "seed": seed}
    return encode_json(
        {
            "id": f"batch_req_{_digest(line, custom_id)}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
            "batchrun": extras,
        }
    )


def _digest(line: int, custom_id: str) -> str:
    content = f"{line}:{custom_id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _plain(value: Any) -> Any:
    # orjson writes contiguous arrays itself; a column of a larger array comes here.
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError


def _without_lone_surrogates(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        case dict():
            return {_without_lone_surrogates(key): _without_lone_surrogates(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_lone_surrogates(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {
                field.name: _without_lone_surrogates(getattr(value, field.name)) for field in dataclasses.fields(value)
            }
        case _:
            return value
