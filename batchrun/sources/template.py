"""Prompts made of the columns of a row by a Jinja template, which can reach nothing but the row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchrun.errors import UsageError
from batchrun.report.records import Warned

ROW = "row"  # the whole row in a template, for columns whose names are no names there
LONG = 200  # characters of constant text behind a variable that are worth a word; some 50 tokens


def template_text(given: str) -> str:
    """The text of a template that was given as a file's name or as itself.

    Raises:
        UsageError: the file cannot be read.
    """
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"The template {given} cannot be read: {reason}.",
            hint="Name a file, or give a text with {{ column }} in it.",
        ) from error


class Template:
    """A template of prompts.

    Attributes:
        names: that it reads: of columns, of Jinja's own functions, and `row`.

    Raises:
        UsageError: it is not valid Jinja, or it reads nothing of a row.
    """

    def __init__(self, text: str) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_printed)
        try:
            self._parsed = environment.parse(text)
            self._template = environment.from_string(text)
        except TemplateSyntaxError as error:
            raise UsageError(
                f"The template is not valid Jinja: line {error.lineno}: {error.message}.",
                hint="A column is written {{ name }}.",
            ) from None
        self.names = frozenset(meta.find_undeclared_variables(self._parsed))
        self._globals = frozenset(environment.globals)
        if not self.names:
            raise UsageError("The template reads no column, so that all prompts would be the same.")

    def columns(self, there: Sequence[str]) -> list[str]:
        """Those of a table's columns that it reads.

        Raises:
            UsageError: it reads one that is not there.
        """
        if missing := sorted(self.names - {ROW, *there} - self._globals):
            raise UsageError(f"The template reads {missing[0]!r}, which is no column.")
        return [name for name in there if name in self.names or ROW in self.names]

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            ValueError: the template refuses it; the message says why.
        """
        try:
            return self._template.render({ROW: row, **row})
        except Exception as error:  # a template can raise anything, and it concerns this row only
            empty = [name for name in row if row[name] is None]
            nulls = f" (null in this row: {', '.join(empty)})" if isinstance(error, _NoValue) and empty else ""
            raise ValueError(f"the template refuses this row: {error}{nulls}") from None

    def warnings(self) -> list[Warned]:
        """Whether it has long constant text behind what differs from row to row: nothing behind it can be shared."""
        from jinja2 import nodes

        first, behind = None, 0
        for node in self._parsed.body:
            if isinstance(node, nodes.Assign | nodes.AssignBlock | nodes.Macro):
                continue  # they write nothing
            for part in node.nodes if isinstance(node, nodes.Output) else [node]:
                if isinstance(part, nodes.TemplateData):
                    behind += len(part.data) if first is not None else 0
                elif first is None and (names := {name.name for name in part.find_all(nodes.Name)} | _name_of(part)):
                    first = ", ".join(sorted(names))
        if behind < LONG:
            return []
        return [
            Warned(
                "template_order",
                1,
                f"the template has {behind:,} characters of text that all rows have behind {first}, which differs from "
                "row to row, and only what stands in front of it can be shared: put the text first",
            )
        ]


def _name_of(node: Any) -> set[str]:
    from jinja2 import nodes

    return {node.name} if isinstance(node, nodes.Name) else set()


class _NoValue(ValueError):
    pass


def _printed(value: Any) -> Any:
    """What a template is to write; `None` and `nan` in a prompt are nobody's intention."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise _NoValue(
            f"it writes a value that is {'null' if value is None else 'no number'}; {{{{ name or '' }}}} may do"
        )
    if isinstance(value, bytes):
        raise _NoValue("it writes bytes, which are no text")
    return value
