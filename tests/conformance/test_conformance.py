"""Requests as the documentation of OpenAI's batch API and of vLLM's run-batch has them, and what each must give.

Each `NAME.jsonl` is a job; `NAME.expected.json` says of each of its lines, by custom_id, what comes of it:

- `error`: its `code` and `param`. All other lines have results.
- `finish_reasons`: those that it may have.
- `choices`: how many, if not one; `prompt_tokens`, `completion_tokens`: how many; `max_completion_tokens`: at most.
- `logprobs`: how many alternatives are named at each place; without it there are no logprobs. `scored`: they begin with
  those of the prompt. `prompt_logprobs`: the prompt has its own, with so many alternatives.
- `reasoning`: the message has a thought. `calls`: it is calls of some of these functions, with arguments by their
  schemas.
- `schema`, `pattern`: what the text is if the answer ended by itself. `begins`: how it begins. `without`: what it does
  not have. `same_as`: the line whose text it is too.
- `unknown`: a field of the line that a warning names.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from factories import make_model
from jsonschema import Draft202012Validator
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

import batchrun
from batchrun.check import check_job
from batchrun.config import load_config
from batchrun.pipeline import plan_job

HERE = Path(__file__).parent
JOBS = ("openai", "vllm")
CHAT = "/v1/chat/completions"


class Ran(NamedTuple):
    """A job that was run."""

    path: Path
    lines: dict[str, dict[str, Any]]  # as asked
    expected: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Any]]  # whole lines
    errors: dict[str, dict[str, Any]]
    warnings: list[str]
    options: dict[str, str]


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = (HERE / "template.jinja").read_text()
    return make_model(tmp_path_factory.mktemp("conformance") / "tiny", chat_template=template)


@pytest.fixture(scope="module", params=JOBS)
def ran(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    from batchrun import pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "RemoteEngine", lambda build, step_timeout: build())
        path, out = HERE / f"{request.param}.jsonl", tmp_path_factory.mktemp("run") / "out.run"
        options = {"model": str(model), "dtype": "float32"}
        report = batchrun.run(path, out=out, **options)
    yield Ran(
        path,
        read_lines(path),
        json.loads((HERE / f"{request.param}.expected.json").read_text(encoding="utf-8")),
        read_lines(out / "results.jsonl"),
        read_lines(out / "errors.jsonl"),
        [warned.message for warned in report.warnings],
        options,
    )


# --- what every line has ------------------------------------------------------------------------------------------


def without_unknown(line: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """A result without the first place of an echoed prompt: it has null, which OpenAI's types do not know."""
    line = copy.deepcopy(line)
    if expected.get("scored"):
        for choice in line["response"]["body"]["choices"]:
            columns = choice["logprobs"]
            assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
            choice["logprobs"] = {name: column[1:] for name, column in columns.items()}
    return line


LOGPROB = {"token": str, "logprob": float, "bytes": [int]}
# The fields and types of all that is written; a list has items of its one type, a set is one of its values.
SHAPES: dict[str, Any] = {
    "usage": {
        "prompt_tokens": int,
        "completion_tokens": int,
        "total_tokens": int,
        "prompt_tokens_details": {"cached_tokens": int},
    },
    "call": {"id": str, "type": {"function"}, "function": {"name": str, "arguments": str}},
    "chat logprobs": {"content": [LOGPROB | {"top_logprobs": [LOGPROB]}], "refusal": {None}},
    "logprobs": {"tokens": [str], "token_logprobs": [float], "top_logprobs": [dict], "text_offset": [int]},
    "error": {"message": str, "type": {"invalid_request_error"}, "param": str, "code": str},
}


def check_shape(value: Any, shape: Any, path: str = "") -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict) and value.keys() == shape.keys(), f"{path}: {value!r}"
        for name, inner in shape.items():
            check_shape(value[name], inner, f"{path}.{name}")
    elif isinstance(shape, list):
        assert isinstance(value, list), f"{path}: {value!r}"
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{path}[{i}]")
    elif isinstance(shape, set):
        assert value in shape, f"{path}: {value!r}"
    else:
        assert type(value) is shape, f"{path}: {value!r}"


