"""`batchrun bench`: the standard workloads run as a user's job, in all ways that are compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import batchrun
from batchrun.bench import BENCH, run_bench
from batchrun.cli import app
from batchrun.config import RunConfig, load_config
from batchrun.engine import model as engine_model
from batchrun.errors import BatchrunError, ExitCode, Stopped, UsageError
from batchrun.planning.order import CANDIDATES

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 96  # cuts all workloads short


@pytest.fixture
def small(model_dir) -> RunConfig:
    return load_config(model=str(model_dir(max_position_embeddings=CONTEXT)))


def texts(run_dir: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (run_dir / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}


@pytest.fixture(scope="module")
def measured(model_dir, tmp_path_factory) -> SimpleNamespace:
    """Two workloads in all ways, twice, with a count of how often the model is loaded, and what was told."""
    out, loads, told = tmp_path_factory.mktemp("bench") / "out", [], []
    load = engine_model.load_model

    def counted(*args: Any, **options: Any) -> Any:
        loads.append(args)
        return load(*args, **options)

    from batchrun import pipeline

    config = load_config(model=str(model_dir(max_position_embeddings=CONTEXT)), in_process=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_model, "load_model", counted)
        assert pipeline.RemoteEngine is not None
        bench = run_bench(config, ["micro", "pressure"], scale=0.5, repeats=2, out=out, tell=told.append)
    return SimpleNamespace(bench=bench, out=out, loads=len(loads), told=told, config=config)


def test_sharing_is_on_and_off_and_the_rest_is_the_same(measured):
    micro, pressure = measured.bench.workloads
    assert (micro.name, pressure.name) == ("micro", "pressure")
    for benched in (micro, pressure):
        shared, unshared = benched.shared.report, benched.unshared.report
        assert (benched.shared.grouping, benched.unshared.grouping) == ("auto", "none")
        assert shared.groups and not unshared.groups
        assert shared.tokens.prompt_computed < 0.5 * unshared.tokens.prompt_computed
        assert unshared.tokens.prompt_computed >= unshared.tokens.prompt_logical == shared.tokens.prompt_logical
        assert shared.tokens.output == unshared.tokens.output > 0
        assert shared.request_counts.completed == unshared.request_counts.completed == benched.requests
        assert benched.part == CONTEXT / 576
    assert (micro.requests, pressure.requests) == (32, 48)


def test_figures_follow_from_the_runs(measured):
    for benched in measured.bench.workloads:
        for timed in (benched.shared, benched.unshared, *benched.orders):
            execute = [run.execute for run in timed.runs]
            assert len(execute) == measured.bench.repeats == 2
            assert timed.seconds == min(execute) == timed.report.seconds.execute
            assert timed.spread == pytest.approx((max(execute) - min(execute)) / min(execute))
            tokens = timed.report.tokens
            assert timed.tokens_per_second * timed.seconds == pytest.approx(tokens.prompt_logical + tokens.output)
            assert timed.bound_share * timed.seconds == pytest.approx(timed.report.bound.seconds)
            assert timed.disturbed == 0
        assert benched.speedup == pytest.approx(benched.unshared.seconds / benched.shared.seconds)


def test_orders_are_compared_where_memory_is_tight(measured):
    micro, pressure = measured.bench.workloads
    kv = pressure.shared.report.kv
    assert (micro.kv_tokens, micro.orders) == (None, ())
    assert kv.pages == pressure.kv_tokens // kv.page_size
    assert micro.shared.report.kv.pages > kv.pages
    assert pressure.shared.report.schedule_order != "input"
    assert [(timed.grouping, timed.report.schedule_order) for timed in pressure.orders] == [("auto", "input")]
    assert pressure.orders[0].report.kv.pages == kv.pages
    assert pressure.orders[0].report.tokens.prompt_computed > pressure.shared.report.tokens.prompt_computed


def test_the_model_is_loaded_once_and_answers_are_those_of_a_run_of_its_own(measured, tmp_path):
    assert measured.loads == 1
    for benched in measured.bench.workloads:
        job, name = measured.out / f"{benched.name}.jsonl", benched.name
        batchrun.run(job, model=measured.config.model, out=tmp_path / f"{name}.run", in_process=True)
        answers = texts(tmp_path / f"{name}.run")
        assert len(answers) == benched.requests
        runs = [run for run in sorted(measured.out.glob(f"{name}.*.run")) if len(texts(run)) == benched.requests]
        assert len(runs) == 2 * (2 + len(benched.orders))
        for run in runs:
            assert texts(run) == answers


def test_each_run_is_told_of_and_the_document_is_kept(measured):
    document = json.loads((measured.out / BENCH).read_text(encoding="utf-8"))
    assert document["schema_version"] == 1
    assert document["environment"]["torch"]
    assert [benched["name"] for benched in document["workloads"]] == ["micro", "pressure"]
    assert document["workloads"][0]["shared"]["report"]["tokens"]["output"] > 0
    assert len(measured.told) == 1 + 2 * (2 + 3)
    assert measured.told[1].startswith("micro, 1 of 2: ")
    assert measured.told[2].startswith("micro, 1 of 2: ")  # the ways take turns
    assert measured.told[2].endswith(", nothing shared")


def test_all_orders_are_those_that_auto_tries(small):
    [benched] = run_bench(small, ["mixed"], scale=0.1, repeats=1, all_orders=True).workloads
    taken = benched.shared.report.schedule_order
    assert sorted([taken, *(timed.report.schedule_order for timed in benched.orders)]) == sorted(CANDIDATES)


# --- what ends it early


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """Where temporary directories are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_nothing_is_left_behind_unless_it_is_asked_for(small, scratch):
    run_bench(small, ["micro"], scale=0.1, repeats=1)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("ours", [True, False], ids=["new directory", "empty directory"])
