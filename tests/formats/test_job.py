"""What a sound line means, and what each sort of bad line gets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from batchrun.formats import job as job_module
from batchrun.formats.job import lint_job, open_job, read_job
from batchrun.request import Endpoint, Grammar, JobLine, LineFault, LineOptions, ToolChoice

HELLO = {"role": "user", "content": "Hello"}


def read(tmp_path: Path, *lines: Any) -> list[JobLine | LineFault]:
    """Read a job of these lines: objects as JSON, bytes as they are."""
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return list(read_job(open_job(path)))


def chat(**body: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [HELLO], **body}
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello", **body}}


def deep(levels: int) -> dict[str, Any]:
    """A schema nested more deeply than it can be written again."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def function_of(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "clock", "parameters": parameters}}


def sound(tmp_path: Path, line: Any) -> JobLine:
    (item,) = read(tmp_path, line)
    assert isinstance(item, JobLine), item
    return item


def fault(tmp_path: Path, line: Any) -> LineFault:
    """The fault of a line; the good lines before and after it are seen to be unharmed."""
    before, item, after = read(tmp_path, {"id": "before", "prompt": "x"}, line, {"id": "after", "prompt": "y"})
    assert before == JobLine(1, "before", Endpoint.COMPLETIONS, LineOptions(), prompts=("x",))
    assert after == JobLine(3, "after", Endpoint.COMPLETIONS, LineOptions(), prompts=("y",))
    assert isinstance(item, LineFault), item
    assert item.number == 2
    assert len(item.message) < 400
    assert item.message.isprintable()
    return item


# --- sound lines ------------------------------------------------------------------------------------------------


def test_openai_documented_line_is_read_unchanged(tmp_path):
    documented = (
        b'{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": '
        b'"gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are a helpful assistant."},'
        b'{"role": "user", "content": "Hello world!"}],"max_tokens": 1000}}'
    )
    assert sound(tmp_path, documented) == JobLine(
        number=1,
        custom_id="request-1",
        endpoint=Endpoint.CHAT,
        options=LineOptions(max_tokens=1000),
        messages=(
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello world!"},
        ),
        model="gpt-3.5-turbo-0125",
    )


def test_every_sampling_field_is_read(tmp_path):
    given: dict[str, Any] = {
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "stop": ["\n", "END"],
        "stop_token_ids": [2, 0],
        "ignore_eos": True,
        "min_tokens": 3,
        "max_tokens": 7,
        "seed": -(2**63),
    }
    want = LineOptions(**{**given, "stop": ("\n", "END"), "stop_token_ids": (2, 0)})
    for line in (chat(**given), completion(**given), {"prompt": "Hello", **given}):
        options = sound(tmp_path, line).options
        assert options == want
        assert type(options.temperature) is float


def test_plain_prompt_with_fields_beside_it(tmp_path):
    line = {"id": 7, "prompt": "Hello", "temperature": 0, "model": "m"}
    want = JobLine(1, "7", Endpoint.COMPLETIONS, LineOptions(temperature=0.0), prompts=("Hello",), model="m")
    assert sound(tmp_path, line) == want


def test_plain_messages(tmp_path):
    line = sound(tmp_path, {"custom_id": "a", "messages": [HELLO]})
    assert line == JobLine(1, "a", Endpoint.CHAT, LineOptions(), messages=(HELLO,))


def test_line_without_id_is_named_by_its_physical_number(tmp_path):
    lines = read(tmp_path, b"", {"prompt": "a"}, b" \t ", {"custom_id": None, "prompt": "b"})
    assert [line.custom_id for line in lines] == ["line-2", "line-4"]


def test_max_completion_tokens_wins_and_null_is_absent(tmp_path):
    assert sound(tmp_path, chat(max_completion_tokens=5, max_tokens=9)).options.max_tokens == 5
    assert sound(tmp_path, chat(max_completion_tokens=None, max_tokens=9)).options.max_tokens == 9
    assert sound(tmp_path, chat(temperature=None, stop=None, n=None, tools=None)).options == LineOptions()


