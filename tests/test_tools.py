"""Calls of tools that a line wants for sure, through whole runs of models that would never make one: what is finished
is calls of the functions that were asked for, with arguments by their schemas."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from factories import make_model
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletion
from schemas import WRITTEN, make_schemas

import batchrun

MESSAGES = "{%- for message in messages %}{{ message.role }}: {{ message.content }}\n{%- endfor %}assistant:"
TOOLS = "{%- for tool in tools or [] %}{{ tool.function.name }}\n{%- endfor %}"
TEMPLATES = {
    "hermes": TOOLS + "{#- <tool_call> #}" + MESSAGES,
    "llama": TOOLS + '{#- "parameters" ipython #}' + MESSAGES,
    "mistral": TOOLS + "{#- [TOOL_CALLS] #}" + MESSAGES,
    "mistral, later": TOOLS + "{#- [TOOL_CALLS] [ARGS] #}" + MESSAGES,
    "thinks": TOOLS + "{#- <tool_call> </think> #}" + MESSAGES + "{{ begin }}",
    "channels": TOOLS + "{#- <|channel|> <|message|> #}" + MESSAGES,
    "unknown": TOOLS + MESSAGES,
}
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]"]
THOUGHTS = ["<think>", "</think>"]
CHANNEL_MARKS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"]
CHANNEL_WORDS = ["analysis", "commentary", "final", " to=functions.clock", "{}", "Hm.", "Noon."]
VOCAB_SIZE = 400
USER = {"role": "user", "content": "How is the weather in Bern?"}


def function(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | ({} if parameters is None else {"parameters": parameters})}


WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Bern", "Zürich", "</tool_call>", "[TOOL_CALLS]"]}},
}
TREE = {"type": "object", "properties": {"down": {"$ref": "#"}}, "additionalProperties": False}
SCHEMAS = {"weather": WEATHER, "tree.1": TREE, "clock": None}
ASKED = [function(name, schema) for name, schema in SCHEMAS.items()]


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory):
    """`tool_model(special)`: a model whose tokenizer has what marks calls as tokens; special ones, or of the text."""
    from tokenizers import AddedToken, Tokenizer

    made: dict[bool, Path] = {}

    def get(special: bool) -> Path:
        if special not in made:
            path = made[special] = make_model(tmp_path_factory.mktemp("tools") / "model", vocab_size=VOCAB_SIZE)
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
            tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
            tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in THOUGHTS])
            assert tokenizer.get_vocab_size() <= VOCAB_SIZE
            tokenizer.save(str(path / "tokenizer.json"))
        return made[special]

    return get


def token_id(model: Path, text: str) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(text))


def run(model: Path, template: str, folder: Path, lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The body of each result or error, by custom_id."""
    out = folder / f"{len(list(folder.iterdir()))}.run"
    (folder / "jobs.jsonl").write_text("".join(json.dumps({"messages": [USER], **line}) + "\n" for line in lines))
    (folder / "template.jinja").write_text(TEMPLATES[template])
    batchrun.run(folder / "jobs.jsonl", model=str(model), out=out, chat_template=str(folder / "template.jinja"))
    found = [
        json.loads(line) for name in ("results.jsonl", "errors.jsonl") for line in (out / name).read_text().splitlines()
    ]
    return {line["custom_id"]: line["response"]["body"] for line in found}


def only_choice(body: dict[str, Any]) -> Any:
    return ChatCompletion.model_validate(body, strict=True).choices[0]


def check_calls(choice: Any, schemas: dict[str, Any]) -> None:
    """The message is calls of these functions and nothing else."""
    assert choice.message.content is None
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        schema = schemas[call.function.name] or {"const": {}}
        Draft202012Validator(schema).validate(json.loads(call.function.arguments))


