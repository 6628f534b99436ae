"""Runs killed with SIGKILL at random moments, and resumed: every request once, and what an undisturbed run gives."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LINES, FAULTY = 120, 3
CONFIG = """
[output]
flush_seconds = 0.0
flush_results = 2
[scheduler]
step_tokens = 24
"""


@dataclass(frozen=True)
class Job:
    """A job, how it is run, and what an undisturbed run of it gave."""

    path: Path
    command: list[str]
    answers: dict[str, Any]
    seconds: float


def start(command: list[str], out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def answers(run_dir: Path) -> dict[str, Any]:
    """By custom_id what a user gets; each once."""
    found: dict[str, Any] = {}
    for name in ("results.jsonl", "errors.jsonl"):
        for raw in (run_dir / name).read_text(encoding="utf-8").splitlines():
            line = json.loads(raw)
            assert line["custom_id"] not in found, "a request has two answers"
            body = line["response"]["body"]
            found[line["custom_id"]] = (
                (body["choices"], body["usage"]["completion_tokens"]) if "choices" in body else body["error"]["code"]
            )
    return found


@pytest.fixture(scope="module")
def job(model_dir, tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("kill")
    lines = []
    for i in range(LINES):
        body = {"prompt": f"The quick brown fox {'jumps ' * (i % 3)}{i % 40} apples", "max_tokens": 4 + i % 23}
        if i % 2:
            body |= {"temperature": 0.9, "top_p": 0.95} | ({"seed": i} if i % 4 == 1 else {})
        else:
            body["temperature"] = 0
        lines.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body})
    for i in range(FAULTY):
        lines.insert(10 * i, {"custom_id": f"bad{i}", "method": "POST", "url": "/v1/nothing", "body": {}})
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = folder / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "batchrun.cli", "run", str(path), "--model", str(model_dir())]
    command += ["--config", str(config), "--seed", "7", "--quiet"]
    began = time.monotonic()
    undisturbed = start(command, folder / "undisturbed.run")
    assert undisturbed.wait() == 3, undisturbed.stderr.read() if undisturbed.stderr else ""
    return Job(path, command, answers(folder / "undisturbed.run"), time.monotonic() - began)


def check(job: Job, out: Path, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2))):
        process = start(job.command, out)
        # Most of a run is loading: half of the kills go to the part behind it.
        part = rng.uniform(0, 1.05) if rng.random() < 0.5 else rng.uniform(0.6, 1.05)
        try:
            process.wait(part * job.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = start(job.command, out)
    _, errors = last.communicate()
    assert last.returncode == 3, errors.decode()
    assert answers(out) == job.answers
    counts = json.loads((out / "run.json").read_text())["request_counts"]
    assert counts == {"total": LINES + FAULTY, "completed": LINES, "failed": FAULTY, "remaining": 0}
    assert json.loads((out / "report.json").read_text())["request_counts"] == counts


@pytest.mark.parametrize("seed", range(10))
def test_a_killed_run_goes_on_to_the_same_end(job, tmp_path, seed):
    check(job, tmp_path / "killed.run", random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 110))
def test_a_hundred_killed_runs_go_on_to_the_same_end(job, tmp_path, seed):
    check(job, tmp_path / "killed.run", random.Random(seed))
