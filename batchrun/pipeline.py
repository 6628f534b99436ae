"""The whole program on one page: read, tokenise, find the forest, plan, run, write. The Python API."""

from __future__ import annotations

import logging
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from batchrun.config import RunConfig, dump_config, load_config, nearest, parse_duration, parse_share, parse_until
from batchrun.devices import DEPTH
from batchrun.errors import BatchrunError, ExitCode, NothingRunnable, OutputError, RunDirError, UsageError
from batchrun.execution.collect import LineCollector
from batchrun.execution.limits import Limits, RequestClock
from batchrun.execution.logprobs import LogprobTable, PromptTable
from batchrun.execution.loop import LoopEnd, run_loop
from batchrun.execution.process import RemoteEngine
from batchrun.execution.recovery import Recovery
from batchrun.execution.stops import TextStops
from batchrun.execution.timeline import Timeline
from batchrun.execution.worker import WorkerLost
from batchrun.formats.job import JobLint, JobSource, lint_job, sound_lines
from batchrun.formats.plan import PLAN, PlanFile, write_plan
from batchrun.formats.report import (
    REPORT,
    STEPS,
    Course,
    StepWriter,
    read_course,
    read_latest,
    read_report,
    write_report,
)
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
    exit_code_of,
    output_errors,
    sort_results,
    write_text_atomic,
)
from batchrun.models import load_device_spec
from batchrun.planning.cost import Work
from batchrun.planning.memory import page_size_on
from batchrun.prefix.doctor import Diagnosis, diagnose
from batchrun.prefix.explain import Explanation, SharedRuns, Timetable, explain, shared_runs
from batchrun.prefix.forest import PrefixForest
from batchrun.prepare import (
    Prepared,
    Simulated,
    bound_of,
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
    SlowRequest,
    StepLog,
    Throughput,
    TokenCounts,
    Warned,
    step_seconds,
)
from batchrun.report.wording import plural, printable
from batchrun.request import FinishReason, JobLine, LineFault
from batchrun.schedule.scheduler import Finished, Scheduler
from batchrun.schedule.step import Step, StepOutput
from batchrun.sources.opening import open_to_read, open_to_run
from batchrun.sources.results import write_results
from batchrun.sources.stores import check_writable, refuse_own_file
from batchrun.subject import Fingerprint, Subject, fingerprint_of

if TYPE_CHECKING:
    from batchrun.engine.engine import Engine, EngineSettings

log = logging.getLogger(__name__)

LOG, PAGE = "run.log", "report.html"
QUARANTINED, TIMED_OUT = "engine_quarantined", "request_timeout"
_IDS_COMPARED = 5000  # to either side, to find the one that was meant


class Observer(Protocol):
    """What a caller hears of a run while it runs."""

    def faults(self, faults: list[LineFault], total: int) -> None:
        """Bad lines of the job, before the model is loaded; `total` lines there are."""

    def stage(self, name: str) -> None:
        """A stage begins: `fetch`, `read`, `load model`, `run`."""

    def expected_rows(self, rows: int) -> None:
        """How many rows the whole run is expected to compute; said once, before the model is loaded."""

    def step(self, rows: int, sampled: int, finished: int) -> None:
        """A step was computed, and so many requests have got their answers since the last one."""

    def should_stop(self) -> bool:
        """Asked between steps; True ends the run early, to be gone on with later."""


