"""The examples of docs/scheduling.md pass the checkers of the programs they are for, and do what the page says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.errors import ExitCode

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = DOCS / "examples"
UNITS = ["batchrun.service", "batchrun.timer"]


def said(*command: str | Path, **environment: str) -> tuple[int, str]:
    """Exit code of a command and all that it prints."""
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def stub(path: Path, script: str) -> Path:
    """A program that is this shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_every_example_is_on_the_page():
    page = (DOCS / "scheduling.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(examples/([\w.]+)\)", page)) == {path.name for path in EXAMPLES.iterdir()}


def test_the_page_has_every_exit_code():
    rows = re.findall(r"^\| (\d+) \|", (DOCS / "scheduling.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(row) for row in rows] == [code.value for code in ExitCode]


# --- cron ---


def crontab_check(path: Path) -> int:
    """Exit code of crontab's own check: -T of cronie, -n of Debian's cron."""
    if shutil.which("crontab") is None:
        pytest.skip("cron is not installed")
    for option in ("-T", "-n"):
        code, output = said("crontab", option, path)
        if "option" not in output:
            return code
    pytest.skip("this crontab checks no file")


def test_cron_takes_the_crontab(tmp_path):
    assert crontab_check(EXAMPLES / "crontab") == 0
    wrong = tmp_path / "crontab"
    wrong.write_text((EXAMPLES / "crontab").read_text().replace("0 22", "0 25"))
    assert crontab_check(wrong) != 0


def cron_command() -> str:
    [line] = [line for line in (EXAMPLES / "crontab").read_text().splitlines() if not line.startswith("#")]
    command = line.split(maxsplit=5)[5]
    assert "%" not in command  # cron would end the line there
    return command


def run_as_cron(home: Path) -> str:
    """What cron would mail: the command has its home directory, and no more than that of an environment."""
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["/bin/sh", "-c", cron_command()],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    ).stdout


@pytest.mark.parametrize("code", [0, 3, 75, 76])
def test_cron_mails_an_exit_code_that_is_not_0(tmp_path, code):
    stub(tmp_path / "batch/.venv/bin/batchrun", f"exit {code}")
    assert run_as_cron(tmp_path) == (f"batchrun ended with exit code {code}\n" if code else "")


def test_the_command_of_the_crontab_runs_a_job_and_is_silent_once_it_is_finished(tmp_path):
    stub(tmp_path / "batch/.venv/bin/batchrun", f'exec "{sys.executable}" -m batchrun.cli "$@"')
    lines = [{"id": name, "prompt": "figs:", "max_tokens": 2} for name in "ab"]
    (tmp_path / "batch/jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_as_cron(tmp_path) == ""
    results = (tmp_path / "batch/jobs.run/results.jsonl").read_bytes()
    assert results.count(b"\n") == 2
    assert run_as_cron(tmp_path) == ""
    assert (tmp_path / "batch/jobs.run/results.jsonl").read_bytes() == results


# --- systemd ---


def verify(folder: Path, home: Path) -> str:
    """What systemd-analyze has to say about the units of a user in `folder`."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    units = [folder / name for name in UNITS]
    stub(home / "batch/.venv/bin/batchrun", "exit 0")  # it is looked for
    return said("systemd-analyze", "--user", "verify", *units, HOME=str(home), XDG_RUNTIME_DIR=str(home))[1]


def test_systemd_takes_the_units(tmp_path):
    assert verify(EXAMPLES, tmp_path) == ""
    for name in UNITS:
        unit = (EXAMPLES / name).read_text()
        (tmp_path / name).write_text(unit.replace("22:00", "25:00").replace("KillMode", "KilMode"))
    found = verify(tmp_path, tmp_path)
    assert "KilMode" in found and "25:00" in found


def test_the_service_is_tried_again_where_the_same_command_goes_on():
    unit = (EXAMPLES / "batchrun.service").read_text()
    codes = {
        key: {ExitCode(int(code)) for code in re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)[0].split()}
        for key in ("SuccessExitStatus", "RestartPreventExitStatus")
    }
    again = set(ExitCode) - {ExitCode.OK} - codes["SuccessExitStatus"] - codes["RestartPreventExitStatus"]
    assert again == {ExitCode.INTERNAL, ExitCode.OUTPUT}


# --- Slurm ---


def test_the_shell_takes_the_script_of_slurm():
    assert said("bash", "-n", EXAMPLES / "slurm.sh") == (0, "")


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    assert said("shellcheck", EXAMPLES / "slurm.sh") == (0, "")


@pytest.mark.parametrize("code", [0, 3, 73, 75])
def test_slurm_gets_the_job_again_where_it_stopped_early(tmp_path, code):
    stub(tmp_path / "srun", f'echo "$@"; exit {code}')
    stub(tmp_path / "scontrol", 'echo "scontrol $@"')
    done, output = said(
        "bash",
        EXAMPLES / "slurm.sh",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_CPUS_PER_TASK="4",
        SLURM_JOB_ID="17",
    )
    ran = "--cpus-per-task=4 .venv/bin/batchrun run jobs.jsonl --model demo --quiet\n"
    assert output == ran + ("scontrol requeue 17\n" if code == ExitCode.STOPPED else "")
    assert done == code
