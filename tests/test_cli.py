"""The command as a user or a cron job meets it: exit codes, what is printed and where, signals."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import copy_without_weights
from typer.testing import CliRunner, Result

import batchrun
from batchrun.cli import app
from batchrun.engine.torch_worker import TorchWorker
from batchrun.errors import ExitCode
from batchrun.formats.rundir import RunDir, RunFile, read_document
from batchrun.planning.order import AUTO, ORDERS
from batchrun.prefix.groups import GROUPINGS

SOUND = [
    {"id": "a", "prompt": "apple pear", "max_tokens": 3, "ignore_eos": True},
    {"id": "b", "messages": [{"role": "user", "content": "plum"}], "max_tokens": 4},
]


def write_job(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def line_numbers(*files: Path) -> list[int]:
    return sorted(line["batchrun"]["line"] for file in files for line in read_lines(file))


def texts(run_dir: Path) -> dict[str, list[Any]]:
    """The choices of each line."""
    return {line["custom_id"]: line["response"]["body"]["choices"] for line in read_lines(run_dir / "results.jsonl")}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file but the lock, which says who held it last."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(here, model_dir) -> Callable[..., Result]:
    """`command("run", "jobs.jsonl")`: the command in this process, in `here`, with a tiny model."""

    def call(*args: str, model: str | None = "tiny", stdin: bytes | None = None) -> Result:
        if model == "tiny":
            model = str(model_dir())
        chosen = ["--model", model] if model is not None else []
        return CliRunner().invoke(app, [*args, *chosen], input=stdin, catch_exceptions=False)

    return call


def test_a_terminal_that_is_gone_ends_no_run(tmp_path, model_dir):
    """As with `2>&1 | tee log` where tee is ended."""
    job = tmp_path / "jobs.jsonl"
    job.write_text("".join(json.dumps({"id": f"r{i}", "prompt": f"one {i}", "max_tokens": 3}) + "\n" for i in range(5)))
    process = batchrun_process(tmp_path, "run", str(job), "--model", str(model_dir()), "--json")
    assert process.stderr is not None and process.stdout is not None
    process.stderr.close()
    report = json.loads(process.stdout.read())
    assert process.wait(60) == 0
    assert report["request_counts"]["completed"] == 5


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["summary", "json"])
@pytest.mark.parametrize("gone", [True, False], ids=["reader gone", "disk full"])
def test_where_nobody_gets_the_summary_the_run_is_what_it_is(gone, flags, tmp_path, model_dir):
    """As with `| head -3`, or `>> log` on a disk that is full."""
    write_job(tmp_path / "jobs.jsonl", [{"prompt": "one", "max_tokens": 2}])
    with Path("/dev/full").open("w") as full:
        process = batchrun_process(
            tmp_path, "run", "jobs.jsonl", "--model", str(model_dir()), *flags, **({} if gone else {"stdout": full})
        )
        assert process.stderr is not None
        if process.stdout is not None:
            process.stdout.close()
        told = process.stderr.read()
        assert process.wait(60) == 0, told
    assert gone or "The summary could not be written: [Errno 28]" in told
    assert "Traceback" not in told and "Exception" not in told
    assert read_document(tmp_path / "jobs.run" / "run.json", RunFile).exit_code == 0


def batchrun_process(cwd: Path, *args: str, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "batchrun.cli", *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "COLUMNS": "200"},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


ROOT = Path(__file__).resolve().parent.parent


# --- what is loaded


def test_help_and_faults_of_the_job_load_neither_torch_nor_transformers(here, model_dir):
    """Each in turn in one process: what one of them loads, the following ones show as well."""
    write_job(here / "blank.jsonl", ["", "  "])
    write_job(here / "bad.jsonl", ["{bad"])
    model = ["--model", str(model_dir())]
    calls = [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["plan", "--help"],
        ["run", "missing.jsonl", *model],
        ["run", "blank.jsonl", *model],
        ["run", "bad.jsonl", "--strict", *model],
        ["run", "bad.jsonl", "--model", "no-such-model"],
        ["run", "bad.jsonl", "--device", "cuda", *model],
    ]
    code = (
        "import json, sys\n"
        "from batchrun.cli import app\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        app(call)\n"
        "    except SystemExit as end:\n"
        "        heavy = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "        print('END', json.dumps([call[0], int(end.code or 0), heavy]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)], cwd=here, capture_output=True, text=True, check=True
    )
    ends = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("END ")]
    assert [code for _, code, _ in ends] == [0, 0, 0, 0, 2, 4, 4, 2, 2]
    assert not any(heavy for _, _, heavy in ends)
    assert f"batchrun {batchrun.__version__}" in done.stdout
    assert not list(here.glob("*.run"))


def test_plan_loads_no_torch_needs_no_weights_and_writes_nothing(here, model_dir):
    copy_without_weights(model_dir(), here / "bare")
    write_job(here / "jobs.jsonl", [*SOUND, "{bad"])
    before = snapshot(here)
    code = (
        "import sys\n"
        "from batchrun.cli import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "finally:\n"
        "    assert 'transformers' in sys.modules and 'torch' not in sys.modules, 'torch is loaded'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "jobs.jsonl", "--model", "bare", "--json"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.SOME_FAILED, done.stderr
    assert snapshot(here) == before
    document = json.loads(done.stdout)
    assert document["requests"] == 2
    assert 0 < document["expected"]["low"] <= document["expected"]["seconds"] <= document["expected"]["high"]
    assert document["schedule_order"] == "dfs"
    assert set(document["kv"]) == {"page_size", "pages", "peak_pages"}
    assert set(document["tokens"]) == {"prompt_logical", "prompt_physical", "prompt_computed", "output"}
    assert {"saving", "steps", "groups"} <= set(document)
    assert "line 3" in done.stderr


# --- one run, its output in pipes

MIXED = [
    *({"id": f"r{i}", "prompt": f"The quick brown fox jumps over {i}", "max_tokens": 3} for i in range(20)),
    '{"prompt": "\x1b[31mred\x1b[0m [bold]" ',
    {"id": "u", "prompt": "x", "max_tokens": 2, "colour": "\x1b[31m[red]"},
    {"id": "t", "prompt": "x", "tools": [1], "max_tokens": 2},
]


@pytest.fixture(scope="module")
def piped(model_dir, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("piped")
    (folder / "tiny").symlink_to(model_dir())
    write_job(folder / "jobs.jsonl", MIXED)
    process = batchrun_process(folder, "run", "jobs.jsonl", "--model", "tiny")
    out, err = process.communicate(timeout=110)
    return SimpleNamespace(dir=folder, out=out, err=err, code=process.returncode)


def test_without_a_compiler_the_log_says_so_and_a_quiet_run_prints_nothing(model_dir, tmp_path, monkeypatch):
    """The engine finds out, in the process that it has."""
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "one two", "max_tokens": 2}\n')
    process = batchrun_process(tmp_path, "run", "jobs.jsonl", "--model", str(model_dir()), "-q")
    assert process.communicate(timeout=110) == ("", "")
    assert process.returncode == ExitCode.OK
    [told] = [line for line in (tmp_path / "jobs.run" / "run.log").read_text().splitlines() if "WARNING" in line]
    assert "CPU kernels were not compiled" in told
    assert "no-compiler" in told


def test_a_run_in_a_pipe_is_plain_and_narrow(piped):
    assert piped.code == ExitCode.SOME_FAILED
    for text in (piped.out, piped.err):
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80


def test_the_summary_goes_to_standard_output_and_the_rest_to_standard_error(piped):
    assert "21 of 23 requests answered, 2 failed" in piped.out
    assert "jobs.run/results.jsonl" in piped.out
    assert "line 21" in piped.err
    assert "tools is not supported yet" in piped.err
    assert "answered" not in piped.err
    assert "Traceback" not in piped.err


def test_the_run_directory_holds_every_line_once(piped):
    run_dir = piped.dir / "jobs.run"
    assert line_numbers(run_dir / "results.jsonl", run_dir / "errors.jsonl") == list(range(1, 24))


def test_a_finished_run_says_so_and_touches_nothing(piped, command, monkeypatch):
    before = snapshot(piped.dir)
    monkeypatch.chdir(piped.dir)
    again = command("run", "jobs.jsonl", model="tiny/")
    assert again.exit_code == piped.code
    assert "finished already" in again.stdout
    assert "21 of 23 requests answered" in again.stdout
    as_json = command("run", "jobs.jsonl", "--json", model="tiny")
    assert as_json.exit_code == piped.code
    assert json.loads(as_json.stdout)["request_counts"]["completed"] == 21
    assert snapshot(piped.dir) == before


# --- what is printed


@pytest.fixture
def sound_job(here) -> Path:
    return write_job(here / "jobs.jsonl", SOUND)


def test_json_is_one_document_on_standard_output(command, sound_job, here):
    done = command("run", "jobs.jsonl", "--json")
    assert done.exit_code == ExitCode.OK
    document = json.loads(done.stdout)
    assert document == json.loads((here / "jobs.run" / "report.json").read_bytes())
    planned = command("plan", "jobs.jsonl", "--json")
    assert planned.exit_code == ExitCode.OK
    assert json.loads(planned.stdout) == json.loads((here / "jobs.run" / "plan.json").read_bytes())
    assert planned.stderr == ""


@pytest.mark.parametrize("name", ["run", "plan"])
@pytest.mark.parametrize(
    ("job", "flags", "code", "name_of_error"),
    [
        ("missing.jsonl", [], ExitCode.USAGE, None),
        ("jobs.jsonl", ["--seed", "-1"], ExitCode.USAGE, None),
        ("blank.jsonl", [], ExitCode.NOTHING_RUNNABLE, "empty_batch"),
        ("bad.jsonl", ["--strict"], ExitCode.NOTHING_RUNNABLE, None),
    ],
)
def test_a_failure_is_one_document_too(name, job, flags, code, name_of_error, command, sound_job, here):
    write_job(here / "blank.jsonl", [""])
    write_job(here / "bad.jsonl", ["{bad", SOUND[0]])
    done = command(name, job, "--json", *flags)
    assert done.exit_code == code
    error = json.loads(done.stdout)["error"]
    assert error["code"] == name_of_error
    assert error["message"].splitlines()[0] in done.stderr
    assert not list(here.glob("*.run"))


def test_quiet_is_silent_on_success_and_says_only_what_failed_else(here, model_dir):
    """In a process of its own, where the libraries beneath would be heard as well."""
    write_job(here / "jobs.jsonl", [*SOUND, "{bad"])
    process = batchrun_process(here, "run", "jobs.jsonl", "--quiet", "--model", str(model_dir()))
    assert process.communicate(timeout=110) == ("", "")
    assert process.returncode == ExitCode.SOME_FAILED


def test_quiet_failures_are_heard(command, sound_job):
    done = command("run", "missing.jsonl", "--quiet")
    assert done.exit_code == ExitCode.USAGE
    assert done.stdout == ""
    assert done.stderr == "batchrun: There is no job file missing.jsonl.\nCheck the path; `-` reads standard input.\n"


def test_a_plan_is_shown_as_a_table(command, here):
    write_job(here / "jobs.jsonl", MIXED)
    done = command("plan", "jobs.jsonl")
    assert done.exit_code == ExitCode.SOME_FAILED
    assert "Plan: 21 requests from 23 lines, 2 of them bad" in done.stdout
    assert "The quick brown fox" in done.stdout  # how the largest shared run begins
    assert "is not calibrated: the range is 35 % to 100 % of its data" in done.stdout
    assert "Rows of a step over time" in done.stdout
    assert "unsupported_field" in done.stderr
    assert "unknown_field" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_plan_says_which_lines_cannot_fit(command, here):
    write_job(here / "jobs.jsonl", [SOUND[0], {"id": "long", "prompt": [7] * 600, "max_tokens": 2}])
    done = command("plan", "jobs.jsonl")
    assert done.exit_code == ExitCode.SOME_FAILED
    assert "Too large" in done.stdout
    assert "cannot fit into the context or the KV memory: line 2" in done.stdout
    assert "context_length_exceeded" in done.stderr


def test_a_plan_is_made_by_name_of_order_grouping_and_device(command, here):
    write_job(here / "jobs.jsonl", MIXED)
    flags = ["--schedule-order", "input", "--grouping", "none", "--device-spec", "h200", "--dtype", "float32"]
    planned = json.loads(command("plan", "jobs.jsonl", "--json", *flags).stdout)
    assert (planned["schedule_order"], planned["grouping"], planned["groups"]) == ("input", "none", [])
    assert (planned["expected"]["device"], planned["expected"]["calibrated"]) == ("h200", False)
    usual = json.loads(command("plan", "jobs.jsonl", "--json").stdout)
    assert usual["tokens"]["prompt_computed"] < planned["tokens"]["prompt_computed"]
    assert usual["groups"]


@pytest.mark.parametrize(("flag", "names"), [("--schedule-order", (AUTO, *ORDERS)), ("--grouping", tuple(GROUPINGS))])
@pytest.mark.parametrize("name", ["run", "plan"])
def test_the_help_has_every_policy(name, flag, names, command):
    shown = " ".join(CliRunner().invoke(app, [name, "--help"], terminal_width=200).stdout.split())
    words = shown[shown.index(flag) :].split(" --")[0]
    assert [policy for policy in names if policy not in words] == []


DATED = [
    *(
        {"id": f"day-{day:02}-{i}", "prompt": f"On 2026-11-{day:02} the quick brown fox jumps over the lazy dog: {i}"}
        for day in range(1, 13)
        for i in range(3)
    ),
    {"id": "many", "prompt": ["On 2026-11-01 the quick brown fox", "apple"]},
    {"id": "bad", "prompt": "x", "tools": [1]},
]


def test_a_plan_explains_one_line(command, here):
    write_job(here / "jobs.jsonl", DATED)
    shown = " ".join(command("plan", "jobs.jsonl", "--explain", "day-02-1").stdout.split())
    assert "Line 5: day-02-1" in shown
    assert re.search(r"\d+ tokens with 2 other requests \(day-02-0, day-02-2\): ", shown)
    document = json.loads(command("plan", "jobs.jsonl", "--explain", "day-02-1", "--json").stdout)
    [request] = document["explain"]["requests"]
    assert document["explain"]["line"] == 5
    assert request["reads"][-1]["with_lines"] == ["day-02-0", "day-02-2"]
    assert request["prompt_tokens"] > request["cached_tokens"] == sum(read["tokens"] for read in request["reads"])
    assert request["steps"][0] <= request["steps"][1] < document["steps"]
    assert request["kv_bytes"] == request["pages"] * request["page_bytes"]
    assert "doctor" not in document

    several = json.loads(command("plan", "jobs.jsonl", "--explain", "many", "--json").stdout)["explain"]
    assert len(several["requests"]) == 2
    bad = command("plan", "jobs.jsonl", "--explain", "bad")
    assert "Bad line  line 38: unsupported_field: tools is not supported yet" in bad.stdout


@pytest.mark.parametrize(("asked", "meant"), [("day-2-1", "day-"), ("mny", "many"), ("bod", "bad"), ("?", "")])
def test_a_line_that_the_job_does_not_have(asked, meant, command, here):
    write_job(here / "jobs.jsonl", DATED)
    done = command("plan", "jobs.jsonl", "--explain", asked)
    assert done.exit_code == ExitCode.USAGE
    assert f"No line of the job has the custom_id '{asked}'." in done.stderr
    assert f"The nearest one is '{meant}" in done.stderr
    assert done.stdout == ""


def test_the_doctor_says_why_prompts_do_not_share(command, here):
    write_job(here / "jobs.jsonl", DATED)
    before = snapshot(here)
    shown = " ".join(command("plan", "jobs.jsonl", "--doctor").stdout.split())
    assert re.search(r"1\. 36 requests share \d+ tokens and part at token \d+: '2026-11-\d\d' against '2026-11-", shown)
    assert "(a date), in day-" in shown
    assert snapshot(here) == before
    document = json.loads(command("plan", "jobs.jsonl", "--doctor", "--json").stdout)
    [finding] = document["doctor"]["findings"]
    assert finding["cause"] == "date"
    assert finding["saving"] == pytest.approx(finding["spared_tokens"] / document["tokens"]["prompt_logical"])
    assert finding["saving"] > 0.15
    assert "explain" not in document
    # Written as it says, the job saves as much more, and there is nothing left to say.
    moved = [line | {"prompt": re.sub(r"On (\S+) the(.*)", r"On day the\2 \1", line["prompt"])} for line in DATED[:36]]
    write_job(here / "moved.jsonl", [*moved, *DATED[36:]])
    mended = json.loads(command("plan", "moved.jsonl", "--doctor", "--json").stdout)
    assert mended["saving"] > document["saving"] + 0.9 * finding["saving"]
    assert mended["doctor"]["findings"] == []


def test_a_plan_is_written_as_a_page(command, here):
    write_job(here / "jobs.jsonl", DATED)
    done = command("plan", "jobs.jsonl", "--explain", "many", "--doctor", "--html", "plan.html")
    assert done.exit_code == ExitCode.SOME_FAILED
    page = (here / "plan.html").read_text(encoding="utf-8")
    for words in ("Plan: 38 requests from 38 lines", "37: many", "(a date)", "unsupported_field", "Rows of each step"):
        assert words in page
    failed = command("plan", "jobs.jsonl", "--html", "none/plan.html")
    assert failed.exit_code == ExitCode.OUTPUT
    assert failed.stdout == ""


# --- exit code 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "jobs.jsonl", "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["run", "jobs.jsonl", "--device", "tpu"], ["--device", "'tpu'"]),
        (["run", "jobs.jsonl", "--device", "cuda"], ["built for the CPU only", "--device cpu"]),
        (["run", "jobs.jsonl", "--kv-memory", "plenty"], ["--kv-memory", "4GiB"]),
        (["run", "jobs.jsonl", "--limit", "0"], ["--limit"]),
        (["run", "jobs.jsonl", "--results-order", "random"], ["--results-order", "completion", "input"]),
        (["plan", "jobs.jsonl", "--schedule-order", "sideways"], ["--schedule-order", "dfs", "decode_ratio"]),
        (["plan", "jobs.jsonl", "--grouping", "sideways"], ["grouping", "tree", "none"]),
        (["plan", "jobs.jsonl", "--device-spec", "h2000"], ["h2000", "h200"]),
        (["run", "jobs.jsonl", "--schedule-order", "sideways"], ["--schedule-order", "dfs", "decode_ratio"]),
        (["run", "jobs.jsonl", "--config", "typo.toml"], ["typo.toml", "schedule_ordr", "schedule_order"]),
        (["run", "jobs.jsonl", "--config", "none.toml"], ["none.toml", "cannot be read"]),
        (["run", "jobs.jsonl", "--chat-template", "none.jinja"], ["none.jinja", "cannot be read"]),
        (["plan", "jobs.jsonl", "--chat-template", "none.jinja"], ["none.jinja", "cannot be read"]),
        (["run", "none.jsonl"], ["no job file none.jsonl"]),
        (["run", "."], ["does not say how to name", "-o DIR"]),
        (["run", "-"], ["-o DIR"]),
        (["plan", "-"], ["standard input"]),
        (["run", "jobs.jsonl", "--revision", "main"], ["--revision"]),
        (["run", "jobs.jsonl", "--colour"], ["--colour"]),
        (["run"], ["job"]),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_written(args, words, command, sound_job, here):
    (here / "typo.toml").write_text("schedule_ordr = 'dfs'\n")
    before = snapshot(here)
    done = command(*args)
    assert done.exit_code == ExitCode.USAGE
    for word in words:
        assert word in done.stderr
    assert snapshot(here) == before
    assert not (here / "jobs.run").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, ["--model", "missing"]),
        ("lama", ["'llama'", "demo", "qwen", "mistral"]),
        ("./nowhere", ["no directory ./nowhere", "config.json"]),
        (".", ["has no config.json"]),
    ],
)
def test_a_model_that_is_not_there(model, words, command, sound_job, here):
    done = command("run", "jobs.jsonl", model=model)
    assert done.exit_code == ExitCode.USAGE
    for word in words:
        assert word in done.stderr
    assert not (here / "jobs.run").exists()


# --- exit codes 0, 3 and 4


def test_all_is_well(command, sound_job, here):
    done = command("run", "jobs.jsonl")
    assert done.exit_code == ExitCode.OK
    assert "2 requests answered" in done.stdout
    assert (here / "jobs.run" / "errors.jsonl").read_bytes() == b""


@pytest.mark.parametrize("name", ["run", "plan"])
@pytest.mark.parametrize("text", ["", "\n \n\t\n"])
def test_a_job_without_requests(name, text, command, here):
    (here / "jobs.jsonl").write_text(text)
    done = command(name, "jobs.jsonl")
    assert done.exit_code == ExitCode.NOTHING_RUNNABLE
    assert "no requests" in done.stderr
    assert not (here / "jobs.run").exists()


def test_when_every_line_is_bad_the_errors_are_there(command, here):
    write_job(here / "jobs.jsonl", ["{bad", {"prompt": [7] * 600}, {"messages": []}])
    done = command("run", "jobs.jsonl")
    assert done.exit_code == ExitCode.NOTHING_RUNNABLE
    assert line_numbers(here / "jobs.run" / "errors.jsonl") == [1, 2, 3]
    assert read_lines(here / "jobs.run" / "results.jsonl") == []
    run_file = json.loads((here / "jobs.run" / "run.json").read_bytes())
    assert (run_file["status"], run_file["exit_code"]) == ("completed", 4)
    assert command("run", "jobs.jsonl").exit_code == ExitCode.NOTHING_RUNNABLE
    assert command("plan", "jobs.jsonl").exit_code == ExitCode.NOTHING_RUNNABLE


@pytest.mark.parametrize("bad", ["{bad", {"prompt": [7] * 600}], ids=["in the file", "for the model"])
@pytest.mark.parametrize("name", ["run", "plan"])
def test_strict_runs_all_or_none(name, bad, command, here):
    write_job(here / "jobs.jsonl", [SOUND[0], bad])
    done = command(name, "jobs.jsonl", "--strict")
    assert done.exit_code == ExitCode.NOTHING_RUNNABLE
    assert "line 2" in done.stderr
    assert not (here / "jobs.run").exists()


@pytest.mark.parametrize("name", ["run", "plan"])
def test_strict_refuses_lines_made_for_another_model(name, command, here):
    body = {"model": "another", "prompt": "apple", "max_tokens": 1}
    write_job(here / "jobs.jsonl", [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}])
    done = command(name, "jobs.jsonl", "--strict")
    assert done.exit_code == ExitCode.NOTHING_RUNNABLE
    assert "'another'" in done.stderr
    assert not (here / "jobs.run").exists()


# --- exit code 73


@pytest.mark.parametrize("out", ["file", "file/inside", "/proc/nowhere/jobs.run"])
@pytest.mark.parametrize("job", ["jobs.jsonl", "-"])
def test_a_run_directory_that_cannot_be_made(out, job, command, sound_job, here):
    (here / "file").write_text("mine")
    done = command("run", job, "-o", out, stdin=sound_job.read_bytes())
    assert done.exit_code == ExitCode.OUTPUT
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert (here / "file").read_text() == "mine"


LONG = [{"id": f"r{i}", "prompt": f"apple {i}", "max_tokens": 8 + 2 * i, "ignore_eos": True} for i in range(18)]


@pytest.fixture(scope="module")
def undisturbed(model_dir, tmp_path_factory) -> dict[str, list[Any]]:
    """The choices of `LONG`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_job(folder / "jobs.jsonl", LONG)
    batchrun.run(folder / "jobs.jsonl", model=str(model_dir()))
    return texts(folder / "jobs.run")


