"""Plans to show, made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.formats.plan import PlanFile
from batchrun.pipeline import Planned
from batchrun.prefix.doctor import Diagnosis, Finding
from batchrun.prefix.explain import ExplainedRequest, Explanation, PrefixRead, SharedRun, SharedRuns
from batchrun.report.records import (
    BoundSeconds,
    Estimate,
    GroupSummary,
    KvUse,
    OrderTried,
    Report,
    RequestCounts,
    Seconds,
    SlowRequest,
    StepLog,
    StepRecord,
    StepSeconds,
    Throughput,
    TokenCounts,
    Warned,
)
from batchrun.request import LineFault

TOKENS = TokenCounts(prompt_logical=251_904, prompt_physical=31_220, prompt_computed=31_500, output=7_680)
ESTIMATE = Estimate(10.0, 8.0, 12.5, 6.0, 2.5, 1.5, "cpu", "a processor", True, 480)


def some_steps(count: int, pages: int = 3000, seconds: float = 0.5) -> npt.NDArray[np.void]:
    log = StepLog()
    for index in range(count):
        prefill, decode = 200 + index % 7, index % 60
        log.append(StepRecord(index, prefill + decode, decode, prefill, decode, pages + index % 100, seconds))
    return log.columns


def a_report(**changes: Any) -> Report:
    report = Report(
        request_counts=RequestCounts(480, 478, 2, 0),
        duplicates=0,
        tokens=TOKENS,
        saving=TOKENS.saving,
        seconds=Seconds(total=250.0, load=10.0, tokenize=5.0, plan=5.0, execute=225.0),
        throughput=Throughput(1.94, 1019.3, 31.07),
        expected=None,
        bound=BoundSeconds(compute=45.0, memory=30.0, weights=20.0),
        step_seconds=StepSeconds(
            prefill=20.0, mixed=100.0, decode=60.0, tail=15.0, host=28.0, recovery=2.0, held_back=40.0
        ),
        steps=300,
        rows=5000,
        kv=KvUse(page_size=16, pages=4096, peak_pages=3120),
        idle_rows=5,
        padded_rows=12,
        preemptions=3,
        memory_retries=2,
        worker_restarts=4,
        prefix_evictions=1,
        finish_reasons={"stop": 470, "length": 8},
        errors={"empty_prompt": 1, "context_length_exceeded": 1},
        warnings=(Warned("max_tokens_default", 3, "they have no max_tokens"),),
        groups=tuple(GroupSummary(number, 512 - number, 60) for number in range(14)),
        slowest=(SlowRequest("slow-one", 17, 900, 64, 3, 250, 123.0), SlowRequest("cut", 18, 9, None, 3, 4, 1.0)),
        schedule_order="dfs",
        model="demo",
        device="cpu",
        dtype="float32",
        environment={"python": "3.11", "cpus": 2, "triton": None, "gpus": [{"name": "H"}]},
    )
    return replace(report, **changes)


def shared_run(node: int, parent: int = -1, *, spared: int = 1000, text: str = "You answer questions") -> SharedRun:
    return SharedRun(node, parent, depth=10, tokens=50 + node, requests=21, spared=spared, text=text)


def a_plan(**changes: Any) -> PlanFile:
    plan = PlanFile(
        requests=480,
        duplicates=0,
        tokens=TOKENS,
        saving=TOKENS.saving,
        groups=tuple(GroupSummary(number, 512 - number, 60) for number in range(14)),
        schedule_order="dfs",
        grouping="tree",
        steps=1204,
        rows=5000,
        step_tokens=256,
        kv=KvUse(page_size=16, pages=4096, peak_pages=3120),
        expected=ESTIMATE,
        orders=(OrderTried("dfs", 10.0, 1204, 31_500, 3120, 0), OrderTried("input", 12.3, 1398, 45_678, 4096, 17)),
        model="demo",
        dtype="float32",
        fingerprint={},
    )
    return replace(plan, **changes)


def a_planned(plan: PlanFile | None = None, **changes: Any) -> Planned:
    planned = Planned(
        plan=plan or a_plan(),
        faults=[
            LineFault(7, "seven", "context_length_exceeded", "the prompt has 3000 tokens"),
            LineFault(9, "nine", "empty_prompt", "the prompt has no tokens"),
        ],
        total_lines=482,
        warnings=[Warned("max_tokens_default", 3, "they have no max_tokens")],
        runs=SharedRuns((shared_run(0), shared_run(1, 0), shared_run(2, 1), shared_run(5, 0), shared_run(7)), 4, 2519),
        computed_once=7,
        steps=some_steps(300),
    )
    return replace(planned, **changes)


def an_explanation(**changes: Any) -> Explanation:
    request = ExplainedRequest(
        duplicate_of=None,
        answers=1,
        prompt_tokens=219,
        shared_tokens=213,
        cached_tokens=212,
        identical=1,
        answer_tokens=16,
        max_new_tokens=32,
        reads=(
            PrefixRead(0, 0, 13, 480, ("avocet-002", "robin-003", "robin-004"), "You answer", 1, 300),
            PrefixRead(3, 13, 199, 2, ("robin-003",), "Robin.\nEach", 13, 260),
        ),
        place=233,
        steps=(3, 18),
        seconds=(0.046, 1.5),
        pages=2,
        page_steps=22,
        prefix_page_steps=130.6,
        kv_bytes=65_536,
        page_bytes=32_768,
    )
    return replace(Explanation("robin-001", 7, (request,), ()), **changes)


def a_diagnosis() -> Diagnosis:
    return Diagnosis(
        (
            Finding("date", 3912, 480, 812, ("a", "b"), ("2026-11-0", "2026-11-1"), 153_661, 0.61),
            Finding("order", 250, 1, 93, ("q1", "q2"), ("- jars", "- ropes"), 11_083, 0.044),
            Finding("white space", 12, 0, 99, ("w1", "w2"), (" You", "You"), 1000, 0.01),
        ),
        4392,
        17,
    )
