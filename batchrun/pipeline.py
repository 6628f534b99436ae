"""The whole program on one page: read, tokenise, find the forest, plan, run, write. The Python API."""

from __future__ import annotations

import logging
import os
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from batchrun.config import RunConfig, load_config, nearest
from batchrun.devices import DEPTH
from batchrun.errors import BatchrunError, ExitCode, NothingRunnable, OutputError, UsageError
from batchrun.execution.collect import LineCollector
from batchrun.execution.loop import run_loop
from batchrun.execution.stops import TextStops
from batchrun.formats.job import JobLint, JobSource, lint_job, open_job, read_job, spool_stdin
from batchrun.formats.plan import PlanFile, write_plan
from batchrun.formats.report import StepWriter, read_report, write_report
from batchrun.formats.results import error_line
from batchrun.formats.rundir import (
    ERRORS,
    RESULTS,
    Recovered,
    ResultSink,
    RunDir,
    RunState,
    RunStatus,
    check_disk,
    estimate_disk,
    output_errors,
    sort_results,
    write_text_atomic,
)
from batchrun.models import load_device_spec
from batchrun.prefix.doctor import Diagnosis, diagnose
from batchrun.prefix.explain import Explanation, SharedRuns, Timetable, explain, shared_runs
from batchrun.prepare import (
    Prepared,
    Simulated,
    choose_order,
    mismatches,
    plan_file,
    prepare,
    simulate,
    summaries,
    warnings_of,
)
from batchrun.report.page import render_page
from batchrun.report.records import (
    KvUse,
    Report,
    RequestCounts,
    Seconds,
    StepLog,
    Throughput,
    TokenCounts,
    Warned,
)
from batchrun.request import FinishReason, JobLine, LineFault
from batchrun.schedule.scheduler import Finished, Scheduler
from batchrun.schedule.step import Step, StepOutput
from batchrun.subject import Fingerprint, Subject, fingerprint_of

if TYPE_CHECKING:  # a plan loads no torch
    from batchrun.engine.device import Device
    from batchrun.engine.model import LoadedModel

log = logging.getLogger(__name__)

LOG, PAGE, PLAN, REPORT, STEPS = "run.log", "report.html", "plan.json", "report.json", "steps.jsonl"
STDIN_JOB = "job.jsonl"
_IDS_COMPARED = 5000  # to either side, to find the one that was meant


class Observer(Protocol):
    """What a caller hears of a run while it runs."""

    def faults(self, faults: list[LineFault], total: int) -> None:
        """Bad lines of the job, before the model is loaded; `total` lines there are."""

    def stage(self, name: str) -> None:
        """A stage begins: `read`, `load model`, `run`."""

    def expected_rows(self, rows: int) -> None:
        """How many rows the whole run is expected to compute; said once, before the model is loaded."""

    def step(self, rows: int, sampled: int, finished: int) -> None:
        """A step was computed, and so many requests have got their answers since the last one."""

    def should_stop(self) -> bool:
        """Asked between steps; True ends the run early, to be gone on with later."""