def test_a_disk_that_fills_up_ends_the_run_and_room_on_it_goes_on(command, here, model_dir, undisturbed):
    """A limit on the size of files stands for the full disk: the write that passes it is cut short and fails."""
    write_job(here / "jobs.jsonl", LONG)
    (here / "often.toml").write_text("[output]\nflush_results = 1\nsteps_log = false\n")

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))

    args = ["run", "jobs.jsonl", "--config", "often.toml"]
    process = batchrun_process(here, *args, "--model", str(model_dir()), preexec_fn=limit_files)
    out, err = process.communicate(timeout=110)
    assert process.returncode == ExitCode.OUTPUT, err
    assert out == ""
    assert "cannot write jobs.run/results.jsonl" in err
    assert "Traceback" not in err
    kept = texts(here / "jobs.run")
    assert 0 < len(kept) < len(LONG)
    assert kept.items() <= undisturbed.items()
    run_file = json.loads((here / "jobs.run" / "run.json").read_bytes())
    assert (run_file["status"], run_file["exit_code"]) == ("stopped", 73)
    assert run_file["request_counts"]["completed"] == len(kept)

    done = command(*args)
    assert done.exit_code == ExitCode.OK
    assert line_numbers(here / "jobs.run" / "results.jsonl") == list(range(1, len(LONG) + 1))
    assert texts(here / "jobs.run") == undisturbed


