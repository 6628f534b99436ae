"""What is written of plans, reports and steps reads back the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import orjson
import pytest

from batchrun.errors import OutputError, RunDirError
from batchrun.formats.plan import PlanFile, read_plan, write_plan
from batchrun.formats.report import (
    StepWriter,
    encode_step,
    read_report,
    read_step_logs,
    read_steps,
    write_report,
)
from batchrun.report.records import (
    Estimate,
    GroupSummary,
    KvUse,
    OrderTried,
    Report,
    RequestCounts,
    Seconds,
    StartSummary,
    StepLog,
    StepRecord,
    StepSeconds,
    Throughput,
    TokenCounts,
    Warned,
    largest_groups,
    step_seconds,
    sum_up,
)
from batchrun.schedule.step import PrefixReads, Step

TOKENS = TokenCounts(prompt_logical=1000, prompt_physical=250, prompt_computed=260, output=64)


def a_report() -> Report:
    return Report(
        request_counts=RequestCounts(10, 8, 1, 1),
        duplicates=2,
        tokens=TOKENS,
        saving=TOKENS.saving,
        seconds=Seconds(total=3.0, tokenize=0.25, execute=2.5),
        throughput=Throughput(3.2, 400.0, None),
        expected=None,
        bound=None,
        step_seconds=None,
        steps=12,
        rows=5000,
        kv=KvUse(16, 100, 42),
        idle_rows=0,
        padded_rows=0,
        preemptions=0,
        memory_retries=0,
        worker_restarts=0,
        prefix_evictions=0,
        finish_reasons={"stop": 7, "length": 1},
        errors={"empty_prompt": 1},
        warnings=(Warned("max_tokens_default", 3, "3 lines have no max_tokens"),),
        groups=(GroupSummary(4, 200, 8),),
        slowest=(),
        schedule_order="dfs",
        model="demo",
        device="cpu",
        dtype="float32",
        environment={"python": "3.11", "threads": 2},
    )


def a_plan() -> PlanFile:
    return PlanFile(
        requests=8,
        duplicates=1,
        tokens=TOKENS,
        saving=TOKENS.saving,
        groups=(GroupSummary(4, 200, 8),),
        schedule_order="dfs",
        grouping="tree",
        steps=12,
        rows=5000,
        step_tokens=256,
        kv=KvUse(16, 100, 42),
        expected=Estimate(10.0, 8.0, 12.5, 6.0, 2.5, 1.5, "cpu", "a processor", True, 480),
        orders=(OrderTried("dfs", 10.0, 53, 4000, 90, 0), OrderTried("input", 12.5, 61, 9000, 99, 7)),
        model="demo",
        dtype="float32",
        fingerprint={"job": "sha256:aa", "seed": 0},
    )


RECORD = StepRecord(0, 4, 2, 2, 2, 9, 0.5, 0.25, 2, 7)


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def a_step(index: int, **changes) -> Step:
    step = Step(
        index=index,
        sequence=int32(0, 1, 2),
        request=int32(-1, 0, 1),
        start=int32(0, 5, 3),
        length=int32(2, 1, 1),
        depth=int32(0, 2, 2),
        samples=np.array([False, True, True]),
        num_sampled=int32(0, 1, 1),
        token_ids=int32(5, 6, 7, 8),
        prefix_reads=PrefixReads(int32(0), int32(2), int32(2), int32(0), int32(2), int32(0)),
        releases=int32(),
        grant_sequence=int32(0),
        grant_page=int32(9),
    )
    return dataclasses.replace(step, **changes)


def test_a_report_reads_back_equal(tmp_path):
    path = tmp_path / "report.json"
    write_report(path, a_report())
    assert read_report(path) == a_report()
    document = orjson.loads(path.read_bytes())
    assert next(iter(document)) == "schema_version"
    assert document["seconds"] == {"total": 3.0, "load": None, "tokenize": 0.25, "plan": None, "execute": 2.5}
    assert document["saving"] == 0.75
    assert document["warnings"] == [{"code": "max_tokens_default", "count": 3, "message": "3 lines have no max_tokens"}]


def test_a_plan_reads_back_equal(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, a_plan())
    assert read_plan(path) == a_plan()
    document = orjson.loads(path.read_bytes())
    assert document["schema_version"] == 1
    assert document["groups"] == [{"id": 4, "prefix_tokens": 200, "requests": 8}]
    assert document["kv"] == {"page_size": 16, "pages": 100, "peak_pages": 42}
    assert document["expected"]["seconds"] == 10.0
    assert [order["name"] for order in document["orders"]] == ["dfs", "input"]


def test_plan_and_report_use_the_same_names(tmp_path):
    write_plan(tmp_path / "plan.json", a_plan())
    write_report(tmp_path / "report.json", a_report())
    plan, report = (orjson.loads((tmp_path / name).read_bytes()) for name in ("plan.json", "report.json"))
    for name in ("tokens", "saving", "kv", "steps", "groups", "schedule_order", "model", "dtype"):
        assert plan[name] == report[name]


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("tokens", "output"), "64", "tokens.output"),
        (("kv", "pages"), 1.5, "kv.pages"),
        (("request_counts", "total"), 11, "request_counts"),
        (("seconds", "total"), "fast", "seconds.total"),
        (("groups",), {}, "groups"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, place, value, named):
    path = tmp_path / "report.json"
    write_report(path, a_report())
    document = orjson.loads(path.read_bytes())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_bytes(orjson.dumps(document))
    with pytest.raises(RunDirError, match=named):
        read_report(path)


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(RunDirError, match=r"report\.json: No such file"):
        read_report(tmp_path / "report.json")


def test_largest_groups_are_those_that_spare_most():
    groups = [GroupSummary(0, 1000, 1), GroupSummary(1, 10, 11), GroupSummary(2, 50, 4), GroupSummary(3, 100, 2)]
    assert [group.id for group in largest_groups(groups)] == [2, 1, 3, 0]
    assert [group.id for group in largest_groups(groups, limit=2)] == [2, 1]


def test_saving_is_the_share_of_prompt_tokens_spared():
    assert TOKENS.saving == 0.75
    assert TokenCounts(0, 0, 0, 0).saving == 0


# --- steps ---


def test_steps_read_back_as_their_columns(tmp_path):
    path = tmp_path / "steps.jsonl"
    with StepWriter(path) as writer:
        writer.write(a_step(0), RECORD)
        writer.write(a_step(1, releases=int32(2, 1)))
    first, second = read_steps(path)
    assert first == {
        "index": 0,
        "chunks": {
            "sequence": [0, 1, 2],
            "request": [-1, 0, 1],
            "start": [0, 5, 3],
            "length": [2, 1, 1],
            "samples": [0, 1, 1],
        },
        "prefix_reads": {
            "level": [0],
            "first_row": [2],
            "rows": [2],
            "sequence": [0],
            "length": [2],
            "position": [0],
        },
        "releases": [],
        "grants": {"sequence": [0], "page": [9]},
        "record": {
            "index": 0,
            "rows": 4,
            "sampled": 2,
            "prefill_rows": 2,
            "decode_rows": 2,
            "pages_used": 9,
            "seconds": 0.5,
            "host_seconds": 0.25,
            "running": 2,
            "waiting": 7,
            "held_back": False,
        },
    }
    assert second["releases"] == [2, 1]
    assert second["record"] is None
    assert path.read_bytes().count(b"\n") == 2


def test_a_planned_and_a_measured_step_differ_in_their_record_only():
    planned, measured = orjson.loads(encode_step(a_step(3))), orjson.loads(encode_step(a_step(3), RECORD))
    assert planned.pop("record") is None
    assert measured.pop("record")["seconds"] == 0.5
    assert planned == measured
    other_tokens = orjson.loads(encode_step(a_step(3, token_ids=int32(1, 1, 1, 1))))
    other_tokens.pop("record")
    assert other_tokens == planned  # what was sampled is not the schedule's


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": int32(0, 1, 3)},
        {"request": int32(-1, 0, 2)},
        {"start": int32(0, 5, 4)},
        {"length": int32(1, 2, 1)},
        {"samples": np.array([False, True, False])},
        {"prefix_reads": PrefixReads(int32(0), int32(2), int32(2), int32(0), int32(1), int32(0))},
        {"releases": int32(1)},
        {"grant_sequence": int32(1)},
        {"grant_page": int32(8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_column_of_the_schedule_tells_steps_apart(change):
    assert encode_step(a_step(3, **change)) != encode_step(a_step(3))


def test_columns_that_are_slices_of_larger_arrays_are_written(tmp_path):
    strided = np.arange(6, dtype=np.int32)[::2]
    assert orjson.loads(encode_step(a_step(0, sequence=strided)))["chunks"]["sequence"] == [0, 2, 4]


def test_a_torn_step_is_left_out_by_readers_and_cut_by_writers(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(encode_step(a_step(0)) + encode_step(a_step(1))[:-20])
    assert [step["index"] for step in read_steps(path)] == [0]
    with StepWriter(path) as writer:
        writer.write(a_step(7))
    assert [step["index"] for step in read_steps(path)] == [0, 7]


def test_records_read_back_start_by_start(tmp_path):
    path = tmp_path / "steps.jsonl"
    assert read_step_logs(path) == []
    for indices in ((0, 1, 4), (0, 1)):  # steps 2 and 3 were lost with a worker
        with StepWriter(path) as writer:
            for index in indices:
                writer.write(a_step(index), dataclasses.replace(RECORD, index=index))
    first, second = read_step_logs(path)
    assert first.columns["index"].tolist() == [0, 1, 4]
    assert second[1] == dataclasses.replace(RECORD, index=1)
    assert sum_up(first) == StartSummary(3, 6, 6, 6, 9, 1.5)


def test_a_step_without_a_sound_record_is_named(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(encode_step(a_step(0), RECORD) + encode_step(a_step(1)))
    with pytest.raises(RunDirError, match="line 2 has no sound record"):
        read_step_logs(path)


def test_damage_inside_a_step_log_is_named(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(encode_step(a_step(0)) + b"damage\n" + encode_step(a_step(1)))
    with pytest.raises(RunDirError, match="line 2 is not sound"):
        list(read_steps(path))


def test_a_step_log_on_a_full_device_is_an_output_error(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left"), StepWriter(path) as writer:
        writer.write(a_step(0))


# --- records ---


def test_a_step_log_gives_back_what_was_appended():
    records = [StepRecord(i, 10 + i, 3, 7, 3 + i, 40 - i, i / 8, i / 16, 5 + i, 90 - i, i % 3 == 0) for i in range(100)]
    log = StepLog(capacity=1)
    for record in records:
        log.append(record)
    assert len(log) == 100
    assert [log[i] for i in range(100)] == records
    assert log[-1] == records[-1]
    assert log.columns["rows"].dtype == np.int64 and log.columns["seconds"].dtype == np.float64
    assert log.columns["rows"].tolist() == [record.rows for record in records]
    with pytest.raises(IndexError):
        log[100]


def test_the_time_of_steps_is_sorted_by_what_they_did():
    log = StepLog()
    for index, (prefill, decode, running, waiting) in enumerate(
        [(16, 0, 4, 5), (12, 4, 8, 5), (0, 8, 8, 5), (0, 8, 8, 0), (0, 4, 4, 0), (0, 3, 3, 0), (2, 1, 2, 0)]
    ):
        rows, held_back = prefill + decode, index == 2
        log.append(StepRecord(index, rows, decode, prefill, decode, 9, 2.0**index, 0.0, running, waiting, held_back))
    found = step_seconds(log.columns, execute=200.0, recovery=10.0)
    assert found == StepSeconds(
        prefill=1, mixed=2 + 64, decode=4 + 8 + 16, tail=32, host=200 - 127 - 10, recovery=10, held_back=4
    )
    assert found.device + found.host + found.recovery == 200


def test_no_steps_take_no_time():
    assert step_seconds(StepLog().columns, 0.5, 0.125) == StepSeconds(0, 0, 0, 0, 0.375, 0.125, 0)
