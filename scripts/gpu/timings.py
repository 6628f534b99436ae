"""The attention of one layer, timed beside what else computes the same and beside the least that the device allows.

    ours     with the sharing that there is
    off      our kernel where every request has a copy of its prefix
    cascade  FlashInfer's, where it is installed
    sdpa     torch's with a dense mask, where that fits into memory
    floor    each KV token read once, queries read and results written at the rate of a copy, or the operations at the
             rate of a matrix product, both measured here: whichever is longer

All are given the same inputs, and a time counts only where the results agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from batchrun_kernels.attention import SharedPrefixAttention
from batchrun_kernels.work_list import Columns

from .setting import Rates, Result, Setting, host_seconds_of, measure_rates, seconds_of

# Of two results whose rows each err by up to the tolerance of kernels.py.
_AGREE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A step: groups of readers of a prefix each, every reader a chunk of rows after its own tokens.

    Attributes:
        prefix, own, rows: tokens of a prefix; of a reader before the step; that the step computes of each.
    """

    name: str
    groups: int
    prefix: int
    readers: int
    own: int
    rows: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    @property
    def chunks(self) -> int:
        return self.groups * self.readers

    @property
    def num_rows(self) -> int:
        return self.chunks * self.rows

    def floor(self, rates: Rates, itemsize: int) -> float:
        """Least seconds: by bytes or by operations."""
        kv = self.groups * self.prefix + self.chunks * (self.own + self.rows)
        moved = 2 * self.head_dim * itemsize * (kv * self.kv_heads + self.num_rows * self.heads)
        pairs = self.num_rows * (self.prefix + self.own) + self.chunks * self.rows * (self.rows + 1) // 2
        return max(moved / rates.bandwidth, 4 * self.heads * self.head_dim * pairs / rates.flops)


SHAPES = [
    Shape("decode 32x16", 32, 2000, 16, 250, 1),
    Shape("prefill readers", 2, 2000, 16, 0, 128),
    Shape("prefill chunk", 1, 2048, 1, 2048, 4096),
    Shape("decode 4x64", 4, 2000, 64, 250, 1),
    Shape("decode alone", 256, 0, 1, 2000, 1),
    Shape("prefill page 16", 2, 2000, 16, 0, 128, page_size=16),
    Shape("decode page 16", 32, 2000, 16, 250, 1, page_size=16),
    Shape("1x256 page 16", 1, 8000, 256, 250, 1, page_size=16),
    Shape("decode 1x256", 1, 8000, 256, 250, 1),
    Shape("decode D=64", 32, 2000, 16, 250, 1, head_dim=64),
    Shape("decode G=7", 32, 2000, 16, 250, 1, heads=28, kv_heads=4),
]
TINY_SHAPES = [
    Shape("decode", 2, 80, 3, 20, 1, heads=4, kv_heads=2, head_dim=16, page_size=16),
    Shape("prefill", 1, 40, 2, 5, 9, heads=4, kv_heads=2, head_dim=16, page_size=16),
]


@dataclass(frozen=True, slots=True)
class Inputs:
    """K and V of the prefixes `[groups, prefix, Hkv, D]` and of the readers `[chunks, own + rows, Hkv, D]`, and the
    queries `[T, Hq, D]`."""

    query: torch.Tensor
    prefix: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor]

    def apart(self, readers: int) -> Inputs:
        """The same with a copy of its prefix before each reader's own tokens, and nothing shared."""
        own = [
            torch.cat((prefix.repeat_interleave(readers, 0), own), 1)
            for prefix, own in zip(self.prefix, self.own, strict=True)
        ]
        return Inputs(self.query, (own[0][:, :0], own[1][:, :0]), (own[0], own[1]))


@dataclass(frozen=True, slots=True)
class Paged:
    """Inputs in pages that lie anywhere.

    Attributes:
        prefix_pages, own_pages: int32 `[groups, *]` and `[chunks, *]`, on the host.
        pools: K and V, `[pages, Hkv, page_size, D]`.
    """

    prefix_pages: np.ndarray
    own_pages: np.ndarray
    pools: tuple[torch.Tensor, torch.Tensor]


