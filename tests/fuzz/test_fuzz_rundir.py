"""Whatever the files of a run directory hold, a start finds a sound state or says what is wrong, and loses nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from fuzz.cases import LUMPS, edited, parts, repeatable
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import ExitCode, RunDirError
from batchrun.formats.results import error_line, read_line_number, result_line, unrun_line
from batchrun.formats.rundir import ERRORS, RESULTS, RUN, Recovered, ResultSink, RunDir, RunStatus
from batchrun.report.records import RequestCounts
from batchrun.request import Endpoint, FinishReason, LineFault, Result, Usage

FINGERPRINT = {"job": "sha256:aa", "model": "demo", "temperature": 0.7, "template": None}
TOTAL = 9


def a_result(line: int) -> bytes:
    answer = Result(0, "grüße\n", np.array([1], np.int32), FinishReason.STOP, Usage(1, 0, 1))
    return result_line(
        [answer], custom_id=f"r{line}", line=line, endpoint=Endpoint.CHAT, model="m", created=0, seed=0, group=None
    )


LINES = {
    RESULTS: [a_result(line) for line in (4, 1, 7)],
    ERRORS: [error_line(LineFault(2, "r2", "empty_prompt", "x")), unrun_line("r5", 5, "batch_cancelled", "closed")],
}
NUMBERS = [b'"line":0', b'"line":-1', b'"line":18446744073709551615', b'"line":true', b'"line":1.0', b'"line":null']
IN_LINES = [*LUMPS, *NUMBERS, b'"code":[]', b'"code":7', b'"error":"x"', LINES[RESULTS][0], LINES[ERRORS][0]]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture
def no_fsync(monkeypatch):
    """Thousands of starts; none of them meets a power cut."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def run_json(tmp_path, no_fsync) -> bytes:
    """`run.json` of a run that was stopped."""
    with RunDir.open(tmp_path / "made.run", FINGERPRINT) as run_dir:
        run_dir.start(RequestCounts(TOTAL, 0, 0, TOTAL), model="demo", environment={"python": "3.11"})
        counts = RequestCounts(TOTAL, 3, 2, 4)
        run_dir.update(RunStatus.STOPPED, counts, errors={"empty_prompt": 1}, exit_code=ExitCode.STOPPED)
    return (tmp_path / "made.run" / RUN).read_bytes()


def start(path: Path) -> Recovered:
    with RunDir.open(path, FINGERPRINT) as run_dir:
        return run_dir.recover()


def fill(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)


def lines_of(content: bytes) -> list[bytes]:
    return content.split(b"\n")[:-1]


def check_nothing_whole_is_lost(before: bytes, after: bytes) -> None:
    """What was cut off is the part of a line behind the last newline, and before that at most one line that is not
    sound."""
    assert before.startswith(after)
    cut = lines_of(before[len(after) :])
    assert len(cut) <= 1
    for line in cut:
        with pytest.raises(ValueError):
            read_line_number(line)


def check_start(path: Path, files: dict[str, bytes]) -> None:
    """A start on these files is refused with a reason, or goes on from what they say; nothing whole is lost."""
    fill(path, files)
    try:
        with RunDir.open(path, FINGERPRINT) as run_dir:
            recovered = run_dir.recover()
            done = check_recovered(path, recovered)
            assert run_dir.run is not None
            if run_dir.run.status.finished:
                assert run_dir.run.exit_code is not None
                ExitCode(run_dir.run.exit_code)
            with ResultSink(path, recovered) as sink:
                counts = RequestCounts(1000, sink.completed, sink.failed, 1000 - sink.completed - sink.failed)
                run_dir.start(counts, model="demo", environment={})
                new = next(number for number in range(1, 20) if number not in done)
                sink.write_result(a_result(new))
    except RunDirError as refusal:
        assert str(path) in refusal.message
        assert refusal.hint and "--fresh" in refusal.hint
        assert refusal.code in ("run_dir_unsound", "unreadable_document", "schema_version", "run_dir_mismatch")
        for name in LINES:
            check_nothing_whole_is_lost(files[name], (path / name).read_bytes())
        return
    after = (path / RESULTS).read_bytes().removesuffix(a_result(new))
    check_nothing_whole_is_lost(files[RESULTS], after)
    check_nothing_whole_is_lost(files[ERRORS], (path / ERRORS).read_bytes())
    again = start(path)
    assert again.results.tolist() == sorted([*recovered.results.tolist(), new])
    assert (again.errors.tolist(), again.error_codes) == (recovered.errors.tolist(), recovered.error_codes)


def check_recovered(path: Path, recovered: Recovered) -> list[int]:
    """What was recovered is what the files say; returns the lines of the job that are done."""
    numbers = {
        name: sorted(orjson.loads(line)["batchrun"]["line"] for line in lines_of((path / name).read_bytes()))
        for name in LINES
    }
    assert (recovered.results.tolist(), recovered.errors.tolist()) == (numbers[RESULTS], numbers[ERRORS])
    done = numbers[RESULTS] + numbers[ERRORS]
    assert len(set(done)) == len(done)
    assert all(1 <= number < 2**63 for number in done)
    assert sum(recovered.error_codes.values()) == len(numbers[ERRORS])
    assert all(type(code) is str for code in recovered.error_codes)
    return done


