"""What the answer of a chat has besides its text: thinking, and calls of tools.

How a model writes them is told by its chat template, which has to write them too when they come back as messages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from batchrun.request import Grammar, ToolCall

_THINK, _THOUGHT = "<think>", "</think>"
_HERMES, _HERMES_END = "<tool_call>", "</tool_call>"
_MISTRAL, _MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][^\[{]*)?\[ARGS\]\s*")
_PYTHON_TAG = "<|python_tag|>"
_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_ANALYSIS = f"{_CHANNEL}analysis{_MESSAGE}"
_MESSAGE_END = re.compile(r"<\|(?:end|call|return)\|>|(?=<\|start\|>)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"\bto=functions\.([^\s<]+)")
# What may be a special token: a grammar has to ask for it by its id then.
_MARKS = re.compile("|".join(map(re.escape, (_HERMES, _HERMES_END, _MISTRAL, _MISTRAL_ARGUMENTS))))
_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|[^"{]+|\{')  # texts, braces, and what stands between them
# Space in a call is no part of it, so there is no more of it than models write.
_GUIDANCE = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """An answer, taken apart.

    Attributes:
        content: the text that is left.
        reasoning: what the model thought before, or None if it did not.
        tool_calls: in their order.
    """

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class _Calls:
    """How a family of models writes calls of tools.

    Attributes:
        read: takes a text apart: what is left of it, and its calls; None where it has none.
        call: what stands before and behind the arguments of a call, by the name of its function.
        begin, between, end: what stands before all calls, between two, and behind all.
    """

    read: Callable[[str], tuple[str, tuple[ToolCall, ...]] | None]
    call: Callable[[str], tuple[str, str]]
    begin: str = ""
    between: str = ""
    end: str = ""


class UnknownFormat(ValueError):
    """How the model would write what is wanted of an answer is not known."""


class ChatReader:
    """Takes answers apart as the model of a chat template writes them, and says what they must be a text of where they
    have to be of such parts.

    Args:
        template: the chat template, or None.
        special_tokens: ids of the special tokens, by their texts.

    Attributes:
        channels: whether an answer is messages in channels, as GPT-OSS writes them, told apart by special tokens alone.
        thinks: whether an answer may have a thought.
        reads_calls: whether calls of tools are found in an answer.
    """

    def __init__(self, template: str | None, special_tokens: Mapping[str, int] | None = None) -> None:
        template = template or ""
        self.channels = _CHANNEL in template and _MESSAGE in template
        self.thinks = self.channels or _THOUGHT in template
        self._think = _ANALYSIS if self.channels else _THINK
        self._special = special_tokens or {}
        self._calls = None if self.channels else _calls_of(template)
        self.reads_calls = self.channels or self._calls is not None
        self._renames = "message.thinking" in template and "reasoning_content" not in template
        self._in_chat = lru_cache(maxsize=4096)(self._in_chat_anew)  # most lines say the same

    def in_chat(self, grammar: Grammar, prompt_end: str) -> Grammar:
        """The grammar of an answer whose content, or whose calls of tools, are to follow `grammar`.

        Args:
            prompt_end: the end of the prompt's text, which tells whether the model is thinking there, or has been.

        Raises:
            UnknownFormat: calls are wanted, and how the model writes them is not known; or it writes in channels.
        """
        if self.channels:
            raise UnknownFormat(
                "this model writes its answers in channels, which a grammar cannot follow yet; leave it out"
            )
        end = prompt_end.rstrip()
        return self._in_chat(grammar, self.begins_in_thought(end), end.endswith(_THOUGHT))

    def _in_chat_anew(self, grammar: Grammar, in_thought: bool, has_thought: bool) -> Grammar:
        if grammar.kind == "tools":
            wanted = json.loads(grammar.text)
            if "otherwise" in wanted and self._calls is None:  # nor would its calls be read
                grammar = Grammar("json", json.dumps(wanted["otherwise"], ensure_ascii=False))
            else:
                grammar = self._calls_wanted(**wanted)
        if not self.thinks or has_thought:
            return grammar
        thought = {"begin": "" if in_thought else _THINK, "end": _THOUGHT, "optional": not in_thought}
        return Grammar("thought", json.dumps({**thought, "then": grammar}, ensure_ascii=False))

    def _calls_wanted(self, tools: list[tuple[str, Any]], many: bool, **otherwise: Any) -> Grammar:
        form = self._calls
        if form is None:
            raise UnknownFormat(
                "how this model writes calls of tools is not known from its chat template, so it cannot be made to "
                'write one; "auto" and "none" are supported'
            )
        pieces = {name: self._pieces(getattr(form, name)) for name in ("begin", "between", "end")}
        calls = []
        for name, schema in tools:
            before, behind = map(self._pieces, form.call(name))
            if otherwise:  # a piece that begins as the JSON does would be taken for what is written, to its end
                before = [
                    part for piece in before for part in (_JSON.findall(piece) if type(piece) is str else [piece])
                ]
            guided = {**schema, "x-guidance": {**_GUIDANCE, **schema.get("x-guidance", {})}}
            calls.append([*before, guided, *behind])
        return Grammar("calls", json.dumps({**pieces, "calls": calls, "many": many, **otherwise}, ensure_ascii=False))

    def _pieces(self, text: str) -> list[str | int]:
        """A text, with the ids of special tokens in place of theirs."""
        pieces: list[str | int] = []
        at = 0
        for mark in _MARKS.finditer(text):
            if (token := self._special.get(mark[0])) is not None:
                pieces += [text[at : mark.start()], token]
                at = mark.end()
        return [piece for piece in (*pieces, text[at:]) if piece != ""]

    def begins_in_thought(self, prompt_end: str) -> bool:
        """Whether a prompt that ends so leaves the model thinking."""
        return self.thinks and prompt_end.rstrip().endswith(self._think)

    def for_template(self, messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Messages as the template takes them: that of GPT-OSS has another name for `reasoning_content`."""
        if not self._renames:
            return messages
        return [
            {"thinking" if name == "reasoning_content" else name: value for name, value in message.items()}
            for message in messages
        ]

    def read(self, text: str, whole: str, *, calls: bool, in_thought: bool) -> ChatAnswer:
        """Take an answer apart.

        Args:
            text: as a person would read it.
            whole: with all special tokens; looked at for calls, and where there are `channels`.
            calls: whether to look for calls of tools.
            in_thought: as `begins_in_thought`.
        """
        if self.channels:
            return _in_channels(_ANALYSIS + whole if in_thought else whole, calls)
        reasoning, content = self._thought(text, in_thought)
        if calls and self._calls is not None:
            found = self._calls.read(self._thought(whole, in_thought)[1])
            if found is not None:
                return ChatAnswer(found[0], reasoning, found[1])
        return ChatAnswer(content, reasoning, ())

    def _thought(self, text: str, in_thought: bool) -> tuple[str | None, str]:
        if not self.thinks:
            return None, text
        head = text.lstrip()
        if head.startswith(_THINK):
            head, in_thought = head.removeprefix(_THINK), True
        if not in_thought:
            return None, text
        thought, _, content = head.partition(_THOUGHT)
        return thought.strip("\n"), content.lstrip("\n")