@pytest.mark.parametrize("special", [False, True], ids=["marks as text", "marks as special tokens"])
@pytest.mark.parametrize("template", ["hermes", "llama", "mistral", "mistral, later"])
def test_finished_answers_are_the_calls_that_were_wanted(tool_model, tmp_path, template, special):
    def how(i: int) -> dict[str, Any]:
        return {"tools": ASKED, "max_tokens": 250, "temperature": [0, 1][i % 2], "seed": i}

    lines = [{"id": f"required {i}", **how(i), "tool_choice": "required"} for i in range(6)]
    lines += [{"id": f"one {i}", **how(i), "tool_choice": "required", "parallel_tool_calls": False} for i in range(6)]
    lines += [{"id": f"{name} {i}", **how(i), "tool_choice": function(name)} for name in SCHEMAS for i in range(2)]
    lines += [{"id": "cut 0", **how(0), "tool_choice": function("weather"), "max_tokens": 4}]
    found = run(tool_model(special), template, tmp_path, lines)
    assert len(found) == len(lines)
    finished = []
    for name, body in found.items():
        kind, choice = name.split()[0], only_choice(body)
        if choice.finish_reason == "length":
            continue
        finished.append(kind)
        assert choice.finish_reason == ("tool_calls" if kind in ("required", "one") else "stop")
        check_calls(choice, SCHEMAS)
        if kind in ("one", *SCHEMAS):
            assert len(choice.message.tool_calls) == 1
        if kind in SCHEMAS:
            assert choice.message.tool_calls[0].function.name == kind
    reasons = Counter(only_choice(body).finish_reason for body in found.values())
    [report] = tmp_path.glob("*.run/report.json")
    assert json.loads(report.read_bytes())["finish_reasons"] == reasons
    assert "cut" not in finished
    assert set(finished) >= {"required", "one", *SCHEMAS}
    cut = only_choice(found["cut 0"])
    assert cut.message.content
    assert cut.message.tool_calls is None


def test_arguments_follow_schemas_of_many_kinds(tool_model, tmp_path):
    schemas = {f"f{i}": schema for i, schema in enumerate(make_schemas(60, seed=3)) if schema.get("type") == "object"}
    assert len(schemas) > 15
    assert any(schema in WRITTEN for schema in schemas.values())
    lines = [
        {"id": name, "tools": [function(name, schema)], "tool_choice": "required", "max_tokens": 300, "seed": i}
        for i, (name, schema) in enumerate(schemas.items())
    ]
    found = run(tool_model(False), "hermes", tmp_path, [{**line, "parallel_tool_calls": False} for line in lines])
    choices = {name: only_choice(body) for name, body in found.items()}
    finished = [name for name, choice in choices.items() if choice.finish_reason == "tool_calls"]
    assert len(finished) > 0.7 * len(schemas)
    for name in finished:
        check_calls(choices[name], {name: schemas[name]})
    assert {choice.finish_reason for choice in choices.values()} <= {"tool_calls", "length"}


def test_thoughts_come_before_calls_and_before_what_else_an_answer_must_be(tool_model, tmp_path):
    model = tool_model(False)
    opened, closed, letter = (token_id(model, mark) for mark in (*THOUGHTS, "<"))
    calls = {"tools": ASKED, "tool_choice": function("weather"), "max_tokens": 100, "temperature": 0}
    regex = {"guided_regex": "[0-9]{3}", "max_tokens": 100, "temperature": 0}
    prompted = {"chat_template_kwargs": {"begin": "<think>\n"}}
    thought = {"chat_template_kwargs": {"begin": "<think>\n\n</think>\n\n"}}
    # A model of random weights would think up to its limit.
    ends, begins = {closed: 100}, {opened: 50, closed: 60}
    lines = [
        {"id": f"{name} {kind}", **wanted, **how}
        for kind, wanted in (("calls", calls), ("regex", regex))
        for name, how in (
            ("prompted", {**prompted, "logit_bias": ends}),
            ("chosen", {"logit_bias": begins}),
            ("unwanted", {"logit_bias": {opened: -100, letter: -100}}),
            ("over", {**thought, "logit_bias": begins}),
            ("endless", {**prompted, "logit_bias": {closed: -100, "29": 100}}),
        )
    ]
    for name, body in run(model, "thinks", tmp_path, lines).items():
        choice = only_choice(body)
        how, kind = name.split()
        reasoning = body["choices"][0]["message"].get("reasoning_content")
        if how == "endless":
            assert (choice.finish_reason, choice.message.content) == ("length", "")
            assert reasoning
            continue
        assert reasoning == (None if how in ("unwanted", "over") else "" if how == "prompted" else reasoning)
        assert (reasoning is not None) == (how in ("prompted", "chosen"))
        assert choice.finish_reason == "stop"
        if kind == "calls":
            check_calls(choice, SCHEMAS)
        else:
            assert choice.message.content.isdigit()
            assert len(choice.message.content) == 3


