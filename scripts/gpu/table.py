"""What a person reads: a line for each section, its error or note, and its rows; no wider than 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

WIDTH = 80


def table(document: dict[str, Any]) -> str:
    """The sections of a document, one after the other."""
    lines = []
    for name, result in document["sections"].items():
        lines.append(
            f"{name:<10} {'passed' if result['passed'] else 'FAILED'} {result['seconds']:6.1f} s{_cases(result)}"
        )
        for line in (result.get("error") or result.get("note", "")).splitlines():
            # What is indented is a command, to be copied as it is.
            lines += [line] if line.startswith(" ") else wrap(line, WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += [f"  {line}" for line in grid(result.get("rows", []))]
    return "\n".join(lines)


def grid(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows with the same keys as columns under these: text to the left, numbers to the right, cut at the width."""
    if not rows:
        return []
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [isinstance(value, str) for value in rows[0].values()]
    return [
        " ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()[: WIDTH - 2]
        for line in cells
    ]


def _cases(result: dict[str, Any]) -> str:
    if "cases" not in result:
        return ""
    cut = ": time was up" if result["cases"] < result["of"] else ""
    return f"  {result['cases']} of {result['of']} cases{cut}"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
