"""What a run came to, read back from its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchrun.errors import UsageError
from batchrun.formats.plan import PLAN, PlanFile, read_plan
from batchrun.formats.report import REPORT, STEPS, read_latest, read_step_logs
from batchrun.report.limit import Limit, what_limited
from batchrun.report.records import Report, StartSummary, StepLog, sum_up
from batchrun.status import RunProgress


@dataclass(frozen=True, slots=True)
class Review:
    """What `batchrun report` tells.

    Attributes:
        run_dir: where the run is.
        progress: how it stands.
        report: of its latest start.
        plan: that this start followed; None where it has none.
        limited_by: what took most of its time; None where nothing was run.
        starts: what the steps of each start did, as far as they are logged.
    """

    run_dir: str
    progress: RunProgress
    report: Report
    plan: PlanFile | None
    limited_by: Limit | None
    starts: tuple[StartSummary, ...]


def read_review(progress: RunProgress, run_dir: Path) -> tuple[Review, npt.NDArray[np.void]]:
    """Read a run's report, its plan, and its steps, `[steps]` as in `StepLog.columns`: those of its latest start, none
    where they are not logged.

    Args:
        progress: as `read_status` tells it.

    Raises:
        UsageError: it has no report.
        RunDirError: a file is not sound.
    """
    report = read_latest(run_dir)
    if report is None:
        raise UsageError(
            f"{run_dir} has no {REPORT}: a run writes it when it ends, finished or stopped, and this one has not yet.",
            hint="batchrun status tells how far it is; the same command again goes on with it.",
        )
    plan = read_plan(run_dir / PLAN) if (run_dir / PLAN).is_file() else None
    if plan is not None and plan.expected != report.expected:  # it is of another start
        plan = None
    logs = read_step_logs(run_dir / STEPS)
    latest = next((log for log in reversed(logs) if len(log) == report.steps), StepLog(1))
    review = Review(
        run_dir=str(run_dir),
        progress=progress,
        report=report,
        plan=plan,
        limited_by=what_limited(report, plan),
        starts=tuple(map(sum_up, logs)),
    )
    return review, latest.columns