def _in_channels(text: str, calls: bool) -> ChatAnswer:
    """GPT-OSS: `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`. A call has
    ` to=functions.NAME` before or behind its channel. The prompt begins the first header, and may have all of it."""
    said: list[str] = []
    thoughts: list[str] = []
    called: list[ToolCall] = []
    for message in _MESSAGE_END.split(text):
        header, mark, body = message.partition(_MESSAGE)
        if not mark:  # text alone, or a header that was cut
            header, body = "", "" if _START in header or _CHANNEL in header else header
        channel, function = _CHANNEL_NAME.search(header), _FUNCTION.search(header)
        call = _call({"name": function[1], "arguments": body}) if function and calls else None
        if call is not None:
            called.append(call)
        elif channel is not None and channel[1] == "analysis" and function is None:
            thoughts.append(body)
        elif body:
            said.append(body)
    return ChatAnswer("\n".join(said), "\n".join(thoughts) if thoughts else None, tuple(called))


def _calls_of(template: str) -> _Calls | None:
    """How calls are written by the model of a template; None where it is not known."""
    if _MISTRAL in template and _MISTRAL_ARGUMENTS in template:
        return _Calls(_mistral, lambda name: (f"{_MISTRAL}{name}{_MISTRAL_ARGUMENTS}", ""))
    if _MISTRAL in template:
        return _Calls(_mistral, _object("arguments"), begin=f"{_MISTRAL}[", between=", ", end="]")
    if _HERMES in template and "<function=" not in template:  # Qwen3-Coder's are XML
        return _Calls(_hermes, _object("arguments", f"{_HERMES}\n", f"\n{_HERMES_END}"), between="\n")
    if '"parameters"' in template and ("python_tag" in template or "ipython" in template):
        return _Calls(_llama, _object("parameters"), between="; ")
    return None