def make_inputs(shape: Shape, dtype: str, device: str) -> Inputs:
    """Random numbers from a seed."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(getattr(torch, dtype))

    kv = (shape.kv_heads, shape.head_dim)
    prefix = (numbers(shape.groups, shape.prefix, *kv), numbers(shape.groups, shape.prefix, *kv))
    tokens = shape.own + shape.rows
    own = (numbers(shape.chunks, tokens, *kv), numbers(shape.chunks, tokens, *kv))
    return Inputs(numbers(shape.num_rows, shape.heads, shape.head_dim), prefix, own)


def to_pages(inputs: Inputs, page_size: int) -> Paged:
    """Lay the KV out in pages."""
    counts = [(kv.shape[0], -(-kv.shape[1] // page_size)) for kv in (inputs.prefix[0], inputs.own[0])]
    split = counts[0][0] * counts[0][1]
    numbers = np.random.default_rng(0).permutation(split + counts[1][0] * counts[1][1]).astype(np.int32)
    tables = numbers[:split].reshape(counts[0]), numbers[split:].reshape(counts[1])
    pools = []
    for parts in zip(inputs.prefix, inputs.own, strict=True):
        _, _, kv_heads, head_dim = parts[0].shape
        pool = parts[0].new_zeros(numbers.size, kv_heads, page_size, head_dim)
        for kv, table in zip(parts, tables, strict=True):
            for page in range(table.shape[1]):
                tokens = kv[:, page * page_size : (page + 1) * page_size].transpose(1, 2)
                pool[torch.from_numpy(table[:, page]).long().to(kv.device), :, : tokens.shape[2]] = tokens
        pools.append(pool)
    return Paged(tables[0], tables[1], (pools[0], pools[1]))


def columns(shape: Shape, paged: Paged) -> Columns:
    """The step as the kernels read it: slots of the prefixes first, then those of the readers."""
    slots = np.zeros(
        (shape.groups + shape.chunks, max(paged.prefix_pages.shape[1], paged.own_pages.shape[1])), dtype=np.int32
    )
    slots[: shape.groups, : paged.prefix_pages.shape[1]] = paged.prefix_pages
    slots[shape.groups :, : paged.own_pages.shape[1]] = paged.own_pages
    reads = np.arange(shape.groups if shape.prefix else 0, dtype=np.int32)
    each = np.ones(shape.chunks, dtype=np.int32)
    return Columns(
        sequence=np.arange(shape.groups, shape.groups + shape.chunks, dtype=np.int32),
        start=each * shape.own,
        length=each * shape.rows,
        depth=each * shape.prefix,
        first_row=reads * shape.readers * shape.rows,
        rows=np.full_like(reads, shape.readers * shape.rows),
        read_sequence=reads,
        tokens=np.full_like(reads, shape.prefix),
        position=np.zeros_like(reads),
        pages=slots,
    )


Call = Callable[[], torch.Tensor]


def ours(shape: Shape, inputs: Inputs) -> tuple[Call, dict[str, Any]]:
    """Our kernel, and what the host did for it."""
    paged = to_pages(inputs, shape.page_size)
    step = columns(shape, paged)
    attention = SharedPrefixAttention(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        dtype=inputs.query.dtype,
        device=inputs.query.device,
    )
    plan = attention.plan(step)
    out = torch.empty_like(inputs.query)
    scale = shape.head_dim**-0.5
    host = {
        "items": plan.host.num_items,
        "merged_rows": plan.host.num_merged,
        "plan_seconds": host_seconds_of(lambda: attention.plan(step)),
    }
    return lambda: attention.run(inputs.query, *paged.pools, plan, scale=scale, out=out), host


def without_sharing(shape: Shape, inputs: Inputs) -> Call:
    """Our kernel where every request has all its KV for itself."""
    alone = replace(shape, groups=shape.chunks, readers=1, prefix=0, own=shape.prefix + shape.own)
    return ours(alone, inputs.apart(shape.readers))[0]


def cascade(shape: Shape, inputs: Inputs) -> Call | None:
    """FlashInfer's cascade of two levels; None where it is not installed or there is no prefix."""
    try:
        from flashinfer import MultiLevelCascadeAttentionWrapper
    except ImportError:
        return None
    if not shape.prefix:
        return None
    device = inputs.query.device
    paged = to_pages(inputs, shape.page_size)

    def indptr(count: int, size: int) -> torch.Tensor:
        return torch.arange(count + 1, dtype=torch.int32, device=device) * size

    levels = [
        (shape.groups, shape.readers * shape.rows, paged.prefix_pages, shape.prefix),
        (shape.chunks, shape.rows, paged.own_pages, shape.own + shape.rows),
    ]
    wrapper = MultiLevelCascadeAttentionWrapper(2, torch.empty(256 << 20, dtype=torch.uint8, device=device), "HND")
    wrapper.plan(
        [indptr(count, rows) for count, rows, _, _ in levels],
        [indptr(count, pages.shape[1]) for count, _, pages, _ in levels],
        [torch.from_numpy(pages.ravel()).to(device) for _, _, pages, _ in levels],
        [
            torch.full((count,), (tokens - 1) % shape.page_size + 1, dtype=torch.int32, device=device)
            for count, _, _, tokens in levels
        ],
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.page_size,
        causal=True,  # of the last level
        sm_scale=shape.head_dim**-0.5,
        q_data_type=inputs.query.dtype,
    )
    return lambda: wrapper.run(inputs.query, paged.pools)


