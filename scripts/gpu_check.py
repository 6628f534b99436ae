"""What only a GPU can show: the kernels against the reference, their times, and whole runs on a large random model.

    python scripts/gpu_check.py --out gpu_check.json            # on a GPU
    TRITON_INTERPRET=1 python scripts/gpu_check.py --tiny       # the same on the CPU, very small; times mean nothing

Needs torch, triton, transformers and numpy; nothing is installed or downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]

from batchrun_kernels import reference  # noqa: E402
from batchrun_kernels.attention import SharedPrefixAttention, store_kv  # noqa: E402
from batchrun_kernels.work_list import Columns  # noqa: E402
from forest_steps import make_step, random_forest  # noqa: E402

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # relative error of a row against float32


@dataclass(frozen=True)
class Size:
    """How much is run."""

    device: str
    cases: int
    groups: int
    readers: int
    prefix: int
    own: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    job: tuple[int, int, int, int, int]  # groups, prefix, requests of each, own tokens, output tokens
    repeats: int
    dtype: str


FULL = Size(
    "cuda", 40, 60, 16, 2000, 250, 32, 8, 128, 32, 4096, 14336, 32000, (100, 2000, 16, 200, 100), 20, "bfloat16"
)
TINY = Size("cpu", 2, 3, 4, 40, 20, 4, 2, 16, 2, 64, 128, 384, (2, 40, 3, 5, 3), 1, "float32")


def synchronize(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], size: Size) -> float:
    """Median time of a call, its launches included."""
    call()
    times = []
    for _ in range(size.repeats):
        synchronize(size)
        began = time.perf_counter()
        call()
        synchronize(size)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def check_kernels(size: Size) -> dict[str, Any]:
    """Random steps over random forests in several shapes: the largest relative error of a row for each dtype."""
    rng = np.random.default_rng(0)
    worst: dict[str, float] = {}
    shapes = [(8, 8, 64), (8, 2, 128), (7, 1, 128), (16, 2, 80), (4, 4, 256)] if size.device == "cuda" else [(4, 2, 16)]
    pages = [16, 64] if size.device == "cuda" else [16]
    dtypes = TOLERANCE if size.device == "cuda" else ["float32"]
    for case in range(size.cases):
        heads, kv_heads, head_dim = shapes[case % len(shapes)]
        page_size = pages[case % len(pages)]
        window = (None, None, 24)[case % 3]
        softcap = (None, 20.0)[case % 2]
        step = make_step(random_forest(rng, trees=3, levels=3, most=100), page_size, seed=case)
        if not step.num_rows:
            continue
        for name in dtypes:
            dtype = getattr(torch, name)
            attention = SharedPrefixAttention(
                heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype, device=size.device
            )
            generator = torch.Generator().manual_seed(case)
            shape = (step.num_pages, kv_heads, page_size, head_dim)
            keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            rows = (step.num_rows, kv_heads, head_dim)
            new = [torch.randn(rows, generator=generator).to(dtype) for _ in range(2)]
            query = torch.randn(step.num_rows, heads, head_dim, generator=generator).to(dtype)
            sinks = torch.randn(heads, generator=generator).to(dtype) if case % 4 == 3 else None
            on = [t.to(size.device) for t in (*new, keys, values, query)]
            store_kv(on[0], on[1], on[2], on[3], step.places.to(size.device))
            out = attention.run(
                on[4],
                on[2],
                on[3],
                attention.plan(step.columns, window=window),
                scale=head_dim**-0.5,
                softcap=softcap,
                sinks=None if sinks is None else sinks.to(size.device),
                out=torch.full_like(on[4], float("nan")),
            ).cpu()
            keys, values = (pool.cpu().transpose(1, 2).flatten(0, 1) for pool in (on[2], on[3]))
            expected, _ = reference.shared_prefix_attention(
                query, keys, values, step.visible(window), scale=head_dim**-0.5, softcap=softcap, sinks=sinks
            )
            error = float(((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
            worst[name] = float(np.maximum(worst.get(name, 0.0), error))  # NaN stays NaN
    return {
        "cases": size.cases,
        "largest_relative_error": worst,
        "passed": all(error < TOLERANCE[name] for name, error in worst.items()),
    }


def decode_columns(size: Size, *, shared: bool) -> tuple[Columns, int, int]:
    """A step of decodes: groups of readers of one prefix each, or the same contexts with nothing shared. Also how many
    pages there are, and how many KV tokens are read if each is read once."""
    page = 64 if size.device == "cuda" else 16
    rows = size.groups * size.readers
    prefix_pages, own_pages = -(-size.prefix // page), -(-(size.own if shared else size.prefix + size.own) // page)
    count = (size.groups * prefix_pages if shared else 0) + rows * own_pages
    table = np.zeros((size.groups + rows, max(prefix_pages, own_pages)), dtype=np.int32)
    numbers = np.random.default_rng(0).permutation(count).astype(np.int32)
    if shared:
        table[: size.groups, :prefix_pages] = numbers[: size.groups * prefix_pages].reshape(size.groups, -1)
        numbers = numbers[size.groups * prefix_pages :]
    table[size.groups :, :own_pages] = numbers.reshape(rows, own_pages)
    own = size.own if shared else size.prefix + size.own
    groups = np.arange(size.groups, dtype=np.int32)
    some = groups if shared else groups[:0]
    columns = Columns(
        sequence=np.arange(size.groups, size.groups + rows, dtype=np.int32),
        start=np.full(rows, own - 1, dtype=np.int32),
        length=np.ones(rows, dtype=np.int32),
        depth=np.full(rows, size.prefix if shared else 0, dtype=np.int32),
        first_row=some * size.readers,
        rows=np.full(some.size, size.readers, dtype=np.int32),
        read_sequence=some,
        tokens=np.full(some.size, size.prefix, dtype=np.int32),
        position=np.zeros(some.size, dtype=np.int32),
        pages=table,
    )
    return columns, count, some.size * size.prefix + rows * own


def time_decode(size: Size) -> dict[str, Any]:
    """The attention of one layer in a step of decodes, with sharing and without, beside the time that reading its KV
    once would take at the rate of a copy."""
    dtype = getattr(torch, size.dtype)
    page = 64 if size.device == "cuda" else 16
    copied = torch.empty((1 << 30) if size.device == "cuda" else (1 << 20), dtype=torch.uint8, device=size.device)
    target = torch.empty_like(copied)
    bandwidth = 2 * copied.numel() / seconds_of(lambda: target.copy_(copied), size)
    found: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "rows": size.groups * size.readers}
    for name, shared in (("shared", True), ("not_shared", False)):
        columns, pages, tokens = decode_columns(size, shared=shared)
        attention = SharedPrefixAttention(
            heads=size.heads,
            kv_heads=size.kv_heads,
            head_dim=size.head_dim,
            page_size=page,
            dtype=dtype,
            device=size.device,
        )
        shape = (pages, size.kv_heads, page, size.head_dim)
        keys, values = (torch.randn(shape, dtype=dtype, device=size.device) for _ in range(2))
        query = torch.randn(size.groups * size.readers, size.heads, size.head_dim, dtype=dtype, device=size.device)
        out = torch.empty_like(query)
        plan = attention.plan(columns)
        spent = seconds_of(
            lambda q=query, k=keys, v=values, p=plan, o=out, a=attention: a.run(q, k, v, p, scale=0.1, out=o), size
        )
        read = 2 * tokens * size.kv_heads * size.head_dim * dtype.itemsize
        found[name] = {
            "seconds": spent,
            "plan_seconds": seconds_of(lambda a=attention, c=columns: a.plan(c), size),
            "kv_bytes": read,
            "share_of_copy_bandwidth": read / spent / bandwidth,
            "items": plan.host.num_items,
            "merged_rows": plan.host.num_merged,
        }
    found["speedup"] = found["not_shared"]["seconds"] / found["shared"]["seconds"]
    return found


def run_jobs(size: Size) -> dict[str, Any]:
    """A whole job on random weights, with sharing and without: seconds and tokens a second."""
    from oracles import make_requests
    from transformers import LlamaConfig, LlamaForCausalLM

    import batchrun.engine.triton_attention  # noqa: F401  registers itself
    from batchrun.engine.model import LoadedModel
    from batchrun.engine.torch_worker import TorchWorker
    from batchrun.execution.loop import run_loop
    from batchrun.planning.cost import CostModel
    from batchrun.planning.memory import MemoryBudget
    from batchrun.planning.planner import PlanOptions, make_plan
    from batchrun.prefix.forest import build_forest
    from batchrun.schedule.scheduler import Scheduler
    from batchrun.specs import DeviceSpec, ModelSpec

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=8192,
    )
    dtype = getattr(torch, size.dtype)
    with torch.device(size.device):
        module = LlamaForCausalLM._from_config(config, attn_implementation="batchrun_triton", dtype=dtype).eval()
    model = LoadedModel(
        module, size.layers, size.heads, size.kv_heads, size.head_dim, dtype, size.device, attention="triton"
    )
    spec = ModelSpec.from_config(config.to_dict())
    peaks = {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12}
    device = DeviceSpec("here", size.device, 1 << 37, 0.9, 64, 1024, peaks, 4.8e12)
    groups, prefix, readers, own, output = size.job
    rng = np.random.default_rng(0)
    prompts = [
        [*shared, *rng.integers(16, size.vocabulary, own).tolist()]
        for shared in rng.integers(16, size.vocabulary, (groups, prefix)).tolist()
        for _ in range(readers)
    ]
    requests = make_requests(prompts, [output] * len(prompts), ignore_eos=True)
    page = 64 if size.device == "cuda" else 16
    pages = min((300_000 if size.device == "cuda" else 4096) // page, 1 << 16)
    found: dict[str, Any] = {"requests": len(prompts), "prompt_tokens": sum(map(len, prompts)), "output": output}
    for grouping in ("auto", "none"):
        plan = make_plan(
            requests,
            build_forest(requests.tokens),
            CostModel(spec, device, size.dtype),
            MemoryBudget(page, pages, 1, 0),
            PlanOptions("dfs", grouping, 1024 if size.device == "cuda" else 32),
        )
        worker = TorchWorker(model, requests, eos_token_ids=frozenset(), page_size=page, num_pages=plan.budget.pages)
        scheduler = Scheduler(plan, requests)
        synchronize(size)
        began = time.perf_counter()
        end = run_loop(scheduler, worker)
        synchronize(size)
        spent = time.perf_counter() - began
        worker.close()
        columns = end.log.columns
        found[grouping] = {
            "seconds": spent,
            "steps": len(end.log),
            "prompt_computed": scheduler.counters.prompt_computed,
            "output_tokens_per_second": scheduler.counters.sampled / spent,
            "host_seconds": float(columns["host_seconds"].sum()),
            "preemptions": scheduler.counters.preemptions,
        }
    found["speedup"] = found["none"]["seconds"] / found["auto"]["seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="very small, on the CPU under Triton's interpreter")
    args = parser.parse_args()
    size = TINY if args.tiny else FULL
    document: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if size.device == "cuda" else "cpu, interpreted",
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "numpy")},
    }
    failed = False
    for part in (check_kernels, time_decode, run_jobs):
        began = time.perf_counter()
        try:
            document[part.__name__] = part(size)
            failed |= not document[part.__name__].get("passed", True)
        except Exception:  # the other parts are wanted all the same
            traceback.print_exc()
            document[part.__name__] = {"error": traceback.format_exc(limit=-3)}
            failed = True
        print(f"{part.__name__}: {time.perf_counter() - began:.1f} s", flush=True)
    text = json.dumps(document, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