def test_hints_stand_in_the_line_or_in_its_body(tmp_path):
    hint = {"batchrun": {"expected_tokens": 7}}
    for line in (
        chat() | hint,
        chat(**hint),
        completion() | hint,
        {"prompt": "a"} | hint,
        {"messages": [HELLO]} | hint,
    ):
        read = sound(tmp_path, line)
        assert (read.options, read.unknown_fields) == (LineOptions(expected_tokens=7), ())
    both = chat(batchrun={"expected_tokens": 5}, max_tokens=9) | hint
    assert sound(tmp_path, both).options == LineOptions(max_tokens=9, expected_tokens=7)
    for nothing in (None, {}, {"expected_tokens": None}):
        assert sound(tmp_path, chat(batchrun=nothing) | {"batchrun": nothing}).options == LineOptions()


def test_unknown_hints_are_unknown_fields(tmp_path):
    line = chat(batchrun={"expected_token": 1, "expected_tokens": 2}) | {"batchrun": {"expect": 3}}
    read = sound(tmp_path, line)
    assert read.options.expected_tokens == 2
    assert read.unknown_fields == ("batchrun.expect", "batchrun.expected_token")


@pytest.mark.parametrize("given", [-1, 0])
def test_top_k_off(tmp_path, given):
    assert sound(tmp_path, chat(top_k=given)).options.top_k == 0


def test_one_stop_string_is_a_list_of_one(tmp_path):
    assert sound(tmp_path, chat(stop="END")).options.stop == ("END",)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ("text",)),
        ([5, 0, 2**31 - 1], ((5, 0, 2**31 - 1),)),
        (["a", "b"], ("a", "b")),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_completion_prompts(tmp_path, prompt, prompts):
    assert sound(tmp_path, completion(prompt=prompt)).prompts == prompts


def test_messages_of_every_role_and_content_parts(tmp_path):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    line = sound(tmp_path, chat(messages=given))
    assert line.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one \ntwo", "name": "Ann"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    )
    assert line.unknown_fields == ()


@pytest.mark.parametrize(
    "neutral",
    [
        {"best_of": 1, "stream": False, "logprobs": False, "top_logprobs": 0, "echo": False},
        {"length_penalty": 1.0, "use_beam_search": False},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"add_generation_prompt": True, "modalities": ["text"], "suffix": ""},
        {"truncation_side": "left", "thinking_token_budget": -1, "logprob_token_ids": [], "return_prompt_text": False},
        {"user": "u1", "metadata": {"k": "v"}, "store": True, "service_tier": "flex", "session_id": "s"},
    ],
)
def test_neutral_values_and_informative_fields_say_nothing(tmp_path, neutral):
    line = sound(tmp_path, chat(**neutral))
    assert (line.options, line.unknown_fields) == (LineOptions(), ())


def test_unknown_fields_are_collected_wherever_they_stand(tmp_path):
    line = chat(temprature=1, messages=[{**HELLO, "mood": "glad"}])
    line["priority"] = 3
    assert sound(tmp_path, line).unknown_fields == ("priority", "messages.mood", "temprature")
    assert sound(tmp_path, {"prompt": "a", "\x1b[31m": 1}).unknown_fields == ("\\x1b[31m",)


# --- bad lines --------------------------------------------------------------------------------------------------

NOT_JSON = {
    "cut short": b'{"prompt": "a',
    "two objects": b'{"prompt": "a"} {"prompt": "b"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "number out of range": b'{"prompt": "a", "temperature": 1e999}',
    "invalid UTF-8": b'{"prompt": "caf\xe9"}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "lone high surrogate": rb'{"prompt": "\ud800"}',
    "lone low surrogate": rb'{"prompt": "\udc00 x"}',
    "NUL byte": b'{"prompt": "a\x00b"}',
    "NULs of a torn file": b"\x00" * 4096,
    "UTF-16": '{"prompt": "a"}'.encode("utf-16-le"),
    "nesting bomb": b"[" * 1_000_000,
    "nesting bomb of objects": b'{"a":' * 1_000_000,
    "single quotes": b"{'prompt': 'a'}",
    "a list": b'[{"prompt": "a"}]',
    "a string": b'"prompt"',
    "a number": b"12",
    "null": b"null",
    "deep but closed": b"[" * 1000 + b"]" * 1000,
}


