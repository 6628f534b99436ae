"""Small jobs whose steps are kept in tests/golden, and what a change of the scheduler did to them.

python tests/golden_steps.py            # compare, and print what is different
python tests/golden_steps.py --write    # take the steps as they are now for the golden ones
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from oracles import DEAR_ROWS, make_requests

from batchrun.execution.loop import run_loop
from batchrun.execution.simulate import SimulatedWorker
from batchrun.formats.report import encode_step, read_steps
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Requests
from batchrun.schedule.scheduler import Scheduler

GOLDEN = Path(__file__).resolve().parent / "golden"
PAGE_SIZE = 4


def _shared(groups: int, readers: int, prefix: int, own: int, output: int) -> Requests:
    prompts = [[g] * prefix + [100 + i] * own for i in range(readers) for g in range(groups)]
    return make_requests(prompts, [output] * len(prompts), ignore_eos=True)


def _levels() -> Requests:
    prompts = [[1] * 9 + [10 + d] * 7 + [20 + d, q] for d in range(3) for q in range(3)]
    return make_requests(prompts, [2 + i % 4 for i in range(9)], ignore_eos=True)


def _unknown_lengths() -> Requests:
    return make_requests([[i, i, i] for i in range(1, 11)], [3 + (7 * i) % 11 for i in range(10)])


# name -> (requests, pages, options)
JOBS: dict[str, tuple[Callable[[], Requests], int, dict[str, Any]]] = {
    "prefixes": (lambda: _shared(3, 3, 10, 3, 4), 40, {}),
    "prefixes-in-little-memory": (lambda: _shared(4, 3, 10, 3, 6), 9, {}),
    "prefixes-scattered": (lambda: _shared(3, 3, 10, 3, 4), 9, {"schedule_order": "input"}),
    "levels": (_levels, 30, {}),
    "long-prompts-in-chunks": (
        lambda: make_requests([[i] * 30 for i in range(1, 5)], [5] * 4, ignore_eos=True),
        60,
        {},
    ),
    "longer-than-expected": (_unknown_lengths, 12, {"first_guess": 2}),
    "nothing-shared": (lambda: make_requests([[i, i + 1] for i in range(0, 24, 2)], [3] * 12, ignore_eos=True), 40, {}),
}


def steps_of(name: str) -> Iterator[bytes]:
    """The steps of a job as lines of `steps.jsonl`."""
    make, pages, options = JOBS[name]
    requests = make()
    budget = MemoryBudget(page_size=PAGE_SIZE, pages=pages, page_bytes=1, weight_bytes=0)
    chosen = PlanOptions(**({"schedule_order": "dfs", "grouping": "tree", "step_tokens": 16} | options))
    plan = make_plan(requests, build_forest(requests.tokens), DEAR_ROWS, budget, chosen)
    lines: list[bytes] = []
    run_loop(
        Scheduler(plan, requests),
        SimulatedWorker(requests.max_new_tokens),
        on_step=lambda step, output: lines.append(encode_step(step)),
    )
    yield from lines


def picture(steps: list[dict[str, Any]]) -> list[str]:
    """One line a step: who computes how many rows, and how many pages are held after it."""
    pages: dict[int, int] = {}
    lines = []
    for step in steps:
        for slot in step["releases"]:
            pages.pop(slot, None)
        for slot in step["grants"]["sequence"]:
            pages[slot] = pages.get(slot, 0) + 1
        chunks = step["chunks"]
        parts = []
        for slot, request, start, length, samples in zip(*chunks.values(), strict=True):
            who = f"r{request}" if request >= 0 else f"prefix@{slot}"
            parts.append(who + (f"[{start}:{start + length}]" if length > 1 or not samples else ""))
        lines.append(
            f"{step['index']:3d}  {sum(chunks['length']):3d} rows  {sum(pages.values()):3d} pages  " + " ".join(parts)
        )
    return lines


def difference(name: str) -> list[str]:
    """What is different from the golden steps, for a person; empty where nothing is."""
    new = [orjson.loads(line) for line in steps_of(name)]
    path = GOLDEN / f"{name}.jsonl"
    old = list(read_steps(path)) if path.exists() else []
    if new == old:
        return []
    before, after = picture(old), picture(new)
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    rows = [int(np.sum([sum(step["chunks"]["length"]) for step in steps])) for steps in (old, new)]
    lines = [
        f"{name}: {len(old)} steps and {rows[0]} rows before, {len(new)} and {rows[1]} now; the same up to step {same}"
    ]
    for i in range(same, max(len(before), len(after))):
        was, now = (lines_[i] if i < len(lines_) else "" for lines_ in (before, after))
        if was != now:
            lines += [f"  - {was}"] * bool(was) + [f"  + {now}"] * bool(now)
        elif i == same:
            lines.append(f"    {now}  (pages or reads differ)")
    return lines


def main() -> None:
    if "--write" in sys.argv[1:]:
        GOLDEN.mkdir(exist_ok=True)
        for name in JOBS:
            (GOLDEN / f"{name}.jsonl").write_bytes(b"".join(steps_of(name)))
        return
    changed = [line for name in JOBS for line in difference(name)]
    print("\n".join(changed) or "the steps of all jobs are the golden ones")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