def envelope(response: Any, error: Any) -> dict[str, Any]:
    extras = {"line": int, "group": object, "attempts": int, "dedup_of": object, "seed": object}
    return {"id": str, "custom_id": str, "response": response, "error": error, "batchrun": extras}


def shape_of(name: str, line: dict[str, Any], ran: Ran) -> dict[str, Any]:
    """The fields that the result line of a line must have, by what was asked for."""
    chat, expected = ran.lines[name]["url"] == CHAT, ran.expected[name]
    content: Any = str
    message: dict[str, Any] = {"role": {"assistant"}}
    if expected.get("reasoning"):
        message["reasoning_content"] = str
    if "calls" in expected:
        message["tool_calls"] = [SHAPES["call"]]
        content = {None}
    message["content"] = content
    logprobs: Any = {None}
    if "logprobs" in expected:
        logprobs = SHAPES["chat logprobs" if chat else "logprobs"]
    choice = {"index": int, "logprobs": logprobs, "finish_reason": set(expected["finish_reasons"])}
    choice |= {"message": message} if chat else {"text": str}
    of_prompt = {"prompt_logprobs": list} if "prompt_logprobs" in expected else {}
    choice |= {} if chat else of_prompt
    body = {
        "id": str,
        "object": {"chat.completion" if chat else "text_completion"},
        "created": int,
        "model": str,
        "choices": [choice],
        "usage": SHAPES["usage"],
        **(of_prompt if chat else {}),
    }
    return envelope({"status_code": {200}, "request_id": str, "body": body}, {None})


def without_extras(line: dict[str, Any]) -> dict[str, Any]:
    """`batchrun`'s own fields are checked by name; some of them may be null."""
    assert line["batchrun"].keys() == envelope(None, None)["batchrun"].keys()
    return {**line, "batchrun": None}


def test_every_line_is_expected_and_comes_out_once(ran: Ran) -> None:
    assert ran.lines.keys() == ran.expected.keys()
    failing = {name for name, expected in ran.expected.items() if "error" in expected}
    assert ran.errors.keys() == failing
    assert ran.results.keys() == ran.lines.keys() - failing


def test_results_have_the_fields_of_their_api_and_no_others(ran: Ran) -> None:
    for name, line in ran.results.items():
        shape = {**shape_of(name, line, ran), "batchrun": {None}}
        check_shape(without_extras(without_unknown(line, ran.expected[name])), shape, name)


def test_openais_types_read_every_body(ran: Ran) -> None:
    for name, line in ran.results.items():
        body = without_unknown(line, ran.expected[name])["response"]["body"]
        for part in (body, *body["choices"]):
            part.pop("prompt_logprobs", None)  # vLLM's, and its types none of OpenAI's
        read = (ChatCompletion if ran.lines[name]["url"] == CHAT else Completion).model_validate(body, strict=True)
        assert not read.model_extra, name
        assert read.usage is not None
        assert read.usage.total_tokens == read.usage.prompt_tokens + read.usage.completion_tokens
        assert 0 <= read.usage.prompt_tokens_details.cached_tokens <= read.usage.prompt_tokens
        assert [choice.index for choice in read.choices] == list(range(ran.expected[name].get("choices", 1)))
    for name, line in ran.errors.items():
        error = ErrorObject.model_validate(line["response"]["body"]["error"], strict=True)
        assert not error.model_extra, name


def test_errors_have_the_fields_of_openais_and_name_what_is_wrong(ran: Ran) -> None:
    for name, line in ran.errors.items():
        body = {"error": SHAPES["error"]}
        shape = envelope({"status_code": {400}, "request_id": str, "body": body}, {None})
        check_shape(without_extras(line), {**shape, "batchrun": {None}}, name)
        error = line["response"]["body"]["error"]
        assert {"code": error["code"], "param": error["param"]} == ran.expected[name]["error"], name
        assert 10 < len(error["message"]) < 400 and error["message"].isprintable(), name


def test_the_same_lines_fail_before_anything_runs(ran: Ran) -> None:
    config = load_config(**ran.options)
    for faults in (check_job(str(ran.path), config).faults, plan_job(str(ran.path), config).faults):
        assert {fault.custom_id: {"code": fault.code, "param": fault.param} for fault in faults} == {
            name: expected["error"] for name, expected in ran.expected.items() if "error" in expected
        }