@pytest.mark.parametrize("line", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_not_a_json_object(tmp_path, line):
    found = fault(tmp_path, line)
    assert (found.code, found.custom_id, found.param) == ("invalid_json_line", "line-2", None)


def test_json_fault_says_where_and_what(tmp_path):
    nan = fault(tmp_path, NOT_JSON["NaN"]).message
    assert "column 32" in nan
    assert "'NaN}'" in nan
    assert "byte 16 of the line is 0xe9" in fault(tmp_path, NOT_JSON["invalid UTF-8"]).message


DEEP = json.loads("[" * 900 + "]" * 900)

BAD_LINES = {
    "custom_id empty": ({"custom_id": "", "prompt": "a"}, "invalid_request", "custom_id"),
    "custom_id too long": ({"custom_id": "i" * 513, "prompt": "a"}, "invalid_request", "custom_id"),
    "custom_id a number": ({"custom_id": 5, "prompt": "a"}, "invalid_request", "custom_id"),
    "id a float": ({"id": 5.0, "prompt": "a"}, "invalid_request", "id"),
    "id a boolean": ({"id": True, "prompt": "a"}, "invalid_request", "id"),
    "neither prompt nor messages": ({"text": "a"}, "invalid_request", None),
    "both prompt and messages": ({"prompt": "a", "messages": [HELLO]}, "invalid_request", "messages"),
    "method not POST": ({**chat(), "method": "GET"}, "invalid_request", "method"),
    "url missing": ({"custom_id": "a", "body": chat()["body"]}, "invalid_request", "url"),
    "url unsupported": ({**chat(), "url": "/v1/embeddings"}, "unsupported_url", "url"),
    "url not a text": ({**chat(), "url": ["/v1/completions"]}, "unsupported_url", "url"),
    "body missing": ({"custom_id": "a", "url": "/v1/completions"}, "invalid_request", "body"),
    "body a list": ({**chat(), "body": []}, "invalid_request", "body"),
    "prompt for the other url": (
        {**completion(), "url": "/v1/chat/completions"},
        "invalid_request",
        "messages",
    ),
    "prompt empty": (completion(prompt=""), "empty_prompt", "prompt"),
    "prompt an empty list": (completion(prompt=[]), "empty_prompt", "prompt"),
    "one of the prompts empty": (completion(prompt=["a", ""]), "empty_prompt", "prompt[1]"),
    "one of the id lists empty": (completion(prompt=[[1], []]), "empty_prompt", "prompt[1]"),
    "prompt a number": (completion(prompt=3), "invalid_request", "prompt"),
    "prompts of two sorts": (completion(prompt=["a", 1]), "invalid_request", "prompt[1]"),
    "token ids of two sorts": (completion(prompt=[1, "a"]), "invalid_request", "prompt[1]"),
    "token id negative": (completion(prompt=[[1], [2, -1]]), "invalid_request", "prompt[1][1]"),
    "token id too large": (completion(prompt=[2**31]), "invalid_request", "prompt[0]"),
    "token id a boolean": (completion(prompt=[1, True]), "invalid_request", "prompt[1]"),
    "prompt too deep": (completion(prompt=DEEP), "invalid_request", "prompt[0][0]"),
    "messages empty": (chat(messages=[]), "empty_prompt", "messages"),
    "messages a text": (chat(messages="Hello"), "invalid_request", "messages"),
    "message a text": (chat(messages=[HELLO, "Hello"]), "invalid_request", "messages[1]"),
    "role missing": (chat(messages=[{"content": "a"}]), "invalid_request", "messages[0].role"),
    "role unknown": (chat(messages=[{"role": "bot", "content": "a"}]), "invalid_request", "messages[0].role"),
    "role a list": (chat(messages=[{"role": [], "content": "a"}]), "invalid_request", "messages[0].role"),
    "content null": (
        chat(messages=[{"role": "user", "content": None}]),
        "invalid_request",
        "messages[0].content",
    ),
    "content a number": (
        chat(messages=[{"role": "user", "content": 1}]),
        "invalid_request",
        "messages[0].content",
    ),
    "tool calls": (
        chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}]),
        "invalid_request",
        "messages[0].tool_calls[0]",
    ),
    "image part": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "unsupported_field",
        "messages[0].content[0].type",
    ),
    "text part without text": (
        chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
        "invalid_request",
        "messages[0].content[0].text",
    ),
    "part a text": (
        chat(messages=[{"role": "user", "content": ["a"]}]),
        "invalid_request",
        "messages[0].content[0]",
    ),
    "temperature above 2": (chat(temperature=2.1), "invalid_request", "temperature"),
    "temperature a text": (chat(temperature="hot"), "invalid_request", "temperature"),
    "temperature a boolean": (chat(temperature=True), "invalid_request", "temperature"),
    "temperature too deep": (chat(temperature=DEEP), "invalid_request", "temperature"),
    "top_p negative": (chat(top_p=-0.1), "invalid_request", "top_p"),
    "top_k below -1": (chat(top_k=-2), "invalid_request", "top_k"),
    "min_p above 1": (chat(min_p=1.5), "invalid_request", "min_p"),
    "max_tokens zero": (chat(max_tokens=0), "invalid_request", "max_tokens"),
    "max_tokens bad under a good winner": (
        chat(max_tokens="9", max_completion_tokens=5),
        "invalid_request",
        "max_tokens",
    ),
    "min_tokens above max_tokens": (chat(min_tokens=6, max_tokens=5), "invalid_request", "min_tokens"),
    "seed beyond 64 bits": (chat(seed=2**63), "invalid_request", "seed"),
    "seed far beyond": (chat(seed=10**40), "invalid_request", "seed"),
    "stop with an empty text": (chat(stop=["a", ""]), "invalid_request", "stop"),
    "stop of too many": (chat(stop=["a"] * 17), "invalid_request", "stop"),
    "stop a number": (chat(stop=1), "invalid_request", "stop"),
    "stop token a text": (chat(stop_token_ids=[1, "2"]), "invalid_request", "stop_token_ids[1]"),
    "ignore_eos a number": (chat(ignore_eos=1), "invalid_request", "ignore_eos"),
    "model a number": (chat(model=4), "invalid_request", "model"),
    "hint zero": (chat() | {"batchrun": {"expected_tokens": 0}}, "invalid_request", "batchrun.expected_tokens"),
    "hint a text": (chat() | {"batchrun": {"expected_tokens": "9"}}, "invalid_request", "batchrun.expected_tokens"),
    "hint in the body": (
        chat(batchrun={"expected_tokens": 1.5}),
        "invalid_request",
        "batchrun.expected_tokens",
    ),
    "hint of a plain line": (
        {"prompt": "a", "batchrun": {"expected_tokens": True}},
        "invalid_request",
        "batchrun.expected_tokens",
    ),
    "hints a number": (chat() | {"batchrun": 200}, "invalid_request", "batchrun"),
    "plain form": ({"prompt": "a", "temperature": 9}, "invalid_request", "temperature"),
}


