"""`plan.json`: what a job is going to do, before it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchrun.formats.rundir import document, read_document, write_json_atomic
from batchrun.report.records import Estimate, GroupSummary, KvUse, OrderTried, TokenCounts

PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class PlanFile:
    """`plan.json`: what a run would do.

    Attributes:
        requests: requests that are to run.
        duplicates: answers that are not computed, since one of these requests must have the same.
        tokens, saving: as in the report; `tokens.output` is what is expected.
        groups: the largest prefix-sharing groups, largest first (`largest_groups`).
        schedule_order, grouping: names of the policies.
        steps: steps until the end.
        rows: tokens that they compute.
        step_tokens: rows a step is filled up to.
        kv: KV memory.
        expected: how long it takes, and the bound.
        orders: the schedule orders that were tried, shortest first; one, unless it was left to `auto`.
        model, dtype: what it is planned for.
        fingerprint: as in `run.json`.
    """

    requests: int
    duplicates: int
    tokens: TokenCounts
    saving: float
    groups: tuple[GroupSummary, ...]
    schedule_order: str
    grouping: str
    steps: int
    rows: int
    step_tokens: int
    kv: KvUse
    expected: Estimate
    orders: tuple[OrderTried, ...]
    model: str
    dtype: str
    fingerprint: dict[str, str | int | float | bool | None]


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write `plan.json`.

    Raises:
        OutputError: it cannot be written.
    """
    write_json_atomic(path, document(plan))


def read_plan(path: Path) -> PlanFile:
    """Read `plan.json`.

    Raises:
        RunDirError: it is missing or not sound.
    """
    return read_document(path, PlanFile)
