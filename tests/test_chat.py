"""Answers of chats taken apart: thinking, and calls of tools, as the common families of models write them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from transformers import AutoTokenizer

import batchrun
from batchrun.chat import ChatAnswer, ChatReader, UnknownFormat
from batchrun.request import Grammar, ToolCall

HERMES = "{%- if tools %}<tool_call>{%- endif %}"
LLAMA = """{%- if tools is not none %}Environment: ipython {"name": ..., "parameters": ...}{%- endif %}"""
MISTRAL = "{%- if tool_calls %}[TOOL_CALLS]{%- endif %}"
WEATHER = ToolCall("weather", '{"city": "Zürich"}')
CLOCK = ToolCall("clock", "{}")


def read(template: str, text: str, *, in_thought: bool = False) -> ChatAnswer:
    return ChatReader(template).read(text, text, calls=True, in_thought=in_thought)


@pytest.mark.parametrize(
    ("template", "text", "content", "calls"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>', "", [WEATHER]),
        (
            HERMES,
            'I look.\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n'
            '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Zürich\\"}"}',  # ended by its end
            "I look.",
            [CLOCK, WEATHER],
        ),
        (LLAMA, '{"name": "weather", "parameters": {"city": "Zürich"}}', "", [WEATHER]),
        (
            LLAMA,
            '<|python_tag|>{"name": "clock", "parameters": {}}; {"name": "clock", "arguments": {}}<|eom_id|>',
            "",
            [CLOCK, CLOCK],
        ),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Zürich"}}, {"name": "clock"}]',
            "",
            [WEATHER, CLOCK],
        ),
        (
            MISTRAL,
            'Well.[TOOL_CALLS]weather[ARGS]{"city": "Zürich"}[TOOL_CALLS]clock[CALL_ID]a1[ARGS]{}',
            "Well.",
            [WEATHER, CLOCK],
        ),
    ],
)
def test_calls_of_tools(template, text, content, calls):
    assert read(template, text) == ChatAnswer(content, None, tuple(calls))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (HERMES, "No call."),
        (HERMES, "<tool_call>{not json}</tool_call>"),
        (HERMES, '<tool_call>{"name": 5}</tool_call>'),
        (HERMES, '<tool_call>{"name": "a", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b", "argu'),
        (LLAMA, 'The answer is {"name": "clock"}'),
        (LLAMA, '{"name": "Anna", "age": 31}'),
        (LLAMA, '{"name": "clock"} and more'),
        (LLAMA, "[" * 100_000),
        (MISTRAL, "[TOOL_CALLS]"),
        (MISTRAL, "[TOOL_CALLS][1]"),
        (MISTRAL, '[TOOL_CALLS]a[ARGS]{"b": 1'),
        ("", '<tool_call>{"name": "clock"}</tool_call>'),
    ],
)
def test_what_is_no_call_is_text(template, text):
    assert read(template, text) == ChatAnswer(text, None, ())


def test_without_tools_nothing_is_looked_for():
    text = '<tool_call>{"name": "clock"}</tool_call>'
    assert ChatReader(HERMES).read(text, text, calls=False, in_thought=False) == ChatAnswer(text, None, ())


THINKS = "{{ content.split('</think>')[-1] }}"


@pytest.mark.parametrize(
    ("text", "in_thought", "reasoning", "content"),
    [
        ("<think>\nIt rains.\n</think>\n\nTake a coat.", False, "It rains.", "Take a coat."),
        ("\nIt rains.\n</think>\nTake a coat.", True, "It rains.", "Take a coat."),
        ("<think>\n\n</think>\n\nHello", False, "", "Hello"),
        ("<think>cut off at the li", False, "cut off at the li", ""),
        ("cut off at the li", True, "cut off at the li", ""),
        ("Hello", False, None, "Hello"),
        ("Of </think> one may write.", False, None, "Of </think> one may write."),
    ],
)
def test_thinking(text, in_thought, reasoning, content):
    assert read(THINKS, text, in_thought=in_thought) == ChatAnswer(content, reasoning, ())
    assert read("", text) == ChatAnswer(text, None, ())


def test_thinking_comes_before_calls():
    text = '<think>Which tool?</think>\n<tool_call>{"name": "clock"}</tool_call>'
    assert read(HERMES + THINKS, text) == ChatAnswer("", "Which tool?", (CLOCK,))


def test_whether_a_prompt_ends_in_a_thought():
    assert ChatReader(THINKS).begins_in_thought("<|assistant|>\n<think>\n")
    assert not ChatReader(THINKS).begins_in_thought("<think>\n\n</think>\n\n")
    assert not ChatReader(HERMES).begins_in_thought("<think>\n")


# --- channels, as GPT-OSS has them

CHANNELS = "{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}"
THOUGHT = "<|channel|>analysis<|message|>It rains.<|end|><|start|>assistant"
TO_WEATHER = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Zürich"}<|call|>'
TO_CLOCK = " to=functions.clock<|channel|>commentary json<|message|>{}<|call|>"
BAD_CALL = '<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{"zone": "U'


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"{THOUGHT}<|channel|>final<|message|>Take a coat.<|return|>", "It rains.", "Take a coat.", []),
        (f"{THOUGHT}<|channel|>final<|message|>Take a coat.", "It rains.", "Take a coat.", []),
        (f"{THOUGHT}{THOUGHT}<|channel|>final<|message|>A\nB", "It rains.\nIt rains.", "A\nB", []),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", None, "{}", []),
        (f"{THOUGHT}{TO_WEATHER}", "It rains.", "", [WEATHER]),
        (f"{THOUGHT}{TO_CLOCK}", "It rains.", "", [CLOCK]),
        (TO_CLOCK, None, "", [CLOCK]),
        (TO_CLOCK.removesuffix("<|call|>"), None, "", [CLOCK]),  # which ended it
        (f"{TO_CLOCK}<|start|>assistant{TO_WEATHER}", None, "", [CLOCK, WEATHER]),
        ("<|channel|>analysis to=functions.clock<|message|>{}<|call|>", None, "", [CLOCK]),
        (
            f"{THOUGHT}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{TO_WEATHER}",
            "It rains.",
            "I look.",
            [WEATHER],
        ),
        (
            "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|>Then.",
            None,
            "First.\nThen.",
            [],
        ),
        # What is no call is text.
        (BAD_CALL, None, '{"zone": "U', []),
        (f"{TO_CLOCK}<|start|>assistant{BAD_CALL}", None, '{"zone": "U', [CLOCK]),
        ("<|channel|>commentary to=browser.open code<|message|>{}<|call|>", None, "{}", []),
        ("<|channel|>analysis to=python code<|message|>1 + 1<|call|>", "1 + 1", "", []),
        # Cut.
        ("<|channel|>analysis<|message|>It ra", "It ra", "", []),
        ("<|channel|>analysis<|message|>", "", "", []),
        ("<|channel|>ana", None, "", []),
        (THOUGHT.removesuffix("<|start|>assistant"), "It rains.", "", []),
        (THOUGHT, "It rains.", "", []),
        (f"{THOUGHT}<|channel|>", "It rains.", "", []),
        (f"{THOUGHT} to=functions.clo", "It rains.", "", []),
        (f"{THOUGHT}<|channel|>final<|message|>Take a", "It rains.", "Take a", []),
        # Without a header, as where the prompt has all of it, or the model leaves it out.
        ("Take a coat.", None, "Take a coat.", []),
        (f"Well.<|end|><|start|>assistant{TO_CLOCK}", None, "Well.", [CLOCK]),
        (f"{THOUGHT.removesuffix('<|start|>assistant')}Take a coat.", "It rains.", "Take a coat.", []),
        ("", None, "", []),
    ],
)
def test_channels(text, reasoning, content, calls):
    assert read(CHANNELS, text) == ChatAnswer(content, reasoning, tuple(calls))


def test_channels_without_tools():
    reader = ChatReader(CHANNELS)
    assert reader.reads_calls
    answer = reader.read("as a person reads it", f"{THOUGHT}{TO_WEATHER}", calls=False, in_thought=False)
    assert answer == ChatAnswer('{"city": "Zürich"}', "It rains.", ())


def test_a_prompt_may_begin_the_thought_of_a_model_with_channels():
    reader = ChatReader(CHANNELS)
    assert not reader.begins_in_thought("<|start|>assistant")
    assert reader.begins_in_thought("<|start|>assistant<|channel|>analysis<|message|>")
    text = "It rains.<|end|><|start|>assistant<|channel|>final<|message|>Take a coat."
    assert read(CHANNELS, text, in_thought=True) == ChatAnswer("Take a coat.", "It rains.", ())
    assert read(CHANNELS, "It ra", in_thought=True) == ChatAnswer("", "It ra", ())


@pytest.mark.parametrize("kind", ["json", "regex", "tools"])
def test_a_grammar_cannot_follow_channels(kind):
    with pytest.raises(UnknownFormat, match="channels"):
        ChatReader(CHANNELS).in_chat(Grammar(kind, "{}"), "<|start|>assistant")


def test_a_thought_comes_back_under_the_name_that_the_template_has_for_it():
    said = [{"role": "user", "content": "A coat?"}, {"role": "assistant", "content": "", "reasoning_content": "Hm."}]
    renamed = [said[0], {"role": "assistant", "content": "", "thinking": "Hm."}]
    for template, expected in (
        (CHANNELS, said),
        ("{{ message.thinking }}", renamed),
        ("{{ message.thinking or message.reasoning_content }}", said),
    ):
        assert ChatReader(template).for_template(said) == expected


# --- through a whole run

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TEMPLATE = (
    "{%- for tool in tools or [] %}tool {{ tool.function.name }} <tool_call>\n{%- endfor %}"
    "{%- for message in messages %}{{ message.role }}: {{ message.content }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{%- endfor %}"
    "{%- if message.reasoning_content %} ({{ message.reasoning_content }}){% endif %}"
    "{{ '\\n' }}"
    "{%- endfor %}{%- for document in documents or [] %}{{ document.text }}{{ '\\n' }}{%- endfor %}"
    "{%- if reasoning_effort %}effort {{ reasoning_effort }}{{ '\\n' }}{%- endif %}"
    "{%- if add_generation_prompt %}assistant:{{ '<think>' if think else '' }}{%- endif %}{# </think> #}"
)


@pytest.fixture
def run(model_dir, tmp_path):
    def call(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        path, template = tmp_path / "jobs.jsonl", tmp_path / "template.jinja"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        template.write_text(TEMPLATE)
        out = tmp_path / "out.run"
        batchrun.run(path, model=str(model_dir()), out=out, chat_template=str(template), fresh=True)
        found = [
            json.loads(line)
            for name in ("results.jsonl", "errors.jsonl")
            for line in (out / name).read_text().splitlines()
        ]
        return {line["custom_id"]: line["response"]["body"] for line in found}

    return call


def test_tools_and_variables_reach_the_template(run, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    user = {"role": "user", "content": "What time is it?"}
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    greedy = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    rendered = {
        "plain": "user: What time is it?\nassistant:",
        "tools": "tool clock <tool_call>user: What time is it?\nassistant:",
        "none": "user: What time is it?\nassistant:",
        "variables": "user: What time is it?\nassistant:<think>",
        "turns": 'user: What time is it?\nassistant: <tool_call>{"name": "clock", "arguments": {"zone": "UTC"}}'
        "</tool_call>\ntool: noon\nassistant:",
        "thought": "user: What time is it?\nassistant: Noon. (Hm.)\nuser: What time is it?\nassistant:",
        "goes on": "user: What time is it?\nassistant: It is",
        "no prompt": "user: What time is it?\n",
        "effort": "user: What time is it?\neffort low\nassistant:",
        "documents": "user: What time is it?\nNoon is at twelve.\nassistant:",
    }
    thought = {"role": "assistant", "content": "Noon.", "reasoning_content": "Hm."}
    messages = [
        user,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
    ]
    found = run(
        [
            {"id": "plain", "messages": [user], **greedy},
            {"id": "tools", "messages": [user], "tools": [TOOL], **greedy},
            {"id": "none", "messages": [user], "tools": [TOOL], "tool_choice": "none", **greedy},
            {"id": "variables", "messages": [user], "chat_template_kwargs": {"think": True}, **greedy},
            {"id": "turns", "messages": messages, **greedy},
            {"id": "thought", "messages": [user, thought, user], **greedy},
            {
                "id": "goes on",
                "messages": [user, {"role": "assistant", "content": "It is"}],
                "continue_final_message": True,
                **greedy,
            },
            {"id": "no prompt", "messages": [user], "add_generation_prompt": False, **greedy},
            {"id": "effort", "messages": [user], "reasoning_effort": "low", **greedy},
            {"id": "documents", "messages": [user], "documents": [{"text": "Noon is at twelve."}], **greedy},
            {
                "id": "kept back",
                "messages": [user],
                "chat_template_kwargs": {"think": True},
                "include_reasoning": False,
                **greedy,
            },
            *(
                {"id": f"text {name}", "prompt": tokenizer.encode(text, add_special_tokens=False), **greedy}
                for name, text in rendered.items()
            ),
            {"id": "taken", "messages": [user], "chat_template_kwargs": {"tokenize": True}},
            {"id": "odd", "messages": [user], "tools": [{"name": "clock"}]},
        ]
    )
    for name in rendered:
        chat, text = (found[key] for key in (name, f"text {name}"))
        assert chat["usage"]["prompt_tokens"] == text["usage"]["prompt_tokens"], name
        message = ChatCompletion.model_validate(chat, strict=True).choices[0].message
        said = text["choices"][0]["text"]
        assert (message.content, chat["choices"][0]["message"].get("reasoning_content")) == (
            ("", said.strip("\n")) if name == "variables" else (said, None)
        )
    assert found["kept back"]["choices"][0]["message"] == {"role": "assistant", "content": ""}
    assert found["kept back"]["usage"] == {
        **found["variables"]["usage"],
        "prompt_tokens_details": found["kept back"]["usage"]["prompt_tokens_details"],
    }
    errors = {name: found[name]["error"] for name in ("taken", "odd")}
    assert {name: (error["code"], error["param"]) for name, error in errors.items()} == {
        "taken": ("invalid_request", "chat_template_kwargs.tokenize"),
        "odd": ("invalid_request", "tools[0]"),
    }