@pytest.mark.parametrize(("line", "code", "param"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line(tmp_path, line, code, param):
    found = fault(tmp_path, line)
    assert (found.code, found.param) == (code, param)


NOT_BUILT = {
    "best_of": 2,
    "stream": True,
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "prediction": {"type": "content"},
    "suffix": "end",
}


@pytest.mark.parametrize(("name", "value"), NOT_BUILT.items())
def test_field_that_is_not_built_is_refused_by_name(tmp_path, name, value):
    for line, param in ((chat(**{name: value}), name), ({"prompt": "a", name: value}, name)):
        found = fault(tmp_path, line)
        assert (found.code, found.param) == ("unsupported_field", param)
        assert name in found.message


def test_tools_and_what_else_the_template_gets(tmp_path):
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    line = sound(tmp_path, chat(tools=[tool], chat_template_kwargs={"enable_thinking": False}))
    assert (line.tools, line.template_kwargs, line.options.tool_choice) == (
        (tool,),
        {"enable_thinking": False},
        ToolChoice.AUTO,
    )
    line = sound(tmp_path, chat(tools=[tool], tool_choice="none"))
    assert (line.tools, line.options.tool_choice) == (None, None)
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    turns = [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    read = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    said = {"role": "assistant", "content": "", "tool_calls": [read]}
    assert sound(tmp_path, chat(messages=turns)).messages == (HELLO, said)
    for field, value, param in (
        ("tools", [{"type": "function"}], "tools[0]"),
        ("tools", {"type": "function"}, "tools"),
        ("tool_choice", 5, "tool_choice"),
        ("chat_template_kwargs", ["a"], "chat_template_kwargs"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs.messages"),
        ("messages", [{**said, "tool_calls": "x"}], "messages[0].tool_calls"),
        (
            "messages",
            [{**said, "tool_calls": [{"function": {"name": "a", "arguments": "[1"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ):
        assert fault(tmp_path, chat(**{field: value})).param == param


def test_what_a_chat_says_of_its_prompt(tmp_path):
    def given(**more: Any) -> Any:
        return sound(tmp_path, chat(**more)).template_kwargs

    assert given(reasoning_effort="low", documents=[{"text": "a"}]) == {
        "reasoning_effort": "low",
        "documents": [{"text": "a"}],
    }
    assert given(chat_template_kwargs={"a": 1}, add_generation_prompt=False) == {"a": 1, "add_generation_prompt": False}
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert given(continue_final_message=True) == given(**goes_on) == goes_on
    both = chat(continue_final_message=True, add_generation_prompt=True)
    assert fault(tmp_path, both).param == "add_generation_prompt"
    assert fault(tmp_path, chat(documents=["a"])).param == "documents"
    for name in ("reasoning_content", "reasoning"):
        said = {"role": "assistant", "content": "A.", name: "Hm."}
        read = {"role": "assistant", "content": "A.", "reasoning_content": "Hm."}
        line = sound(tmp_path, chat(messages=[HELLO, said, HELLO]))
        assert (line.messages, line.unknown_fields) == ((HELLO, read, HELLO), ())
    for added in (True, False):
        assert sound(tmp_path, {"prompt": "a", "add_special_tokens": added}).add_special_tokens is added


def test_tools_of_which_some_are_allowed(tmp_path):
    def allowed(mode: str, *names: str) -> dict[str, Any]:
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [function(name) for name in names]}}

    line = sound(tmp_path, chat(tools=TOOLS, tool_choice=allowed("auto", "clock")))
    assert (line.tools, line.options.tool_choice, line.options.grammar) == ((TOOLS[1],), ToolChoice.AUTO, None)
    line = sound(tmp_path, chat(tools=TOOLS, tool_choice=allowed("required", "clock")))
    assert (line.tools, line.options.tool_choice) == (tuple(TOOLS), ToolChoice.REQUIRED)
    assert json.loads(line.options.grammar.text)["tools"] == [["clock", NO_ARGUMENTS]]
    found = fault(tmp_path, chat(tools=TOOLS, tool_choice=allowed("required", "clock", "compass")))
    assert (found.code, found.param) == ("invalid_request", "tool_choice.allowed_tools.tools")
    for wrong in ({"mode": "any", "tools": TOOLS}, {"mode": "auto", "tools": []}, {"mode": "auto"}, "clock"):
        choice = {"type": "allowed_tools", "allowed_tools": wrong}
        assert fault(tmp_path, chat(tools=TOOLS, tool_choice=choice)).param == "tool_choice.allowed_tools"


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [function("weather", parameters=CITY), function("clock")]
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def test_calls_that_an_answer_must_make(tmp_path):
    def wanted(**more: Any) -> tuple[Any, ...]:
        options = sound(tmp_path, chat(**{"tools": TOOLS, **more})).options
        assert options.grammar is not None and options.grammar.kind == "tools"
        assert options.grammar_field == "tool_choice"
        return options.tool_choice, options.parallel_tool_calls, json.loads(options.grammar.text)

    both = [["weather", CITY], ["clock", NO_ARGUMENTS]]
    assert wanted(tool_choice="required") == (ToolChoice.REQUIRED, None, {"tools": both, "many": True})
    assert wanted(tool_choice="required", parallel_tool_calls=False) == (
        (ToolChoice.REQUIRED, False, {"tools": both, "many": False})
    )
    named = (ToolChoice.NAMED, None, {"tools": both[1:], "many": False})
    assert wanted(tool_choice=function("clock")) == named
    # A format of what is said besides calls leaves them as they are.
    assert wanted(tool_choice=function("clock"), response_format={"type": "json_object"}) == named
    loose = function("loose", parameters={"type": ["object", "null"]})
    assert wanted(tool_choice=function("loose"), tools=[loose])[2]["tools"] == [["loose", {"type": "object"}]]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tool_choice": "required"}, "invalid_request", "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "invalid_request", "tool_choice"),
        ({"tool_choice": function("clock")}, "invalid_request", "tool_choice.function.name"),
        ({"tool_choice": function("nobody"), "tools": TOOLS}, "invalid_request", "tool_choice.function.name"),
        ({"tool_choice": "sometimes", "tools": TOOLS}, "invalid_request", "tool_choice"),
        ({"tool_choice": {"function": "clock"}, "tools": TOOLS}, "invalid_request", "tool_choice"),
        ({"tool_choice": {"type": "custom"}, "tools": TOOLS}, "unsupported_field", "tool_choice.type"),
        ({"tool_choice": "required", "tools": [function("two words")]}, "invalid_request", "tools"),
        ({"tool_choice": "required", "tools": [function("f", parameters=3)]}, "invalid_request", "tools"),
        (
            {"tool_choice": "required", "tools": [function("f", parameters={"type": "array"})]},
            "invalid_request",
            "tools",
        ),
        ({"tool_choice": "required", "tools": TOOLS, "guided_regex": "a"}, "invalid_request", "guided_regex"),
        ({"tool_choice": "required", "tools": TOOLS, "bad_words": ["a"]}, "invalid_request", "bad_words"),
        ({"parallel_tool_calls": 1}, "invalid_request", "parallel_tool_calls"),
    ],
)
def test_calls_that_cannot_be_made_are_refused_by_name(tmp_path, fields, code, param):
    found = fault(tmp_path, chat(**fields))
    assert (found.code, found.param) == (code, param)


SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
ANY_OBJECT = Grammar("json", '{"type":"object"}')
AS_TEXT = json.dumps(SCHEMA, separators=(",", ":"))  # properties in their order
GRAMMARS = [
    ("response_format", {"type": "text"}, None),
    ("response_format", {"type": "json_object"}, ANY_OBJECT),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}},
        Grammar("json", AS_TEXT),
    ),
    ("structured_outputs", {"json": SCHEMA}, Grammar("json", AS_TEXT)),
    ("structured_outputs", {"json": json.dumps(SCHEMA), "regex": None}, Grammar("json", AS_TEXT)),
    ("structured_outputs", {"regex": "a+"}, Grammar("regex", "a+")),
    ("structured_outputs", {"choice": ["a", "ü"]}, Grammar("choice", '["a","ü"]')),
    ("structured_outputs", {"grammar": "root ::= x"}, Grammar("grammar", "root ::= x")),
    ("structured_outputs", {"json_object": True}, ANY_OBJECT),
    ("structured_outputs", {"json_object": False}, None),
    ("structured_outputs", {}, None),
    (
        "structured_outputs",
        {"json": {"type": "array"}, "disable_any_whitespace": True},
        Grammar("json", '{"x-guidance":{"whitespace_flexible":false},"type":"array"}'),
    ),
    (
        "structured_outputs",
        {"json": {"type": "array"}, "whitespace_pattern": " ?"},
        Grammar("json", '{"x-guidance":{"whitespace_pattern":" ?"},"type":"array"}'),
    ),
    ("guided_json", SCHEMA, Grammar("json", AS_TEXT)),
    ("guided_json", json.dumps(SCHEMA), Grammar("json", AS_TEXT)),
    ("guided_regex", "a+", Grammar("regex", "a+")),
    ("guided_choice", ["a"], Grammar("choice", '["a"]')),
    ("guided_grammar", "start: x", Grammar("grammar", "start: x")),
    ("guided_json_object", True, ANY_OBJECT),
]


@pytest.mark.parametrize(("name", "value", "grammar"), GRAMMARS)
def test_what_an_answer_must_be(tmp_path, name, value, grammar):
    for line in (chat(**{name: value}), {"prompt": "a", name: value}):
        options = sound(tmp_path, line).options
        assert options.grammar == grammar
        assert options.grammar_field == (None if grammar is None else name)


BAD_GRAMMARS = [
    ("response_format", "json", "response_format"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "n"}}, "response_format.json_schema"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"schema": 3}},
        "response_format.json_schema.schema",
    ),
    ("structured_outputs", [], "structured_outputs"),
    ("structured_outputs", {"json": "{"}, "structured_outputs.json"),
    ("structured_outputs", {"json": SCHEMA, "regex": "a"}, "structured_outputs"),
    ("structured_outputs", {"whitespace_pattern": " "}, "structured_outputs"),
    ("structured_outputs", {"choice": []}, "structured_outputs.choice"),
    ("structured_outputs", {"choice": ["a", ""]}, "structured_outputs.choice"),
    ("structured_outputs", {"choice": "a"}, "structured_outputs.choice"),
    ("guided_json", "not JSON", "guided_json"),
    ("guided_regex", "", "guided_regex"),
    ("guided_choice", ["a", 1], "guided_choice"),
    ("guided_grammar", {}, "guided_grammar"),
]