def _object(arguments: str, before: str = "", behind: str = "") -> Callable[[str], tuple[str, str]]:
    return lambda name: (f'{before}{{"name": {json.dumps(name, ensure_ascii=False)}, "{arguments}": ', "}" + behind)


def _hermes(text: str) -> tuple[str, tuple[ToolCall, ...]] | None:
    """Nous Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one or more."""
    content, mark, rest = text.partition(_HERMES)
    calls = []
    while mark:
        value, rest = _first_value(rest)
        call = _call(value)
        # The last one may be ended by the answer's end. (A text in its arguments may have the mark in it too.)
        if call is None or not (rest.startswith(_HERMES_END) or not rest):
            return None
        calls.append(call)
        _, mark, rest = rest.removeprefix(_HERMES_END).partition(_HERMES)
    return (content.rstrip("\n"), tuple(calls)) if calls else None


def _mistral(text: str) -> tuple[str, tuple[ToolCall, ...]] | None:
    """Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`; later `[TOOL_CALLS]name[ARGS]{...}`, again."""
    content, _, rest = text.partition(_MISTRAL)
    calls: list[ToolCall | None] = []
    if isinstance(listed := _loads(rest), list):
        calls = [_call(one) for one in listed]
    else:
        while rest and None not in calls:
            named = _MISTRAL_NAMED.match(rest)
            arguments, rest = _first_value(rest[named.end() :]) if named else (None, "")
            is_whole = not rest or rest.startswith(_MISTRAL)
            calls.append(_call({"name": named[1], "arguments": arguments}) if named and is_whole else None)
            rest = rest.removeprefix(_MISTRAL)
    sound = tuple(call for call in calls if call is not None)
    return (content, sound) if sound and len(sound) == len(calls) else None


def _llama(text: str) -> tuple[str, tuple[ToolCall, ...]] | None:
    """Llama 3: the whole answer is `{"name": ..., "parameters": {...}}`, or several with semicolons between them."""
    objects = list(_objects(text.replace(_PYTHON_TAG, "").replace("<|eom_id|>", "").strip()))
    # What has no arguments may be an answer in JSON that happens to have a name in it.
    calls = [
        _call(one) if isinstance(one, dict) and {"parameters", "arguments"} & one.keys() else None for one in objects
    ]
    sound = tuple(call for call in calls if call is not None)
    return ("", sound) if sound and len(sound) == len(calls) else None


def _objects(text: str) -> Iterator[Any]:
    """The JSON values of a text that is nothing else, with semicolons between them; None for what is none."""
    while text:
        value, text = _first_value(text)
        yield value
        text = text.removeprefix(";").lstrip()


def _first_value(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and the text behind it; None and nothing where it begins with none."""
    try:
        value, end = _DECODER.raw_decode(text := text.lstrip())
    except (ValueError, RecursionError):
        return None, ""
    return value, text[end:].lstrip()


def _loads(text: str) -> Any:
    value, rest = _first_value(text)
    return None if rest else value


def _finite(number: str) -> float:
    """JSON can write numbers that it could not be given back as."""
    if math.isinf(value := float(number)):
        raise ValueError(number)
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _call(value: Any) -> ToolCall | None:
    """A call, if a JSON value is one."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
