"""Result and error lines are what OpenAI's own types read, whatever the text is."""

from __future__ import annotations

import json

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion

from batchrun.formats.results import encode_json, error_line, read_line_number, result_line, unrun_line
from batchrun.request import Endpoint, FinishReason, LineFault, Result, Usage

ANY_TEXT = st.text(st.characters(), max_size=40)  # surrogates and control characters included


def a_result(index=0, text="hello", finish=FinishReason.STOP, usage=None):
    return Result(index, text, np.array([1, 2], np.int32), finish, usage or Usage(10, 4, 2))


def a_line(*choices, endpoint=Endpoint.CHAT, custom_id="r1", line=3, created=1_700_000_000, seed=7, group=5):
    return result_line(
        choices,
        custom_id=custom_id,
        line=line,
        endpoint=endpoint,
        model="m",
        created=created,
        seed=seed,
        group=group,
    )


def test_a_chat_line_is_a_chat_completion():
    entry = orjson.loads(a_line(a_result(finish=FinishReason.LENGTH)))
    assert list(entry) == ["id", "custom_id", "response", "error", "batchrun"]
    assert entry["custom_id"] == "r1"
    assert entry["error"] is None
    assert entry["response"]["status_code"] == 200
    assert entry["response"]["request_id"]
    assert entry["batchrun"] == {"line": 3, "group": 5, "attempts": 1, "dedup_of": None, "seed": 7}

    body = entry["response"]["body"]
    completion = ChatCompletion.model_validate(body, strict=True)
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"} <= completion.model_fields_set
    assert completion.id.startswith("chatcmpl-")
    (choice,) = completion.choices
    assert {"index", "message", "logprobs", "finish_reason"} == choice.model_fields_set
    assert (choice.message.role, choice.message.content) == ("assistant", "hello")
    assert choice.finish_reason == "length"
    assert not choice.model_extra and not choice.message.model_extra and not completion.model_extra
    usage = completion.usage
    assert usage and usage.prompt_tokens_details and not usage.model_extra
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 2, 12)
    assert usage.prompt_tokens_details.cached_tokens == 4


def test_a_list_of_prompts_is_one_text_completion_with_their_sums():
    first = a_result(0, "one", usage=Usage(10, 4, 2))
    second = a_result(1, "two", FinishReason.LENGTH, Usage(7, 0, 16))
    entry = orjson.loads(a_line(first, second, endpoint=Endpoint.COMPLETIONS))
    body = entry["response"]["body"]
    completion = Completion.model_validate(body, strict=True)
    assert completion.id.startswith("cmpl-")
    assert not completion.model_extra
    answers = [(choice.index, choice.text, choice.finish_reason) for choice in completion.choices]
    assert answers == [(0, "one", "stop"), (1, "two", "length")]
    assert all(c.model_fields_set == {"index", "text", "logprobs", "finish_reason"} for c in completion.choices)
    usage = completion.usage
    assert usage and usage.prompt_tokens_details
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (17, 18, 35)
    assert usage.prompt_tokens_details.cached_tokens == 4


def test_a_rerun_gives_the_same_bytes_but_for_the_time():
    assert a_line(a_result()) == a_line(a_result())
    early, late = (orjson.loads(a_line(a_result(), created=t)) for t in (1, 2))
    assert early["response"]["body"].pop("created") != late["response"]["body"].pop("created")
    assert early == late


def test_ids_differ_between_lines_even_where_custom_ids_are_equal():
    lines = [a_line(a_result(), custom_id=c, line=n) for c, n in (("a", 1), ("a", 2), ("b", 1))]
    assert len({orjson.loads(line)["id"] for line in lines}) == 3


def test_a_rejected_line_carries_the_error_as_the_api_would_answer():
    fault = LineFault(9, "bad", "unsupported_field", "`n` is not supported yet", "n")
    entry = orjson.loads(error_line(fault))
    assert entry["error"] is None
    assert entry["response"]["status_code"] == 400
    assert entry["response"]["body"] == {
        "error": {
            "message": "`n` is not supported yet",
            "type": "invalid_request_error",
            "param": "n",
            "code": "unsupported_field",
        }
    }
    assert entry["batchrun"] == {"line": 9, "group": None, "attempts": 0, "dedup_of": None, "seed": None}


def test_a_line_that_never_ran_has_no_response():
    entry = orjson.loads(unrun_line("x", 4, "batch_cancelled", "the run was closed"))
    assert entry["response"] is None
    assert entry["error"] == {"code": "batch_cancelled", "message": "the run was closed"}
    assert entry["batchrun"]["line"] == 4


def test_every_kind_of_line_says_which_line_of_the_job_it_answers():
    assert read_line_number(a_line(a_result(), line=3)) == (3, None)
    assert read_line_number(error_line(LineFault(9, "b", "empty_prompt", "empty"))) == (9, "empty_prompt")
    assert read_line_number(unrun_line("x", 4, "batch_cancelled", "closed")) == (4, "batch_cancelled")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[1]\n",
        b"17\n",
        b'"text"\n',
        b'{"batchrun":{"line":1}}\n',
        b'{"batchrun":{"line":"1"},"error":null,"response":{"body":{}}}\n',
        b'{"batchrun":{"line":1},"error":"text","response":null}\n',
        b"\x00\x00\n",
    ],
)
def test_what_is_no_line_of_ours_is_refused(raw):
    with pytest.raises(ValueError):
        read_line_number(raw)


@given(text=ANY_TEXT, custom_id=ANY_TEXT)
def test_any_text_makes_one_line_of_json(text, custom_id):
    raw = a_line(a_result(text=text), custom_id=custom_id)
    assert raw.count(b"\n") == 1 and raw.endswith(b"\n")
    assert not any(byte < 0x20 for byte in raw[:-1])
    content = orjson.loads(raw)["response"]["body"]["choices"][0]["message"]["content"]
    assert content == text or any("\ud800" <= c <= "\udfff" for c in text)
    assert error_line(LineFault(1, custom_id, "invalid_request", text, text)).count(b"\n") == 1


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("\udfff", "\ufffd"),
        ("\ud800\ud800x", "\ufffd\ufffdx"),
        ("\ud83d\ude00", "\U0001f600"),  # two halves that belong together are one character
        ("ü\x00\x1b\u2028\r\n", "ü\x00\x1b\u2028\r\n"),
    ],
)
def test_lone_surrogates_become_replacement_characters_and_all_else_stays(text, read):
    assert json.loads(encode_json({"keys too " + text: [(text,)]})) == {"keys too " + read: [[read]]}


def test_a_value_without_a_form_in_json_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable: object"):
        encode_json({"x": object()})
