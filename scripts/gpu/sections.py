"""Runs the sections one after the other, each in a process of its own: what one does to the GPU, to memory or to
itself is not the matter of the next, and one that hangs is ended."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import versions
from .setting import Setting

COMMAND = Path(__file__).resolve().parents[1] / "gpu_check.py"
SECTIONS = {"versions": 0.2, "kernels": 3.0, "timings": 2.0, "exactness": 0.8, "micro": 3.0, "sanitizer": 1.0}  # shares
# Of a section's time: begin no more cases after it, so that the last ones can end. What is over it and a bit is ended.
_BEGIN, _GRACE = 0.85, 20.0


def run_all(names: Sequence[str], *, minutes: float, tiny: bool, scale: float, workers: int | None) -> dict[str, Any]:
    """Run sections within a time; what one leaves of its share goes to those after it.

    Returns:
        the document: date, and for each section its result.
    """
    document: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "sections": {}}
    end = time.monotonic() + 60 * minutes
    for nth, name in enumerate(names):
        share = SECTIONS[name] / sum(SECTIONS[rest] for rest in names[nth:])
        began = time.monotonic()
        result = run_section(name, seconds=max(0.0, share * (end - began)), tiny=tiny, scale=scale, workers=workers)
        result["seconds"] = round(time.monotonic() - began, 1)
        document["sections"][name] = result
        print(
            f"{name}: {'passed' if result['passed'] else 'FAILED'}, {result['seconds']} s", file=sys.stderr, flush=True
        )
    return document


def run_section(
    name: str,
    *,
    seconds: float,
    tiny: bool,
    scale: float = 1.0,
    workers: int | None = None,
    before: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a section in a process of its own and give its result.

    Args:
        before: a command that runs the process, such as a debugger and its options.
        environment: variables beside those that are set.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [*before, sys.executable, str(COMMAND), "--section", name, "--seconds", str(seconds)]
        command += ["--scale", str(scale), "--out", str(out), *(["--tiny"] if tiny else [])]
        command += [] if workers is None else ["--workers", str(workers)]
        interpret = {"TRITON_INTERPRET": "1"} if tiny else {}
        process = subprocess.Popen(
            command, env={**os.environ, **interpret, **(environment or {})}, stdout=sys.stderr, start_new_session=True
        )
        try:
            process.wait(timeout=seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return {"passed": False, "error": f"It had not ended after {seconds + _GRACE:.0f} s and was ended."}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode or not out.exists():
            error = f"The process ended with {process.returncode}; what it said is above."
            return {"passed": False, "error": error}
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return result


def run_here(name: str, out: Path, *, seconds: float, tiny: bool, scale: float, workers: int | None) -> None:
    """Run a section in this process and write its result."""
    began = time.monotonic()
    if workers is None:
        workers = 0 if tiny else min(12, (os.cpu_count() or 2) * 3 // 4)
    try:
        setting = Setting(tiny=tiny, end=began + _BEGIN * seconds, scale=scale, workers=workers)
        result = importlib.import_module(f".{name}", __package__).run(setting)
    except Exception as error:  # the other sections are wanted all the same
        wheels = versions.explain(error) if isinstance(error, ModuleNotFoundError) else None
        if wheels is None:
            traceback.print_exc()
        result = {"passed": False, "error": wheels or f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(result), encoding="utf-8")
