"""The loop: schedule, compute, update, until every request has its answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from batchrun.execution.recovery import Recovery
from batchrun.execution.worker import Worker, WorkerLost
from batchrun.report.records import StepLog, StepRecord
from batchrun.schedule.scheduler import Finished, Scheduler, Watch
from batchrun.schedule.step import Step, StepOutput


@dataclass(frozen=True, slots=True)
class LoopEnd:
    """What a loop leaves.

    Attributes:
        log: a record of each step.
        padded_rows: rows computed beyond those of the steps.
        stopped: whether it was told to stop before every request had its answer.
        recovery: seconds until a worker that was lost was known to be, and another was there.
    """

    log: StepLog
    padded_rows: int
    stopped: bool
    recovery: float = 0.0


def run_loop(
    scheduler: Scheduler,
    worker: Worker,
    *,
    on_finished: Callable[[Finished], None] = lambda finished: None,
    on_output: Callable[[Step, StepOutput], None] = lambda step, output: None,
    on_step: Callable[[Step, StepOutput], None] = lambda step, output: None,
    watch: Watch | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    recovery: Recovery | None = None,
    log: StepLog | None = None,
) -> LoopEnd:
    """Run steps until every request has its answer, or `should_stop` says so between two steps; with a scheduler of
    depth 2, a step is made and submitted while the device computes the one before it.

    Args:
        on_finished: called for each answer, as soon as it is there.
        on_output: called for what each step brought, before its answers.
        on_step: called after each step and its answers.
        watch: says which answers a stop string ends.
        recovery: what to do when the worker is lost; None: nothing.
        log: where records of steps go, each before its `on_step`; a new one if None.

    Raises:
        WorkerLost: the worker was lost, and there is no `recovery`, or it could not be started again.
        BatchrunError: as `Recovery.crashed`.
    """
    log = StepLog() if log is None else log
    padded, spent = 0, 0.0
    in_flight: deque[tuple[Step, int, int, int, bool]] = deque()
    while True:
        stopping = should_stop()
        began, waited = perf_counter(), 0.0
        try:
            while not stopping and len(in_flight) < scheduler.depth and (step := scheduler.schedule()) is not None:
                pages, held_back = scheduler.pool.num_used, scheduler.held_back
                in_flight.append((step, pages, scheduler.num_running, scheduler.num_waiting, held_back))
                submitted = perf_counter()
                worker.submit(step)
                waited += perf_counter() - submitted
            if not in_flight:
                if not stopping and recovery is not None and recovery.widen():
                    continue
                return LoopEnd(log, padded, stopped=stopping and not scheduler.done, recovery=spent)
            submitted = perf_counter()
            output = worker.collect()
            waited += perf_counter() - submitted
        except WorkerLost as lost:
            if recovery is None:
                raise
            in_flight.clear()
            recovery.crashed(str(lost), killed=lost.killed)
            worker.restart()
            spent += perf_counter() - began
            continue
        step, pages_used, running, waiting, held_back = in_flight.popleft()
        on_output(step, output)
        finished = scheduler.update(step, output, watch)
        decodes = int(((step.num_sampled > 0) & step.samples & (step.length == 1)).sum())
        padded += output.padded_rows
        log.append(
            StepRecord(
                index=step.index,
                rows=step.num_rows,
                sampled=output.token_ids.size,
                prefill_rows=step.num_rows - decodes,
                decode_rows=decodes,
                pages_used=pages_used,
                seconds=output.seconds,
                host_seconds=perf_counter() - began - waited,
                running=running,
                waiting=waiting,
                held_back=held_back,
            )
        )
        for answer in finished:
            on_finished(answer)
            if recovery is not None:
                recovery.finished()
        on_step(step, output)
        no_numbers = output.token_ids < 0
        for place, cause in output.stuck.items():
            no_numbers[place] = False
            if recovery is None:
                raise AssertionError(cause)
            recovery.stuck(int(step.request[step.samples][place]), cause)
        unsound = step.request[step.samples][no_numbers]
        unsound = unsound[np.isin(unsound, scheduler.requests_begun())] if unsound.size else unsound
        if unsound.size:
            if recovery is None:
                raise AssertionError("logits that are no numbers")
            in_flight.clear()
            lost_at = perf_counter()
            recovery.no_numbers(unsound.tolist())
            worker.restart()
            spent += perf_counter() - lost_at