@pytest.mark.parametrize(("name", "value", "param"), BAD_GRAMMARS)
def test_what_is_no_grammar_is_refused_by_name(tmp_path, name, value, param):
    found = fault(tmp_path, chat(**{name: value}))
    assert (found.code, found.param) == ("invalid_request", param)


def test_a_line_has_one_grammar(tmp_path):
    found = fault(tmp_path, chat(guided_regex="a", response_format={"type": "json_object"}))
    assert (found.code, found.param) == ("invalid_request", "guided_regex")
    assert "response_format" in found.message
    assert fault(tmp_path, chat(guided_regex="a", bad_words=["a"])).param == "bad_words"
    found = fault(tmp_path, chat(structured_outputs={"structural_tag": "x"}))
    assert (found.code, found.param) == ("unsupported_field", "structured_outputs")


def test_true_is_not_one(tmp_path):
    assert fault(tmp_path, chat(best_of=True)).code == "unsupported_field"
    assert fault(tmp_path, chat(n=True)).code == "invalid_request"
    assert fault(tmp_path, chat(presence_penalty=False)).code == "invalid_request"


def test_how_answers_are_chosen_and_shown(tmp_path):
    fields = {
        "n": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"50256": -100, "7": 1.5},
        "bad_words": ["a", "b c"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "truncate_prompt_tokens": -1,
    }
    read = LineOptions(
        n=3,
        presence_penalty=0.5,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        logit_bias=((7, 1.5), (50256, -100.0)),
        bad_words=("a", "b c"),
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        truncate_prompt_tokens=-1,
    )
    assert sound(tmp_path, chat(**fields)).options == read
    assert sound(tmp_path, {"prompt": "a", **fields}).options == read


