"""Runs `interpreted.py`, part by part, in processes of their own: `TRITON_INTERPRET=1` counts only before triton is
first loaded, and other tests of this process may have loaded it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("interpreted.py")
ROOT = FILE.parents[2]


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def run(*arguments: str) -> None:
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("The interpreter of triton 3.6 makes numbers of arrays in a way that numpy 2.4 refuses.")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "part",
    ["TestGrid", "TestForests", "TestFeatures", "TestDeterministic", "TestMerge TestStore TestInterface"],
)
def test_interpreted(part: str) -> None:
    run("-m", "not slow", *(f"{FILE}::{name}" for name in part.split()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interpreted_for_long() -> None:
    run("-m", "slow", str(FILE))


def test_every_part_is_run() -> None:
    parts = {line.split()[1].rstrip(":") for line in FILE.read_text().splitlines() if line.startswith("class Test")}
    [marker] = test_interpreted.pytestmark  # type: ignore[attr-defined]
    assert parts == {name for part in marker.args[1] for name in part.split()}
