"""The worker's process crashes, hangs, or gives no numbers: only the requests at fault get no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faulty import build_faulty_engine

import batchrun
from batchrun import pipeline
from batchrun.errors import BatchrunError, ExitCode
from batchrun.formats.rundir import RunFile, read_document

pytestmark = pytest.mark.own_process
KINDS = ["segfault", "device", "hang", "memory", "nan"]


def write_job(folder: Path, lines: int) -> Path:
    """Of many lines greedy ones alone: what a step is made of changes the last bits of logits, and among thousands of
    draws from the flat distributions of a random model there is one that they decide."""
    path = folder / "jobs.jsonl"
    with path.open("w") as file:
        for i in range(lines):
            prompt = f"The quick brown fox {'jumps ' * (i % 3)}{i} apples"
            line = {"id": f"r{i}", "prompt": prompt, "max_tokens": 4 + i % 5, "ignore_eos": True}
            file.write(
                json.dumps(line | ({"temperature": 0.8, "seed": i} if i % 2 and lines < 20 else {"temperature": 0}))
                + "\n"
            )
    return path


def answers(run_dir: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    return {line["custom_id"]: line["response"]["body"]["choices"] for line in lines}


def check(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, lines: int, faults: dict[int, tuple[str, int]]
) -> batchrun.Report:
    job = write_job(folder, lines)
    batchrun.run(job, model=str(model), out=folder / "sound.run", in_process=True)
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    monkeypatch.setattr(pipeline, "build_engine", build_faulty_engine)
    report = batchrun.run(job, model=str(model), out=folder / "faulty.run", step_timeout=8)

    expected = answers(folder / "sound.run")
    for request in faults:
        del expected[f"r{request}"]
    assert answers(folder / "faulty.run") == expected
    errors = [json.loads(line) for line in (folder / "faulty.run" / "errors.jsonl").read_text().splitlines()]
    assert sorted(error["custom_id"] for error in errors) == sorted(f"r{request}" for request in faults)
    causes = {"segfault": "SIGSEGV", "device": "device-side assert", "hang": "not answered", "memory": "out of memory"}
    for error in errors:
        kind = faults[int(error["custom_id"][1:])][0]
        assert error["response"] is None
        assert error["error"]["code"] == "engine_quarantined"
        assert causes.get(kind, "not numbers") in error["error"]["message"]
        assert error["batchrun"]["attempts"] >= 2
    counts = report.request_counts
    assert (counts.total, counts.completed, counts.failed, counts.remaining) == (
        lines,
        lines - len(faults),
        len(faults),
        0,
    )
    assert report.errors == {"engine_quarantined": len(faults)}
    assert report.worker_restarts >= 2
    run = read_document(folder / "faulty.run" / "run.json", RunFile)
    assert (run.status, run.exit_code) == ("completed", ExitCode.SOME_FAILED)
    return report


@pytest.mark.parametrize(("kind", "sampled"), [("segfault", 2), ("device", 0), ("nan", 2)])
def test_a_line_that_brings_the_worker_down_is_left_out(model_dir, tmp_path, monkeypatch, kind, sampled):
    check(model_dir(), tmp_path, monkeypatch, 2, {1: (kind, sampled)})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sampled", [0, 2])
@pytest.mark.parametrize("poison", [(250,), (17, 250, 499)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_and_three_of_500(model_dir, tmp_path, monkeypatch, kind, poison, sampled):
    check(model_dir(), tmp_path, monkeypatch, 500, dict.fromkeys(poison, (kind, sampled)))


def test_a_worker_that_cannot_start_ends_the_run_which_stays_resumable(model_dir, tmp_path, monkeypatch):
    job = write_job(tmp_path, 3)
    monkeypatch.setenv("FAULTS", "no JSON")  # which the engine reads when it starts
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "build_engine", build_faulty_engine)
        with pytest.raises(BatchrunError, match="could not be started") as caught:
            batchrun.run(job, model=str(model_dir()), out=tmp_path / "a.run")
    assert caught.value.exit_code is ExitCode.INTERNAL
    run = read_document(tmp_path / "a.run" / "run.json", RunFile)
    assert (run.status, run.request_counts.remaining) == ("stopped", 3)
    assert batchrun.run(job, model=str(model_dir()), out=tmp_path / "a.run").request_counts.completed == 3


def test_what_the_engine_refuses_is_told_as_it_is_in_the_process_of_the_command(model_dir, tmp_path):
    job, model = write_job(tmp_path, 3), tmp_path / "model"
    model.mkdir()
    for file in model_dir().iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    messages = []
    for in_process in (False, True):
        with pytest.raises(BatchrunError) as caught:
            batchrun.run(job, model=str(model), out=tmp_path / "a.run", in_process=in_process)
        messages.append((type(caught.value), caught.value.message, caught.value.hint, caught.value.exit_code))
    assert messages[0] == messages[1]
    assert "lack" in messages[0][1]


def test_nothing_the_worker_prints_gets_into_standard_output(model_dir, tmp_path, capfd):
    batchrun.run(write_job(tmp_path, 3), model=str(model_dir()), out=tmp_path / "a.run")
    assert capfd.readouterr().out == ""