class Silent:
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
        job: a file, directory, pattern or URL, as `batchrun run` takes it.
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
        job: a file, directory, pattern or URL, as `batchrun plan` takes it.
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
    with ExitStack() as stack:
        opened = open_to_read(job, config.input, stack, out=config.out)
        source = opened.job
        lint = lint_job(source, config.limit)
        _refuse_unrunnable(lint.faults, lint.total, config)
        _refuse_mismatch(lint, subject, config)
        prepared, forest = prepare(subject, sound_lines(source, config.limit), config)
    unfit = source.located(prepared.faults)
    _refuse_unrunnable(unfit, lint.total, config)
    faults = sorted([*lint.faults, *unfit], key=lambda fault: fault.number)
    total = lint.total
    if not len(prepared.requests):
        raise NothingRunnable(f"None of the {total} lines can run; the first: {_shown(faults[0])}")
    if explain_line is not None:
        _refuse_unknown(explain_line, [*prepared.answers.custom_ids, *(fault.custom_id for fault in faults)])
    prepared, orders = choose_order(prepared)
    simulated = simulate(prepared)
    requests, decode = prepared.requests, prepared.tokenizer.decode
    return Planned(
        plan=plan_file(prepared, simulated, orders, subject, fingerprint_of(subject, lint.fingerprint, config)),
        faults=faults,
        total_lines=total,
        warnings=[*opened.warnings, *warnings_of(lint, prepared, subject, config)],
        runs=shared_runs(forest, requests.tokens.ids, decode),
        computed_once=len(prepared.plan.groups),
        steps=simulated.log.columns,
        explanation=_explain(explain_line, prepared, forest, simulated, faults) if explain_line is not None else None,
        diagnosis=diagnose(requests, forest, decode) if doctor else None,
    )


def _explain(
    custom_id: str, prepared: Prepared, forest: PrefixForest, simulated: Simulated, faults: list[LineFault]
) -> Explanation:
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
        custom_id,
        faults,
        prepared.answers,
        requests,
        forest,
        plan.groups,
        timetable,
        prepared.tokenizer.decode,
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


def run_job(
    job: str, config: RunConfig, observer: Observer | None = None, *, engine: Engine | RemoteEngine | None = None
) -> Outcome:
    """Run a job: what `batchrun run` does. Raises as `run`.

    Args:
        engine: of `start_engine`, for this model and device, left open for further runs; None: one of its own.
    """
    observer = observer or Silent()
    began = time.perf_counter()
    subject = Subject.resolve(config, weights=True)
    if config.output.results is not None:
        check_writable(config.output.results, job)
    with ExitStack() as stack:
        opened, out = open_to_run(job, config, stack, tell=observer.stage, stop=observer.should_stop)
        source = opened.job
        if config.output.results is not None:
            refuse_own_file(config.output.results, job, out)
        lint = lint_job(source, config.limit)
        _refuse_unrunnable(lint.faults, lint.total, config)
        _refuse_mismatch(lint, subject, config)
        if config.strict:  # all or none: what only the tokenizer can refuse is found before anything is written
            faults = prepare(subject, sound_lines(source, config.limit), config)[0].faults
            _refuse_unrunnable(source.located(faults), lint.total, config)
        fingerprint = fingerprint_of(subject, lint.fingerprint, config)
        run_dir = stack.enter_context(
            RunDir.open(
                out,
                fingerprint,
                fresh=config.fresh,
                job=opened.place,
                settings=dump_config(config),
                source=opened.source,
            )
        )
        if run_dir.state is RunState.FINISHED:
            _in_order(out, config)
            if config.output.results is not None:
                opened.keep(out)
                run_dir.note_results(config.output.results)
                write_results(out, config.output.results)
            return finished(run_dir)
        opened.keep(out)
        stack.enter_context(log_to(out / LOG))
        return Run(
            source, lint, fingerprint, subject, config, run_dir, observer, began, engine, warnings=opened.warnings
        ).execute()


def _in_order(run_dir: Path, config: RunConfig) -> None:
    """Put results and errors into the order that is wanted."""
    if config.results_order == "input":
        for name in (RESULTS, ERRORS):
            sort_results(run_dir / name)


def finished(run_dir: RunDir) -> Outcome:
    """What an earlier start came to, where nothing is left to do.

    Raises:
        RunDirError: its report is not sound.
    """
    assert run_dir.run is not None and run_dir.run.exit_code is not None
    done = read_report(run_dir.path / REPORT)
    return Outcome(done, run_dir.path, ExitCode(run_dir.run.exit_code), already_done=True)


def start_engine(subject: Subject, config: RunConfig) -> Engine | RemoteEngine:
    """The engine, which loads its model while other things are done, if it has a process of its own."""
    from batchrun.engine.engine import EngineSettings

    settings = EngineSettings(
        path=subject.model.path,
        config=subject.config,
        dtype=subject.dtype,
        device=subject.device,
        enforce_eager=config.enforce_eager,
        deterministic=config.deterministic,
    )
    if config.in_process:
        return build_engine(settings)
    return RemoteEngine(partial(build_engine, settings), step_timeout=config.step_timeout)


