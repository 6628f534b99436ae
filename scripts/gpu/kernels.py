"""The kernels equal the reference on the device: every ratio of heads, head size, page size and dtype, over a forest of
all kinds of rows, with prefixes that end at, before and after the end of a page, read in all ways that a step can be
cut. Outputs, partial results and all of the pool that no row may see are NaN before a run."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from batchrun_kernels import reference
from batchrun_kernels.attention import SharedPrefixAttention, store_kv
from batchrun_kernels.work_list import Columns
from forest_steps import ForestStep, Node, make_step

from .setting import Result, Setting

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # ‖row − reference‖ / ‖reference‖, in float32
_APART = {"merge_cost": 0.0, "item_cost": -1e9}  # every prefix is read for all its readers at once
RULES: dict[str, dict[str, Any]] = {
    "chosen": {},
    "apart, not split": {**_APART, "min_split": 1 << 30},
    "apart, split": {**_APART, "programs": 10_000, "min_split": 1},
    "along": {"item_cost": 1e9},
    "deterministic": {"deterministic": True, "fixed_split": 64},
}
_KV_HEADS = 2


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel as it is compiled, and steps to run it on.

    Attributes:
        group: query heads per KV head.
        window, softcap, sinks: features of a layer.
        offs: for each step, by how many tokens its prefixes end after the end of a page.
        rules: how steps are cut, by the names of `RULES`.
    """

    group: int
    head_dim: int
    page_size: int
    dtype: str
    window: int | None
    softcap: float | None
    sinks: bool
    offs: tuple[int, ...] = (-1, 0, 1)
    rules: tuple[str, ...] = tuple(RULES)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Attributes:
    error: the largest relative error of a row; NaN where one was not computed, or the kernel did not run.
    fault: what is wrong, or None.
    lost: whether the process that ran it is good for no other.
    """

    case: Case
    error: float
    fault: str | None
    lost: bool = False


def cases(tiny: bool) -> list[Case]:
    """Every shape once, with the features changing from shape to shape, in an order of chance: wherever time ends,
    all values have been seen beside each other."""
    features: list[Any] = list(product((None, 20), (None, 2.0), (False, True)))
    shapes: list[Any]
    if tiny:
        shapes = [(2, 16, 16, "float32"), (7, 24, 16, "float16"), (1, 64, 32, "bfloat16")]
        features = [(None, None, False), (20, 2.0, True), (None, 2.0, True)]
        return [
            Case(*[*shape, *feature, (off,)]) for shape, feature, off in zip(shapes, features, (-1, 0, 1), strict=True)
        ]
    shapes = list(product((1, 2, 4, 7, 8), (64, 80, 96, 128, 192, 256), (16, 32, 64), TOLERANCE))
    chance = random.Random(0)
    chance.shuffle(shapes)
    usual = tuple(name for name in RULES if name != "deterministic")  # which is another kernel to compile
    return [
        Case(*shape, *features[nth % len(features)], rules=usual if nth % 3 else tuple(RULES))
        for nth, shape in enumerate(shapes)
    ]


def forest(page_size: int, off: int, *, small: bool = False) -> list[Node]:
    """Decodes and prefill chunks beside each other, with no own KV yet, some, and pages of it; prefixes of one reader;
    three levels; a prompt that ends inside a prefix; requests that share nothing."""
    n = page_size + off
    mixed = [Node(n - 1, 1), Node(0, 1), Node(3, 5 if small else 21)]
    deep = [Node(n, children=[Node(0, 1), Node(4, 3)]), Node(2, 1)]
    more = [] if small else [Node(page_size + n, 1), Node(0, page_size + 1), Node(n, 1)]
    return [
        Node(n, children=[*mixed, *more]),
        Node(2 * n, children=[Node(5, 1)]),
        Node(n, children=[Node(9, children=deep), Node(0, 1, cut=3)]),
        Node(n, 1),
        *([] if small else [Node(0, 40), Node(5 * page_size, 3)]),
    ]


def check(case: Case, device: str) -> float:
    """The largest relative error of a row over the steps and rules of a case."""
    worst = []
    for off in case.offs:
        step = make_step(forest(case.page_size, off, small=len(case.offs) == 1), case.page_size, seed=off + 1)
        worst += _check_step(case, step, device)
    return float(torch.stack(worst).max())  # NaN is the maximum of all


def _check_step(case: Case, step: ForestStep, device: str) -> list[torch.Tensor]:
    dtype, heads = getattr(torch, case.dtype), _KV_HEADS * case.group
    generator = torch.Generator().manual_seed(step.num_pages)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = numbers(step.num_rows, heads, case.head_dim)
    sinks = numbers(heads) if case.sinks else None
    new = [numbers(step.num_rows, _KV_HEADS, case.head_dim) for _ in range(2)]
    old = torch.tensor(sorted({place for sees in step.sees for _, place in sees} - set(step.places.tolist())))
    pools, expected_pools = [], []
    for rows in new:
        flat = torch.full((step.num_pages * case.page_size, _KV_HEADS, case.head_dim), float("nan"), dtype=dtype)
        flat[old] = numbers(old.numel(), _KV_HEADS, case.head_dim)
        pools.append(flat.unflatten(0, (-1, case.page_size)).transpose(1, 2).contiguous().to(device))
        flat[step.places] = rows
        expected_pools.append(flat)
    keys, values = pools
    store_kv(new[0].to(device), new[1].to(device), keys, values, step.places.to(device))
    for pool, flat in zip(pools, expected_pools, strict=True):
        if not torch.equal(pool.cpu().transpose(1, 2).flatten(0, 1).nan_to_num(7.0), flat.nan_to_num(7.0)):
            raise AssertionError("store_kv wrote something else, or elsewhere")
    expected, _ = reference.shared_prefix_attention(
        query,
        expected_pools[0],
        expected_pools[1],
        step.visible(case.window),
        scale=0.3,
        softcap=case.softcap,
        sinks=sinks,
    )
    errors = []
    for rules in map(RULES.__getitem__, case.rules):
        deterministic = rules.get("deterministic", False)
        attention = SharedPrefixAttention(
            heads=heads,
            kv_heads=_KV_HEADS,
            head_dim=case.head_dim,
            page_size=case.page_size,
            dtype=dtype,
            device=device,
            deterministic=deterministic,
            rules=rules,
        )

        def attend(columns: Columns, rows: torch.Tensor, attention: SharedPrefixAttention = attention) -> torch.Tensor:
            plan = attention.plan(columns, window=case.window)
            attention._partial_out.fill_(float("nan"))
            attention._partial_lse.fill_(float("nan"))
            return attention.run(
                rows.to(device),
                keys,
                values,
                plan,
                scale=0.3,
                softcap=case.softcap,
                sinks=None if sinks is None else sinks.to(device),
                out=torch.full_like(rows, float("nan"), device=device),
            ).cpu()

        out = attend(step.columns, query)
        errors.append(((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        if deterministic:
            _check_alone(step.columns, query, out, attend, exactly=device != "cpu")
    return errors


def _check_alone(columns: Columns, query: torch.Tensor, out: torch.Tensor, attend: Any, *, exactly: bool) -> None:
    """See that chunks get the bits alone that they have among others; the interpreter's products round by place."""
    first = np.cumsum(columns.length) - columns.length
    for chunk in range(0, len(first), 3):
        rows = slice(int(first[chunk]), int(first[chunk] + columns.length[chunk]))
        alone = attend(of_one_chunk(columns, chunk), query[rows])
        if not (torch.equal(alone, out[rows]) if exactly else torch.allclose(alone, out[rows], rtol=1e-2, atol=1e-2)):
            raise AssertionError(f"deterministic: chunk {chunk} differs when it is alone")


