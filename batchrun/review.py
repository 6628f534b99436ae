"""What a run came to, read back from its directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchrun.errors import UsageError
from batchrun.formats.plan import PlanFile
from batchrun.formats.report import REPORT, read_course, read_latest
from batchrun.report.limit import Limit, what_limited
from batchrun.report.records import Report, StartSummary, Warned
from batchrun.status import RunProgress


@dataclass(frozen=True, slots=True)
class Review:
    """What `batchrun report` tells.

    Attributes:
        run_dir: where the run is.
        progress: how it stands.
        report: of its latest start that ended with one; a warning says where that is not the latest.
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
    if outdated := why_outdated(report, progress):
        report = replace(report, warnings=(Warned("outdated", 1, outdated), *report.warnings))
    course = read_course(run_dir, report)
    review = Review(
        run_dir=str(run_dir),
        progress=progress,
        report=report,
        plan=course.plan,
        limited_by=what_limited(report, course.plan),
        starts=course.starts,
    )
    return review, course.steps.columns


def why_outdated(report: Report, progress: RunProgress) -> str | None:
    """Why a report is not of the run as it stands; None where it is. A start writes it when it ends, and one that is
    killed does not."""
    if progress.state == "running":
        return "the run is going on; this report is of the start before"
    if progress.request_counts != report.request_counts:
        return "a start after the one that this report is of ended without a report; batchrun status has its counts"
    return None
