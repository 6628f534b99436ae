"""Runs the sections one after the other, each in a process of its own: what one does to the GPU, to memory or to
itself is not the matter of the next, and one that hangs is ended."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import versions
from .setting import Result, Setting

COMMAND = Path(__file__).resolve().parents[1] / "gpu_check.py"
SECTIONS = {"versions": 0.4, "kernels": 3.0, "timings": 2.0, "exactness": 0.8, "micro": 3.0, "sanitizer": 1.0}  # shares
# Of a section's time: begin no more cases after it, so that the last ones can end. What is over it and a bit is ended.
_BEGIN, _GRACE = 0.85, 20.0


def run_all(
    names: Sequence[str],
    *,
    minutes: float,
    tiny: bool,
    scale: float,
    workers: int | None,
    report: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Run sections within a time; what one leaves of its share goes to those after it.

    Args:
        report: is given the document after each section: nothing of it is lost if this is ended.

    Returns:
        the document: date, and for each section its result.
    """
    document: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "sections": {}}
    end = time.monotonic() + 60 * minutes - _GRACE
    for nth, name in enumerate(names):
        share = SECTIONS[name] / sum(SECTIONS[rest] for rest in names[nth:])
        began = time.monotonic()
        result = run_section(name, seconds=max(0.0, share * (end - began)), tiny=tiny, scale=scale, workers=workers)
        result["seconds"] = round(time.monotonic() - began, 1)
        document["sections"][name] = result
        report(document)
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
) -> Result:
    """Run a section in a process of its own and give its result; of one that was ended, what it had.

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
            command,
            env={**os.environ, **interpret, **(environment or {})},
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  this process has no other thread
        )
        error = ""
        try:
            if process.wait(timeout=seconds + _GRACE):
                error = f"The process ended with {process.returncode}; what it said is above."
        except subprocess.TimeoutExpired:
            error = f"It had not ended after {seconds + _GRACE:.0f} s and was ended."
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result: Result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        if error or not result:
            result |= {"passed": False, "error": error or "The process has told nothing."}
        return result


def _end_with_parent() -> None:
    """Of a process that is begun: it has a session of its own, and would go on with the GPU when this one is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_here(name: str, out: Path, *, seconds: float, tiny: bool, scale: float, workers: int | None) -> None:
    """Run a section in this process, and write its result whenever there is more of it."""
    began = time.monotonic()
    if workers is None:
        workers = 0 if tiny else min(12, (os.cpu_count() or 2) * 3 // 4)
    try:
        setting = Setting(tiny=tiny, end=began + _BEGIN * seconds, scale=scale, workers=workers)
        for result in importlib.import_module(f".{name}", __package__).run(setting):
            _write(out, result)
    except Exception as error:  # the other sections are wanted all the same
        wheels = versions.explain(error) if isinstance(error, ModuleNotFoundError) else None
        if wheels is None:
            traceback.print_exc()
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        _write(out, found | {"passed": False, "error": wheels or f"{type(error).__name__}: {error}"})


def _write(out: Path, result: Result) -> None:
    """Whole, whenever the process may be ended."""
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(out)