# --- exit code 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_two_steps_and_the_same_command_goes_on(number, command, here, model_dir, undisturbed):
    write_job(here / "jobs.jsonl", LONG)
    # Memory for one or two requests at a time makes many steps, so that the signal meets the run.
    (here / "slow.toml").write_text("kv_memory = '30KiB'\n[output]\nflush_results = 1\n")
    args = ["run", "jobs.jsonl", "--config", "slow.toml"]
    process = batchrun_process(here, *args, "--model", str(model_dir()))
    results = here / "jobs.run" / "results.jsonl"
    while process.poll() is None and not (results.exists() and results.stat().st_size):
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=110)
    assert process.returncode == ExitCode.STOPPED, err
    assert "Stopped early. The same command again goes on." in err
    assert "remaining" in out
    assert "Traceback" not in err
    run_file = json.loads((here / "jobs.run" / "run.json").read_bytes())
    counts = run_file["request_counts"]
    assert (run_file["status"], run_file["exit_code"]) == ("stopped", 75)
    assert counts["completed"] == len(read_lines(results)) > 0
    assert counts["failed"] == 0
    assert counts["remaining"] == len(LONG) - counts["completed"] > 0
    kept = results.read_bytes()

    done = command(*args)
    assert done.exit_code == ExitCode.OK
    assert results.read_bytes().startswith(kept)
    assert line_numbers(results) == list(range(1, len(LONG) + 1))
    assert texts(here / "jobs.run") == undisturbed


