"""The command line: a command parses, makes one call, prints, exits."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

import batchrun
from batchrun.errors import BatchrunError, ExitCode

if TYPE_CHECKING:
    from batchrun.pipeline import Outcome

app = typer.Typer(
    name="batchrun",
    help="Run a JSONL file of LLM requests offline: shared prefixes are found before the run and computed once, "
    "results are exact, nothing is lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Job = Annotated[
    str,
    typer.Argument(
        help="Job: .jsonl, .csv, .tsv (also .gz, .zst) or .parquet; a directory or pattern of such files; a URL of "
        "any (s3://, gs://, hf://, https://); - is standard input."
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Model directory, short name (demo, llama, qwen, ...) or hub id.")
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file of settings; flags win over it.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda; auto is a GPU where there is one.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the run.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Token limit of lines that have none.")]
KvMemory = Annotated[str | None, typer.Option("--kv-memory", help="Memory for KV, such as 4GiB.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first N lines, as a trial.")]
ScheduleOrder = Annotated[
    str | None,
    typer.Option(
        "--schedule-order",
        help="auto (the one that is expected to be shortest), input, shuffle, dfs, decode_ratio or density; never "
        "changes results.",
    ),
]
Grouping = Annotated[
    str | None,
    typer.Option(
        "--grouping",
        help="Which shared prefixes are computed once: auto, tree, exact, greedy or none; never changes results.",
    ),
]
DeviceSpec = Annotated[
    str | None,
    typer.Option("--device-spec", help="Device to plan for, by name (cpu, a100, h100, h200); that of the run else."),
]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="On a GPU, capture no CUDA graphs.")]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="On a GPU, attention gives a row the same bits in any batch."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse the whole job if any line of it is bad.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the hub.")]
ChatTemplate = Annotated[
    Path | None, typer.Option("--chat-template", help="Jinja file used in place of the model's chat template.")
]
IgnoreGenerationConfig = Annotated[
    bool, typer.Option("--ignore-generation-config", help="No sampling defaults from the model.")
]
Until = Annotated[
    str | None, typer.Option("--until", metavar="TIME", help="Stop at this time, such as 06:00; resumable.")
]
Timeout = Annotated[
    str | None, typer.Option("--timeout", metavar="DURATION", help="Stop after this time, such as 8h; resumable.")
]
MaxErrors = Annotated[
    str | None, typer.Option("--max-errors", metavar="N|x%", help="Stop when more lines have failed; resumable.")
]
RequestTimeout = Annotated[
    str | None, typer.Option("--request-timeout", metavar="DURATION", help="A request that takes longer fails.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: that of -o, or jobs.run beside jobs.jsonl.")]
MovedJob = Annotated[
    Path | None, typer.Option("--job", metavar="FILE", help="Where the job lies now, if it was moved.")
]
PromptColumn = Annotated[
    str | None,
    typer.Option("--prompt-column", metavar="NAME", help="Of a table: the column that has the prompts."),
]
Template = Annotated[
    str | None,
    typer.Option("--template", metavar="FILE|TEXT", help="Of a table: Jinja that makes a row's prompt of its columns."),
]
IdColumn = Annotated[
    str | None, typer.Option("--id-column", metavar="NAME", help="Of a table: the column that has the custom_id.")
]
FieldColumns = Annotated[
    str | None,
    typer.Option(
        "--field-columns", metavar="NAMES", help="Of a table: columns that are fields, such as max_tokens,seed."
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Of a table: a prompt is a chat's user message, not a completion.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, no tables.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"batchrun {batchrun.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    job: Job,
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; jobs.run beside jobs.jsonl if not given.")
    ] = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    kv_memory: KvMemory = None,
    limit: Limit = None,
    prompt_column: PromptColumn = None,
    template: Template = None,
    id_column: IdColumn = None,
    field_columns: FieldColumns = None,
    chat: Chat = False,
    results: Annotated[
        str | None,
        typer.Option(
            "--results",
            metavar="FILE|URL",
            help="Also write all answers and errors to one file at the end, in the order of the job: .jsonl, or "
            ".parquet with the columns of the job's table.",
        ),
    ] = None,
    results_order: Annotated[
        str | None, typer.Option("--results-order", help="completion (as they finish) or input (sorted at the end).")
    ] = None,
    schedule_order: ScheduleOrder = None,
    grouping: Grouping = None,
    device_spec: DeviceSpec = None,
    enforce_eager: EnforceEager = False,
    deterministic: Deterministic = False,
    strict: Strict = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again; an earlier run is moved aside, not overwritten.")
    ] = False,
    revision: Revision = None,
    chat_template: ChatTemplate = None,
    ignore_generation_config: IgnoreGenerationConfig = False,
    until: Until = None,
    timeout: Timeout = None,
    max_errors: MaxErrors = None,
    request_timeout: RequestTimeout = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run every request of a job and write results, errors and a report.

    The same command again goes on with a run that was stopped, or says that all is done.
    """
    with _failures(json):
        from batchrun.config import load_config
        from batchrun.pipeline import run_job
        from batchrun.report.wording import printable

        settings = load_config(
            config,
            **_given(
                model=model, out=_path(out), device=device, dtype=dtype, seed=seed, max_tokens=max_tokens,
                kv_memory=kv_memory, limit=limit, results_order=results_order, schedule_order=schedule_order,
                strict=strict, fresh=fresh, revision=revision, chat_template=_path(chat_template),
                ignore_generation_config=ignore_generation_config, device_spec=device_spec,
                enforce_eager=enforce_eager, deterministic=deterministic,
                limits=_given(
                    until=until, timeout=timeout, max_errors=max_errors, request_timeout=request_timeout
                ) or None,
                scheduler=_given(grouping=grouping) or None,
                input=_given(
                    prompt_column=prompt_column, template=template, id_column=id_column, field_columns=field_columns,
                    chat=chat,
                ) or None,
                output=_given(results=results) or None,
            ),
        )  # fmt: skip
        with _Terminal(quiet=quiet) as terminal:
            outcome = run_job(job, settings, terminal)
        where = printable(str(outcome.run_dir), limit=4096)
        said = f"This run is finished already; {where} has its results." if outcome.already_done else None
        _end(outcome, quiet, json, settings.output.results, said=said)


