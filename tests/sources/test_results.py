"""Answers in one file elsewhere: all of them, once, in the order of the job, beside the columns that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.close import close_run
from batchrun.config import load_config
from batchrun.errors import ExitCode, OutputError, RunDirError, UsageError
from batchrun.pipeline import Outcome, Silent, run_job
from batchrun.retry import retry_run
from batchrun.sources import results

ROWS = 40
OURS = ["custom_id", "text", "finish_reason", "reasoning", "tool_calls", "choices", "prompt_tokens"]
OURS += ["completion_tokens", "cached_tokens", "error_code", "error_message"]


@pytest.fixture
def table(here) -> pa.Table:
    """A table whose prompts are answered at different times, with some bad rows, as `t.parquet`."""
    prompts = [None if i % 7 == 3 else f"The quick brown fox {'jumps ' * (i % 5)}{i}" for i in range(ROWS)]
    table = pa.table(
        {
            "prompt": prompts,
            "label": pa.array(["ab"[i % 2] for i in range(ROWS)]).dictionary_encode(),
            "score": [None if i % 3 else i / 7 for i in range(ROWS)],
            "said": [[{"role": "user", "content": str(i)}] * (i % 3) for i in range(ROWS)],
            "max_tokens": [1 + i % 9 for i in range(ROWS)],
        }
    )
    pq.write_table(table, here / "t.parquet", row_group_size=11)
    return table


@pytest.fixture
def run(here, model_dir) -> Callable[..., Outcome]:
    def call(job: str, *, results: str | None, observer: Silent | None = None, **config: Any) -> Outcome:
        config.setdefault("input", {"field_columns": ("max_tokens",), "prompt_column": "prompt"})
        settings = load_config(model=str(model_dir()), max_tokens=4, output={"results": results}, **config)
        return run_job(job, settings, observer)

    return call


class StopAfter(Silent):
    def __init__(self, count: int) -> None:
        self.left = count

    def step(self, rows: int, sampled: int, finished: int) -> None:
        self.left -= finished

    def should_stop(self) -> bool:
        return self.left <= 0


def lines_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Result and error lines by line of the job."""
    raw = b"".join((run_dir / name).read_bytes() for name in ("results.jsonl", "errors.jsonl"))
    lines = [json.loads(line) for line in raw.splitlines()]
    assert len({line["batchrun"]["line"] for line in lines}) == len(lines)
    return {line["batchrun"]["line"]: line for line in lines}


def check_answers(rows: list[dict[str, Any]], lines: dict[int, dict[str, Any]], prefix: str = "") -> None:
    """Our columns say what the lines of the run directory say, in the order of the job."""
    assert len(rows) == len(lines)
    for row, number in zip(rows, sorted(lines), strict=True):
        body = lines[number]["response"]["body"]
        choice = body["choices"][0] if "choices" in body else {}
        usage = body.get("usage", {})
        error = body.get("error", {})
        told = {
            "custom_id": lines[number]["custom_id"],
            "text": choice.get("text"),
            "finish_reason": choice.get("finish_reason"),
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "cached_tokens": usage.get("prompt_tokens_details", {}).get("cached_tokens"),
            "error_code": error.get("code"),
            "error_message": error.get("message"),
        }
        assert {name: row[prefix + name] for name in told} == told


def test_a_table_comes_back_with_the_answers_beside_its_columns(run, table, here):
    outcome = run("t.parquet", results="out/answers.parquet")
    assert outcome.exit_code is ExitCode.SOME_FAILED
    written = pq.read_table(here / "out" / "answers.parquet")
    assert written.schema.names == [*table.schema.names, *OURS]
    assert written.select(table.schema.names).to_pylist() == table.to_pylist()
    assert written.schema.field("said").type == table.schema.field("said").type
    check_answers(written.to_pylist(), lines_of(outcome.run_dir))
    assert [path.name for path in (here / "out").iterdir()] == ["answers.parquet"]