@st.composite
def rearranged(draw: st.DrawFn) -> dict[str, bytes]:
    """The lines of both files, some of them dropped, there twice, in the other file, mutated or cut short."""
    content = {}
    every = [line for lines in LINES.values() for line in lines]
    for name, lines in LINES.items():
        mine = draw(st.permutations(lines)) if draw(st.booleans()) else lines
        if draw(st.booleans()):
            mine = [*mine, draw(st.sampled_from(every))]
        content[name] = b"".join(mine)
        match draw(st.sampled_from(["whole", "edited", "cut"])):
            case "edited":
                content[name] = draw(edited(content[name], IN_LINES))
            case "cut":
                content[name] = content[name][: draw(st.integers(0, len(content[name])))]
                content[name] += draw(st.sampled_from([b"", b"", b"\0" * 5000, b"\n", b"{}\n", b"\xff"]))
    return content


@parts(slow=8)
def test_results_and_errors_of_any_content(tmp_path, run_json, part):
    @repeatable(part, 1000)
    @given(rearranged())
    def law(files):
        check_start(tmp_path / "fuzzed.run", {RUN: run_json, **files})

    law()


@parts(slow=2)
def test_a_run_json_of_any_bytes(tmp_path, run_json, part):
    files = {name: b"".join(lines) for name, lines in LINES.items()}

    @repeatable(part, 1000)
    @given(edited(run_json) | st.integers(0, len(run_json)).map(lambda size: run_json[:size]))
    def law(content):
        check_start(tmp_path / "fuzzed.run", {RUN: content, **files})

    law()


@parts(slow=4)
def test_a_run_json_of_any_values(tmp_path, run_json, part):
    files = {name: b"".join(lines) for name, lines in LINES.items()}
    there: dict[str, Any] = orjson.loads(run_json)
    inner = [(key, name) for key in ("request_counts", "fingerprint") for name in there[key]]

    @repeatable(part, 1000)
    @given(
        st.dictionaries(st.sampled_from([*((key, None) for key in there), *inner]), VALUES, min_size=1, max_size=2),
        st.sampled_from(["in_progress", "completed", "stopped", "cancelled"]),
        st.sets(st.sampled_from(sorted(there)), max_size=1),
    )
    def law(changes, status, dropped):
        document = {**there, "status": status}
        for (key, name), value in changes.items():
            if name is None:
                document[key] = value
            elif isinstance(document[key], dict):
                document[key] = {**document[key], name: value}
        document = {key: value for key, value in document.items() if key not in dropped}
        check_start(tmp_path / "fuzzed.run", {RUN: orjson.dumps(document), **files})

    law()


# --- found by the above ---


@pytest.mark.parametrize("number", [0, -1, 2**63, 2**64 - 1, True, 1.0])
def test_a_line_of_a_number_that_no_line_has_is_not_sound(tmp_path, run_json, number):
    """The one beyond int64 ended the start as an internal failure."""
    wrong = LINES[RESULTS][0].replace(b'"line":4', b'"line":' + orjson.dumps(number))
    assert wrong != LINES[RESULTS][0]
    fill(tmp_path / "a.run", {RUN: run_json, RESULTS: wrong + LINES[RESULTS][1]})
    with pytest.raises(RunDirError, match="the line at byte 0 is not sound"):
        start(tmp_path / "a.run")


@pytest.mark.parametrize("code", [b"[]", b"{}", b"7", b"true"])
def test_an_error_code_that_is_no_text_is_not_sound(tmp_path, run_json, code):
    wrong = LINES[ERRORS][0].replace(b'"empty_prompt"', code)
    fill(tmp_path / "a.run", {RUN: run_json, ERRORS: wrong + LINES[ERRORS][1]})
    with pytest.raises(RunDirError, match="the line at byte 0 is not sound"):
        start(tmp_path / "a.run")


@pytest.mark.parametrize(
    ("name", "line", "kind"), [(RESULTS, LINES[ERRORS][0], "an error"), (ERRORS, a_result(3), "a result")]
)
def test_a_line_in_the_wrong_file_is_refused_and_not_cut(tmp_path, run_json, name, line, kind):
    content = LINES[name][0] + line
    fill(tmp_path / "a.run", {RUN: run_json, name: content})
    with pytest.raises(RunDirError, match=f"the line at byte {len(LINES[name][0])} is {kind}"):
        start(tmp_path / "a.run")
    assert (tmp_path / "a.run" / name).read_bytes() == content


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [1]])
def test_a_schema_version_is_an_integer(tmp_path, run_json, version):
    fill(tmp_path / "a.run", {RUN: orjson.dumps({**orjson.loads(run_json), "schema_version": version})})
    with pytest.raises(RunDirError, match="schema_version is no integer"):
        start(tmp_path / "a.run")


def test_a_deep_schema_version_is_refused(tmp_path, run_json):
    fill(tmp_path / "a.run", {RUN: b'{"schema_version": ' + b"[" * 1000 + b"]" * 1000 + b"}"})
    with pytest.raises(RunDirError, match="schema_version is no integer"):
        start(tmp_path / "a.run")


def test_an_exit_code_that_there_is_not_is_refused(tmp_path, run_json):
    fill(tmp_path / "a.run", {RUN: orjson.dumps({**orjson.loads(run_json), "exit_code": 42})})
    with pytest.raises(RunDirError, match="42 is not a valid ExitCode"):
        start(tmp_path / "a.run")
