"""Two runs side by side: where answers begin to differ, what only one has, in memory that is bounded."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import HOSTILE
from rich.cells import cell_len
from typer.testing import CliRunner

from batchrun.cli import app
from batchrun.diff import _alike, diff_runs
from batchrun.errors import ExitCode, RunDirError, UsageError
from batchrun.formats.results import error_line, result_line
from batchrun.formats.rundir import RunDir, RunStatus
from batchrun.report.records import RequestCounts
from batchrun.request import Endpoint, FinishReason, LineFault, Result, Usage


def result(line: int, *texts: str, custom_id: str | None = None, reason: str = "stop", created: int = 1) -> bytes:
    answers = [
        Result(k, text, np.zeros(1, np.int32), FinishReason(reason), Usage(1, 0, 1)) for k, text in enumerate(texts)
    ]
    name = custom_id if custom_id is not None else f"r{line}"
    endpoint = Endpoint.CHAT if len(texts) == 1 else Endpoint.COMPLETIONS
    return result_line(
        answers, custom_id=name, line=line, endpoint=endpoint, model="m", created=created, seed=0, group=None
    )


def fault(line: int, code: str = "empty_prompt", custom_id: str | None = None) -> bytes:
    return error_line(LineFault(line, custom_id or f"r{line}", code, "it is wrong"))


def a_run(path: Path, results: list[bytes], errors: list[bytes] = [], model: str = "demo", digest: str = "d") -> Path:  # noqa: B006
    """A run directory with these lines."""
    with RunDir.open(path, {"model": digest}) as run_dir:
        counts = RequestCounts(len(results) + len(errors), len(results), len(errors), 0)
        run_dir.start(counts, model=model, environment={})
        run_dir.update(RunStatus.COMPLETED, counts, errors={}, exit_code=ExitCode.OK)
    (path / "results.jsonl").write_bytes(b"".join(results))
    (path / "errors.jsonl").write_bytes(b"".join(errors))
    return path


@pytest.fixture
def runs(tmp_path):
    """`runs(lines of A, lines of B)`: their comparison."""

    def compare(a: Any, b: Any, **kwargs: Any):
        made = [a_run(tmp_path / name, *lines) for name, lines in (("a", a), ("b", b))]
        return diff_runs(*made, **kwargs)

    return compare


def test_equal_runs_are_equal_whatever_their_order_and_time(runs):
    one = [result(k, f"text {k}", created=5) for k in (1, 2, 3)]
    other = [result(k, f"text {k}", created=9) for k in (3, 1, 2)]
    diff = runs((one, [fault(4)]), (other, [fault(4)]))
    assert (diff.equal, diff.different, diff.kinds, diff.differences) == (4, 0, {}, ())
    assert diff.exit_code == 0


def test_every_kind_of_difference_is_found(runs):
    a = [
        result(1, "same"),
        result(2, "one two"),
        result(3, "x", "yes"),
        result(4, "cut"),
        result(5, "was"),
        result(6, "a"),
    ]
    b = [result(9, "b"), result(5, "x"), result(4, "cut", reason="length"), result(3, "x", "yet"), result(1, "same")]
    diff = runs((a, [fault(7), fault(8)]), (b, [fault(2), fault(7, "invalid_request"), fault(8)]))
    assert diff.equal == 2
    assert diff.exit_code == 3
    assert diff.kinds == {"status": 2, "text": 2, "finish_reason": 1, "only_a": 1, "only_b": 1}
    assert diff.different == 7
    assert [(d.custom_id, d.kinds, d.a, d.b) for d in diff.differences] == [
        ("r2", ("status",), "stop", "empty_prompt"),
        ("r3", ("text",), "stop, stop", "stop, stop"),
        ("r4", ("finish_reason",), "stop", "length"),
        ("r5", ("text",), "stop", "stop"),
        ("r6", ("only_a",), "stop", None),
        ("r7", ("status",), "empty_prompt", "invalid_request"),
        ("r9", ("only_b",), None, "stop"),
    ]
    third = diff.differences[1]
    assert (third.choice, third.equal_characters, third.text_a, third.text_b) == (1, 2, "s", "t")


def test_places_are_tokens_where_both_runs_have_one_tokenizer(runs):
    text = "Place of lemons: shelf A5."
    diff = runs(([result(1, text)],), ([result(1, text.replace("A5", "A6"))],))
    [difference] = diff.differences
    from batchrun.models import resolve_model
    from batchrun.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model("demo").path)
    [ids] = tokenizer.encode_batch([text], add_special_tokens=False)
    assert difference.equal_tokens is not None
    assert 0 < difference.equal_tokens < len(ids)
    assert text.startswith(tokenizer.decode(ids[: difference.equal_tokens]).strip())
    assert len(tokenizer.decode(ids[: difference.equal_tokens + 1])) > difference.equal_characters
    assert diff.tokens is None


def test_places_are_characters_where_there_is_no_tokenizer(tmp_path):
    for name, model, digest in (("x", "demo", "other"), ("y", "nowhere-to-be-found", "d")):
        a = a_run(tmp_path / f"a{name}", [result(1, "abc")], model=model)
        b = a_run(tmp_path / f"b{name}", [result(1, "abd")], model=model, digest=digest)
        diff = diff_runs(a, b)
        assert (diff.differences[0].equal_tokens, diff.differences[0].equal_characters) == (None, 2)
        assert diff.tokens


def test_a_custom_id_that_is_there_twice_is_paired_in_order(runs):
    """Its repetition is an error line with the same name."""
    lines = [result(1, "t", custom_id="twice")], [fault(5, "duplicate_custom_id", "twice")]
    assert runs(lines, lines).different == 0
    more = [*lines[1], fault(9, "duplicate_custom_id", "twice")]
    diff = runs(lines, (lines[0], more))
    assert [(d.custom_id, d.line, d.kinds) for d in diff.differences] == [("twice", 9, ("only_b",))]


def test_only_the_first_are_kept_and_all_are_counted(runs):
    diff = runs(([result(k, "a") for k in range(1, 51)],), ([result(k, "b") for k in range(50, 0, -1)],), shown=3)
    assert diff.different == 50
    assert [d.line for d in diff.differences] == [1, 2, 3]


def test_a_line_that_is_being_written_is_not_there_yet(tmp_path):
    a = a_run(tmp_path / "a", [result(1, "t")])
    b = a_run(tmp_path / "b", [result(1, "t"), result(2, "u")[:-5]])
    assert diff_runs(a, b).different == 0


def test_damage_is_named(tmp_path):
    a = a_run(tmp_path / "a", [result(1, "t"), b'{"custom_id": "x"}\n'])
    with pytest.raises(RunDirError, match=r"results\.jsonl: the line at byte \d+ is not sound"):
        diff_runs(a, a)
    with pytest.raises(UsageError, match="not the directory of a run"):
        diff_runs(tmp_path, a)


def test_texts_are_not_held_in_memory(tmp_path):
    long = "words " * 2000
    made = [
        a_run(tmp_path / name, [result(k, f"{long}{name}") for k in range(1, 1001)], digest=name) for name in ("a", "b")
    ]
    size = (made[0] / "results.jsonl").stat().st_size
    tracemalloc.start()
    try:
        assert diff_runs(*made, shown=5).different == 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 2


def test_the_command_shows_it_in_80_columns_and_exits_as_it_says(tmp_path):
    a = a_run(tmp_path / "a", [result(1, "same"), result(2, HOSTILE, custom_id=HOSTILE)])
    b = a_run(tmp_path / "b", [result(1, "same"), result(2, "x" + HOSTILE, custom_id=HOSTILE), result(3, "more")])
    told = CliRunner().invoke(app, ["diff", str(a), str(b)], catch_exceptions=False)
    assert told.exit_code == 3
    assert all(cell_len(line) <= 80 and line.isprintable() for line in told.output.splitlines())
    assert "2 of 3 lines differ." in told.output
    assert "only in B" in told.output
    assert "from token 1 on" in told.output
    document = json.loads(CliRunner().invoke(app, ["diff", str(a), str(b), "--json", "--show", "1"]).output)
    assert document["different"] == 2
    assert len(document["differences"]) == 1
    assert CliRunner().invoke(app, ["diff", str(a), str(a)]).exit_code == 0
    assert CliRunner().invoke(app, ["diff", str(a), str(tmp_path)]).exit_code == 2


def test_where_two_texts_part():
    for a, b in (("", ""), ("", "x"), ("abc", "abc"), ("abc", "abcd"), ("abXd", "abYd"), ("Xb", "Yb")):
        same = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert _alike(a, b) == _alike(b, a) == _alike([*map(ord, a)], [*map(ord, b)]) == same