def build_engine(settings: EngineSettings) -> Engine:
    """The engine, in the process that it is to live in."""
    from batchrun.engine.engine import Engine

    return Engine(settings)


class Run:
    """One run in a locked run directory, from the read job to the written report.

    Args:
        limit_again: token limit of the lines that were taken out to be run again, over their own; None: their own.
        warnings: what a person should know of the job before anything of it is read.
    """

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
        engine: Engine | RemoteEngine | None = None,
        *,
        limit_again: int | None = None,
        warnings: Sequence[Warned] = (),
    ) -> None:
        self.source = source
        self.lint = lint
        self.fingerprint = fingerprint
        self.subject = subject
        self.config = config
        self.run_dir = run_dir
        self.observer = observer
        self.began = began
        self.engine = engine
        self.limit_again = limit_again
        self.warnings = warnings
        self.seconds: dict[str, float] = {}
        self.answered_prompt_tokens = 0
        self.finish_reasons: Counter[str] = Counter()
        self.error_codes: Counter[str] = Counter()
        self.failed_before = 0
        self.total = lint.total
        self.recovery: Recovery | None = None
        wanted = config.limits
        start = datetime.now() - timedelta(seconds=time.perf_counter() - began)  # which a job that is fetched is after
        self.limits = Limits(
            until=parse_until(wanted.until, start) if wanted.until is not None else None,
            timeout=parse_duration(wanted.timeout) if wanted.timeout is not None else None,
            max_errors=parse_share(wanted.max_errors, lint.total) if wanted.max_errors is not None else None,
            began=began,
        )
        self.limit_reached: str | None = None
        self.planned: PlanFile | None = None
        self.slowest: tuple[SlowRequest, ...] = ()
        self.work = Work()

    def execute(self) -> Outcome:
        recovered = self.run_dir.recover()
        self.error_codes.update(recovered.error_codes)
        self.failed_before = self.error_codes.total()
        self.run_dir.start(self._counts(recovered), model=self.subject.name, environment=self.subject.environment)
        came_from = self.source.came_from
        place = self.source.path if came_from is None else came_from.location
        names = (printable(str(name), limit=4096) for name in (place, self.subject.name))
        log.info("run of %s with %s: %s lines", *names, self.total)
        sink = ResultSink(
            self.run_dir.path,
            recovered,
            flush_seconds=self.config.output.flush_seconds,
            flush_results=self.config.output.flush_results,
            check=self.run_dir.check,
        )
        try:
            with sink, _worker_errors(), ExitStack() as stack:
                report, stopped = self._fill(sink, recovered, stack)
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
        code = ExitCode.STOPPED if stopped else exit_code_of(counts)
        status = RunStatus.STOPPED if stopped else RunStatus.COMPLETED
        self.run_dir.update(status, counts, errors=report.errors, exit_code=code)
        log.info("%s: %s completed, %s failed, %s remaining", status, counts.completed, counts.failed, counts.remaining)
        return Outcome(report, self.run_dir.path, code)

    def _fill(self, sink: ResultSink, recovered: Recovered, stack: ExitStack) -> tuple[Report, bool]:
        """Write every result and error; returns the report, which is written too, and whether the run was stopped."""
        done = recovered.results.size + recovered.errors.size
        self._refuse(sink, list(recovered.unfinished(self.lint.faults)))
        self.observer.faults(self.lint.faults, self.total)

        config = self.config
        device = load_device_spec(config.device_spec or self.subject.device)  # before the model takes memory
        page_size = page_size_on(device, config.scheduler.page_size)
        engine = self.engine
        if engine is None and sink.completed + sink.failed < self.total:  # else nothing is left to compute
            engine = stack.enter_context(closing(start_engine(self.subject, config)))
        if engine is not None and device.kind != "cpu" and config.kv_memory is None:
            self._wait_for_engine(engine)
            rows = config.scheduler.step_tokens or device.step_tokens
            left = engine.kv_memory(device.kv_share, rows, page_size)
            config = config.model_copy(update={"kv_memory": left})
        self.observer.stage("read")
        lines = recovered.unfinished(sound_lines(self.source, self.config.limit))
        if self.limit_again is not None:
            lines = _limited(lines, set(recovered.again.tolist()), self.limit_again)
        prepared = prepare(self.subject, lines, config, device)[0]
        self.seconds |= prepared.seconds
        if unfit := self.source.located(prepared.faults):
            self._refuse(sink, unfit)
            self.observer.faults(unfit, self.total)
        warnings = [*self.warnings, *warnings_of(self.lint, prepared, self.subject, self.config)]
        if done:
            warnings.append(
                Warned(
                    "resumed",
                    done,
                    f"finished by an earlier start: {plural(done, 'line')}; tokens, steps and times are of the rest",
                )
            )
        limits = prepared.requests.max_new_tokens[prepared.answers.request]
        disk = check_disk(self.run_dir.path, estimate_disk(limits, len(prepared.answers.custom_ids)))
        if disk is not None:
            warnings.append(Warned("disk_space", 1, disk))
        for warning in warnings:
            log.warning("%s", warning.message)

        began = time.perf_counter()
        prepared, orders = choose_order(prepared)
        scheduler = Scheduler(prepared.plan, prepared.requests, depth=DEPTH[self.subject.device])
        end = LoopEnd(StepLog(), 0, stopped=False)
        if len(prepared.requests) and self._limit_reached():
            end = replace(end, stopped=True)
        elif len(prepared.requests):
            assert engine is not None
            planned = plan_file(prepared, simulate(prepared), orders, self.subject, self.fingerprint)
            self.planned = planned
            self.seconds["plan"] += time.perf_counter() - began
            write_plan(self.run_dir.path / PLAN, planned)
            self.observer.expected_rows(planned.rows)
            attempts = recovered.attempts_of(prepared.answers.line_numbers)
            end = self._run_model(prepared, scheduler, engine, sink, attempts)
        if end.stopped and self.limit_reached is not None:
            message = f"stopped because {self.limit_reached}; the same command goes on"
            warnings.append(Warned("stopped_early", 1, message))
            log.warning("%s", message)
        sink.flush()
        report = self._report(prepared, scheduler, end, sink, recovered, warnings)
        earlier = None
        if done and not len(prepared.requests):  # nothing was left to run: what there is to tell is of the start before
            with suppress(RunDirError):
                earlier = read_latest(self.run_dir.path)
        if earlier is not None:
            report = replace(earlier, request_counts=report.request_counts, errors=report.errors)
        write_report(self.run_dir.path / REPORT, report)  # a start that is killed below has one, too
        if not end.stopped and report.request_counts.remaining:
            raise AssertionError(f"{report.request_counts.remaining} lines have neither a result nor an error")
        if not end.stopped:
            self.run_dir.update(RunStatus.FINALIZING, report.request_counts, errors=report.errors)
            _in_order(self.run_dir.path, self.config)
            if self.config.output.results is not None:
                write_results(self.run_dir.path, self.config.output.results)
        if earlier is None:
            report = replace(report, seconds=replace(report.seconds, total=time.perf_counter() - self.began))
            write_report(self.run_dir.path / REPORT, report)
        write_page(self.run_dir.path, report, Course(self.planned, end.log, ()), again=bool(done))
        return report, end.stopped

    def _run_model(
        self,
        prepared: Prepared,
        scheduler: Scheduler,
        engine: Engine | RemoteEngine,
        sink: ResultSink,
        attempts: npt.NDArray[np.int64],
    ) -> LoopEnd:
        """Run the plan; answers go to `sink` as they come. `attempts`: int64 `[N]`, of each line before."""
        requests, plan = prepared.requests, prepared.plan
        self._wait_for_engine(engine)
        eos_token_ids = prepared.tokenizer.eos_token_ids(self.subject.generation_config)
        vocabulary = None
        if any(sampling.grammar is not None for sampling in requests.sampling):
            vocabulary = prepared.tokenizer.vocabulary(self.subject.spec.vocab_size)
        engine.start(requests, eos_token_ids, plan.budget.page_size, plan.budget.pages, vocabulary)

        texts = TextStops(prepared.tokenizer, requests)
        logprobs, prompts = LogprobTable(requests), PromptTable(requests)
        lines = LineCollector(
            prepared.answers, requests, plan.groups, self.subject.name, sink, prepared.tokenizer, attempts
        )
        newly_finished = 0

        def on_finished(finished: Finished) -> None:
            nonlocal newly_finished
            if requests.sampling[requests.sampling_id[finished.request]].prompt_only:
                finished = replace(finished, token_ids=finished.token_ids[:0], reason=FinishReason.LENGTH, ended=False)
            text, by_text = texts.text(finished)
            reason = FinishReason.STOP if by_text else finished.reason
            timeline.finished(finished)
            prompt_tokens = requests.tokens.span(finished.request).length
            kept = logprobs.take(finished.request, finished.token_ids.size - finished.ended)
            answers = lines.add(finished, prompt_tokens, text, reason, kept, prompts.take(finished.request))
            self.finish_reasons.update(answer.value for answer in answers)
            self.answered_prompt_tokens += len(answers) * prompt_tokens
            newly_finished += len(answers)

        def on_output(step: Step, output: StepOutput) -> None:
            logprobs.add(step, output)
            prompts.add(output)

        def on_step(step: Step, output: StepOutput) -> None:
            nonlocal newly_finished
            self.observer.step(step.num_rows, output.token_ids.size, newly_finished)
            newly_finished = 0
            sink.poll()
            timeline.step(step)
            self.work += step.work
            if clock is not None:
                for request in clock.late(step, scheduler.requests_in_steps()):
                    scheduler.drop([request])
                    fail(request, TIMED_OUT, f"it took longer than {clock.limit:g} s (--request-timeout)", 1)
            if step_writer is not None:
                step_writer.write(step, log[-1])

        def fail(request: int, code: str, message: str, attempts: int) -> None:
            logprobs.forget(request)
            prompts.take(request)
            if failed := lines.fail(request, code, message, attempts=attempts):
                self.error_codes[code] += failed

        def on_quarantined(request: int, attempts: int, cause: str) -> None:
            fail(request, QUARANTINED, f"left out after {attempts} attempts: {cause}", attempts)

        log, timeline = StepLog(), Timeline(len(requests))
        timeout = self.config.limits.request_timeout
        clock = RequestClock(len(requests), parse_duration(timeout)) if timeout is not None else None
        self.recovery = Recovery(scheduler, on_quarantined, clock.forget if clock is not None else lambda: None)
        self.observer.stage("run")
        began = time.perf_counter()
        with ExitStack() as stack:
            steps_path = self.run_dir.path / STEPS
            step_writer = stack.enter_context(StepWriter(steps_path)) if self.config.output.steps_log else None
            end = run_loop(
                scheduler,
                engine,
                on_finished=on_finished,
                on_output=on_output,
                on_step=on_step,
                watch=texts.watch,
                should_stop=lambda: self.observer.should_stop() or self._limit_reached(),
                recovery=self.recovery,
                log=log,
            )
        self.seconds["execute"] = time.perf_counter() - began
        self.slowest = timeline.slowest(requests, log.columns)
        return end

    def _wait_for_engine(self, engine: Engine | RemoteEngine) -> None:
        """Have the model loaded, if it is not."""
        if "load" not in self.seconds:
            self.observer.stage("load model")
            began = time.perf_counter()
            engine.load()
            self.seconds["load"] = time.perf_counter() - began

    def _limit_reached(self) -> bool:
        """Whether a limit ends the run; which one is noted."""
        failed = self.error_codes.total() - self.failed_before  # also those that are not on disk yet
        self.limit_reached = self.limits.reached(failed)
        return self.limit_reached is not None

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
        end: LoopEnd,
        sink: ResultSink,
        recovered: Recovered,
        warnings: list[Warned],
    ) -> Report:
        plan, counters, steps = prepared.plan, scheduler.counters, end.log
        execute = self.seconds.get("execute")
        answered = sink.completed - recovered.results.size

        def rate(count: int) -> float | None:
            return count / execute if execute else None

        tokens = TokenCounts(prepared.prompt_logical, plan.prompt_physical, counters.prompt_computed, counters.sampled)
        return Report(
            request_counts=RequestCounts(
                self.total, sink.completed, sink.failed, self.total - sink.completed - sink.failed
            ),
            duplicates=prepared.duplicates,
            tokens=tokens,
            saving=tokens.saving,
            seconds=Seconds(
                total=time.perf_counter() - self.began,
                load=self.seconds.get("load"),
                tokenize=self.seconds.get("tokenize"),
                plan=self.seconds.get("plan"),
                execute=execute,
            ),
            throughput=Throughput(rate(answered), rate(self.answered_prompt_tokens), rate(counters.sampled)),
            expected=self.planned.expected if self.planned is not None else None,
            bound=bound_of(self.work, prepared.cost) if execute is not None else None,
            step_seconds=step_seconds(steps.columns, execute, end.recovery) if execute is not None else None,
            steps=len(steps),
            rows=int(steps.columns["rows"].sum()),
            kv=KvUse(plan.budget.page_size, plan.budget.pages, scheduler.pool.peak_used),
            idle_rows=counters.idle_rows,
            padded_rows=end.padded_rows,
            preemptions=counters.preemptions,
            memory_retries=counters.memory_retries,
            worker_restarts=self.recovery.crashes if self.recovery is not None else 0,
            prefix_evictions=counters.prefix_evictions,
            finish_reasons=dict(self.finish_reasons),
            errors=dict(self.error_codes),
            warnings=tuple(warnings),
            groups=summaries(plan.groups),
            slowest=self.slowest,
            schedule_order=plan.options.schedule_order,
            model=self.subject.name,
            device=self.subject.device,
            dtype=self.subject.dtype,
            environment=self.subject.environment,
        )


