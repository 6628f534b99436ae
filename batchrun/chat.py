"""What the answer of a chat has besides its text: thinking, and calls of tools.

How a model writes them is told by its chat template, which has to write them too when they come back as messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from batchrun.request import ToolCall

_THINK, _THOUGHT = "<think>", "</think>"
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][^\[{]*)?\[ARGS\]\s*")
_PYTHON_TAG = "<|python_tag|>"


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


class ChatReader:
    """Takes answers apart as the model of a chat template writes them.

    Args:
        template: the chat template, or None.
    """

    def __init__(self, template: str | None) -> None:
        template = template or ""
        self.thinks = _THOUGHT in template
        self._calls: Callable[[str], tuple[str, tuple[ToolCall, ...]] | None] | None = None
        if _MISTRAL in template:
            self._calls = _mistral
        elif "<tool_call>" in template:
            self._calls = _hermes
        elif '"parameters"' in template and ("python_tag" in template or "ipython" in template):
            self._calls = _llama

    def begins_in_thought(self, prompt_end: str) -> bool:
        """Whether a prompt that ends so leaves the model thinking."""
        return self.thinks and prompt_end.rstrip().endswith(_THINK)

    def read(self, text: str, whole: str | None, *, in_thought: bool) -> ChatAnswer:
        """Take an answer apart.

        Args:
            text: as a person would read it.
            whole: with all special tokens, where calls of tools are to be looked for; else None.
            in_thought: as `begins_in_thought`.
        """
        reasoning, content = self._thought(text, in_thought)
        if whole is not None and self._calls is not None:
            found = self._calls(self._thought(whole, in_thought)[1])
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


def _hermes(text: str) -> tuple[str, tuple[ToolCall, ...]] | None:
    """Nous Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one or more."""
    found = list(_HERMES.finditer(text))
    calls = [_call(_loads(match[1])) for match in found]
    sound = tuple(call for call in calls if call is not None)
    if not sound or len(sound) < len(calls):
        return None
    return text[: found[0].start()].rstrip("\n"), sound


def _mistral(text: str) -> tuple[str, tuple[ToolCall, ...]] | None:
    """Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`; later `[TOOL_CALLS]name[ARGS]{...}`, again."""
    content, _, rest = text.partition(_MISTRAL)
    calls: list[ToolCall | None] = []
    if isinstance(listed := _loads(rest), list):
        calls = [_call(one) for one in listed]
    else:
        for part in rest.split(_MISTRAL):
            named = _MISTRAL_NAMED.match(part)
            calls.append(_call({"name": named[1], "arguments": _loads(part[named.end() :])}) if named else None)
    sound = tuple(call for call in calls if call is not None)
    return (content, sound) if sound and len(sound) == len(calls) else None


def _llama(text: str) -> tuple[str, tuple[ToolCall, ...]] | None:
    """Llama 3: the whole answer is `{"name": ..., "parameters": {...}}`, or several with semicolons between them."""
    objects = list(_objects(text.replace(_PYTHON_TAG, "").replace("<|eom_id|>", "").strip()))
    calls = [_call(one) for one in objects]
    sound = tuple(call for call in calls if call is not None)
    return ("", sound) if sound and len(sound) == len(calls) else None


def _objects(text: str) -> Iterator[Any]:
    """The JSON values of a text that is nothing else; None for what is none."""
    decoder = json.JSONDecoder()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            yield None
            return
        yield value
        text = text[end:].lstrip().removeprefix(";").lstrip()


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any) -> ToolCall | None:
    """A call, if a JSON value is one."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
