"""The loop: schedule, compute, update, until every request has its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from batchrun.execution.worker import Worker
from batchrun.report.records import StepLog, StepRecord
from batchrun.schedule.scheduler import Finished, Scheduler
from batchrun.schedule.step import Step, StepOutput

Watch = Callable[[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.bool_]], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class LoopEnd:
    """What a loop leaves.

    Attributes:
        log: a record of each step.
        padded_rows: rows computed beyond those of the steps.
        stopped: whether it was told to stop before every request had its answer.
    """

    log: StepLog
    padded_rows: int
    stopped: bool


def run_loop(
    scheduler: Scheduler,
    worker: Worker,
    *,
    on_finished: Callable[[Finished], None] = lambda finished: None,
    on_step: Callable[[Step, StepOutput], None] = lambda step, output: None,
    watch: Watch | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> LoopEnd:
    """Run steps until every request has its answer, or `should_stop` says so between two steps.

    Args:
        on_finished: called for each answer, as soon as it is there.
        on_step: called after each step and its answers.
        watch: given the requests, the token ids and the ends that the model made of the rows sampled, `[S]` each;
            says which answers a stop string ends.
    """
    log = StepLog()
    padded = 0
    while True:
        if should_stop():
            return LoopEnd(log, padded, stopped=True)
        began = perf_counter()
        step = scheduler.schedule()
        if step is None:
            return LoopEnd(log, padded, stopped=False)
        pages_used = scheduler.pool.num_used
        submitted = perf_counter()
        worker.submit(step)
        output = worker.collect()
        waited = perf_counter() - submitted
        requests = step.request[step.samples]
        stopped = watch(requests, output.token_ids, output.ended) if watch is not None else None
        finished = scheduler.update(step, output, stopped)
        decodes = int(((step.num_sampled > 0) & step.samples & (step.length == 1)).sum())
        padded += output.padded_rows
        log.append(
            StepRecord(
                index=step.index,
                rows=step.num_rows,
                sampled=requests.size,
                prefill_rows=step.num_rows - decodes,
                decode_rows=decodes,
                pages_used=pages_used,
                seconds=output.seconds,
                host_seconds=perf_counter() - began - waited,
            )
        )
        for answer in finished:
            on_finished(answer)
        on_step(step, output)