@contextmanager
def _worker_errors() -> Iterator[None]:
    """A worker that is lost before there is anything to recover, or while it is started again."""
    try:
        yield
    except WorkerLost as lost:
        raise BatchrunError(
            f"The worker could not be started: {lost}.",
            hint="What is finished is kept: the same command goes on once the cause is mended.",
            code="worker_lost",
        ) from lost


def write_page(path: Path, report: Report, course: Course, *, again: bool) -> None:
    """Write `report.html` into a run's directory.

    Args:
        course: how the run went, as far as it is at hand.
        again: whether it is the run's directory that tells more of that.
    """
    if again:
        with suppress(RunDirError):  # a log that is not sound costs what it would show
            course = read_course(path, report)
    write_text_atomic(path / PAGE, render_page(report, course.steps.columns, course.plan, course.starts))


# --- what both do -------------------------------------------------------------------------------------------------


def _limited(lines: Iterator[JobLine], again: set[int], limit: int) -> Iterator[JobLine]:
    """Lines of which some have another token limit than their own; those that are asked for their prompts alone have
    none."""
    for line in lines:
        if line.number in again and not line.options.prompt_only:
            line.options = replace(line.options, max_tokens=limit, may_be_cut=True)
        yield line


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


class _RunLog(logging.FileHandler):
    """`run.log`. That it cannot be written ends no run: the first failure is kept, to be told of at the end."""

    def __init__(self, path: Path) -> None:
        # A path may have bytes that are no UTF-8.
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.failure: OSError | None = None
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.failure = self.failure or error
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # what a write before has left in its buffer
            self.failure = self.failure or error


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send the package's log to `run.log` while something is done to a run.

    Raises:
        OutputError: it cannot be opened, or all ended well and not all of its log could be written.
    """
    with output_errors(path):
        handler = _RunLog(path)
    logger = logging.getLogger("batchrun")
    logger.addHandler(handler)
    level, logger.level = logger.level, min(logger.level or logging.INFO, logging.INFO)
    try:
        yield
    finally:
        logger.level = level
        logger.removeHandler(handler)
        handler.close()
    with output_errors(path):
        if handler.failure is not None:
            raise handler.failure
