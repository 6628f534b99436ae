"""The engine against its floor: the same rows through the model's linear layers alone, their weights packed for oneDNN.

Both run in this process, by turns, on SmolLM2-135M's shape with random weights: the engine a workload, with the real
scheduler, loop and worker; the floor, for each step, one packed product for each linear layer of the checkpoint as it
is (nothing put together, no products left out), for the rows of that step, the LM head for those that sample. With
`--profile`, one more run says where the engine's time goes, by kinds of operations.

    python scripts/bench/bench_floor.py --workload micro --dtype float32
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import batchrun.engine  # noqa: F401  sets how threads wait, before torch is loaded  # isort: skip
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from calibrate_device import FULL, Bench, Job

from batchrun.engine import decoder
from batchrun.engine.sampler import Sampler
from batchrun.models import load_device_spec
from batchrun.planning.cost import Work
from batchrun.workloads import WORKLOADS, Ids, make_workload, micro

_POOL_TOKENS = 1 << 17
_SMALL = "small"  # the job that design notes compare peers on


class Floor:
    """The linear layers of a model, packed; nothing else of it."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        pack = torch.ops.mkldnn._reorder_linear_weight
        found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        self._layers = [(layer.in_features, pack(layer.weight.detach())) for name, layer in found if name != "lm_head"]
        self._head = model.lm_head.in_features, pack(model.lm_head.weight.detach())
        self._widths = {layer.in_features for _, layer in found}
        self._dtype = dtype

    def run(self, works: list[Work]) -> list[float]:
        """Seconds of each step."""
        inputs = {width: torch.randn(max(work.rows for work in works), width).to(self._dtype) for width in self._widths}
        times = []
        with torch.inference_mode():
            for work in works:
                began = time.perf_counter()
                for width, weight in self._layers:
                    torch.ops.mkldnn._linear_pointwise(inputs[width][: work.rows], weight, None, "none", [], "")
                if work.sampled:
                    width, weight = self._head
                    torch.ops.mkldnn._linear_pointwise(inputs[width][: work.sampled], weight, None, "none", [], "")
                times.append(time.perf_counter() - began)
        return times


@contextmanager
def marked(places: list[tuple[Any, str, str]]) -> Iterator[None]:
    """Calls of functions show as ranges in profiles.

    Args:
        places: what holds a function, its name there, and the range's.
    """
    plain = [getattr(holder, name) for holder, name, _ in places]

    def in_range(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(label):
                return function(*args, **kwargs)

        return call

    for (holder, name, label), function in zip(places, plain, strict=True):
        setattr(holder, name, in_range(function, label))
    try:
        yield
    finally:
        for (holder, name, _), function in zip(places, plain, strict=True):
            setattr(holder, name, function)


def kind_of(name: str, ranges: set[str]) -> str:
    """What an operation is for, by its name and the ranges that it lies in."""
    if "sampling" in ranges:
        return "sampling"
    if "linear" in name or name in ("aten::addmm", "aten::mm"):
        return "products"
    if name.startswith(("aten::index_copy", "aten::index_put", "aten::_index_put")):
        return "KV append"
    if "attention" in ranges:
        if "flash" in name or "softmax" in name or "bmm" in name or "exp" in name:
            return "attention"
        return "gathers" if name in ("aten::index_select", "aten::index") else "around attention"
    return "norms, RoPE, elementwise"


def profile(run: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Seconds and operations by kind; what is in no operation is the host's, Python's and the profiler's own."""
    places = [(Sampler, "sample", "sampling"), (decoder, "attend", "attention")]
    with marked(places), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        run()
        wall = time.perf_counter() - began
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    by_name: Counter[tuple[str, str]] = Counter()
    for event in profiler.events():
        if "::" not in event.name:
            continue
        ranges, above = set(), event.cpu_parent
        while above is not None:
            ranges.add(above.name)
            above = above.cpu_parent
        kind = kind_of(event.name, ranges)
        seconds[kind] += event.self_cpu_time_total / 1e6
        by_name[kind, event.name] += event.self_cpu_time_total / 1e6
        calls[kind] += 1
    found = {kind: (seconds[kind], calls[kind]) for kind, _ in seconds.most_common()}
    if os.environ.get("BY_NAME"):
        for (kind, name), spent in by_name.most_common(30):
            print(f"    {kind:28}{name:48}{spent:8.3f} s")
    return found | {"host": (wall - sum(seconds.values()), 0), "all": (wall, sum(calls.values()))}


def told(ours: float, floor: float) -> str:
    return f"engine {ours:7.3f} s   floor {floor:7.3f} s   share {floor / ours:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[_SMALL, *WORKLOADS], default="micro")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()

    shape = {**FULL.held_out, "num_hidden_layers": args.layers}
    vocabulary = shape["vocab_size"]
    if args.workload == _SMALL:
        requests, kv_tokens = list(micro(Ids(0, vocabulary), 2, 512, 16, 32, 32)), None
    else:
        made = make_workload(args.workload, vocab_size=vocabulary)
        requests, kv_tokens = made.requests, made.kv_tokens
    job = Job(args.workload, requests, args.step_tokens, kv_tokens or _POOL_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), shape, load_device_spec("cpu"), args.dtype)
        floor = Floor(Path(folder), getattr(torch, args.dtype))
        works, _ = bench.run(job)  # to warm up
        floor.run(works[:2])
        ours, floors = [], []
        for _ in range(args.repeats):
            ours.append(bench.run(job)[1])
            floors.append(floor.run(works))
            print(told(sum(ours[-1]), sum(floors[-1])), flush=True)
        # What else runs on a machine only adds: so the fastest of each step.
        fastest = [np.min(times, axis=0) for times in (ours, floors)]
        print(f"{told(*(times.sum() for times in fastest))}   the fastest of each step")
        rows = np.array([work.rows for work in works])
        for low, high in ((0, 256), (256, rows.max() + 1)):
            some = (rows >= low) & (rows < high)
            if some.any():
                told_of = told(*(times[some].sum() for times in fastest))
                print(f"{told_of}   {some.sum()} steps of {rows[some].min()} to {rows[some].max()} rows")
        if args.profile:
            for kind, (seconds, calls) in profile(lambda: bench.run(job)).items():
                print(f"{kind:28}{seconds:8.2f} s{calls:10,}")


if __name__ == "__main__":
    main()
