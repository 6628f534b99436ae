"""compute-sanitizer's memory check over the kernels on small shapes, where it is installed."""

from __future__ import annotations

import os
import shutil
from typing import Any

from .sections import run_section
from .setting import Setting

_PLACES = ("CUDA_HOME", "CUDA_PATH")


def find_tool() -> str | None:
    """Where compute-sanitizer is: on the path or with CUDA."""
    folders = [os.environ["PATH"], *(f"{os.environ[name]}/bin" for name in _PLACES if name in os.environ)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


def run(setting: Setting) -> dict[str, Any]:
    """Run the `kernels` section under the tool for the time there is, in one process."""
    tool = find_tool()
    if tool is None:
        return {"passed": True, "note": "skipped: compute-sanitizer is not installed"}
    result = run_section(
        "kernels",
        seconds=setting.seconds_left(),
        tiny=setting.tiny,
        workers=0,
        before=[tool, "--tool", "memcheck", "--error-exitcode", "1"],
        # Each tensor is an allocation of its own, so that reading over its end is seen.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    return {"note": "memcheck over the section kernels", **result}
