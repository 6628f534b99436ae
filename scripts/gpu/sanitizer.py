"""compute-sanitizer's memory check over the kernels on small shapes, where it is installed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .sections import run_section
from .setting import Result, Setting

_PLACES = ("CUDA_HOME", "CUDA_PATH")


def find_tool() -> str | None:
    """Where compute-sanitizer is: on the path or with CUDA."""
    folders = [os.environ["PATH"], *(f"{os.environ[name]}/bin" for name in _PLACES if name in os.environ)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


def run(setting: Setting) -> Iterator[Result]:
    """Run the `kernels` section under the tool for the time there is, in one process."""
    tool = find_tool()
    if tool is None:
        yield {"passed": True, "note": "skipped: compute-sanitizer is not installed"}
        return
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "memcheck.txt"
        result = run_section(
            "kernels",
            seconds=setting.seconds_left(),
            tiny=setting.tiny,
            workers=0,
            before=[tool, "--tool", "memcheck", "--error-exitcode", "1", "--log-file", str(said)],
            # Each tensor is an allocation of its own, so that reading over its end is seen.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        if said.exists():
            result["memcheck"] = said.read_text(encoding="utf-8", errors="replace")[-4000:]
    yield {"note": "memcheck over the section kernels", **result}
