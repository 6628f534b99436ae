"""Write one of the standard workloads (batchrun/workloads.py) as a job file.

python scripts/make_job.py micro --vocab-size 16384 -o micro.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from batchrun.workloads import SIZES, WORKLOADS, make_workload, write_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--max-context", type=int, help="cut lengths to fit, as batchrun bench does")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = make_workload(
        args.name,
        vocab_size=args.vocab_size,
        max_context=args.max_context,
        size=args.size,
        scale=args.scale,
        seed=args.seed,
    )
    write_job(args.out, made)


if __name__ == "__main__":
    main()
