"""Runs a job again and again while it is disturbed, and compares what comes out with an undisturbed run.

Each round starts the bundled job, some of its lines made bad, and disturbs it at random moments: the run is killed
(SIGKILL), told to stop (SIGTERM) or stopped by a limit, its worker is killed, or a torn line is left at the end of its
results. The same command is given until the run is finished. Every request must have its answer once, and the answer
of the undisturbed run.

    python scripts/soak.py --minutes 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs" / "demo"
CONFIG = "[output]\nflush_seconds = 0.0\nflush_results = 2\n[scheduler]\nstep_tokens = 32\n"
BAD_LINES = (
    b'{"custom_id": "bad0", "method": "POST", "url": "/v1/nothing", "body": {}}',
    b'{"prompt": 5}',
    b"not JSON at all",
    b'{"prompt": "\xff"}',
    b"[" * 5000,
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"messages": "hello"}',
)
FINISHED = 3  # with some lines failed: the bad ones


@dataclass
class Tally:
    """What was done, and what came of it."""

    rounds: int = 0
    requests: int = 0
    bad_lines: int = 0
    lost: int = 0
    twice: int = 0
    changed: int = 0
    survived: Counter[str] = field(default_factory=Counter)


def write_job(path: Path, rng: random.Random, lines: int) -> int:
    """Some lines of the bundled job with bad ones among them; returns how many are bad."""
    asked = rng.sample((DEMO / "job.jsonl").read_bytes().splitlines(), lines)
    bad = rng.choices(BAD_LINES, k=rng.randrange(1, 6))
    for line in bad:
        asked.insert(rng.randrange(len(asked)), line)
    path.write_bytes(b"\n".join(asked) + b"\n")
    return len(bad)


def answers(run_dir: Path, tally: Tally) -> dict[int, Any]:
    """By line of the job what came of it."""
    found: dict[int, Any] = {}
    for name in ("results.jsonl", "errors.jsonl"):
        for raw in (run_dir / name).read_bytes().splitlines():
            line = json.loads(raw)
            number, body = line["batchrun"]["line"], line["response"]["body"]
            tally.twice += number in found
            found[number] = body["choices"] if "choices" in body else body["error"]["code"]
    return found


def start(command: list[str], *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def worker_of(process: subprocess.Popen[bytes]) -> int | None:
    """The process that runs the model, if there is one."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        found = children.read_text().split()
    except OSError:
        return None
    return int(found[0]) if found else None


def disturb(command: list[str], out: Path, seconds: float, rng: random.Random, tally: Tally) -> int | None:
    """One start of the run, disturbed; its exit code."""
    how = rng.choice(["killed", "stopped by a signal", "stopped by a limit", "worker killed", "torn line"])
    limit = ["--timeout", f"{rng.uniform(0.2, seconds):.2f}"] if how == "stopped by a limit" else []
    process = start(command, *limit)
    try:
        process.communicate(timeout=rng.uniform(0.2, 1.0) * seconds if not limit else None)
    except subprocess.TimeoutExpired:
        worker = worker_of(process)
        if how == "stopped by a signal":
            process.terminate()
        elif how == "worker killed" and worker is not None:
            os.kill(worker, signal.SIGKILL)
        else:
            process.kill()
        tally.survived[how] += 1
        process.communicate()
    else:
        tally.survived[how] += process.returncode == 75
    results = out / "results.jsonl"
    if how == "torn line" and process.returncode != FINISHED and results.exists():
        with results.open("ab") as file:
            file.write(b'{"id": "batch_req_0", "custom_id": "r')
    return process.returncode


def soak(minutes: float, lines: int, seed: int) -> Tally:
    """Rounds until the time is over."""
    rng, tally = random.Random(seed), Tally()
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "config.toml").write_text(CONFIG)
        base = [sys.executable, "-m", "batchrun.cli", "run"]
        settings = ["--model", str(DEMO / "model"), "--config", str(root / "config.toml"), "--quiet"]
        while time.monotonic() < end:
            job = root / f"{tally.rounds}.jsonl"
            tally.bad_lines += write_job(job, rng, lines)
            undisturbed, out = root / f"{tally.rounds}.whole", root / f"{tally.rounds}.run"
            began = time.monotonic()
            whole = start([*base, str(job), *settings, "--out", str(undisturbed)])
            _, errors = whole.communicate()
            if whole.returncode != FINISHED:
                raise SystemExit(f"the undisturbed run failed: {errors.decode()}")
            seconds = time.monotonic() - began
            command = [*base, str(job), *settings, "--out", str(out)]
            code = None
            for _ in range(rng.randrange(1, 5)):
                code = disturb(command, out, seconds, rng, tally)
                if code == FINISHED:
                    break
            if code != FINISHED:
                last = start(command)
                _, errors = last.communicate()
                if last.returncode != FINISHED:
                    raise SystemExit(f"the run could not be finished ({last.returncode}): {errors.decode()}")
            expected, found = answers(undisturbed, Tally()), answers(out, tally)
            tally.rounds += 1
            tally.requests += len(expected)
            tally.lost += len(expected.keys() - found.keys())
            tally.changed += sum(found[number] != expected[number] for number in expected.keys() & found.keys())
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--lines", type=int, default=120, help="requests of a job")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    tally = soak(args.minutes, args.lines, args.seed)
    print(
        f"load held         {tally.requests:,} lines in {tally.rounds} runs, {(time.monotonic() - began) / 60:.1f} min"
    )
    for how, count in sorted(tally.survived.items()):
        print(f"survived          {count:4}  {how}")
    print(f"bad inputs tried  {tally.bad_lines}")
    print(f"results lost      {tally.lost}")
    print(f"duplicated        {tally.twice}")
    print(f"changed           {tally.changed}")
    sys.exit(bool(tally.lost or tally.twice or tally.changed))


if __name__ == "__main__":
    main()
