"""What there is: Python, packages, the GPU; and what is missing, as the line that brings it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .setting import Result, Setting

ROOT = Path(__file__).resolve().parents[2]
_PEERS = ("flashinfer-python",)


def requirements() -> dict[str, str]:
    """What pyproject.toml asks for: requirements by the name they are imported by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [requirement.partition(";")[0].strip() for requirement in project["dependencies"]]
    return {re.split(r"[^\w.-]", requirement)[0].replace("-", "_"): requirement for requirement in asked}


def missing() -> dict[str, str]:
    """Those of `requirements` that are not installed."""
    return {name: requirement for name, requirement in requirements().items() if find_spec(name) is None}


def bring(wanted: dict[str, str]) -> str:
    """What to run where there is a network, and then here, to install the requirements and what they need."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    machine = platform.machine()
    tags = " ".join(f"--platform {tag}_{machine}" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014"))
    names = " ".join(f"'{requirement}'" for requirement in wanted.values())
    return (
        f"Not installed: {', '.join(wanted)}. Where there is a network:\n"
        f"  pip download --dest wheels --only-binary=:all: --python-version {python} {tags} {names}\n"
        f"Then here:\n"
        f"  {sys.executable} -m pip install --no-index --find-links wheels {names}"
    )


def explain(error: ModuleNotFoundError) -> str | None:
    """Which wheels to bring where a package was not found; None where it is not one of ours or of theirs."""
    name = (error.name or "").partition(".")[0]
    if (
        name in ("", "batchrun", "batchrun_kernels", __name__.partition(".")[0])
        or (ROOT / "tests" / f"{name}.py").exists()
    ):
        return None
    return bring(missing() | ({} if name in requirements() else {name: name}))


def run(setting: Setting) -> Iterator[Result]:
    """Versions, and the wheels to bring where a package is missing."""
    packages: dict[str, str | None] = {}
    for name in [*requirements(), *_PEERS]:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    result: dict[str, Any] = {"passed": True, "python": platform.python_version(), "packages": packages}
    lacking = missing()
    if lacking:
        result |= {"passed": False, "error": bring(lacking)}
    yield result
    if "torch" in lacking:
        return
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
        }
    elif not setting.tiny:
        result |= {"passed": False, "error": "torch sees no GPU; --tiny runs all of it on the CPU, very small."}
    named = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "transformers"))
    yield result | {"gpu": gpu, "note": f"{gpu['name'] if gpu else 'CPU'}, {named}"}


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or None
