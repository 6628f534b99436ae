"""Small plots of characters: columns over time, in block elements or, where the console has none, in ASCII."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.report.wording import duration

Float = npt.NDArray[np.float64]


class Glyphs(NamedTuple):
    """What plots and trees are drawn with.

    Attributes:
        fills: a full place of each layer of a plot, the lowest first.
        parts: parts of a place of the lowest layer, from an eighth or so up to nearly all of it.
        bar, corner, line: the axes.
        branch, last, through: the lines of a tree; two columns each.
    """

    fills: str
    parts: str
    bar: str
    corner: str
    line: str
    branch: str
    last: str
    through: str


BLOCKS = Glyphs("█░", "▁▂▃▄▅▆▇", "│", "└", "─", "├─", "└─", "│ ")
ASCII = Glyphs("#.", "_", "|", "+", "-", "|-", "`-", "| ")


def glyphs(encoding: str) -> Glyphs:
    """Block elements where the encoding has them."""
    try:
        "".join(BLOCKS).encode(encoding)
    except UnicodeEncodeError:
        return ASCII
    return BLOCKS


class Course(NamedTuple):
    """What steps do over time, in columns of equal time, float64 `[columns]` each.

    Attributes:
        seconds: of all steps.
        decode, prefill: rows of a step, a mean over time.
        pages: KV pages, the most at any time.
        running, waiting: requests under way, and those that wait, the most at any time.
    """

    seconds: float
    decode: Float
    prefill: Float
    pages: Float
    running: Float
    waiting: Float


def course(steps: npt.NDArray[np.void], columns: int) -> Course:
    """What steps do over time.

    Args:
        steps: at least one, as in `StepLog.columns`; where they take no time, as if all took equally long.
        columns: how many columns to make.
    """
    seconds = steps["seconds"]
    whole = float(seconds.sum())
    ends = np.cumsum(seconds if whole > 0 else np.ones(steps.size))
    edges = np.linspace(0, ends[-1], columns + 1)
    lengths = np.diff(ends, prepend=0.0)

    def mean(name: str) -> Float:
        """The integral of a step function is linear between the ends of steps."""
        integral = np.concatenate(([0.0], np.cumsum(steps[name] * lengths)))
        return np.diff(np.interp(edges, np.concatenate(([0.0], ends)), integral)) / np.diff(edges)

    # The steps that are under way in a column: from the one that its left edge is in to the one of its right edge.
    first = np.minimum(np.searchsorted(ends, edges[:-1], side="right"), steps.size - 1)
    last = np.maximum(np.minimum(np.searchsorted(ends, edges[1:]), steps.size - 1), first)

    def most(name: str) -> Float:
        places = np.stack((first, last + 1), axis=1).ravel()
        return np.maximum.reduceat(np.append(steps[name], 0), places)[::2].astype(np.float64)

    rows = mean("decode_rows"), mean("prefill_rows")
    return Course(whole, *rows, most("pages_used"), most("running"), most("waiting"))


def plot(layers: Sequence[Float], highest: float, height: int, drawn: Glyphs) -> list[str]:
    """Columns of layers that stand on each other, as lines from the top down.

    Args:
        layers: heights, float64 `[columns]` each, the lowest first; at most as many as `drawn.fills`.
        highest: what the topmost line reaches.
        height: lines.
        drawn: with what.
    """
    tops = np.cumsum(np.stack(layers), axis=0) * (height / max(highest, 1e-9))
    if len(layers) == 1:
        # What is there is seen, however little it is.
        part = np.maximum(np.round(tops[0] * (len(drawn.parts) + 1)), tops[0] > 0).astype(np.int64)
        scale = f" {drawn.parts}{drawn.fills[0]}"
        return [
            "".join(scale[place] for place in np.clip(part - line * (len(scale) - 1), 0, len(scale) - 1).tolist())
            for line in reversed(range(height))
        ]
    filled = np.round(tops).astype(np.int64)
    nothing = (filled[-1] == 0) & (tops[-1] > 0)
    filled[np.argmax(np.stack(layers), axis=0)[nothing], nothing] = 1
    filled = np.maximum.accumulate(filled, axis=0)
    scale = f"{drawn.fills[: len(layers)]} "
    return [
        "".join(scale[layer] for layer in (filled <= line).sum(axis=0).tolist()) for line in reversed(range(height))
    ]


def framed(lines: Sequence[str], highest: str, seconds: float, margin: int, drawn: Glyphs) -> list[str]:
    """A plot with its axes: `highest` and 0 to its left, in `margin` columns, and time below it."""
    width = len(lines[0])
    labels = [highest, *[""] * (len(lines) - 1)]
    rows = [f"{label:>{margin}} {drawn.bar}{line}" for label, line in zip(labels, lines, strict=True)]
    end = duration(seconds)
    return [
        *rows,
        f"{'0':>{margin}} {drawn.corner}{drawn.line * width}",
        f"{'':>{margin}}  0{end:>{width - 1}}",
    ]