def test_failed_requests_are_no_measurement(small, scratch, tmp_path, ours):
    if not ours:
        (tmp_path / "out").mkdir()
    limits = small.limits.model_copy(update={"request_timeout": "0.000001"})
    with pytest.raises(BatchrunError, match=r"requests of micro failed: request_timeout \(\d+\)") as caught:
        run_bench(small.model_copy(update={"limits": limits}), ["micro"], scale=0.1, repeats=1, out=tmp_path / "out")
    assert caught.value.code == "requests_failed"
    assert (tmp_path / "out").exists() is not ours
    assert not list(tmp_path.glob("out/*"))
    assert not list(scratch.iterdir())


def test_a_limit_of_the_configuration_stops_it(small, scratch):
    limits = small.limits.model_copy(update={"timeout": "0.000001"})
    with pytest.raises(Stopped, match="A limit of the configuration"):
        run_bench(small.model_copy(update={"limits": limits}), ["micro"], scale=0.1, repeats=1)
    assert not list(scratch.iterdir())


def test_a_workload_that_does_not_fit_into_memory_is_refused_before_a_model_is_loaded(small, monkeypatch):
    monkeypatch.setattr(engine_model, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"The workload micro does not fit: .* prompt and answer may take"):
        run_bench(small.model_copy(update={"kv_memory": 1 << 14}), ["micro"], scale=0.1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workload", "micros"], "There is no workload 'micros'; did you mean 'micro'?"),
        (["--size", "tpu"], "There is no size 'tpu'."),
        (["--scale", "0"], "A scale of 0 is none"),
        (["--scale", "nan"], "A scale of nan is none"),
        (["--repeats", "0"], "0 repeats are none"),
        (["--out", "."], "The directory . is not empty."),
        (["--dtype", "int4"], "--dtype: dtype = 'int4' is wrong"),
    ],
)
def test_a_wrong_argument_is_named(args, message, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    done = CliRunner().invoke(app, ["bench", "--model", small.model, *args])
    assert done.exit_code == ExitCode.USAGE
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_a_file_of_settings_says_for_jobs_of_ones_own_is_left_alone(small, tmp_path, scratch):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("mine\n")
    changes = {"output": {"results": str(answers)}, "input": {"prompt_column": "text"}, "chat_template": "none.jinja"}
    run_bench(load_config(model=small.model, **changes), ["none"], scale=0.1, repeats=1)
    assert answers.read_text() == "mine\n"
    assert not list(scratch.glob("batchrun-*"))


# --- the command


def command(scratch: Path, *args: str) -> subprocess.Popen[str]:
    """The command in a process of its own, which has the engine in another one."""
    return subprocess.Popen(
        [sys.executable, "-m", "batchrun.cli", "bench", *args],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "TMPDIR": str(scratch)},
        cwd=scratch.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_prints_narrow_tables(small, scratch):
    process = command(
        scratch, "--model", small.model, "-w", "none", "-w", "pressure", "--scale", "0.5", "--repeats", "1"
    )
    out, err = process.communicate(timeout=100)
    assert process.returncode == ExitCode.OK, err
    assert "\x1b" not in out + err
    assert max(map(len, [line for line in out.splitlines() if small.model not in line])) <= 80
    for word in ("none", "pressure", "not shared", "speed-up", "of bound", "Orders of pressure", "scripts/calibrate"):
        assert word in out
    assert "pressure: lengths were cut to 16.7 %" in " ".join(out.split())
    assert "none, 1 of 1: " in err
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_file_and_no_process(number, small, scratch):
    kept = scratch.parent / "kept"
    process = command(scratch, "--model", small.model, "-w", "micro", "--repeats", "100000", "--json", "-o", str(kept))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("micro, 2 of"):
            break
    assert list(kept.iterdir())
    assert len(processes_of(scratch)) == 2  # it and its worker
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED, err
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "nothing of it is kept" in err
    assert not kept.exists()
    assert not list(scratch.iterdir())
    assert processes_of(scratch) == []


def processes_of(scratch: Path) -> list[int]:
    """Those that have this folder for their temporary files."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={scratch}\0".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found
