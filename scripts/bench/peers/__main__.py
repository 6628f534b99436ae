"""batchrun and its peers on the same requests, one after another, and a page of what came out.

What it makes (environments, models, answers to compare with) is kept in .cache/peers.

    python scripts/bench/peers                  all of it, in less than two hours
    python scripts/bench/peers --quick          micro and pressure once each, in a quarter of an hour
    python scripts/bench/peers --growth         how time and memory grow, against the strongest peer
    python scripts/bench/peers --tiny           a tiny model, all peers: do the adapters answer rightly?
    python scripts/bench/peers --install-only   only make environments and models
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are common ones

from scripts.bench.peers import growth  # noqa: E402
from scripts.bench.peers.bench import TINY, Bench  # noqa: E402
from scripts.bench.peers.forms import SHAPE  # noqa: E402
from scripts.bench.peers.page import render  # noqa: E402
from scripts.bench.peers.registry import OURS, PEERS, Peer  # noqa: E402
from scripts.bench.peers.schedule import DTYPES, WORKLOADS, Turn, turns  # noqa: E402


def write_page(document: dict[str, Any], text: str, folder: Path, subject: str) -> Path:
    """Write the page and the document; a page that is there already is never written over."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{document['date']}-{subject}-cpu"
    number = 1
    while (page := folder / f"{stem}{f'-{number}' if number > 1 else ''}.md").exists():
        number += 1
    page.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    page.write_text(text)
    return page


def _shown(arguments: Sequence[str]) -> list[str]:
    """Arguments without the paths of this machine."""
    return [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/bench/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {peer.name: peer for peer in PEERS}
    parser.add_argument("--quick", action="store_true", help="a trial in a quarter of an hour, each run once")
    parser.add_argument("--growth", action="store_true", help="one thing at a time made 4 and 16 times as much")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and workload: are the answers right?")
    parser.add_argument("--peers", nargs="*", choices=known, metavar="PEER", help=f"of {', '.join(known)}")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=WORKLOADS,
        metavar="NAME",
        help=f"of {', '.join(WORKLOADS)}",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)}"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the strongest on micro and pressure")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="processor threads of a run")
    parser.add_argument("--install-only", action="store_true", help="make environments and models, and measure nothing")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache" / "peers", help="where environments and models are kept"
    )
    parser.add_argument("--out", type=Path, help="folder of the page; a trial's is in the cache")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the peer which runs is ended too
    if args.tiny:
        args.workloads, args.repeats = ["micro"], 1
    strongest = PEERS[:1] if args.growth else PEERS
    asked = strongest if args.peers is None else [known[name] for name in args.peers]
    trial = args.quick or args.tiny or args.peers is not None
    out = args.out or (args.cache / "results" if trial else ROOT / "docs" / "benchmarks")

    began = time.perf_counter()
    bench = Bench(args.cache.resolve(), TINY if args.tiny else SHAPE, args.threads)

    def planned(peers: Sequence[Peer]) -> Iterator[Turn]:
        if args.growth:
            return growth.turns(peers, dtypes=args.dtypes, repeats=args.repeats)
        everywhere = args.peers is not None or args.tiny
        choice = {"workloads": args.workloads, "dtypes": args.dtypes, "repeats": args.repeats}
        return turns(peers, **choice, quick=args.quick, everywhere=everywhere)

    taking_part = {turn.peer for turn in planned(asked)}
    needed = [peer for peer in asked if peer in taking_part]
    bench.prepare([OURS], args.dtypes)
    ready = bench.prepare(needed, args.dtypes)
    if args.install_only:
        return
    try:
        for turn in planned(ready):
            bench.take(turn)
    except (KeyboardInterrupt, SystemExit):
        trial, out = True, args.cache / "results"  # what there is, is not lost
        print("\ninterrupted", flush=True)
    command = shlex.join(["python", "scripts/bench/peers", *_shown(sys.argv[1:])])
    document = bench.document(needed, command, trial=trial)
    text, subject = (growth.render(document), "growth") if args.growth else (render(document), "peers")
    page = write_page(document, text, out, subject)
    print(f"\n{page.read_text()}\nWritten to {page} in {(time.perf_counter() - began) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
