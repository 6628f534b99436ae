"""Runs the standard workloads with a model on a device: with shared prefixes computed once and without, in several
schedule orders where KV memory is tight, and tells what each run took and what share of the bound that is.

Runs are those of `batchrun run`, in a folder of their own. One engine serves all of them, so the model is loaded once.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from batchrun.config import InputConfig, RunConfig, SamplingConfig, nearest
from batchrun.errors import BatchrunError, ExitCode, NothingRunnable, Stopped, UsageError
from batchrun.formats.plan import PlanFile
from batchrun.formats.rundir import document, output_errors, write_json_atomic
from batchrun.pipeline import plan_job, run_job, start_engine
from batchrun.planning.order import CANDIDATES
from batchrun.report.records import Report, Seconds
from batchrun.report.wording import duration
from batchrun.subject import Subject
from batchrun.workloads import SIZES, WORKLOADS, Workload, make_workload, write_job

BENCH = "bench.json"
DEFAULT = tuple(name for name in WORKLOADS if name != "many")
SHARED, UNSHARED = "auto", "none"  # groupings
_INPUT = "input"  # the order of the job, which is shuffled
_WARM_UP = 8  # of so many lines one


@dataclass(frozen=True, slots=True)
class Timed:
    """A workload as it was run in one way, a few times.

    Attributes:
        grouping, schedule_order: as they were asked for; `report` has the order that `auto` took.
        seconds: the median of `execute` over `runs`; of an even number the lower one of the two in the middle.
        spread: the longest `execute` less the shortest, as a share of `seconds`.
        tokens_per_second: prompt tokens, shared or not, and tokens of answers.
        bound_share: the least time that the device's peaks allow for what was computed, as a share of `seconds`.
        disturbed: runs in which the worker was lost or a step was cut for want of memory.
        runs: where the time of each run went, in the order that they ran in.
        report: of the run that took `seconds`.
    """

    grouping: str
    schedule_order: str
    seconds: float
    spread: float
    tokens_per_second: float
    bound_share: float
    disturbed: int
    runs: tuple[Seconds, ...]
    report: Report


@dataclass(frozen=True, slots=True)
class Benched:
    """A workload, run in all the ways that are compared.

    Attributes:
        name, about: which one, and what it is.
        requests: lines of its job.
        part: of all lengths that was left, so that they fit into the model's context; 1 where nothing was cut.
        kv_tokens: tokens that there was KV memory for, where the workload is about memory; else as many as fit.
        speedup: `unshared.seconds / shared.seconds`.
        shared: with shared prefixes computed once, in the order that `auto` took.
        unshared: without.
        orders: as `shared`, in other orders.
    """

    name: str
    about: str
    requests: int
    part: float
    kv_tokens: int | None
    speedup: float
    shared: Timed
    unshared: Timed
    orders: tuple[Timed, ...]


@dataclass(frozen=True, slots=True)
class Bench:
    """What `batchrun bench` measured.

    Attributes:
        model, device, dtype: what ran.
        size, scale: of the workloads.
        repeats: runs of each workload in each way; they take turns.
        began: Unix time.
        seconds: that it took in all.
        workloads: in the order that they were measured in.
        environment: versions and machine.
    """

    model: str
    device: str
    dtype: str
    size: str
    scale: float
    repeats: int
    began: int
    seconds: float
    workloads: tuple[Benched, ...]
    environment: dict[str, Any]


def run_bench(
    config: RunConfig,
    names: Sequence[str] = (),
    *,
    size: str | None = None,
    scale: float = 0.5,
    repeats: int = 3,
    all_orders: bool = False,
    out: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Measure workloads: what `batchrun bench` does.

    Args:
        config: model, device, and whatever else is the same in all runs; grouping and order are chosen here, and
            sampling is that of the workloads.
        names: of `WORKLOADS`; all but `many` if there are none.
        size: one of `workloads.SIZES`; that of the device if None.
        scale: of the number of groups or requests.
        repeats: runs of each workload in each way.
        all_orders: whether to compare all schedule orders on each workload; else `input` alone, and only where the
            workload is about memory.
        out: directory to keep jobs, run directories and the figures in; nothing is kept if None.
        tell: hears of each run, in a line.

    Raises:
        UsageError: an argument is wrong, or a workload does not fit the model or its memory.
        Stopped: it was interrupted, or a limit was reached; nothing is left of it.
        BatchrunError: as `pipeline.run`, or requests failed.
    """
    names = _known(names) or DEFAULT
    if size is not None and size not in SIZES:
        raise UsageError(f"There is no size {size!r}.", hint=f"Choose one of: {', '.join(SIZES)}.")
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"A scale of {scale:g} is none: it must be above 0.")
    if repeats < 1:
        raise UsageError(f"{repeats} repeats are none: it must be at least 1.")
    began, clock = int(time.time()), time.perf_counter()
    # What a file may say for jobs of one's own is not for these.
    ours = {"sampling": SamplingConfig(), "ignore_generation_config": True, "limit": None, "chat_template": None}
    ours |= {"input": InputConfig(), "output": config.output.model_copy(update={"results": None})}
    config = config.model_copy(update=ours)
    subject = Subject.resolve(config, weights=True)
    size = size or ("gpu" if subject.device == "cuda" else "cpu")
    try:
        with _folder(out) as folder:
            cases = []
            for name in names:
                made = make_workload(
                    name,
                    vocab_size=subject.spec.vocab_size,
                    max_context=subject.spec.max_context,
                    size=size,
                    scale=scale,
                )
                cases.append(_Case(made, folder, config, subject, all_orders=all_orders, keep=out is not None))
            expected = repeats * sum(case.expected for case in cases)
            tell(f"{duration(expected)} of computing expected; the model is loaded")
            with closing(start_engine(subject, config)) as engine:
                cases[0].run(0, engine, lines=max(cases[0].requests // _WARM_UP, 1))
                cases[0].run(1, engine, lines=max(cases[0].requests // _WARM_UP, 1))
                benched = tuple(case.measure(engine, repeats, tell) for case in cases)
            bench = Bench(
                model=subject.name,
                device=subject.device,
                dtype=subject.dtype,
                size=size,
                scale=scale,
                repeats=repeats,
                began=began,
                seconds=time.perf_counter() - clock,
                workloads=benched,
                environment=subject.environment,
            )
            if out is not None:
                write_json_atomic(out / BENCH, document(bench))
            return bench
    except KeyboardInterrupt:
        raise Stopped("The measurement was interrupted; nothing of it is kept.", code="interrupted") from None


class _Case:
    """A workload's job in a folder, and the ways in which it is run."""

    def __init__(
        self, made: Workload, folder: Path, config: RunConfig, subject: Subject, *, all_orders: bool, keep: bool
    ) -> None:
        """`keep`: whether directories of runs stay."""
        self.name = made.name
        self.keep = keep
        self.requests = len(made.requests)
        self.part = made.part
        self.kv_tokens = made.kv_tokens
        self.folder = folder
        self.job = folder / f"{made.name}.jsonl"
        self.config = config
        if made.kv_tokens is not None:
            kv_memory = made.kv_tokens * subject.spec.kv_bytes_per_token(subject.dtype)
            self.config = config.model_copy(update={"kv_memory": min(kv_memory, config.kv_memory or kv_memory)})
        self._started = 0
        with output_errors(self.job):
            write_job(self.job, made)
        self.ways = [(SHARED, config.schedule_order), (UNSHARED, config.schedule_order)]
        planned = [self._plan(way) for way in (0, 1)]
        others = CANDIDATES if all_orders else (_INPUT,) if made.kv_tokens is not None else ()
        taken = planned[0].schedule_order
        self.ways += [(SHARED, order) for order in others if order != taken]
        shared, unshared = (plan.expected.seconds for plan in planned)
        self.expected = unshared + shared * (len(self.ways) - 1)

    def _plan(self, way: int) -> PlanFile:
        """What it is expected to do, seen to fit: a run of a part of it would be no measurement."""
        try:
            planned = plan_job(str(self.job), self._config(way))
            refused = planned.faults[0].message if planned.faults else None
        except NothingRunnable as refusal:
            refused = refusal.message
        if refused is not None:
            raise UsageError(
                f"The workload {self.name} does not fit: {refused}",
                hint="Give more --kv-memory, or choose other workloads.",
            )
        return planned.plan

    def measure(self, engine: Any, repeats: int, tell: Callable[[str], None]) -> Benched:
        """Run it in each way in turn, so that a slow spell of the machine hits all of them."""
        reports: list[list[Report]] = [[] for _ in self.ways]
        for repeat in range(repeats):
            for way, of_way in enumerate(reports):
                of_way.append(report := self.run(way, engine))
                words = "" if self.ways[way][0] == SHARED else ", nothing shared"
                took = duration(_execute(report))
                tell(f"{self.name}, {repeat + 1} of {repeats}: {took}, order {report.schedule_order}{words}")
        shared, unshared, *orders = (_timed(*way, of_way) for way, of_way in zip(self.ways, reports, strict=True))
        return Benched(
            name=self.name,
            about=WORKLOADS[self.name].about,
            requests=self.requests,
            part=self.part,
            kv_tokens=self.kv_tokens,
            speedup=unshared.seconds / shared.seconds,
            shared=shared,
            unshared=unshared,
            orders=tuple(orders),
        )

    def run(self, way: int, engine: Any, *, lines: int | None = None) -> Report:
        """One run, as a user's.

        Args:
            way: index into `ways`.
            lines: only as many, where it is to warm up.
        """
        out = self.folder / f"{self.name}.{self._started:03}.run"
        self._started += 1
        config = self._config(way).model_copy(update={"out": out, "limit": lines})
        outcome = run_job(str(self.job), config, engine=engine)
        report = outcome.report
        if not self.keep:
            shutil.rmtree(out)  # of many lines it is large, and there may be many
        if outcome.exit_code is ExitCode.STOPPED:
            raise Stopped("A limit of the configuration was reached; nothing of the measurement is kept.")
        if outcome.exit_code is not ExitCode.OK:
            errors = ", ".join(f"{code} ({count:,})" for code, count in report.errors.items())
            raise BatchrunError(
                f"{report.request_counts.failed:,} of {self.requests:,} requests of {self.name} failed: {errors}.",
                hint="Times of other requests would mean nothing.",
                code="requests_failed",
            )
        return report

    def _config(self, way: int) -> RunConfig:
        grouping, order = self.ways[way]
        scheduler = self.config.scheduler.model_copy(update={"grouping": grouping})
        return self.config.model_copy(update={"scheduler": scheduler, "schedule_order": order})


def _timed(grouping: str, order: str, reports: list[Report]) -> Timed:
    seconds = [_execute(report) for report in reports]
    median = statistics.median_low(seconds)
    report = reports[seconds.index(median)]
    assert report.bound is not None  # it was run
    return Timed(
        grouping=grouping,
        schedule_order=order,
        seconds=median,
        spread=(max(seconds) - min(seconds)) / median,
        tokens_per_second=(report.tokens.prompt_logical + report.tokens.output) / median,
        bound_share=report.bound.seconds / median,
        disturbed=sum(report.worker_restarts + report.memory_retries > 0 for report in reports),
        runs=tuple(report.seconds for report in reports),
        report=report,
    )


def _execute(report: Report) -> float:
    assert report.seconds.execute is not None  # it was run
    return report.seconds.execute


def _known(names: Sequence[str]) -> tuple[str, ...]:
    """Names of workloads, each once."""
    for name in names:
        if name not in WORKLOADS:
            meant = nearest(name, WORKLOADS)
            raise UsageError(
                f"There is no workload {name!r}" + (f"; did you mean {meant!r}?" if meant else "."),
                hint=f"There are: {', '.join(WORKLOADS)}.",
            )
    return tuple(dict.fromkeys(names))


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where to work: `out`, which must be empty, or a folder that is removed again. If it fails, nothing is left."""
    if out is None:
        with TemporaryDirectory(prefix="batchrun-") as folder:
            yield Path(folder)
        return
    new = not out.exists()
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UsageError(f"The directory {out} is not empty.", hint="Give another one to --out.")
    try:
        yield out
    except BaseException:
        with suppress(OSError):
            for left in out.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            if new:
                out.rmdir()
        raise