def test_parts_of_any_size_give_the_same_table(run, table, here, monkeypatch):
    run("t.parquet", results="whole.parquet")
    for size in (1, 7, ROWS):
        monkeypatch.setattr(results, "_ROWS", size)
        run("t.parquet", results="parts.parquet")
        assert pq.read_table("parts.parquet").equals(pq.read_table("whole.parquet"))
        assert pq.ParquetFile("parts.parquet").num_row_groups == -(-ROWS // size)


def test_lines_are_those_of_the_run_in_the_order_of_the_job(run, table, here):
    outcome = run("t.parquet", results="all.jsonl")
    written = [json.loads(line) for line in (here / "all.jsonl").read_bytes().splitlines()]
    lines = lines_of(outcome.run_dir)
    assert written == [lines[number] for number in sorted(lines)]
    assert not (outcome.run_dir / "columns.parquet").exists()


def test_csv_and_shards_are_joined_as_well(run, here):
    (here / "shards").mkdir()
    (here / "shards" / "0.csv").write_text('prompt,note\nx,"a\nb"\ny,\n')
    (here / "shards" / "1.csv").write_text("more,prompt\n1,z\n,toolong,and,more\n")
    outcome = run("shards", results="answers.parquet", input={})
    rows = pq.read_table("answers.parquet").to_pylist()
    assert [(row["prompt"], row["note"], row["more"]) for row in rows] == [
        ("x", "a\nb", None), ("y", "", None), ("z", None, "1"), ("toolong", None, "")
    ]  # fmt: skip
    assert rows[3]["error_message"] == "the row has 4 fields, and the header 2 (row 2 of 1.csv)"
    check_answers(rows, lines_of(outcome.run_dir))


def test_parquet_shards_with_other_columns_and_kinds(run, here):
    (here / "shards").mkdir()
    pq.write_table(pa.table({"prompt": ["x"], "n": pa.array([1], pa.int32())}), here / "shards" / "0.parquet")
    pq.write_table(pa.table({"n": pa.array([2**40], pa.int64()), "prompt": ["y"]}), here / "shards" / "1.parquet")
    pq.write_table(pa.table({"prompt": ["z"], "other": [[1.5]]}), here / "shards" / "2.parquet")
    run("shards", results="answers.parquet", input={})
    rows = pq.read_table("answers.parquet").to_pylist()
    assert [(row["prompt"], row["n"], row["other"]) for row in rows] == [
        ("x", 1, None), ("y", 2**40, None), ("z", None, [1.5])
    ]  # fmt: skip
    pq.write_table(pa.table({"prompt": ["z"], "n": ["text"]}), here / "shards" / "3.parquet")
    with pytest.raises(UsageError, match="different types"):
        run("shards", results="answers.parquet", input={}, out="other.run")
    assert not (here / "other.run").exists()


def test_columns_of_the_table_keep_their_names_and_ours_give_way(run, here):
    pq.write_table(pa.table({"prompt": ["x", "y"], "text": ["mine", "too"], "error_code": [1, 2]}), here / "t.parquet")
    outcome = run("t.parquet", results="answers.parquet", input={})
    written = pq.read_table("answers.parquet")
    assert written.schema.names[:5] == ["prompt", "text", "error_code", "custom_id", "batchrun_text"]
    assert written["text"].to_pylist() == ["mine", "too"]
    lines = lines_of(outcome.run_dir)
    assert written["batchrun_text"].to_pylist() == [lines[i]["response"]["body"]["choices"][0]["text"] for i in (1, 2)]


def test_json_lines_give_a_table_too_with_all_choices(run, here):
    jobs = [
        {"id": "two", "prompt": ["x", "y"], "max_tokens": 2},
        {"id": "chat", "messages": [{"role": "user", "content": "plum"}]},
        {"id": "bad", "prompt": 3},
    ]
    (here / "jobs.jsonl").write_text("\n".join(json.dumps(line) for line in jobs))
    outcome = run("jobs.jsonl", results="answers.parquet", input={})
    written = pq.read_table("answers.parquet")
    assert written.schema.names == OURS
    two, chat, bad = written.to_pylist()
    lines = lines_of(outcome.run_dir)
    choices = lines[1]["response"]["body"]["choices"]
    assert two["choices"] == [{"text": one["text"], "finish_reason": one["finish_reason"]} for one in choices]
    assert (two["text"], chat["choices"], bad["text"]) == (choices[0]["text"], None, None)
    assert chat["text"] == lines[2]["response"]["body"]["choices"][0]["message"]["content"]
    assert bad["error_code"] == "invalid_request"


def test_a_trial_of_some_lines_gives_these_rows(run, table, here):
    run("t.parquet", results="answers.parquet", limit=5)
    written = pq.read_table("answers.parquet")
    assert written.select(table.schema.names).to_pylist() == table.slice(0, 5).to_pylist()


# --- when it is written


def test_it_is_written_at_the_end_and_not_before(run, table, here):
    stopped = run("t.parquet", results="answers.parquet", observer=StopAfter(5))
    assert stopped.exit_code is ExitCode.STOPPED
    assert not (here / "answers.parquet").exists()
    outcome = run("t.parquet", results="answers.parquet")
    check_answers(pq.read_table("answers.parquet").to_pylist(), lines_of(outcome.run_dir))


def test_a_finished_run_writes_it_where_it_is_asked_for_later(run, table, here):
    run("t.parquet", results=None)
    assert not (here / "t.run" / "columns.parquet").exists()
    again = run("t.parquet", results="answers.parquet")
    assert again.already_done
    written = pq.read_table("answers.parquet")
    assert written.select(table.schema.names).to_pylist() == table.to_pylist()
    check_answers(written.to_pylist(), lines_of(again.run_dir))


def test_a_retry_writes_it_anew_where_it_was_asked_for_later(run, table, here):
    run("t.parquet", results=None)
    assert run("t.parquet", results="answers.parquet").already_done
    before = pq.read_table("answers.parquet")
    retry_run(here / "t.run", finish_reason="length", max_tokens=12)
    assert pq.read_table("answers.parquet") != before


@pytest.mark.parametrize("name", ["results.jsonl", "errors.jsonl", "job.jsonl", "columns.parquet", "replaced.jsonl"])
def test_it_is_no_file_of_the_run_itself(name, run, table, here):
    with pytest.raises(UsageError, match="is a file of the run itself"):
        run("t.parquet", results=f"t.run/../t.run/{name}")
    assert not (here / "t.run" / "run.json").exists()


@pytest.mark.parametrize("name", ["parts/a.jsonl", "parts/all.jsonl"])
def test_it_is_no_file_that_the_job_names_by_a_pattern(name, run, here):
    (here / "parts").mkdir()
    for part in "ab":
        (here / "parts" / f"{part}.jsonl").write_text(json.dumps({"id": part, "prompt": "x"}) + "\n")
    before = (here / "parts" / "a.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"parts/\*\.jsonl"):
        run("parts/*.jsonl", results=name, input={})
    assert (here / "parts" / "a.jsonl").read_bytes() == before
    assert run("parts/*.jsonl", results="all.jsonl", input={}).exit_code == 0


def test_retry_and_close_write_it_anew(run, table, here):
    run("t.parquet", results="answers.parquet")
    before = pq.read_table("answers.parquet")
    retried = retry_run(here / "t.run", finish_reason="length", max_tokens=12)
    written = pq.read_table("answers.parquet")
    assert written["completion_tokens"].to_pylist() != before["completion_tokens"].to_pylist()
    check_answers(written.to_pylist(), lines_of(retried.outcome.run_dir))

    run("t.parquet", results="closed.parquet", out="closed.run", observer=StopAfter(5))
    close_run(here / "closed.run")
    codes = pq.read_table("closed.parquet")["error_code"].to_pylist()
    assert codes.count("batch_cancelled") > 5
    assert codes.count("invalid_row") == table["prompt"].null_count
    assert len(codes) == ROWS
    assert None in codes


def test_where_it_goes_does_not_depend_on_where_a_retry_is_started(run, table, here, monkeypatch):
    run("t.parquet", results="answers.parquet")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    (here / "answers.parquet").unlink()
    retry_run(here / "t.run", finish_reason="length", max_tokens=12)
    assert (here / "answers.parquet").exists()
    assert not list((here / "elsewhere").iterdir())


def test_columns_that_are_damaged_or_too_few_are_told_and_brought_anew(run, table, here):
    run("t.parquet", results="answers.parquet")
    columns = here / "t.run" / "columns.parquet"
    for spoil in (lambda: pq.write_table(table.slice(0, 9), columns), lambda: columns.write_bytes(b"nothing")):
        spoil()
        (here / "answers.parquet").unlink()
        with pytest.raises(RunDirError, match=r"columns\.parquet"):
            run("t.parquet", results="answers.parquet")
        assert not (here / "answers.parquet").exists()
        columns.unlink()
        assert run("t.parquet", results="answers.parquet").already_done
        assert pq.read_table("answers.parquet").select(table.schema.names).to_pylist() == table.to_pylist()


@pytest.mark.parametrize("name", ["answers.parquet", "answers.jsonl"])
def test_it_may_go_to_a_store(name, run, table, here, memory):
    memory.pipe_file(f"/bucket/{name}", b"an older one")
    outcome = run("t.parquet", results=f"memory://bucket/{name}")
    run("t.parquet", results=name)
    assert memory.cat_file(f"/bucket/{name}") == (here / name).read_bytes()
    assert memory.ls("/bucket", detail=False) == [f"/bucket/{name}"]
    assert not list(outcome.run_dir.glob(".results*"))


def test_what_cannot_be_written_at_the_end_is_written_by_the_same_command(run, table, here, memory, monkeypatch):
    class Full(OSError):
        strerror = "the bucket is full of me:hunter2@"

    def put_file(self: Any, *_: Any, **__: Any) -> None:
        raise Full

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", put_file)
        with pytest.raises(
            OutputError, match=r"memory://bucket/a\.parquet cannot be written: Full: the bucket is full"
        ):
            run("t.parquet", results="memory://bucket/a.parquet")
    told = json.loads((here / "t.run" / "run.json").read_bytes())
    assert (told["status"], told["exit_code"], told["request_counts"]["remaining"]) == ("stopped", ExitCode.OUTPUT, 0)
    assert not memory.exists("/bucket/a.parquet")
    outcome = run("t.parquet", results="memory://bucket/a.parquet")
    assert outcome.exit_code is ExitCode.SOME_FAILED
    with memory.open("/bucket/a.parquet") as file:
        check_answers(pq.read_table(file).to_pylist(), lines_of(outcome.run_dir))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("answers.csv", "must end in .parquet or .jsonl"),
        ("s3://me:secret@bucket/a.parquet", "no user and no key may stand in it"),
        ("s3://bucket/a.jsonl?key=value", "must end in"),
        ("folder.parquet", "is a directory"),
        ("nosuch://a.parquet", "nosuch://a.parquet"),
        ("t.parquet", "is the job itself"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_run(target, words, run, table, here):
    (here / "folder.parquet").mkdir()
    before = sorted(here.rglob("*"))
    with pytest.raises((UsageError, OutputError)) as caught:
        run("t.parquet", results=target)
    assert words in caught.value.message
    assert "secret" not in caught.value.message
    assert sorted(here.rglob("*")) == before
