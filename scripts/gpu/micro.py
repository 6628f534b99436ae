"""The `micro` workload end to end, with random weights made on the device: groups of 16 requests that share 2,000
tokens, with 200 of their own and 100 to sample. 400 groups times the scale, or as much of them as time allows."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import torch
from oracles import make_requests
from transformers import LlamaConfig, LlamaForCausalLM

from batchrun.models import load_device_spec
from batchrun.planning.cost import CostModel
from batchrun.request import Requests
from batchrun.specs import DeviceSpec, ModelSpec
from batchrun.workloads import MICRO, Groups, Ids, micro

from .engine import ATTENTION, run_engine
from .idle import IdleMeter
from .setting import Result, Setting, measure_rates

# Of Llama 3.2 1B and Llama 3.1 8B.
_LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
           "tie_word_embeddings": True},
    "8B": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}  # fmt: skip
_TINY_LLAMA = {**_LLAMA, "vocab_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
TINY_SHAPES = {"tiny": {**_TINY_LLAMA, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}}
# With pages as the device's file has them, and larger ones, which the kernels read in fewer and longer copies.
ASKED: list[tuple[str, int | None]] = [("1B", None), ("1B", 64), ("8B", None)]
TINY_JOB, WARM_UP = Groups(2, 40, 3, 5, 3), Groups(1, 300, 4, 20, 3)
_KV_SHARE = 0.8  # of the memory that weights leave


def make_job(job: Groups, vocabulary: int) -> Requests:
    """Requests of a seed."""
    made = list(micro(Ids(0, vocabulary), *job))
    return make_requests([prompt for prompt, _ in made], [output for _, output in made], ignore_eos=True)


def find_device(setting: Setting, dtype: str) -> DeviceSpec:
    """An H200 by its data sheet; of another GPU the peaks that are measured."""
    if setting.tiny:
        return load_device_spec("cpu")
    if "H200" in torch.cuda.get_device_name():
        return load_device_spec("h200")
    rates = measure_rates(setting, dtype)
    memory = torch.cuda.get_device_properties(0).total_memory
    return DeviceSpec(
        "measured", "cuda", memory, _KV_SHARE, 64, 1024, {dtype: rates.flops}, rates.bandwidth, hardware="measured"
    )


def run_shape(name: str, shape: dict[str, Any], page_size: int | None, setting: Setting) -> dict[str, Any]:
    """A row of the table: a whole run, or what of it there was time for.

    Args:
        page_size: None for the device's.
    """
    dtype = "float32" if setting.tiny else "bfloat16"
    config = LlamaConfig(**shape)
    with torch.device(setting.device):
        module = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION, dtype=getattr(torch, dtype))
    module.eval()
    device = find_device(setting, dtype)
    page_size = page_size or device.page_size
    cost = CostModel(ModelSpec.from_config(config.to_dict()), device, dtype)
    page = cost.model.kv_bytes_per_token(dtype) * page_size
    room: dict[str, Any] = {
        "page_size": page_size,
        "pages": 4096 if setting.tiny else int(_KV_SHARE * torch.cuda.mem_get_info()[0]) // page,
        "step_tokens": 32 if setting.tiny else device.step_tokens,
    }
    asked = TINY_JOB if setting.tiny else MICRO["gpu"]
    job = make_job(asked._replace(groups=max(1, round(asked.groups * setting.scale))), config.vocab_size)
    meter = IdleMeter()
    if not setting.tiny:
        run_engine(module, make_job(WARM_UP, config.vocab_size), cost, **room)  # compiles the kernels
    with closing(meter):
        ran = run_engine(
            module,
            job,
            cost,
            **room,
            on_step=lambda step: None if setting.tiny else meter.after(step.index),
            should_stop=lambda: not setting.seconds_left(),
        )
    seconds = ran.seconds - meter.seconds
    bound = cost.bound(ran.work)
    return {
        "model": name,
        "page": page_size,
        "requests": len(job),
        "done": len(ran.answers),
        "seconds": seconds,
        "out_tok/s": ran.counters.sampled / seconds,
        "rows/s": ran.work.rows / seconds,
        "of_bound": bound.seconds / seconds,
        "idle": meter.share,
        "details": {
            "bound": bound._asdict(),
            "device": device.hardware,
            "host_seconds": ran.host_seconds,
            "work": asdict(ran.work),
            "counters": asdict(ran.counters),
            **room,
        },
    }


def run(setting: Setting) -> Iterator[Result]:
    """Run the shapes, smallest first; the last one may be cut."""
    asked = [(name, None) for name in TINY_SHAPES] if setting.tiny else ASKED
    left = len(asked)
    rows: list[Result] = []
    details: list[Result] = []
    faults: list[str] = []

    def share_of_time(one: tuple[str, int | None]) -> Result:
        nonlocal left
        gc.collect()  # of the shape before, which may have failed: this one needs its memory
        if not setting.tiny:
            torch.cuda.empty_cache()
        end = time.monotonic() + setting.seconds_left() / left
        left -= 1
        return run_shape(one[0], {**TINY_SHAPES, **SHAPES}[one[0]], one[1], replace(setting, end=end))

    for (name, _), row, failed in setting.try_each(asked, share_of_time):
        if row is None:
            faults.append(f"{name}: {failed}")
        else:
            details.append(row.pop("details"))
            rows.append(row)
        notes = [f"T_bound: {details[0]['device']}"] if details else []
        if any(row["done"] < row["requests"] for row in rows):
            notes.append("a run that was cut counts as far as it went")
        yield {
            "passed": not faults,
            "cases": sum(row["done"] == row["requests"] for row in rows),
            "of": len(asked),
            "note": "; ".join([*notes, *faults]),
            "rows": rows,
            "details": details,
        }