@app.command()
def plan(
    job: Job,
    model: Model = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    kv_memory: KvMemory = None,
    limit: Limit = None,
    prompt_column: PromptColumn = None,
    template: Template = None,
    id_column: IdColumn = None,
    field_columns: FieldColumns = None,
    chat: Chat = False,
    schedule_order: ScheduleOrder = None,
    grouping: Grouping = None,
    device_spec: DeviceSpec = None,
    strict: Strict = False,
    revision: Revision = None,
    chat_template: ChatTemplate = None,
    ignore_generation_config: IgnoreGenerationConfig = False,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="CUSTOM_ID",
            help="Also: what this line shares, with whom, when it runs and what its KV costs.",
        ),
    ] = None,
    doctor: Annotated[
        bool, typer.Option("--doctor", help="Also: why prompts that look alike do not share, and what that costs.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write all of it as a page, with plots to zoom.")
    ] = None,
    json: Json = False,
) -> None:
    """Tell what a run would do, without running it.

    It needs no weights, and it writes nothing but the page that is asked for.
    """
    with _failures(json):
        from batchrun.config import load_config
        from batchrun.formats.results import encode_json
        from batchrun.formats.rundir import document, write_text_atomic
        from batchrun.pipeline import plan_job
        from batchrun.report.plan_page import render_plan_page
        from batchrun.report.tables import print_faults, print_plan
        from batchrun.report.wording import printable

        settings = load_config(
            config,
            **_given(
                model=model, device=device, dtype=dtype, seed=seed, max_tokens=max_tokens, kv_memory=kv_memory,
                limit=limit, schedule_order=schedule_order, strict=strict, revision=revision,
                chat_template=_path(chat_template), ignore_generation_config=ignore_generation_config,
                device_spec=device_spec, scheduler=_given(grouping=grouping) or None,
                input=_given(
                    prompt_column=prompt_column, template=template, id_column=id_column, field_columns=field_columns,
                    chat=chat,
                ) or None,
            ),
        )  # fmt: skip
        planned = plan_job(job, settings, explain_line=explain, doctor=doctor)
        if html is not None:
            write_text_atomic(html, render_plan_page(planned))
        if json:
            asked = _given(explain=planned.explanation, doctor=planned.diagnosis)
            _write(encode_json(document(planned.plan) | asked, indent=True))
        else:
            print_plan(_console(), planned)
        if planned.faults:
            print_faults(_console(stderr=True), planned.faults)
        for warning in planned.warnings:
            _console(stderr=True).print(printable(f"{warning.code} ({warning.count:,}): {warning.message}"))
        sys.exit(planned.exit_code)