def test_logprobs_are_asked_for_in_each_apis_way(tmp_path):
    assert sound(tmp_path, chat(logprobs=True)).options.logprobs == 0
    assert sound(tmp_path, chat(logprobs=True, top_logprobs=5)).options.logprobs == 5
    assert sound(tmp_path, chat(logprobs=False, top_logprobs=0)).options.logprobs is None
    assert sound(tmp_path, {"prompt": "a", "logprobs": 0}).options.logprobs == 0
    assert sound(tmp_path, {"prompt": "a", "logprobs": 5, "echo": False}).options.logprobs == 5
    assert sound(tmp_path, {"prompt": "a", "logprobs": False}).options.logprobs is None
    assert sound(tmp_path, {"prompt": "a", "echo": True}).options.echo
    for line, param in (
        (chat(top_logprobs=5), "top_logprobs"),
        (chat(logprobs=5), "logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
    ):
        found = fault(tmp_path, line)
        assert (found.code, found.param) == ("invalid_request", param)
    assert sound(tmp_path, chat(prompt_logprobs=2)).options.prompt_logprobs == 2
    options = sound(tmp_path, {"prompt": "a", "logprobs": 1, "echo": True, "max_tokens": 0}).options
    assert (options.max_tokens, options.prompt_only) == (1, True)
    for line in (chat(max_tokens=0), {"prompt": "a", "max_tokens": 0}):
        assert fault(tmp_path, line).param == "max_tokens"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", "1"),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"99999999999": 1}),
        ("logit_bias", {"5": 101}),
        ("bad_words", "a"),
        ("bad_words", [""]),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("skip_special_tokens", 1),
    ],
)
def test_a_wrong_value_of_these_is_that_lines_error(tmp_path, name, value):
    found = fault(tmp_path, chat(**{name: value}))
    assert (found.code, found.param.split(".")[0]) == ("invalid_request", name)


