"""Two runs compared line by line: what each `custom_id` got in one and in the other.

Of each run an index is held, some 50 bytes a line (a few times that while lines are paired), and two lines at a time.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchrun.errors import BatchrunError, ExitCode, UsageError
from batchrun.formats.report import read_latest
from batchrun.formats.results import Told
from batchrun.formats.rundir import ERRORS, RESULTS, RUN, RunFile, RunStatus, read_document
from batchrun.formats.watch import told, told_lines
from batchrun.models import resolve_model
from batchrun.report.records import KvUse, RequestCounts, Seconds, Throughput
from batchrun.status import read_status
from batchrun.tokenizer import Tokenizer, load_tokenizer

SHOWN = 20
_SNIPPET = 60  # characters of an answer from the first differing one on

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DiffSide:
    """One of the two runs.

    Attributes:
        run_dir: where it is.
        status, model: as `run.json` has them.
        request_counts: as `run.json` has them.
        saving, steps, seconds, throughput, kv: as its report has them; None where it has none.
    """

    run_dir: str
    status: RunStatus
    model: str
    request_counts: RequestCounts
    saving: float | None
    steps: int | None
    seconds: Seconds | None
    throughput: Throughput | None
    kv: KvUse | None


@dataclass(frozen=True, slots=True)
class Difference:
    """A line that is not the same in both runs.

    Attributes:
        custom_id: of the line.
        line: its number in the job of A, or of B where only B has it.
        kinds: `only_a`, `only_b`; or of `status`, `choices`, `text`, `finish_reason` those that differ.
        a, b: what became of it: the finish reasons or the error's code; None where a run has no such line.
        choice: of the first text that differs; None where no text does.
        equal_tokens: tokens of that text that are the same before the first differing one; None where there is no
            tokenizer for both runs.
        equal_characters: the same in characters.
        text_a, text_b: that text from the first differing character on, cut.
    """

    custom_id: str
    line: int
    kinds: tuple[str, ...]
    a: str | None
    b: str | None
    choice: int | None = None
    equal_tokens: int | None = None
    equal_characters: int | None = None
    text_a: str | None = None
    text_b: str | None = None


@dataclass(frozen=True, slots=True)
class RunDiff:
    """What `batchrun diff` tells.

    Attributes:
        a, b: the runs.
        equal: lines that are the same in both: status, texts, finish reasons.
        different: lines that are not, those that only one run has included.
        kinds: how many lines differ in what; a line may differ in more than one.
        differences: the first of them, by their line in A, then those that only B has.
        tokens: why there are no token positions; None if there are some, or nothing to tell.
    """

    a: DiffSide
    b: DiffSide
    equal: int
    different: int
    kinds: dict[str, int]
    differences: tuple[Difference, ...]
    tokens: str | None

    @property
    def exit_code(self) -> ExitCode:
        """0: the same. 3: not the same, as where some lines failed; 1 and 2 say that nothing was compared."""
        return ExitCode.SOME_FAILED if self.different else ExitCode.OK


def diff_runs(a: Path, b: Path, *, shown: int = SHOWN) -> RunDiff:
    """Compare the answers of two runs, by `custom_id`.

    Args:
        shown: how many differences to keep.

    Raises:
        UsageError: there is no run.
        RunDirError: a file of one is not sound.
    """
    sides = _side(a), _side(b)
    kinds: Counter[str] = Counter()
    equal = different = 0
    kept: list[Difference] = []
    texts: dict[int, tuple[str, str]] = {}
    with ExitStack() as stack:
        one, other = _Lines(a, stack), _Lines(b, stack)
        for in_a, in_b in _pairs(one, other):
            difference, differing = _compare(
                one.read(in_a) if in_a is not None else None, other.read(in_b) if in_b is not None else None
            )
            if difference is None:
                equal += 1
                continue
            different += 1
            kinds.update(difference.kinds)
            if len(kept) < shown:
                if differing is not None:
                    texts[len(kept)] = differing
                kept.append(difference)
    why = None
    if texts:
        tokenizer = _tokenizer(a, b)
        if isinstance(tokenizer, Tokenizer):
            for place, pair in texts.items():
                kept[place] = replace(
                    kept[place], equal_tokens=_alike(*tokenizer.encode_batch(pair, add_special_tokens=False))
                )
        else:
            why = tokenizer
    return RunDiff(*sides, equal, different, dict(kinds.most_common()), tuple(kept), why)


def _side(path: Path) -> DiffSide:
    if not (path / RUN).is_file():
        raise UsageError(f"{path} is not the directory of a run: it has no {RUN}.", hint="Name two run directories.")
    run = read_document(path / RUN, RunFile)
    report = read_latest(path)
    return DiffSide(
        run_dir=str(path),
        status=run.status,
        model=run.model,
        request_counts=read_status(path).request_counts,  # in run.json they are those of when the latest start began
        saving=report.saving if report is not None else None,
        steps=report.steps if report is not None else None,
        seconds=report.seconds if report is not None else None,
        throughput=report.throughput if report is not None else None,
        kv=report.kv if report is not None else None,
    )


def _tokenizer(a: Path, b: Path) -> Tokenizer | str:
    """The tokenizer of both runs, or why there is none."""
    one, other = (read_document(path / RUN, RunFile) for path in (a, b))
    if one.fingerprint.get("model") != other.fingerprint.get("model"):
        return "the runs have different models"
    try:
        return load_tokenizer(resolve_model(one.model, weights=False, download=False).path)
    except BatchrunError as error:
        return error.message


def _compare(a: Told | None, b: Told | None) -> tuple[Difference | None, tuple[str, str] | None]:
    """What is different, and the first two texts that are."""
    known = a or b
    assert known is not None
    outcome_a, outcome_b = _outcome(a), _outcome(b)
    if a is None or b is None:
        return Difference(
            known.custom_id, known.line, ("only_b" if a is None else "only_a",), outcome_a, outcome_b
        ), None
    if a.error is not None or b.error is not None:
        same = a.error == b.error
        return None if same else Difference(a.custom_id, a.line, ("status",), outcome_a, outcome_b), None
    differing = next((k for k, (x, y) in enumerate(zip(a.texts, b.texts, strict=False)) if x != y), None)
    found = {
        "choices": len(a.texts) != len(b.texts),
        "text": differing is not None,
        "finish_reason": a.finish_reasons != b.finish_reasons,
    }
    kinds = tuple(kind for kind, is_so in found.items() if is_so)
    if not kinds:
        return None, None
    difference = Difference(a.custom_id, a.line, kinds, outcome_a, outcome_b)
    if differing is None:
        return difference, None
    texts = a.texts[differing], b.texts[differing]
    alike = _alike(*texts)
    snippets = [text[alike : alike + _SNIPPET] for text in texts]
    return (
        replace(difference, choice=differing, equal_characters=alike, text_a=snippets[0], text_b=snippets[1]),
        texts,
    )


def _outcome(says: Told | None) -> str | None:
    if says is None:
        return None
    return says.error if says.error is not None else ", ".join(says.finish_reasons)


def _alike(a: Sequence[int] | str, b: Sequence[int] | str) -> int:
    """Tokens or characters that are the same at the beginning, found by halves."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# --- lines of a run, by custom_id ---