def of_one_chunk(columns: Columns, chunk: int) -> Columns:
    """A step of one chunk of another, with what it reads."""
    first = int(columns.length[:chunk].sum())
    length = columns.length[chunk : chunk + 1]
    mine = (columns.first_row <= first) & (first < columns.first_row + columns.rows)
    return replace(
        columns,
        **{name: getattr(columns, name)[chunk : chunk + 1] for name in ("sequence", "start", "length", "depth")},
        **{name: getattr(columns, name)[mine] for name in ("read_sequence", "tokens", "position")},
        first_row=np.zeros_like(columns.first_row[mine]),
        rows=np.broadcast_to(length, int(mine.sum())).copy(),
    )


def outcome(case: Case, setting: Setting) -> Outcome:
    """What became of a case; nothing that it raises is raised."""
    try:
        error = check(case, setting.device)
    except Exception as problem:  # the other cases are wanted all the same
        return Outcome(case, float("nan"), f"{type(problem).__name__}: {problem}"[:400], lost=not setting.answers())
    within = error < TOLERANCE[case.dtype]  # NaN is not
    return Outcome(case, error, None if within else f"relative error {error:.3g}")


def outcomes(asked: Sequence[Case], setting: Setting) -> Iterator[Outcome]:
    """Of as many cases as time allows, each when it is known."""
    if not setting.workers:
        for case in setting.take(asked):
            yield (found := outcome(case, setting))
            if found.lost:
                return
    waiting = deque(asked if setting.workers else ())

    def more() -> bool:
        return bool(waiting) and (len(waiting) == len(asked) or setting.seconds_left() > 0)

    while more():
        sound = True
        running: dict[Future[Outcome], Case] = {}
        with ProcessPoolExecutor(setting.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            while running or (sound and more()):
                # No more than there are processes: what waits in a pool cannot be taken back when time is up.
                while sound and more() and len(running) < setting.workers:
                    try:
                        running[pool.submit(outcome, waiting[0], setting)] = waiting[0]
                        waiting.popleft()
                    except BrokenProcessPool:  # since it was looked at
                        sound = False
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    case, died = running.pop(future), future.exception()  # of its process, or of one beside it
                    found = Outcome(case, float("nan"), repr(died), lost=True) if died else future.result()
                    sound &= not found.lost  # the others have a new pool
                    yield found


def run(setting: Setting) -> Iterator[Result]:
    """Check as many cases as time allows; the largest error for each dtype."""
    asked = cases(setting.tiny)
    found = []
    for each in outcomes(asked, setting):
        found.append(each)
        yield _told(found, len(asked))


def _told(found: Sequence[Outcome], asked: int) -> Result:
    faults = [f"{case_name(each.case)}: {each.fault}" for each in found if each.fault]
    rows = []
    for dtype, limit in TOLERANCE.items():
        mine = [each for each in found if each.case.dtype == dtype]
        ran = [each.error for each in mine if each.error == each.error]
        if mine:
            rows.append({
                "dtype": dtype, "cases": len(mine), "largest_error": max(ran, default=None), "limit": limit,
                "failed": sum(each.fault is not None for each in mine),
            })  # fmt: skip
    return {
        "passed": not faults,
        "cases": len(found),
        "of": asked,
        "note": f"{len(faults)} failed, the first: {faults[0]}" if faults else "",
        "rows": rows,
        "faults": faults,
    }


def case_name(case: Case) -> str:
    """As a person reads it."""
    features = [f"{name} {value}" for name in ("window", "softcap") if (value := getattr(case, name)) is not None]
    shape = f"{case.dtype} G={case.group} D={case.head_dim} page={case.page_size}"
    return ", ".join([shape, *features, *(["sinks"] if case.sinks else [])])