def test_first_fault_in_the_lines_own_order_is_reported(tmp_path):
    assert fault(tmp_path, chat(top_p=9, temperature=9)).param == "top_p"
    assert fault(tmp_path, chat(temperature=9, top_p=9)).param == "temperature"


def test_message_says_what_would_be_right_and_quotes_what_is_wrong(tmp_path):
    found = fault(tmp_path, chat(temperature="\x1b[2J" + "hot " * 1000))
    assert found.message.startswith("temperature must be a number from 0 to 2, and is '\\x1b[2Jhot")
    assert len(found.message) < 120
    assert "(write 5), and is 5.0" in fault(tmp_path, chat(max_tokens=5.0)).message
    url = fault(tmp_path, {**chat(), "url": "/v1/embeddings"}).message
    assert all(endpoint in url for endpoint in Endpoint)


def test_fault_carries_the_lines_own_id(tmp_path):
    assert fault(tmp_path, chat(temperature=9)).custom_id == "a"
    assert fault(tmp_path, {**chat(), "custom_id": ["x"]}).custom_id == "line-2"


def test_first_of_a_custom_id_runs_and_each_later_line_is_a_duplicate(tmp_path):
    one, *others = read(tmp_path, {"id": 1, "prompt": "a"}, {"custom_id": "1", "prompt": "b"}, {"id": 1, "prompt": "a"})
    assert isinstance(one, JobLine)
    for number, other in enumerate(others, 2):
        assert isinstance(other, LineFault)
        assert (other.number, other.code, other.custom_id) == (number, "duplicate_custom_id", "1")
        assert "line 1" in other.message