@app.command()
def check(
    job: Job,
    model: Model = None,
    config: Config = None,
    max_tokens: MaxTokens = None,
    limit: Limit = None,
    prompt_column: PromptColumn = None,
    template: Template = None,
    id_column: IdColumn = None,
    field_columns: FieldColumns = None,
    chat: Chat = False,
    revision: Revision = None,
    chat_template: ChatTemplate = None,
    json: Json = False,
) -> None:
    """Look a job over without running it: every bad line, and what is odd about others.

    With --model (or a --config file that has one) prompts are tokenised too, and those that are too long for it are
    found; it needs no weights. Exits with 0 if all lines can run, 3 if some cannot, 4 if none can.
    """
    with _failures(json):
        from batchrun.check import check_job
        from batchrun.config import InputConfig, load_config, names_model
        from batchrun.formats.results import encode_json
        from batchrun.formats.rundir import document
        from batchrun.report.tables import print_check

        # Without any of these nothing but the lines is looked at, and no model is needed.
        of_model = _given(model=model, max_tokens=max_tokens, revision=revision, chat_template=_path(chat_template))
        columns = _given(
            prompt_column=prompt_column, template=template, id_column=id_column, field_columns=field_columns, chat=chat
        )
        if of_model or (config is not None and names_model(config)):
            settings = load_config(config, limit=limit, input=columns or None, **of_model)
            checked = check_job(job, settings, limit=settings.limit)
        elif config is not None:
            settings = load_config(config, limit=limit, input=columns or None, model="none")
            checked = check_job(job, limit=settings.limit, columns=settings.input)
        else:
            checked = check_job(job, limit=limit, columns=InputConfig(**columns))
        if json:
            _write(encode_json(document(checked), indent=True))
        else:
            print_check(_console(), checked)
        sys.exit(checked.exit_code)


@app.command()
def status(
    run_dir: Run,
    json: Json = False,
) -> None:
    """Tell how far a run is, while it runs or after; it may be asked from any terminal, and changes nothing.

    Exits with 0 while it runs, 75 if it was stopped, killed or crashed and can be gone on with, and with the run's own
    exit code once it is finished.
    """
    with _failures(json):
        from batchrun.formats.results import encode_json
        from batchrun.formats.rundir import document
        from batchrun.report.tables import print_status
        from batchrun.status import read_status

        progress = read_status(run_dir)
        if json:
            _write(encode_json(document(progress), indent=True))
        else:
            print_status(_console(), progress)
        sys.exit(progress.command_exit_code)