# --- exit code 76


def test_a_directory_in_use_is_left_alone(command, sound_job, here):
    with RunDir.open(here / "jobs.run", {}):
        for flags in ([], ["--fresh"]):
            done = command("run", "jobs.jsonl", *flags)
            assert done.exit_code == ExitCode.RUN_DIR
            assert f"process {os.getpid()}" in done.stderr
    assert command("run", "jobs.jsonl").exit_code == ExitCode.OK  # nobody holds it any more


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--seed", "7"], "seed is 0 there and 7 now"),
        (["--max-tokens", "9"], "max_tokens is None there and 9 now"),
        (["--limit", "1"], "limit is None there and 1 now"),
        (["--ignore-generation-config"], "ignore_generation_config is False there and True now"),
        ("job", "job is"),
        ("model", "model is"),
        ("template", "chat_template is"),
        ("sampling", "sampling is"),
    ],
)
def test_another_run_in_the_same_directory_names_what_differs(change, field, command, finished, here, model_dir):
    flags, model = change if isinstance(change, list) else [], "tiny"
    match change:
        case "job":
            write_job(here / "jobs.jsonl", SOUND[:1])
        case "model":
            model = str(model_dir("llama-mha"))
        case "template":
            (here / "own.jinja").write_text("{{ messages }}")
            flags = ["--chat-template", "own.jinja"]
        case "sampling":
            (here / "own.toml").write_text("[sampling]\ntemperature = 0.5\n")
            flags = ["--config", "own.toml"]
    before = snapshot(here)
    done = command("run", "jobs.jsonl", *flags, model=model)
    assert done.exit_code == ExitCode.RUN_DIR
    assert field in " ".join(done.stderr.split())
    assert "--fresh" in done.stderr
    assert snapshot(here) == before


