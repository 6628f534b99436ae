"""Looks a job over before it is run: what is wrong with its lines and, where a model is named, how long its prompts
are."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from batchrun.config import InputConfig, RunConfig
from batchrun.errors import ExitCode, UsageError
from batchrun.formats.job import lint_job, sound_lines
from batchrun.intake import Intake, read_requests
from batchrun.prepare import intake_warnings, lint_warnings, mismatches, model_warnings
from batchrun.report.records import Warned
from batchrun.request import LineFault
from batchrun.sources.opening import Opened, open_to_read
from batchrun.subject import Subject
from batchrun.tokenizer import load_tokenizer

TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt tokens of the requests that can run; without one, all are 0.

    Attributes:
        requests: how many there are.
        shortest, median, longest: of a prompt.
        total: of all prompts.
        max_context: longest prompt and answer together that the model takes.
        too_long: lines whose prompt leaves no room for an answer in it.
    """

    requests: int
    shortest: int
    median: float
    longest: int
    total: int
    max_context: int
    too_long: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What `batchrun check` found.

    Attributes:
        total: lines of the job, blank ones not counted; `sound` and bad ones.
        sound: lines that can run.
        errors: bad lines by code.
        faults: why each bad line cannot run, in file order.
        models: sound lines by the model that they name.
        model: the one that was named for the check, or None.
        other_model: lines that name another one; None without a model.
        unknown_fields: sound lines by the unknown fields that they have.
        lengths: of the prompts; None without a model.
        warnings: what a person should know, each kind once.
    """

    total: int
    sound: int
    errors: dict[str, int]
    faults: list[LineFault]
    models: dict[str, int]
    model: str | None
    other_model: int | None
    unknown_fields: dict[str, int]
    lengths: Lengths | None
    warnings: list[Warned]

    @property
    def exit_code(self) -> ExitCode:
        if not self.sound:
            return ExitCode.NOTHING_RUNNABLE
        return ExitCode.SOME_FAILED if self.faults else ExitCode.OK


def check_job(
    job: str, config: RunConfig | None = None, *, limit: int | None = None, columns: InputConfig | None = None
) -> Checked:
    """Check a job: what `batchrun check` does. Loads no torch, and writes nothing.

    Args:
        job: the job, as `batchrun run` takes it.
        config: with the model whose tokens are counted; without one, only the lines are read.
        limit: look at this many lines from the top only.
        columns: how rows of a table become lines; if None as `config` says.

    Raises:
        UsageError: the job, or what `config` names, is missing or wrong.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: limit = {limit} is wrong: it must be at least 1.")
    subject = Subject.resolve(config, weights=False) if config is not None else None
    if columns is None:
        columns = config.input if config is not None else InputConfig()
    with ExitStack() as stack:
        return _check(open_to_read(job, columns, stack), config, subject, limit)


def _check(opened: Opened, config: RunConfig | None, subject: Subject | None, limit: int | None) -> Checked:
    source = opened.job
    lint = lint_job(source, limit)
    faults = lint.faults
    warnings = [*opened.warnings, *lint_warnings(lint, subject)]
    lengths = other_model = None
    if config is not None and subject is not None:
        mismatch = mismatches(lint, subject)
        other_model = mismatch.count if mismatch is not None else 0
        tokenizer = load_tokenizer(subject.model.path, config.chat_template)
        intake = read_requests(sound_lines(source, limit), tokenizer, subject.spec, subject.generation_config, config)
        faults = sorted([*faults, *source.located(intake.faults)], key=lambda fault: fault.number)
        warnings += model_warnings(subject, config)
        warnings += intake_warnings(intake.silent, intake.clipped, intake.calls_not_read)
        lengths = _lengths(intake, subject.spec.max_context)
    return Checked(
        total=lint.total,
        sound=lint.total - len(faults),
        errors=dict(Counter(fault.code for fault in faults)),
        faults=faults,
        models=dict(lint.models),
        model=subject.name if subject is not None else None,
        other_model=other_model,
        unknown_fields=dict(lint.unknown_fields),
        lengths=lengths,
        warnings=warnings,
    )


def _lengths(intake: Intake, max_context: int) -> Lengths:
    lengths = intake.requests.tokens.lengths
    there_are = lengths.size > 0
    return Lengths(
        requests=int(lengths.size),
        shortest=int(lengths.min()) if there_are else 0,
        median=float(np.median(lengths)) if there_are else 0.0,
        longest=int(lengths.max()) if there_are else 0,
        total=int(lengths.sum(dtype=np.int64)),
        max_context=max_context,
        too_long=sum(fault.code == TOO_LONG for fault in intake.faults),
    )