@app.command()
def retry(
    run_dir: Run,
    code: Annotated[
        list[str] | None,
        typer.Option("--code", metavar="CODE", help="Failed lines with this error code; may be given again."),
    ] = None,
    finish_reason: Annotated[
        str | None,
        typer.Option("--finish-reason", metavar="length", help="Lines with an answer that its token limit cut short."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            help="Token limit of the lines that are taken, over their own; less where KV memory ends before.",
        ),
    ] = None,
    request_timeout: RequestTimeout = None,
    kv_memory: KvMemory = None,
    device: Device = None,
    schedule_order: ScheduleOrder = None,
    grouping: Grouping = None,
    enforce_eager: EnforceEager = False,
    until: Until = None,
    timeout: Timeout = None,
    max_errors: MaxErrors = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model lies now, if it was moved.")
    ] = None,
    job: MovedJob = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run lines of a run again: those that failed, or answers that were cut short.

    Without --code and --finish-reason it takes every failed line but those that are bad in the job itself, which would
    fail in the same way. What a line gets takes the place of what it had, and that is kept in replaced.jsonl. Settings
    are those of the run, but for the ones given here. Lines of the run that remain are run too. The same command again
    goes on with a retry that was stopped; `batchrun run` goes on with the settings of the run.
    """
    with _failures(json):
        from batchrun.report.wording import printable
        from batchrun.retry import retry_run

        with _Terminal(quiet=quiet) as terminal:
            retried = retry_run(
                run_dir, codes=code or (), finish_reason=finish_reason, max_tokens=max_tokens, model=model, job=job,
                observer=terminal,
                **_given(
                    kv_memory=kv_memory, device=device, schedule_order=schedule_order, enforce_eager=enforce_eager,
                    limits=_given(
                        until=until, timeout=timeout, max_errors=max_errors, request_timeout=request_timeout
                    ) or None,
                    scheduler=_given(grouping=grouping) or None,
                ),
            )  # fmt: skip
        if not quiet:
            if retried.outcome.already_done:
                where = printable(str(run_dir), limit=4096)
                _console(stderr=True).print(f"Nothing to retry in {where}.", soft_wrap=True)
            for reason in retried.left:
                _console(stderr=True).print(printable(f"Not run again: {reason}."), soft_wrap=True)
        _end(retried.outcome, quiet, json)


@app.command()
def close(
    run_dir: Run,
    expired: Annotated[
        bool, typer.Option("--expired", help="Say batch_expired of the lines that remain, not batch_cancelled.")
    ] = False,
    job: MovedJob = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """End an unfinished run for good: every line that remains becomes an error line, batch_cancelled.

    It loads no model. The run is finished then, and this exits with its exit code: 3, or 4 if no line has a result.
    """
    with _failures(json):
        from batchrun.close import close_run

        outcome = close_run(run_dir, expired=expired, job=job)
        was = "is finished already" if outcome.already_done else "is closed"
        _end(outcome, quiet, json, said=f"This run {was}; `batchrun retry` runs lines that failed again.")


@app.command()
def report(
    run_dir: Run,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page.")] = None,
    prometheus: Annotated[
        Path | None,
        typer.Option(
            "--prometheus", metavar="FILE", help="Write metrics for node_exporter's textfile collector (NAME.prom)."
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Tell what a finished or stopped run came to: what limited it, where its time went, planned against measured.

    Exits with 0 where there is a report, whatever became of the run. --prometheus writes its file also for a run that
    has no report yet.
    """
    with _failures(json):
        from batchrun.formats.report import read_latest
        from batchrun.formats.results import encode_json
        from batchrun.formats.rundir import document, write_text_atomic
        from batchrun.report.page import render_page
        from batchrun.report.prometheus import render_metrics
        from batchrun.report.tables import print_report
        from batchrun.review import read_review, why_outdated
        from batchrun.status import read_status

        progress = read_status(run_dir)
        if prometheus is not None:
            latest = read_latest(run_dir)
            if latest is not None and why_outdated(latest, progress):
                latest = None  # its series are those of the latest start
            write_text_atomic(prometheus, render_metrics(str(run_dir.resolve()), progress, latest))
        review, steps = read_review(progress, run_dir)
        if html is not None:
            write_text_atomic(html, render_page(review.report, steps, review.plan, review.starts))
        if json:
            _write(encode_json(document(review), indent=True))
        elif not quiet:
            print_report(_console(), review, steps)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A run directory.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="How many differences to show.")] = 20,
    json: Json = False,
) -> None:
    """Compare the answers of two runs by custom_id, and their speed.

    Tells where answers begin to differ, which lines only one run has, and whose status or finish reason is another.
    Exits with 0 if all lines are equal and with 3 if some are not; 1, 2 and others say that nothing was compared.
    """
    with _failures(json):
        from batchrun.diff import diff_runs
        from batchrun.formats.results import encode_json
        from batchrun.formats.rundir import document
        from batchrun.report.tables import print_diff

        compared = diff_runs(a, b, shown=show)
        if json:
            _write(encode_json(document(compared), indent=True))
        else:
            print_diff(_console(), compared)
        sys.exit(compared.exit_code)


