"""Runs lines of a run again: those that failed, and those whose answers their token limit cut short. They are taken
out of the run, and what is left is an unfinished run, which is gone on with as any other."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.config import RunConfig, dump_config, load_dumped
from batchrun.errors import UsageError
from batchrun.formats.job import lint_job
from batchrun.formats.rundir import RUN, Retry, RunDir, RunState, endings, failed_lines
from batchrun.origin import job_of, settings_of
from batchrun.pipeline import LOG, Observer, Outcome, Run, Silent, finished, log_to
from batchrun.request import FinishReason
from batchrun.subject import Subject, fingerprint_of

Int64 = npt.NDArray[np.int64]

_OTHER_RUN = (
    "A retry needs the job and the model as they were; what has changed is run by `batchrun run`, with another "
    "directory (-o)."
)
_OF_A_START = ("limits.until", "limits.timeout", "limits.max_errors")  # they change no line, so they are not noted


@dataclass(frozen=True, slots=True)
class Retried:
    """What `batchrun retry` did.

    Attributes:
        outcome: of the run, as it stands now.
        lines: that were taken out to be run again.
        left: why others were not, one sentence each.
    """

    outcome: Outcome
    lines: int
    left: tuple[str, ...]


def retry_run(
    path: Path,
    *,
    codes: Collection[str] = (),
    finish_reason: str | None = None,
    max_tokens: int | None = None,
    model: str | None = None,
    job: Path | None = None,
    observer: Observer | None = None,
    **changes: Any,
) -> Retried:
    """Run lines of the run in `path` again, and with them what else remains of it.

    With neither `codes` nor `finish_reason` every failed line is taken, but for those that the job file itself shows
    to be bad: it is the same file, so they would fail in the same way.

    Args:
        codes: take failed lines with these error codes.
        finish_reason: `length`: take lines with an answer that was ended by its token limit.
        max_tokens: token limit of the lines that are taken, over their own.
        model, job: where they lie, if no longer where they were.
        changes: settings that differ from those of the run, as for `load_config`.

    Raises:
        UsageError: there is no run, an earlier version made it, or a setting is wrong.
        BatchrunError: as a run.
    """
    began = time.perf_counter()
    _refuse_wrong_choice(finish_reason, max_tokens)
    with RunDir.reopen(path) as run_dir:
        assert run_dir.run is not None
        fingerprint = run_dir.run.fingerprint
        base = settings_of(run_dir).model_copy(update={"dtype": fingerprint["dtype"]})
        if model is not None:
            base = base.model_copy(update={"model": model})
        config = _changed(base, path / RUN, max_tokens, changes)
        subject = Subject.resolve(config, weights=True, name=run_dir.run.model)
        source = job_of(run_dir, job)
        lint = lint_job(source, config.limit)
        run_dir.expect(fingerprint_of(subject, lint.fingerprint, base), hint=_OTHER_RUN)

        run_dir.recover()
        noted = {name: value for name, value in _flat(changes | {"max_tokens": max_tokens}) if name not in _OF_A_START}
        asked = Retry(int(time.time()), 0, sorted(codes), finish_reason, noted)
        lines: Int64 = np.empty(0, dtype=np.int64)
        left: list[str] = []
        if not _is_under_way(run_dir, asked):
            bad = np.array([fault.number for fault in lint.faults], dtype=np.int64)
            lines, left = _choose(path, asked, bad, max_tokens, subject.spec.max_context)
        if not lines.size and run_dir.state is RunState.FINISHED:
            return Retried(finished(run_dir), 0, tuple(left))
        with log_to(path / LOG):
            if lines.size:
                run_dir.take_out(lines, asked)
            run = Run(
                source,
                lint,
                fingerprint,
                subject,
                config,
                run_dir,
                observer or Silent(),
                began,
                limit_again=max_tokens,
            )
            return Retried(run.execute(), int(lines.size), tuple(left))


def _refuse_wrong_choice(finish_reason: str | None, max_tokens: int | None) -> None:
    if finish_reason not in (None, FinishReason.LENGTH.value):
        raise UsageError(
            f"--finish-reason: answers that ended by {finish_reason!r} cannot be chosen, as they would end so again.",
            hint="--finish-reason length chooses those that their token limit cut short.",
        )
    if finish_reason is not None and max_tokens is None:
        raise UsageError(
            "Answers that ended by length would end so again.", hint="Give them a larger limit with --max-tokens N."
        )


def _changed(base: RunConfig, source: Path, max_tokens: int | None, changes: Mapping[str, Any]) -> RunConfig:
    """The settings of the run with some that are this retry's own."""
    settings = dump_config(base)
    if "device" in changes:
        settings["device_spec"] = None  # of the device that it was
    config = load_dumped(settings, source, max_tokens=max_tokens, **changes)
    return config.model_copy(update={"max_tokens": base.max_tokens})  # lines that are run for the first time keep it


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that is given, by its name in a file of settings: `limits.request_timeout`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _is_under_way(run_dir: RunDir, asked: Retry) -> bool:
    """Whether the same retry was begun and not finished: then nothing is chosen anew, and what is left of it is run."""
    assert run_dir.run is not None
    if run_dir.state is RunState.FINISHED or not run_dir.run.retries:
        return False
    last = run_dir.run.retries[-1]
    return (last.codes, last.finish_reason, last.changed) == (asked.codes, asked.finish_reason, asked.changed)