def test_what_cannot_be_wanted_of_a_model_is_an_error_of_the_line(tool_model, tmp_path):
    model = tool_model(False)
    lines = [
        {"id": "unknown", "tools": ASKED, "tool_choice": "required"},
        {"id": "auto", "tools": ASKED, "max_tokens": 3},
    ]
    found = run(model, "unknown", tmp_path, lines)
    [report] = tmp_path.glob("*.run/report.json")
    warned = {warning["code"]: warning["count"] for warning in json.loads(report.read_bytes())["warnings"]}
    assert warned["tool_calls_not_read"] == 1
    error = found["unknown"]["error"]
    assert (error["code"], error["param"]) == ("unsupported_field", "tool_choice")
    assert only_choice(found["auto"]).finish_reason == "length"
    lines = [
        {"id": "endless", "tools": ASKED, "tool_choice": "required", "ignore_eos": True},
        {"id": "odd", "tools": [function("f", {"type": "object", "not": {}})], "tool_choice": "required"},
    ]
    found = run(model, "hermes", tmp_path, lines)
    for name, reason in (("endless", "ignore_eos"), ("odd", "not")):
        error = found[name]["error"]
        assert (error["code"], error["param"]) == ("invalid_request", "tool_choice")
        assert reason in error["message"]


def test_one_call_where_calls_are_not_to_be_parallel(tool_model, tmp_path):
    """Also of a model that is free to write what it likes: further calls are left out."""
    model = tool_model(False)
    written = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>' * 2
    free = {"tools": ASKED, "guided_choice": [written], "max_tokens": 150}
    found = run(
        model,
        "hermes",
        tmp_path,
        [{"id": "many", **free}, {"id": "one", **free, "parallel_tool_calls": False}],
    )
    count = {name: len(only_choice(body).message.tool_calls) for name, body in found.items()}
    assert count == {"many": 2, "one": 1}
    assert {only_choice(body).finish_reason for body in found.values()} == {"tool_calls"}


def test_calls_before_a_stop_string_are_read(tool_model, tmp_path):
    """Though the special token that marks them is no part of the text that the stop string is looked for in."""
    how = {"tools": [function("clock")], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 250}
    how |= {"stop": ["}]"], "temperature": 1, "seed": 1}
    lines = [{"id": "kept", **how, "include_stop_str_in_output": True}, {"id": "cut", **how}]
    found = run(tool_model(True), "mistral", tmp_path, lines)
    kept, cut = only_choice(found["kept"]), only_choice(found["cut"])
    assert kept.finish_reason == "tool_calls"
    check_calls(kept, SCHEMAS)
    assert cut.finish_reason == "stop"
    assert cut.message.tool_calls is None
    assert cut.message.content.startswith('[{"name')


