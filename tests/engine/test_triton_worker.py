"""Runs `interpreted_worker.py` in processes of their own: `TRITON_INTERPRET=1` counts only before triton is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("interpreted_worker.py")


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
@pytest.mark.parametrize(
    "architecture",
    [
        *("llama-options0", "gemma2", "gpt_oss"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("odd-heads", "qwen3-options2", "mistral-window"),
                *("gemma3_text", "granite", "mixtral", "olmo2", "phi3", "qwen3_moe", "smollm3"),
            )
        ),
    ],
)
def test_the_engine_with_the_triton_kernels_under_the_interpreter(architecture: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FILE)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-k", architecture],
        cwd=FILE.parents[2],
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