def _choose(path: Path, asked: Retry, bad: Int64, max_tokens: int | None, max_context: int) -> tuple[Int64, list[str]]:
    """The lines of the job to take out, and why others are not, one sentence each.

    Args:
        bad: lines that the job file itself shows to be bad.

    Raises:
        UsageError: the token limit is not above that of any answer, and nothing else is asked for.
    """
    left: list[str] = []
    failed = cut_short = np.empty(0, dtype=np.int64)
    if asked.codes or asked.finish_reason is None:
        failed = failed_lines(path, asked.codes)
        if not failed.size:
            of_codes = f" with {' or '.join(asked.codes)}" if asked.codes else ""
            left.append(f"no line has failed{of_codes}")
        hopeless = np.isin(failed, bad)
        if hopeless.any():
            left.append(f"failed lines that are bad in the job itself, which is the same: {hopeless.sum():,}")
        failed = failed[~hopeless]
    if asked.finish_reason is not None:
        assert max_tokens is not None
        cut_short, no_longer, full = _cut_short(path, max_tokens, max_context)
        if no_longer and not failed.size and not cut_short.size:
            raise UsageError(
                f"--max-tokens {max_tokens} raises no limit; lines with answers that ended by length and have as many "
                f"tokens: {no_longer:,}.",
                hint="Give a larger one.",
            )
        for count, why in ((no_longer, "have as many tokens already"), (full, "fill the model's context")):
            if count:
                left.append(f"answers that ended by length and {why}: {count:,}")
        if not cut_short.size and not left:
            left.append("no answer has ended by length")
    return np.concatenate([failed, cut_short]), left


def _cut_short(path: Path, max_tokens: int, max_context: int) -> tuple[Int64, int, int]:
    """Lines with an answer that a higher limit may make longer; how many ended by length and had as many tokens; how
    many filled the model's context.

    Of a line with several answers only the sum of their tokens is known: it is taken where that leaves it open.
    """
    no_longer = full = 0

    def longer() -> Iterator[int]:
        nonlocal no_longer, full
        for ending in endings(path):
            if not ending.by_length or not ending.completion_tokens:  # or asked for no more than its prompt
                continue
            if ending.completion_tokens >= ending.choices * max_tokens:
                no_longer += 1
            elif ending.choices == 1 and ending.prompt_tokens + ending.completion_tokens >= max_context:
                full += 1
            else:
                yield ending.line

    return np.fromiter(longer(), dtype=np.int64), no_longer, full