@app.command()
def bench(
    model: Model = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            "-w",
            metavar="NAME",
            help="micro, pressure, tree, none, mixed, skew or many; again for more. All but many if not given.",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="cpu or gpu: lengths and numbers; those for the device if not given.")
    ] = None,
    scale: Annotated[
        float,
        typer.Option(
            "--scale", metavar="X", help="Of the number of groups or requests; 1 is what docs/benchmarks measures."
        ),
    ] = 0.5,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Runs of each workload in each way.")] = 3,
    all_orders: Annotated[
        bool, typer.Option("--all-orders", help="Compare schedule orders on all workloads, and all that auto tries.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Keep the jobs, the run directories and bench.json in this new directory.",
        ),
    ] = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = None,
    kv_memory: KvMemory = None,
    device_spec: DeviceSpec = None,
    enforce_eager: EnforceEager = False,
    deterministic: Deterministic = False,
    revision: Revision = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tell nothing of single runs.")] = False,
    json: Json = False,
) -> None:
    """Measure standard workloads with a model on a device: with shared prefixes computed once and without.

    Runs are those of batchrun run, in a temporary directory. The model is loaded once. docs/bench.md says how to read
    the figures.
    """
    with _failures(json):
        from batchrun.bench import run_bench
        from batchrun.config import load_config
        from batchrun.formats.results import encode_json
        from batchrun.formats.rundir import document
        from batchrun.report.tables import print_bench

        settings = load_config(
            config,
            **_given(
                model=model, device=device, dtype=dtype, kv_memory=kv_memory, device_spec=device_spec,
                enforce_eager=enforce_eager, deterministic=deterministic, revision=revision,
            ),
        )  # fmt: skip
        console = _console(stderr=True)
        with _interrupted_by_sigterm():
            measured = run_bench(
                settings,
                workload or (),
                size=size,
                scale=scale,
                repeats=repeats,
                all_orders=all_orders,
                out=out,
                tell=lambda line: None if quiet else console.print(line, style="dim", soft_wrap=True),
            )
        if json:
            _write(encode_json(document(measured), indent=True))
        else:
            print_bench(_console(), measured)


