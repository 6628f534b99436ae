"""What only a GPU can show: the kernels against the reference, their times, exact answers, and whole runs.

    python scripts/gpu_check.py --out gpu_check.json       # all of it, in nine minutes
    python scripts/gpu_check.py --only kernels --minutes 3
    python scripts/gpu_check.py --tiny                     # the same on the CPU, very small; times mean nothing

Needs the packages of pyproject.toml in the Python that runs it; says which wheels to bring where one is missing.
Exits with 1 if a section failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("scripts", ".", "kernels", "tests", "tests/kernels")]

from gpu.sections import SECTIONS, run_all, run_here  # noqa: E402
from gpu.table import table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all sections that are run (9)")
    parser.add_argument("--scale", type=float, default=0.1, help="share of the 6,400 requests of micro (0.1)")
    parser.add_argument("--workers", type=int, help="processes that check kernels side by side (up to 12; 0 for none)")
    parser.add_argument("--out", type=Path, help="file for the JSON, which is printed otherwise")
    parser.add_argument("--tiny", action="store_true", help="very small, on the CPU under Triton's interpreter")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)  # in this process, for --seconds
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section is not None:
        run_here(args.section, args.out, seconds=args.seconds, tiny=args.tiny, scale=args.scale, workers=args.workers)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section which runs is ended too

    def report(document: dict[str, Any]) -> None:
        """Keep what there is, and show the last section of it."""
        if args.out is not None:
            part = args.out.with_name(f"{args.out.name}.part")
            part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            part.replace(args.out)
        [*_, last] = document["sections"]
        print(table({"sections": {last: document["sections"][last]}}), flush=True)

    if args.out is not None:
        args.out.write_text("{}\n", encoding="utf-8")  # a place that cannot be written is told now
    document = run_all(
        args.only, minutes=args.minutes, tiny=args.tiny, scale=args.scale, workers=args.workers, report=report
    )
    if args.out is None:
        print(json.dumps(document, indent=2))
    sys.exit(any(not result["passed"] for result in document["sections"].values()))


if __name__ == "__main__":
    main()