def sdpa(shape: Shape, inputs: Inputs) -> Call | None:
    """torch's attention of all rows over all KV, and a mask for what each sees; None where that is too large."""
    device = inputs.query.device
    tokens, of_own = shape.groups * shape.prefix, shape.own + shape.rows
    keys = tokens + shape.chunks * of_own
    # Scores in float32 and their softmax, if torch has to write them out; KV once for every query head.
    needed = 4 * shape.heads * (2 * shape.num_rows * keys + 2 * keys * shape.head_dim)
    if device.type == "cuda" and needed > torch.cuda.mem_get_info()[0]:
        return None
    row = torch.arange(shape.num_rows, device=device)[:, None]
    reader = row // shape.rows
    prefix = torch.arange(tokens, device=device)[None] // max(shape.prefix, 1)
    own = torch.arange(shape.chunks * of_own, device=device)[None]
    mask = torch.cat(
        (
            prefix == reader // shape.readers,
            (own // of_own == reader) & (own % of_own <= shape.own + row % shape.rows),
        ),
        1,
    )
    group = shape.heads // shape.kv_heads
    k, v = (
        torch.cat((shared.flatten(0, 1), mine.flatten(0, 1))).repeat_interleave(group, 1).transpose(0, 1)[None]
        for shared, mine in zip(inputs.prefix, inputs.own, strict=True)
    )
    q = inputs.query.transpose(0, 1)[None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, attn_mask=mask)[0].transpose(0, 1)


PEERS: dict[str, Callable[[Shape, Inputs], Call | None]] = {"off": without_sharing, "cascade": cascade, "sdpa": sdpa}


def time_shape(shape: Shape, dtype: str, device: str, rates: Rates) -> tuple[dict[str, Any], list[str]]:
    """Microseconds of a step by all, and what disagrees with ours."""
    inputs = make_inputs(shape, dtype, device)
    call, host = ours(shape, inputs)
    result = call().clone()
    seconds = seconds_of(call, device)
    floor = shape.floor(rates, inputs.query.element_size())
    row = {"step": shape.name, "rows": shape.num_rows, "ours_us": seconds * 1e6}
    faults, errors = [], {}
    for name, make in PEERS.items():
        row[f"{name}_us"] = None
        try:
            peer = make(shape, inputs)
            if peer is None:
                continue
            theirs = peer().float()
            error = float(((theirs - result.float()).norm(dim=-1) / theirs.norm(dim=-1)).max())
            if error < _AGREE[dtype]:
                row[f"{name}_us"] = seconds_of(peer, device) * 1e6
            else:
                faults.append(f"{shape.name}: {name} differs by {error:.3g}")
        except Exception as problem:  # of others: no fault of ours
            if name == "off":
                raise
            errors[name] = f"{type(problem).__name__}: {problem}"[:400]
        peer = None  # its memory is for the next
    row |= {"floor_us": floor * 1e6, "share": floor / seconds}
    return row | {"details": {**asdict(shape), **host, "errors": errors}}, faults


def run(setting: Setting) -> Iterator[Result]:
    """Time as many steps as time allows."""
    dtype = "float32" if setting.tiny else "bfloat16"
    rates = measure_rates(setting, dtype)
    shapes = TINY_SHAPES if setting.tiny else SHAPES
    rows: list[Result] = []
    details: list[Result] = []
    faults: list[str] = []
    note = f"{dtype}, copy {rates.bandwidth / 1e9:.4g} GB/s, matrix product {rates.flops / 1e12:.4g} Tflop/s"
    for shape, timed, failed in setting.try_each(shapes, lambda one: time_shape(one, dtype, setting.device, rates)):
        if timed is None:
            faults.append(f"{shape.name}: {failed}")
        else:
            row, wrong = timed
            details.append(row.pop("details"))
            rows.append(row)
            faults += wrong
        # A peer that is there but does not run is no fault of ours, and is told.
        errors = {name: error for detail in details for name, error in detail["errors"].items()}
        faults_and_errors = [*faults, *(f"{name} did not run: {error}" for name, error in errors.items())]
        yield {
            "passed": not faults,
            "cases": len(rows),
            "of": len(shapes),
            "note": "; ".join([note, *faults_and_errors]),
            "rates": asdict(rates),
            "rows": rows,
            "details": details,
        }
