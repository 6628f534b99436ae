"""One adapter in one process: its times, its memory, its answers, or why there are none."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench.peers.adapters.protocol import Job, Result
from scripts.bench.peers.environments import reason

ADAPTERS = Path(__file__).resolve().parent / "adapters"
POLL_SECONDS = 0.2


class RunFailed(Exception):
    """An adapter gave no result, or a wrong one; the message is the reason, on one line."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A run that went through.

    Attributes:
        result: what the adapter wrote.
        process_seconds: from its start until its end, on the clock.
        processor_seconds: of all its processes and threads; what others on the machine take does not count.
        peak_bytes: most memory that its processes held together, by the kernel's own marks.
    """

    result: Result
    process_seconds: float
    processor_seconds: float
    peak_bytes: int


def measure(python: Path, adapter: str | Path, job: Job, timeout: float, variables: Mapping[str, str]) -> Measured:
    """Run an adapter on a job and wait for it; nothing it started is left behind.

    Args:
        python: the interpreter of its environment.
        adapter: a file of `adapters/`, or any path.
        variables: environment variables on top of our own.

    Raises:
        RunFailed: it crashed, hung, or answered with other lengths than asked for.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "scratch").mkdir()
        (root / "job.json").write_text(json.dumps({**asdict(job), "scratch": str(root / "scratch")}))
        command = [str(python), str(ADAPTERS / adapter), str(root / "job.json"), str(root / "result.json")]
        threads = {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with (root / "log").open("w+") as log:
            began, used = time.perf_counter(), _used()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **threads, **variables},
                start_new_session=True,
            )
            memory = PeakMemory(process.pid)
            try:
                code = process.wait(timeout)
                seconds = time.perf_counter() - began
            except subprocess.TimeoutExpired:
                raise RunFailed(f"no end after {timeout:.0f} s") from None
            finally:
                peak = memory.stop()
                _end(process)
            log.seek(0)
            text = log.read()
        if code:
            raise RunFailed(f"{reason(text)} (exit code {code})")
        try:
            result = Result(**json.loads((root / "result.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RunFailed(f"no result: {error}") from error
    lengths = [len(answer) for answer in result.outputs]
    if lengths != job.outputs:
        wrong = sum(a != b for a, b in zip(lengths, job.outputs, strict=False)) + abs(len(lengths) - len(job.outputs))
        raise RunFailed(f"{wrong} of {len(job.outputs)} answers have another length than asked for")
    return Measured(result, seconds, _used() - used, peak)


def _used() -> float:
    """Seconds of processor time of all processes that were waited for so far, and of those that they waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _end(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class PeakMemory:
    """The most that a process and those below it hold together, looked at while they run."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._stopped = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Look no longer; the most so far, in bytes."""
        self._stopped.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self._most = max(self._most, sum(map(_high_water, _tree(self._pid))))


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found, at = [pid], 0
    while at < len(found):
        for file in Path(f"/proc/{found[at]}/task").glob("*/children"):
            try:
                found += map(int, file.read_text().split())
            except OSError:  # it has ended meanwhile
                continue
        at += 1
    return found


def _high_water(pid: int) -> int:
    """Most bytes that a process has held so far, as the kernel has noted it; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
