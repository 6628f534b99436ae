"""Do simulated times rank the schedule orders as measured times do? On `mixed` and `skew`, with little KV memory.

Each order is simulated, and run; runs alternate, and the fastest of each order counts, since what disturbs a run only
adds to it (as in scripts/calibrate); the median stands beside it. The model has SmolLM2-135M's shape and random
weights. Prints a table for each workload and a JSON document.

    python scripts/bench/bench_orders.py --repeats 6
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from bench_run import make_model

import batchrun
from batchrun.planning.order import CANDIDATES
from batchrun.workloads import make_workload, write_job

ORDERS = (*CANDIDATES, "shuffle")
VOCABULARY = 16384


def measure(name: str, model: Path, root: Path, *, kv_tokens: int, repeats: int) -> dict[str, object]:
    """Simulated and measured seconds of each order on a workload."""
    job = root / f"{name}.jsonl"
    write_job(job, make_workload(name, vocab_size=VOCABULARY))
    config = json.loads((model / "config.json").read_text())
    kv_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    options = {"model": str(model), "dtype": "float32", "kv_memory": str(kv_tokens * kv_bytes)}
    chosen = batchrun.plan(job, schedule_order="auto", **options).schedule_order
    planned = {order: batchrun.plan(job, schedule_order=order, **options) for order in ORDERS}
    measured: dict[str, list[float]] = {order: [] for order in ORDERS}
    for repeat in range(repeats):
        for order in ORDERS:
            out = root / f"{name}.{order}.{repeat}.run"
            report = batchrun.run(job, out=out, schedule_order=order, **options)
            measured[order].append(report.seconds.execute)
    fastest = {order: min(times) for order, times in measured.items()}
    median = {order: statistics.median(times) for order, times in measured.items()}
    print(f"\n{name}: {planned['dfs'].requests} requests, KV for {kv_tokens:,} tokens; auto takes {chosen}")
    print(f"{'order':14}{'simulated':>11}{'fastest':>11}{'error':>9}{'median':>11}{'steps':>8}{'prompt rows':>13}")
    for order in sorted(ORDERS, key=fastest.__getitem__):
        expected = planned[order].expected.seconds
        print(
            f"{order:14}{expected:9.2f} s{fastest[order]:9.2f} s{expected / fastest[order] - 1:+9.1%}"
            f"{median[order]:9.2f} s{planned[order].steps:8,}{planned[order].tokens.prompt_computed:13,}"
        )
    for word, seconds in (("fastest runs", fastest), ("medians", median)):
        print(f"by {word}, auto's order takes {seconds[chosen] / min(seconds.values()) - 1:.1%} more than the best one")
    return {
        "workload": name,
        "kv_tokens": kv_tokens,
        "auto": chosen,
        "simulated": {order: plan.expected.seconds for order, plan in planned.items()},
        "measured": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--kv-tokens", type=int, default=3072, help="KV tokens that the pool holds")
    parser.add_argument("--workloads", nargs="+", default=["mixed", "skew"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model")
        found = [
            measure(name, root / "model", root, kv_tokens=args.kv_tokens, repeats=args.repeats)
            for name in args.workloads
        ]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
