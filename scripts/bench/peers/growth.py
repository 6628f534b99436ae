"""How time and memory grow: jobs of one level of sharing, of which one thing at a time is 4 and 16 times as much."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from batchrun.workloads import Groups, Ids, Workload, micro
from scripts.bench.peers.page import facts, listed, peers_and_settings, physical_rows
from scripts.bench.peers.registry import OURS, SHUFFLED, Peer
from scripts.bench.peers.schedule import DTYPES, Turn

BASE = Groups(groups=4, prefix=128, requests=4, own=32, output=32)
FACTORS = (1, 4, 16)
# The field of `Groups` that grows, and what that is.
AXES = {
    "requests": ("groups", "number of requests"),
    "prefix": ("prefix", "length of prefixes"),
    "degree": ("requests", "number of requests that share a prefix"),
}


def point(axis: str, factor: int) -> str:
    """The name of a job; all axes begin at the same one."""
    return "base" if factor == 1 else f"{axis} x{factor}"


POINTS = {
    point(axis, factor): BASE._replace(**{field: factor * getattr(BASE, field)})
    for axis, (field, _) in AXES.items()
    for factor in FACTORS
}


def make(name: str, vocab_size: int, part: float = 1.0) -> Workload:
    """The job of a point, shuffled, with a part of all lengths; equal arguments make equal jobs."""
    ids = Ids(0, vocab_size, part)
    requests = [(prompt, ids.left_of(output)) for prompt, output in micro(ids, *POINTS[name])]
    order = np.random.default_rng(1).permutation(len(requests))
    return Workload(name, [requests[i] for i in order], kv_tokens=None, ignore_eos=True, part=part)


def turns(peers: Sequence[Peer], *, dtypes: Sequence[str] = DTYPES, repeats: int = 3) -> Iterator[Turn]:
    """All runs of a measurement: in every round each point, there everyone, in turns."""
    for dtype in dtypes:
        for number in range(repeats):
            for at, name in enumerate(POINTS):
                asked = [peer for peer in (OURS, *peers) if dtype in peer.dtypes]
                start = (number + at) % len(asked)
                for peer in asked[start:] + asked[:start]:
                    yield Turn(peer, name, dtype, SHUFFLED, number)


def exponent(values: Sequence[float]) -> float:
    """The slope of log(value) over log(factor)."""
    return float(np.polyfit(np.log(FACTORS[: len(values)]), np.log(values), 1)[0])


def render(document: Mapping[str, Any]) -> str:
    """The page, in Markdown."""
    engines = list(dict.fromkeys(run["peer"] for run in document["runs"]))
    dtypes = list(dict.fromkeys(run["dtype"] for run in document["runs"]))
    parts = [
        "# How time and memory grow on a CPU\n",
        f"**Question.** How do the time and the memory of {' and '.join(engines)} grow with the number of requests, "
        f"the length of shared prefixes and the number of requests that share one, one of them at a time? "
        f"**Answer.** {_answer(document, engines, dtypes)}\n",
        "An exponent is the slope of the logarithm over that of the factor: 1 where four times as much takes four "
        "times as long. The rows to compute are what no engine can leave out: distinct prompt tokens, and what each "
        "answer has after its first token.\n",
    ]
    for dtype in dtypes:
        parts += [f"## {dtype}\n", _table(document, engines, dtype)]
    told = facts(document) | {
        "Jobs": f"×1: {BASE.groups} groups of {BASE.requests} requests that share {BASE.prefix} tokens, with "
        f"{BASE.own} of their own and {BASE.output} to answer; seed 0, shuffled; token ids, greedy, every answer to "
        "its limit",
        "Figures": "time of generation in the median of the rounds, and the most memory of any",
    }
    parts += ["## How it was measured\n", listed(told)]
    parts += ["## Engines and their settings\n", peers_and_settings(document)]
    parts += ["## What it does not show\n", "Larger factors, other shapes, models and processors.\n"]
    return "\n".join(parts)


def _figures(document: Mapping[str, Any], engine: str, dtype: str, axis: str) -> tuple[list[float], list[float]] | None:
    """Seconds and megabytes at each factor; None where a run is missing."""
    seconds, megabytes = [], []
    for factor in FACTORS:
        where = (engine, dtype, point(axis, factor))
        runs = [r for r in document["runs"] if (r["peer"], r["dtype"], r["workload"]) == where and not r["failure"]]
        if not runs:
            return None
        seconds.append(statistics.median(run["generation_seconds"] for run in runs))
        megabytes.append(max(run["peak_bytes"] for run in runs) / 1e6)
    return seconds, megabytes


def _answer(document: Mapping[str, Any], engines: Sequence[str], dtypes: Sequence[str]) -> str:
    sentences = []
    for dtype in dtypes:
        for axis, (_, of) in AXES.items():
            found = {engine: _figures(document, engine, dtype, axis) for engine in engines}
            exponents = [
                f"{exponent(figures[0]):.2f} ({engine})" for engine, figures in found.items() if figures is not None
            ]
            if exponents:
                sentences.append(f"With the {of} in {dtype}, time grows with exponent {', '.join(exponents)}.")
    return " ".join(sentences) or "No engine came to the end of an axis."


def _table(document: Mapping[str, Any], engines: Sequence[str], dtype: str) -> str:
    head = ["grows", "", *(f"×{factor} s" for factor in FACTORS), "exponent"]
    head += [*(f"×{factor} MB" for factor in FACTORS), "exponent"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for axis, (_, of) in AXES.items():
        rows = [physical_rows(document, point(axis, factor)) for factor in FACTORS]
        work = [*(f"{count:,} rows" for count in rows), f"{exponent(rows):.2f}"]
        lines.append([of, "to compute", *work])
        for engine in engines:
            figures = _figures(document, engine, dtype, axis)
            if figures is None:
                lines.append(["", engine, "failed"])
                continue
            seconds, megabytes = figures
            cells = [*(f"{s:.2f}" for s in seconds), f"{exponent(seconds):.2f}"]
            cells += [*(f"{m:,.0f}" for m in megabytes), f"{exponent(megabytes):.2f}"]
            lines.append(["", engine, *cells])
    return "".join(f"| {' | '.join(line + [''] * (len(head) - len(line)))} |\n" for line in lines)