@pytest.fixture
def finished(here, model_dir) -> None:
    """`here` with a finished run of `SOUND`."""
    write_job(here / "jobs.jsonl", SOUND)
    batchrun.run("jobs.jsonl", model=str(model_dir()))


def test_what_never_changes_results_may_differ(command, finished, here):
    for flags in (["--schedule-order", "input"], ["--kv-memory", "1MB"], ["--results-order", "input"]):
        assert "finished already" in command("run", "jobs.jsonl", *flags).stdout


def test_fresh_moves_the_earlier_run_aside(command, finished, here):
    before = {name: content for name, (_, content) in snapshot(here / "jobs.run").items()}
    done = command("run", "jobs.jsonl", "--fresh", "--seed", "7")
    assert done.exit_code == ExitCode.OK
    assert {name: content for name, (_, content) in snapshot(here / "jobs.run.1").items()} == before
    assert json.loads((here / "jobs.run" / "run.json").read_bytes())["fingerprint"]["seed"] == 7


# --- exit code 1


def test_an_internal_failure_is_shown_and_can_be_gone_on_from(command, here, monkeypatch, undisturbed):
    write_job(here / "jobs.jsonl", LONG)
    submit = TorchWorker.submit

    def fail(self: TorchWorker, step: Any) -> None:
        if step.index == 15:
            raise RuntimeError("out of luck")
        submit(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(TorchWorker, "submit", fail)
        done = command("run", "jobs.jsonl", "--json")
    assert done.exit_code == ExitCode.INTERNAL
    assert "Traceback" in done.stderr  # for the report of the fault
    assert "internal failure: RuntimeError: out of luck" in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "internal"
    assert 0 < len(texts(here / "jobs.run")) < len(LONG)

    assert command("run", "jobs.jsonl").exit_code == ExitCode.OK
    assert texts(here / "jobs.run") == undisturbed


# --- standard input


def test_a_job_on_standard_input(command, sound_job, here):
    done = command("run", "-", "-o", "out.run", stdin=sound_job.read_bytes())
    assert done.exit_code == ExitCode.OK
    assert line_numbers(here / "out.run" / "results.jsonl") == [1, 2]
    assert (here / "out.run" / "job.jsonl").read_bytes() == sound_job.read_bytes()
    other = command("run", "-", "-o", "out.run", stdin=b'{"prompt": "x"}\n')
    assert other.exit_code == ExitCode.RUN_DIR
    assert (here / "out.run" / "job.jsonl").read_bytes() == sound_job.read_bytes()
    assert not list((here / "out.run").glob(".*"))


def test_the_package_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "batchrun", "--version"], capture_output=True, text=True, check=True)
    assert batchrun.__version__ in done.stdout