@pytest.mark.parametrize("template", ["hermes", "llama", "mistral", "unknown"])
def test_an_answer_in_a_format_may_be_calls_instead(tool_model, tmp_path, template):
    """What the model would write does not matter: it is pushed towards calls, or away from them."""
    model = tool_model(True)
    schema = {"type": "object", "properties": {"zone": {"enum": ["UTC"]}}, "required": ["zone"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    # What only calls have, where the two differ first.
    begins = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama": "n"}.get(template)
    away = "z" if template == "llama" else "{"
    how = {
        "tools": ASKED,
        "response_format": {"type": "json_schema", "json_schema": {"name": "zone", "schema": schema}},
        "max_tokens": 250,
        "temperature": 1,
        "parallel_tool_calls": False,
    }
    lines = [
        {
            "id": f"{i} {bias}",
            **how,
            "seed": i,
            "logit_bias": {token_id(model, begins): bias, token_id(model, away): -bias},
        }
        if begins
        else {"id": f"{i} 0", **how, "seed": i}
        for i in range(6)
        for bias in (-100, 100)[: 2 if begins else 1]
    ]
    found = run(model, template, tmp_path, lines)
    kinds = set()
    for name, body in found.items():
        choice = only_choice(body)
        if choice.finish_reason == "length":
            continue
        kinds.add((name.split()[1], choice.finish_reason))
        if choice.finish_reason == "tool_calls":
            assert choice.message.tool_calls[0].function.name in SCHEMAS
            assert isinstance(json.loads(choice.message.tool_calls[0].function.arguments), dict)
        else:
            Draft202012Validator(schema).validate(json.loads(choice.message.content))
    assert kinds == ({("-100", "stop"), ("100", "tool_calls")} if begins else {("0", "stop")})


@pytest.fixture(scope="module")
def channel_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has the marks of channels as special tokens, and what stands between them as others."""
    from tokenizers import AddedToken, Tokenizer

    path = make_model(tmp_path_factory.mktemp("channels") / "model", vocab_size=VOCAB_SIZE)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in CHANNEL_MARKS])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in CHANNEL_WORDS])
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_answers_in_channels_are_taken_apart(channel_model, tmp_path):
    """They are written a token at a time: of the tokens that are left, each counts by far the most at its turn."""

    def said(*tokens: str, **more: Any) -> dict[str, Any]:
        bias = {token_id(channel_model, token): 100 - 15 * place for place, token in enumerate(tokens)}
        # A token that the answer has already has lost its bias.
        how = {"temperature": 0, "repetition_penalty": 100, "max_tokens": len(tokens)}
        return {**how, "logit_bias": bias, **more}

    call = (" to=functions.clock", "<|channel|>", "commentary", "<|message|>", "{}", "<|call|>")
    ends = {"stop_token_ids": [int(token_id(channel_model, "<|call|>"))]}
    tools = {"tools": [function("clock")]}
    lines = [
        {"id": "call", **said(*call, **ends, **tools)},
        {"id": "cut call", **said(*call[:4], **tools)},
        {"id": "no tools", **said(*call, **ends)},
        {"id": "final", **said("<|channel|>", "final", "<|message|>", "Noon.", "<|im_end|>")},
        {"id": "thought", **said("<|channel|>", "analysis", "<|message|>", "Hm.", "<|end|>", "Noon.")},
        {"id": "cut thought", **said("<|channel|>", "analysis", "<|message|>", "Hm.")},
        {"id": "cut header", **said("<|channel|>", "analysis")},
        {"id": "stopped", **said("<|channel|>", "final", "<|message|>", "Hm.", "Noon.", stop=["oon"])},
        {"id": "kept back", **said("<|channel|>", "analysis", "<|message|>", "Hm.", include_reasoning=False)},
        {"id": "as text", **said("<|channel|>", "final", "<|message|>", "Noon.", skip_special_tokens=False)},
    ]
    found = run(channel_model, "channels", tmp_path, lines)
    read = {}
    for name, body in found.items():
        choice = only_choice(body)
        calls = [(made.function.name, made.function.arguments) for made in choice.message.tool_calls or []]
        reasoning = body["choices"][0]["message"].get("reasoning_content")
        read[name] = (choice.finish_reason, choice.message.content, reasoning, calls)
    assert read == {
        "call": ("tool_calls", None, None, [("clock", "{}")]),
        "cut call": ("length", "", None, []),
        "no tools": ("stop", "{}", None, []),
        "final": ("stop", "Noon.", None, []),
        "thought": ("length", "Noon.", "Hm.", []),
        "cut thought": ("length", "", "Hm.", []),
        "cut header": ("length", "", None, []),
        "stopped": ("stop", "Hm.N", None, []),
        "kept back": ("length", "", None, []),
        "as text": ("length", "Noon.", None, []),
    }


def test_a_grammar_is_refused_where_answers_are_in_channels(channel_model, tmp_path):
    schema = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"type": "object"}}}
    named = {"type": "function", "function": {"name": "clock"}}
    refused = {
        "response_format": {"response_format": schema},
        "response_format and auto": {"response_format": schema, "tools": ASKED},
        "structured_outputs": {"structured_outputs": {"regex": "a"}},
        "tool_choice required": {"tools": ASKED, "tool_choice": "required"},
        "tool_choice named": {"tools": ASKED, "tool_choice": named},
    }
    lines = [{"id": name, "max_tokens": 3, **fields} for name, fields in refused.items()]
    free = [
        {"id": "auto", "max_tokens": 3, "tools": ASKED},
        {"id": "text", "max_tokens": 3, "response_format": {"type": "text"}},
    ]
    found = run(channel_model, "channels", tmp_path, lines + free)
    for name in refused:
        error = found[name]["error"]
        assert (error["code"], error["param"]) == ("unsupported_field", name.split()[0])
        assert "channels" in error["message"]
    assert {only_choice(found[line["id"]]).finish_reason for line in free} <= {"length", "stop", "tool_calls"}
    [report] = tmp_path.glob("*.run/report.json")
    codes = {warning["code"] for warning in json.loads(report.read_bytes())["warnings"]}
    assert "tool_calls_not_read" not in codes