def test_every_pass_finds_the_same_duplicates(tmp_path):
    ids = [1, 2, 1, 3, 2, 1]
    whole = read(tmp_path, *({"id": i, "prompt": "a"} for i in ids))
    source = open_job(tmp_path / "jobs.jsonl")
    next(read_job(source))  # a pass that is given up has found nothing
    assert list(read_job(source)) == whole
    assert list(read_job(source)) == whole
    assert [item.number for item in whole if isinstance(item, LineFault)] == [3, 5, 6]


def test_explicit_id_that_equals_a_missing_one(tmp_path):
    codes = [getattr(x, "code", None) for x in read(tmp_path, {"id": "line-2", "prompt": "a"}, {"prompt": "b"})]
    assert codes == [None, "duplicate_custom_id"]
    codes = [getattr(x, "code", None) for x in read(tmp_path, {"prompt": "a"}, {"id": "line-1", "prompt": "b"})]
    assert codes == [None, "duplicate_custom_id"]


def test_faulty_line_keeps_its_id_from_being_used_again(tmp_path):
    codes = [getattr(x, "code", None) for x in read(tmp_path, chat(temperature=9), chat())]
    assert codes == ["invalid_request", "duplicate_custom_id"]


# --- lint -------------------------------------------------------------------------------------------------------


def test_lint_counts(tmp_path):
    lines = [
        {"id": "a", "prompt": "a", "mood": 1, "model": "m"},
        b"",
        {"id": "b", "prompt": "b", "mood": 2, "tone": 1, "model": "m"},
        b"nonsense",
        {"id": "a", "prompt": "c"},
        {"id": "d", "prompt": "d"},
    ]
    items = read(tmp_path, *lines)
    source = open_job(tmp_path / "jobs.jsonl")
    lint = lint_job(source)
    assert (lint.total, lint.sound) == (5, 3)
    assert lint.faults == [item for item in items if isinstance(item, LineFault)]
    assert [f.number for f in lint.faults] == [4, 5]
    assert lint.unknown_fields == Counter(mood=2, tone=1)
    assert lint.models == Counter(m=2)
    assert lint.fingerprint == source.fingerprint()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": deep(200)}, "guided_json"),
        ({"guided_json": json.dumps(deep(200))}, "guided_json"),
        ({"guided_json": {"x-guidance": None}, "guided_whitespace_pattern": " ?"}, "guided_json"),
        ({"structured_outputs": {"json": {"x-guidance": 5}, "disable_any_whitespace": True}}, None),
        ({"tools": [function_of(deep(200))], "tool_choice": "required"}, "tools"),
        ({"tools": [function_of({"type": "object", "x-guidance": None})], "tool_choice": "required"}, "tools"),
    ],
)
def test_an_odd_schema_is_a_fault_of_its_line(tmp_path, fields, param):
    found = fault(tmp_path, chat(**fields))
    assert found.code == "invalid_request"
    assert param is None or found.param == param


def test_what_nobody_has_thought_of_is_a_fault_of_its_line(tmp_path, monkeypatch):
    def odd(*_: Any) -> Any:
        raise TypeError("an odd thing")

    read_body = job_module._read_body
    monkeypatch.setattr(job_module, "_read_body", lambda *a: odd() if a[1].get("seed") == 77 else read_body(*a))
    found = fault(tmp_path, chat(seed=77))
    assert (found.code, found.message) == ("invalid_request", "the line cannot be read: an odd thing")


def test_a_name_that_a_bad_line_was_given_has_one_outcome(tmp_path):
    bad, taken = read(tmp_path, "{", {"id": "line-1", "prompt": "x"})
    assert (bad.custom_id, bad.code) == ("line-1", "invalid_json_line")
    assert (taken.custom_id, taken.code) == ("line-1", "duplicate_custom_id")