class _Silent:
    """An observer that does not mind."""

    def faults(self, faults: list[LineFault], total: int) -> None: ...

    def stage(self, name: str) -> None: ...

    def expected_rows(self, rows: int) -> None: ...

    def step(self, rows: int, sampled: int, finished: int) -> None: ...

    def should_stop(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        report: what happened.
        run_dir: where the files are.
        exit_code: what the command exits with.
        already_done: whether an earlier run had finished, and nothing was done now.
    """

    report: Report
    run_dir: Path
    exit_code: ExitCode
    already_done: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """What `batchrun plan` found out.

    Attributes:
        plan: as in `plan.json`.
        faults: bad lines.
        total_lines: lines of the job, blank ones not counted.
        warnings: what a person should know.
        runs: what the prompts share most.
        computed_once: how many of the shared runs are.
        steps: as simulated, `[steps]` as in `StepLog.columns`.
        explanation: of one line, if it was asked for.
        diagnosis: why prompts that look alike do not share, if it was asked for.
    """

    plan: PlanFile
    faults: list[LineFault]
    total_lines: int
    warnings: list[Warned]
    runs: SharedRuns
    computed_once: int
    steps: npt.NDArray[np.void]
    explanation: Explanation | None = None
    diagnosis: Diagnosis | None = None

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.SOME_FAILED if self.faults else ExitCode.OK


def run(job: str | Path, *, model: str, out: str | Path | None = None, **options: Any) -> Report:
    """Run every request of a job and return the report.

    Args:
        job: path of a `.jsonl`, `.jsonl.gz` or `.jsonl.zst` file.
        model: a model directory, a short name, or a hub id.
        out: run directory; `jobs.run` beside `jobs.jsonl` if None.
        options: fields of `RunConfig` by name, and `config_file`.

    Raises:
        BatchrunError: as the command would fail; its `exit_code` is the command's.

    Example:
        >>> import batchrun
        >>> report = batchrun.run("jobs.jsonl", model="demo", out="trial.run", limit=4)
        >>> report.request_counts.completed
        4
    """
    return run_job(str(job), load_config(model=model, out=_text(out), **options)).report


def plan(job: str | Path, *, model: str, **options: Any) -> PlanFile:
    """Plan a job without running it: no weights are read and no torch is loaded.

    Args:
        job: path of a `.jsonl`, `.jsonl.gz` or `.jsonl.zst` file.
        model: a model directory, a short name, or a hub id.
        options: fields of `RunConfig` by name, and `config_file`.

    Raises:
        BatchrunError: as the command would fail.

    Example:
        >>> import batchrun
        >>> plan = batchrun.plan("jobs.jsonl", model="demo")
        >>> plan.requests
        480
        >>> plan.saving > 0.9
        True
    """
    return plan_job(str(job), load_config(model=model, **options)).plan


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


# --- plan -------------------------------------------------------------------------------------------------------


def plan_job(job: str, config: RunConfig, *, explain_line: str | None = None, doctor: bool = False) -> Planned:
    """Plan a job: what `batchrun plan` does. Raises as `plan`.

    Args:
        explain_line: `custom_id` of a line to explain.
        doctor: whether to find out why prompts that look alike do not share.
    """
    if job == "-":
        raise UsageError("A plan reads the job twice, so it cannot come from standard input.", hint="Give a file.")
    subject = Subject.resolve(config, weights=False)
    source = open_job(job)
    lint = lint_job(source, config.limit)
    _refuse_unrunnable(lint.faults, lint.total, config)
    _refuse_mismatch(lint, subject, config)
    prepared = prepare(subject, _sound_lines(source, config.limit), config)
    _refuse_unrunnable(prepared.faults, lint.total, config)
    faults = sorted([*lint.faults, *prepared.faults], key=lambda fault: fault.number)
    total = lint.total
    if not len(prepared.requests):
        raise NothingRunnable(f"None of the {total} lines can run; the first: {_shown(faults[0])}")
    if explain_line is not None:
        _refuse_unknown(explain_line, [*prepared.requests.custom_ids, *(fault.custom_id for fault in faults)])
    prepared, orders = choose_order(prepared)
    simulated = simulate(prepared)
    requests, forest, decode = prepared.requests, prepared.forest, prepared.tokenizer.decode
    return Planned(
        plan=plan_file(prepared, simulated, orders, subject, fingerprint_of(subject, lint.fingerprint, config)),
        faults=faults,
        total_lines=total,
        warnings=warnings_of(lint, prepared, subject, config),
        runs=shared_runs(forest, requests.tokens.ids, decode),
        computed_once=len(prepared.plan.groups),
        steps=simulated.log.columns,
        explanation=_explain(explain_line, prepared, simulated, faults) if explain_line is not None else None,
        diagnosis=diagnose(requests, forest, decode) if doctor else None,
    )


def _explain(custom_id: str, prepared: Prepared, simulated: Simulated, faults: list[LineFault]) -> Explanation:
    """What is planned for one line."""
    plan, requests = prepared.plan, prepared.requests
    timetable = Timetable(
        order=plan.order,
        expected_new_tokens=plan.expected_new_tokens,
        first_step=simulated.first_step,
        last_step=simulated.last_step,
        ends=np.cumsum(simulated.log.columns["seconds"]),
        page_size=plan.budget.page_size,
        page_bytes=plan.budget.page_bytes,
    )
    explanation = explain(
        custom_id, faults, requests, prepared.forest, plan.groups, timetable, prepared.tokenizer.decode
    )
    assert explanation is not None  # _refuse_unknown has seen it
    return explanation


def _refuse_unknown(custom_id: str, known: list[str]) -> None:
    """A line that the job does not have; of a large job, the nearest is looked for among those beside it in order."""
    if custom_id in known:
        return
    known.sort()
    place = bisect_left(known, custom_id)
    around = known[max(place - _IDS_COMPARED, 0) : place + _IDS_COMPARED]
    meant = nearest(custom_id, around) or around[min(place, len(around) - 1)]
    raise UsageError(f"No line of the job has the custom_id {custom_id!r}.", hint=f"The nearest one is {meant!r}.")


# --- run --------------------------------------------------------------------------------------------------------


def run_job(job: str, config: RunConfig, observer: Observer | None = None) -> Outcome:
    """Run a job: what `batchrun run` does. Raises as `run`."""
    observer = observer or _Silent()
    began = time.perf_counter()
    subject = Subject.resolve(config, weights=True)
    with ExitStack() as stack:
        source, out = _open_source(job, config, stack)
        lint = lint_job(source, config.limit)
        _refuse_unrunnable(lint.faults, lint.total, config)
        _refuse_mismatch(lint, subject, config)
        if config.strict:  # all or none: what only the tokenizer can refuse is found before anything is written
            faults = prepare(subject, _sound_lines(source, config.limit), config).faults
            _refuse_unrunnable(faults, lint.total, config)
        if subject.device != "cpu":
            from batchrun.engine.device import make_device

            make_device(subject.device)  # a GPU that is not there is told before anything is written
        fingerprint = fingerprint_of(subject, lint.fingerprint, config)
        run_dir = stack.enter_context(RunDir.open(out, fingerprint, fresh=config.fresh))
        if run_dir.state is RunState.FINISHED:
            assert run_dir.run is not None and run_dir.run.exit_code is not None
            done = read_report(out / REPORT)
            return Outcome(done, out, ExitCode(run_dir.run.exit_code), already_done=True)
        if job == "-":
            with output_errors(out):
                source.path = source.path.replace(out / STDIN_JOB)
        stack.enter_context(_log_to(out / LOG))
        return _Run(source, lint, fingerprint, subject, config, run_dir, observer, began).execute()


class _Run:
    """One run in a locked run directory, from the read job to the written report."""

    def __init__(
        self,
        source: JobSource,
        lint: JobLint,
        fingerprint: Fingerprint,
        subject: Subject,
        config: RunConfig,
        run_dir: RunDir,
        observer: Observer,
        began: float,
    ) -> None:
        self.source = source
        self.lint = lint
        self.fingerprint = fingerprint
        self.subject = subject
        self.config = config
        self.run_dir = run_dir
        self.observer = observer
        self.began = began
        self.seconds: dict[str, float] = {}
        self.answered_prompt_tokens = 0
        self.finish_reasons: Counter[str] = Counter()
        self.error_codes: Counter[str] = Counter()
        self.total = lint.total
        self._loaded: tuple[LoadedModel, Device] | None = None

    def execute(self) -> Outcome:
        recovered = self.run_dir.recover()
        self.error_codes.update(recovered.error_codes)
        self.run_dir.start(self._counts(recovered), model=self.subject.name, environment=self.subject.environment)
        log.info("run of %s with %s: %s lines", self.source.path, self.subject.name, self.total)
        sink = ResultSink(
            self.run_dir.path,
            recovered,
            flush_seconds=self.config.output.flush_seconds,
            flush_results=self.config.output.flush_results,
        )
        try:
            with sink:
                report, stopped = self._fill(sink, recovered)
        except BaseException as error:
            log.exception("the run broke off")
            code = error.exit_code if isinstance(error, BatchrunError) else ExitCode.INTERNAL
            # The disk may be full for this file too: what the lines say is the truth, with or without it.
            with suppress(OutputError):
                self.run_dir.update(
                    RunStatus.STOPPED,
                    RequestCounts(self.total, sink.completed, sink.failed, self.total - sink.completed - sink.failed),
                    errors=self.error_codes,
                    exit_code=code,
                )
            raise
        counts = report.request_counts
        if stopped:
            code = ExitCode.STOPPED
        elif counts.completed == 0:
            code = ExitCode.NOTHING_RUNNABLE
        else:
            code = ExitCode.SOME_FAILED if counts.failed else ExitCode.OK
        status = RunStatus.STOPPED if stopped else RunStatus.COMPLETED
        self.run_dir.update(status, counts, errors=report.errors, exit_code=code)
        log.info("%s: %s completed, %s failed, %s remaining", status, counts.completed, counts.failed, counts.remaining)
        return Outcome(report, self.run_dir.path, code)

    def _fill(self, sink: ResultSink, recovered: Recovered) -> tuple[Report, bool]:
        """Write every result and error; returns the report, which is written too, and whether the run was stopped."""
        done = set(recovered.results.tolist()) | set(recovered.errors.tolist())
        self._refuse(sink, [fault for fault in self.lint.faults if fault.number not in done])
        self.observer.faults(self.lint.faults, self.total)

        config = self.config
        if self.subject.device != "cpu" and config.kv_memory is None:
            config = config.model_copy(update={"kv_memory": self._measured_kv_memory()})
        self.observer.stage("read")
        lines = _sound_lines(self.source, self.config.limit)
        prepared = prepare(self.subject, (line for line in lines if line.number not in done), config)
        self.seconds |= prepared.seconds
        self._refuse(sink, prepared.faults)
        if prepared.faults:
            self.observer.faults(prepared.faults, self.total)
        warnings = warnings_of(self.lint, prepared, self.subject, self.config)
        if done:
            warnings.append(
                Warned(
                    "resumed",
                    len(done),
                    f"{len(done):,} lines were finished by an earlier start; tokens, steps and times are of the rest",
                )
            )
        disk = check_disk(
            self.run_dir.path, estimate_disk(prepared.requests.max_new_tokens, len(prepared.requests.custom_ids))
        )
        if disk is not None:
            warnings.append(Warned("disk_space", 1, disk))
        for warning in warnings:
            log.warning("%s", warning.message)

        began = time.perf_counter()
        prepared, orders = choose_order(prepared)
        scheduler = Scheduler(prepared.plan, prepared.requests, depth=DEPTH[self.subject.device])
        steps, padded, stopped = StepLog(), 0, False
        if len(prepared.requests):
            simulated = simulate(prepared)
            self.seconds["plan"] += time.perf_counter() - began
            write_plan(self.run_dir.path / PLAN, plan_file(prepared, simulated, orders, self.subject, self.fingerprint))
            self.observer.expected_rows(round(simulated.scale * int(simulated.log.columns["rows"].sum())))
            steps, padded, stopped = self._run_model(prepared, scheduler, sink)
        sink.flush()
        report = self._report(prepared, scheduler, steps, padded, sink, warnings)
        if not stopped:
            self.run_dir.update(RunStatus.FINALIZING, report.request_counts, errors=report.errors)
            if self.config.results_order == "input":
                for name in (RESULTS, ERRORS):
                    sort_results(self.run_dir.path / name)
        write_report(self.run_dir.path / REPORT, report)
        write_text_atomic(self.run_dir.path / PAGE, render_page(report, steps.columns))
        return report, stopped

    def _run_model(self, prepared: Prepared, scheduler: Scheduler, sink: ResultSink) -> tuple[StepLog, int, bool]:
        """Load the model and run the plan; answers go to `sink` as they come."""
        from batchrun.engine.torch_worker import TorchWorker

        requests, plan = prepared.requests, prepared.plan
        model, device = self._engine()
        worker = TorchWorker(
            model,
            requests,
            eos_token_ids=prepared.tokenizer.eos_token_ids(self.subject.generation_config),
            page_size=plan.budget.page_size,
            num_pages=plan.budget.pages,
            device=device,
            deterministic=self.config.deterministic,
        )

        texts = TextStops(prepared.tokenizer, requests)
        lines = LineCollector(requests, plan.groups, self.subject.name, sink)
        newly_finished = 0

        def on_finished(finished: Finished) -> None:
            nonlocal newly_finished
            text, by_text = texts.text(finished)
            reason = FinishReason.STOP if by_text else finished.reason
            self.finish_reasons[reason.value] += 1
            self.answered_prompt_tokens += requests.tokens.span(finished.request).length
            newly_finished += 1
            lines.add(finished, text, reason)

        def on_step(step: Step, output: StepOutput) -> None:
            nonlocal newly_finished
            self.observer.step(step.num_rows, output.token_ids.size, newly_finished)
            newly_finished = 0
            sink.poll()
            if step_writer is not None:
                step_writer.write(step, output.seconds)

        self.observer.stage("run")
        began = time.perf_counter()
        with ExitStack() as stack:
            stack.callback(worker.close)
            steps_path = self.run_dir.path / STEPS
            step_writer = stack.enter_context(StepWriter(steps_path)) if self.config.output.steps_log else None
            end = run_loop(
                scheduler,
                worker,
                on_finished=on_finished,
                on_step=on_step,
                watch=texts.watch,
                should_stop=self.observer.should_stop,
            )
        self.seconds["execute"] = time.perf_counter() - began
        return end.log, end.padded_rows, end.stopped

    def _engine(self) -> tuple[LoadedModel, Device]:
        """The model, loaded when it is first asked for, and where it is."""
        if self._loaded is None:
            self.observer.stage("load model")
            began = time.perf_counter()
            from batchrun.engine.device import make_device
            from batchrun.engine.model import load_model

            subject = self.subject
            device = make_device(subject.device, graphs=not self.config.enforce_eager)
            model = load_model(subject.model.path, subject.config, subject.dtype, subject.device)
            self._loaded = model, device
            self.seconds["load"] = time.perf_counter() - began
        return self._loaded

    def _measured_kv_memory(self) -> int | None:
        """Bytes for KV: what the weights and the largest step leave of the device."""
        from batchrun.engine.torch_worker import kv_memory

        spec = load_device_spec(self.config.device_spec or self.subject.device)
        scheduler = self.config.scheduler
        return kv_memory(
            *self._engine(),
            share=spec.kv_share,
            rows=scheduler.step_tokens or spec.step_tokens,
            page_size=scheduler.page_size or spec.page_size,
        )

    def _refuse(self, sink: ResultSink, faults: list[LineFault]) -> None:
        for fault in faults:
            sink.write_error(error_line(fault))
            self.error_codes[fault.code] += 1

    def _counts(self, recovered: Recovered) -> RequestCounts:
        completed, failed = recovered.results.size, recovered.errors.size
        return RequestCounts(self.total, completed, failed, self.total - completed - failed)

    def _report(
        self,
        prepared: Prepared,
        scheduler: Scheduler,
        steps: StepLog,
        padded_rows: int,
        sink: ResultSink,
        warnings: list[Warned],
    ) -> Report:
        plan, counters = prepared.plan, scheduler.counters
        execute = self.seconds.get("execute")
        answered = sum(self.finish_reasons.values())

        def rate(count: int) -> float | None:
            return count / execute if execute else None

        return Report(
            request_counts=RequestCounts(
                self.total, sink.completed, sink.failed, self.total - sink.completed - sink.failed
            ),
            tokens=TokenCounts(plan.prompt_logical, plan.prompt_physical, counters.prompt_computed, counters.sampled),
            saving=plan.saving,
            seconds=Seconds(
                total=time.perf_counter() - self.began,
                load=self.seconds.get("load"),
                tokenize=self.seconds.get("tokenize"),
                plan=self.seconds.get("plan"),
                execute=execute,
            ),
            throughput=Throughput(rate(answered), rate(self.answered_prompt_tokens), rate(counters.sampled)),
            steps=len(steps),
            kv=KvUse(plan.budget.page_size, plan.budget.pages, scheduler.pool.peak_used),
            idle_rows=counters.idle_rows,
            padded_rows=padded_rows,
            preemptions=counters.preemptions,
            memory_retries=counters.memory_retries,
            prefix_evictions=counters.prefix_evictions,
            finish_reasons=dict(self.finish_reasons),
            errors=dict(self.error_codes),
            warnings=tuple(warnings),
            groups=summaries(plan.groups),
            schedule_order=plan.options.schedule_order,
            model=self.subject.name,
            device=self.subject.device,
            dtype=self.subject.dtype,
            environment=self.subject.environment,
        )


# --- what both do -------------------------------------------------------------------------------------------------


def _open_source(job: str, config: RunConfig, stack: ExitStack) -> tuple[JobSource, Path]:
    """The job and its run directory; standard input is put into the latter, where `stack` removes it again unless a
    run has taken it."""
    if job != "-":
        source = open_job(job)
        return source, config.out or source.default_out()
    if config.out is None:
        raise UsageError("A job from standard input needs a run directory.", hint="Give one with -o DIR.")
    out, new = config.out, not config.out.exists()
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if new:
        stack.callback(_remove_if_empty, out)
    spool = out / f".{STDIN_JOB}.{os.getpid()}"
    stack.callback(spool.unlink, missing_ok=True)
    return spool_stdin(spool, sys.stdin.buffer), out


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def _sound_lines(source: JobSource, limit: int | None) -> Iterator[JobLine]:
    """The lines that can be tried, of the first `limit`."""
    return (item for item in islice(read_job(source), limit) if isinstance(item, JobLine))


def _refuse_unrunnable(faults: list[LineFault], total: int, config: RunConfig) -> None:
    """An empty job, and under --strict one with bad lines: those that the file shows, or those that the model does."""
    if total == 0:
        raise NothingRunnable("The job has no requests: every line is blank, or there is none.", code="empty_batch")
    if config.strict and faults:
        shown = "\n".join(_shown(fault) for fault in faults[:10])
        more = f"\nand {len(faults) - 10:,} more" if len(faults) > 10 else ""
        raise NothingRunnable(
            f"{len(faults):,} of {total:,} lines are bad, and --strict runs all lines or none:\n{shown}{more}",
            hint="Mend them, or leave --strict out to run the others.",
        )


def _refuse_mismatch(lint: JobLint, subject: Subject, config: RunConfig) -> None:
    """Under --strict, lines made for another model are no warning."""
    mismatch = mismatches(lint, subject)
    if config.strict and mismatch is not None:
        raise NothingRunnable(
            f"{mismatch.count:,} of {lint.total:,} lines: {mismatch.message}; --strict refuses that.",
            hint="Give the model by the name that the lines have, or leave --strict out.",
            code=mismatch.code,
        )


def _shown(fault: LineFault) -> str:
    return f"line {fault.number}: {fault.code}: {fault.message}"


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send the package's log to `run.log` while a run lasts."""
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"The log {path} cannot be written: {error.strerror}.") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("batchrun")
    logger.addHandler(handler)
    level, logger.level = logger.level, min(logger.level or logging.INFO, logging.INFO)
    try:
        yield
    finally:
        logger.level = level
        logger.removeHandler(handler)
        handler.close()