# --- what was asked for ---------------------------------------------------------------------------------------------


def said(choice: dict[str, Any]) -> str | None:
    return choice["message"]["content"] if "message" in choice else choice["text"]


def check_choice(name: str, choice: dict[str, Any], line: dict[str, Any], expected: dict[str, Any]) -> None:
    text = said(choice)
    if (count := expected.get("logprobs")) is not None:
        check_logprobs(choice, count)
    if choice["finish_reason"] == "length":
        return
    if "calls" in expected:
        schemas = {
            tool["function"]["name"]: tool["function"].get("parameters", {"const": {}})
            for tool in line["body"]["tools"]
        }
        assert choice["message"]["tool_calls"], name
        for call in choice["message"]["tool_calls"]:
            assert call["function"]["name"] in expected["calls"], name
            arguments = json.loads(call["function"]["arguments"])
            Draft202012Validator(schemas[call["function"]["name"]]).validate(arguments)
        return
    assert text is not None
    if "schema" in expected:
        Draft202012Validator(expected["schema"]).validate(json.loads(text))
    if "pattern" in expected:
        assert re.fullmatch(expected["pattern"], text), (name, text)


def check_logprobs(choice: dict[str, Any], count: int) -> None:
    logprobs = choice["logprobs"]
    if "message" not in choice:
        lengths = {len(logprobs[field]) for field in SHAPES["logprobs"]}
        assert len(lengths) == 1 and lengths != {0}
        # The token that was taken is among them, one more where it is not likely; tokens may have one text.
        assert all(0 < len(top) <= count + 1 for top in logprobs["top_logprobs"])
        assert all(value <= 0 for value in logprobs["token_logprobs"])
        return
    assert logprobs["content"]
    assert {len(token["top_logprobs"]) for token in logprobs["content"]} == {count}
    assert all(token["logprob"] <= 0 for token in logprobs["content"])


def check_prompt_logprobs(places: list[Any], body: dict[str, Any], count: int) -> None:
    assert len(places) == body["usage"]["prompt_tokens"]
    assert places[0] is None
    for place in places[1:]:
        assert count <= len(place) <= count + 1
        for token_id, told in place.items():
            check_shape(told, {"logprob": float, "rank": int, "decoded_token": str}, token_id)
        assert {*range(1, count + 1)} <= {told["rank"] for told in place.values()}


def test_answers_are_what_was_asked_for(ran: Ran) -> None:
    for name, line in ran.results.items():
        expected = ran.expected[name]
        body = without_unknown(line, expected)["response"]["body"]
        if (count := expected.get("prompt_logprobs")) is not None:
            check_prompt_logprobs(body.get("prompt_logprobs") or body["choices"][0]["prompt_logprobs"], body, count)
        for choice in body["choices"]:
            check_choice(name, choice, ran.lines[name], expected)
            if (begins := expected.get("begins")) is not None:
                assert said(choice).startswith(begins), name
            if (missing := expected.get("without")) is not None:
                assert missing not in said(choice), name
        usage = body["usage"]
        for count in ("prompt_tokens", "completion_tokens"):
            assert usage[count] == expected.get(count, usage[count]), name
        assert usage["completion_tokens"] <= expected.get("max_completion_tokens", 1 << 20), name
        if (other := expected.get("same_as")) is not None:
            again = ran.results[other]["response"]["body"]["choices"]
            assert [said(choice) for choice in body["choices"]] == [said(choice) for choice in again]
    ended = [
        name
        for name, line in ran.results.items()
        if line["response"]["body"]["choices"][0]["finish_reason"] != "length"
    ]
    assert any("calls" in ran.expected[name] for name in ended)
    assert any("schema" in ran.expected[name] for name in ended)


def test_fields_that_nobody_knows_are_named_in_a_warning(ran: Ran) -> None:
    unknown = [expected["unknown"] for expected in ran.expected.values() if "unknown" in expected]
    warned = [message for message in ran.warnings if "is not known" in message]
    assert len(warned) == len(unknown) > 0
    assert all(any(field in message for message in warned) for field in unknown)