class _Lines:
    """Where the lines of a run lie.

    Attributes:
        keys: uint64 `[lines, 2]`, 128 bits of a digest of the custom_id.
        numbers: int64 `[lines]`, of the job's line.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        keys, columns = bytearray(), [array("q") for _ in range(4)]
        self._files: list[int] = []
        for of_errors, name in enumerate((RESULTS, ERRORS)):
            if not (path / name).exists():
                self._files.append(-1)
                continue
            fd = os.open(path / name, os.O_RDONLY)
            stack.callback(os.close, fd)
            self._files.append(fd)
            for offset, length, says in told_lines(path / name):
                keys += hashlib.blake2b(says.custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                for column, value in zip(columns, (says.line, of_errors, offset, length), strict=True):
                    column.append(value)
        self._path = path
        self.keys = np.frombuffer(bytes(keys), dtype=np.uint64).reshape(-1, 2)
        self.numbers, self._of_errors, self._offsets, self._lengths = (
            np.frombuffer(column, dtype=np.int64) if column else np.empty(0, np.int64) for column in columns
        )

    def read(self, place: int) -> Told:
        of_errors, offset = int(self._of_errors[place]), int(self._offsets[place])
        raw = os.pread(self._files[of_errors], int(self._lengths[place]), offset)
        return told(raw, self._path / (ERRORS if of_errors else RESULTS), offset)


def _pairs(a: _Lines, b: _Lines) -> Iterator[tuple[int | None, int | None]]:
    """Places of lines of the same custom_id, in the order of A's lines, then those that only B has. A custom_id that
    is there more than once (its repetitions are errors) is paired in the order of lines."""
    keys = np.concatenate((a.keys, b.keys))
    numbers = np.concatenate((a.numbers, b.numbers))
    of_b = np.arange(len(keys)) >= len(a.keys)
    order = np.lexsort((numbers, of_b, keys[:, 1], keys[:, 0]))
    # The how-manieth line of its custom_id a line is in its run.
    begins = np.ones(order.size, dtype=bool)
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    begins[1:] = ~same | (of_b[order[1:]] != of_b[order[:-1]])
    at = np.arange(order.size)
    nth = np.empty(order.size, dtype=np.int64)
    nth[order] = at - np.maximum.accumulate(np.where(begins, at, 0))
    order = np.lexsort((of_b, nth, keys[:, 1], keys[:, 0]))
    left, right = order[:-1], order[1:]
    paired = (keys[left] == keys[right]).all(axis=1) & (nth[left] == nth[right])
    partner = np.full(len(keys), -1, dtype=np.int64)
    partner[left[paired]] = right[paired]
    partner[right[paired]] = left[paired]
    for place in np.argsort(a.numbers, kind="stable").tolist():
        other = int(partner[place])
        yield place, other - len(a.keys) if other >= 0 else None
    alone = np.flatnonzero(partner[len(a.keys) :] < 0)
    for place in alone[np.argsort(b.numbers[alone], kind="stable")].tolist():
        yield None, place