def _end(outcome: Outcome, quiet: bool, json: bool, results: str | None = None, *, said: str | None = None) -> NoReturn:
    """Show what a run came to, and exit with its code. `said`: a line before it."""
    from batchrun.formats.results import encode_json
    from batchrun.formats.rundir import document
    from batchrun.report.tables import print_summary

    try:
        if json:
            _write(encode_json(document(outcome.report), indent=True))
        elif not quiet:
            console = _console(kind=_Status)
            if said is not None:
                console.print(said, soft_wrap=True)
            print_summary(console, outcome.report, outcome.run_dir, results)
            sys.stdout.flush()
    except OSError as error:  # nobody reads it, or the disk behind it is full: the run is what it is
        with suppress(OSError):
            _console(stderr=True, kind=_Status).print(f"The summary could not be written: {error}.", soft_wrap=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
    if outcome.exit_code is ExitCode.STOPPED and not quiet:
        _console(stderr=True).print("Stopped early. The same command again goes on.", soft_wrap=True)
    sys.exit(outcome.exit_code)


class _Status(Console):
    """A console that nobody need look at."""

    def on_broken_pipe(self) -> None:
        """Where rich would end the program."""
        self.quiet = True


class _Terminal:
    """Shows a run on standard error while it lasts, and turns signals into a stop between two steps."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = _console(stderr=True, kind=_Status)
        self._progress: Any = None
        self._rows = 0
        self._signalled = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Terminal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            with self._as_long_as_anyone_looks():
                self._progress.__exit__(None, None, None)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:  # the second one stops at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signalled = True

    def should_stop(self) -> bool:
        return self._signalled

    @contextmanager
    def _as_long_as_anyone_looks(self) -> Iterator[None]:
        """A terminal that is gone, or a full disk behind it, ends no run."""
        try:
            yield
        except OSError:
            self._console.quiet = True

    def faults(self, faults: list[Any], total: int) -> None:
        from batchrun.report.tables import print_faults

        if faults and not self._quiet:
            with self._as_long_as_anyone_looks():
                print_faults(self._console, faults, more_in="errors.jsonl")

    def stage(self, name: str) -> None:
        from batchrun.report.progress import Progress

        with self._as_long_as_anyone_looks():
            if name == "run":
                self._progress = Progress(self._console, total_rows=self._rows, enabled=not self._quiet)
                self._progress.__enter__()
            elif not self._quiet:
                self._console.print(f"{name} ...", style="dim")

    def expected_rows(self, rows: int) -> None:
        self._rows = rows

    def step(self, rows: int, sampled: int, finished: int) -> None:
        with self._as_long_as_anyone_looks():
            self._progress.advance(rows, sampled, finished)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM is as good as a Ctrl-C: what was begun is cleared away."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _failures(json: bool) -> Iterator[None]:
    """Print a failure with its cause and the next move, and exit with its code."""
    logging.getLogger("batchrun").addHandler(logging.NullHandler())
    try:
        yield
    except BatchrunError as error:
        _fail(error.message, error.hint, error.code, error.exit_code, json)
    except Exception as error:
        traceback.print_exc()
        _fail(
            f"internal failure: {type(error).__name__}: {error}",
            "What is finished is kept; the same command again goes on. Please report this with the lines above.",
            "internal",
            ExitCode.INTERNAL,
            json,
        )
    except KeyboardInterrupt:
        _fail("Interrupted.", "The same command again goes on.", "interrupted", ExitCode.STOPPED, json)


def _fail(message: str, hint: str | None, code: str | None, exit_code: ExitCode, json: bool) -> NoReturn:
    from batchrun.report.wording import printable

    console = _console(stderr=True)
    for i, line in enumerate(message.splitlines()):
        console.print(printable(("batchrun: " if i == 0 else "") + line), soft_wrap=True)
    if hint:
        console.print(printable(hint), soft_wrap=True)
    if json:
        from batchrun.formats.results import encode_json

        _write(encode_json({"error": {"code": code, "message": message, "hint": hint}}, indent=True))
    sys.exit(exit_code)


def _console(*, stderr: bool = False, kind: type[Console] = Console) -> Console:
    # Nothing from a job or a file is ever markup.
    return kind(stderr=stderr, markup=False, highlight=False, emoji=False)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _given(**flags: Any) -> dict[str, Any]:
    """The flags that were given; a switch that is off says nothing."""
    return {name: value for name, value in flags.items() if value is not None and value is not False}


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def main() -> None:
    """The `batchrun` command."""
    app()


if __name__ == "__main__":
    main()
