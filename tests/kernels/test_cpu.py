"""The compiled CPU kernels equal float64 on every instruction set that the processor has, and give a row the same bits
whatever else is in its step.

What is not written is NaN: outputs, and places of the pool that no row sees.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from batchrun_kernels import cpu
from batchrun_kernels.cpu import AttentionWork, CpuKernels, NotCompiled, PackedWeight, Reads
from forest_steps import ForestStep, Node, make_step, random_forest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm, silu

# The code has a way for each width of vectors. Without the flag it is the widest that the processor has.
WITHOUT = ["", "-mno-avx512f", "-mno-avx"] if platform.machine() == "x86_64" else [""]
DTYPES = [torch.float32, torch.bfloat16]
# Half the distance of neighbouring numbers, relative, at most: what one rounding may change.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
HOW = ["plain", "plus", "gated"]
# Of what attention sums, each without its sign. float32: scores of some units have an error of some roundings, which
# weights take over. bfloat16: a weight is rounded and so is the result, each by half of its last bit at most.
CLOSE = {torch.float32: 4e-6, torch.bfloat16: 2 * 2.0**-8 + 4e-6}

_made: dict[tuple[torch.dtype, str], CpuKernels] = {}


def kernels(dtype: torch.dtype, without: str = "") -> CpuKernels:
    """The kernels for a dtype, as if the processor could do less."""
    if (dtype, without) not in _made:
        with pytest.MonkeyPatch.context() as patch:
            if without:
                patch.setenv("CC", f"gcc {without}")
                patch.setattr(cpu, "_library", cpu._library.__wrapped__)  # the one that is held is the widest
            _made[dtype, without] = CpuKernels(dtype)
    return _made[dtype, without]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Attention -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What a layer attends with.

    Attributes:
        query: `[T, G, Hkv, D]`.
        pool: `[places, 2, Hkv, D]`, NaN where no row of the step sees anything.
        sinks: `[G, Hkv]`.
    """

    query: torch.Tensor
    pool: torch.Tensor
    sinks: torch.Tensor | None
    window: int | None
    softcap: float | None
    scale: float

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap, "sinks": self.sinks}


def make_layer(
    step: ForestStep,
    page_size: int,
    *,
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    seed: int = 0,
) -> Layer:
    pool = some(step.num_pages * page_size, 2, kv_heads, dim, dtype=dtype, seed=seed + 1)
    unseen = torch.ones(len(pool), dtype=torch.bool)
    for places in step.visible(None):
        unseen[places] = False
    assert unseen.any()
    pool[unseen] = float("nan")
    query = some(step.num_rows, group, kv_heads, dim, dtype=dtype, seed=seed)
    of_heads = some(group, kv_heads, seed=seed + 2) * 3 if sinks else None
    return Layer(query, pool, of_heads, window, softcap, scale=dim**-0.5)


def exact(step: ForestStep, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention in float64, by one matrix of scores, and the same of values without signs: `[T, G, Hkv, D]`."""
    rows = step.num_rows
    seen = torch.zeros(rows, len(layer.pool), dtype=torch.bool)
    for row, places in enumerate(step.visible(layer.window)):
        seen[row, places] = True
    keys, values = layer.pool.double().nan_to_num().unbind(1)
    scores = torch.einsum("tghd,phd->tghp", layer.query.double(), keys) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    if layer.sinks is not None:
        sinks = layer.sinks.double().expand(rows, *layer.sinks.shape)
        scores = torch.cat((scores, sinks[..., None]), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(layer.pool)]
    return tuple(torch.einsum("tghp,phd->tghd", weights, of) for of in (values, values.abs()))


def work_of(step: ForestStep, page_size: int, group: int, kv_heads: int) -> AttentionWork:
    """As the engine puts it: prefixes from the root down, then what each chunk has of its own."""
    of = step.columns
    reads = Reads(
        sequence=np.concatenate((of.read_sequence, of.sequence)),
        tokens=np.concatenate((of.tokens, of.start + of.length)),
        position=np.concatenate((of.position, of.depth)),
        first_row=np.concatenate((of.first_row, np.cumsum(of.length) - of.length)),
        rows=np.concatenate((of.rows, of.length)),
    )
    return AttentionWork(reads, positions(step), of.pages, page_size, group, kv_heads)


def positions(step: ForestStep) -> np.ndarray:
    return np.array([sees[-1][0] for sees in step.sees], dtype=np.int64)


def work_of_rows(
    step: ForestStep, rows: Sequence[int], page_size: int, group: int, kv_heads: int, pages: np.ndarray | None = None
) -> AttentionWork:
    """Some rows of a step in any order, each by reads of its own, as if all were decodes."""
    of = step.columns
    first, columns = np.cumsum(of.length) - of.length, []
    for at, row in enumerate(rows):
        for j in np.flatnonzero((of.first_row <= row) & (row < of.first_row + of.rows)):
            columns.append((of.read_sequence[j], of.tokens[j], of.position[j], at, 1))
        c = int(np.searchsorted(first, row, side="right")) - 1
        columns.append((of.sequence[c], of.start[c] + row - first[c] + 1, of.depth[c], at, 1))
    reads = Reads(*np.array(columns, dtype=np.int64).T)
    return AttentionWork(
        reads, positions(step)[list(rows)], of.pages if pages is None else pages, page_size, group, kv_heads
    )


def check_attention(step: ForestStep, page_size: int, dtype: torch.dtype, without: str = "", **options: Any) -> None:
    layer = make_layer(step, page_size, dtype=dtype, **options)
    _, group, kv_heads, _ = layer.query.shape
    before = layer.pool.clone()
    found = kernels(dtype, without).attend(
        layer.query, layer.pool, work_of(step, page_size, group, kv_heads), **layer.options
    )
    assert found.dtype == dtype
    assert same_bits(layer.pool, before)
    expected, sizes = exact(step, layer)
    assert bool(((found.double() - expected).abs() <= CLOSE[dtype] * sizes).all())  # NaN is not below


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.view(kind), other.view(kind))


def forest(scale: int = 1) -> list[Node]:
    """Prefixes on three levels, one of them read but for its last token, of lengths around those of chunks; decodes,
    and chunks that begin and that go on."""
    inner = Node(70 * scale, children=[Node(3, rows=1), Node(90, rows=1), Node(0, rows=11), Node(10, rows=5, cut=1)])
    outer = Node(64 * scale, children=[inner, Node(1, children=[Node(0, rows=1), Node(63, rows=2)]), Node(12, rows=1)])
    return [outer, Node(130 * scale, rows=1), Node(0, rows=1), Node(40, rows=29)]


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 96, 128, 256])
def test_attention_of_every_shape_of_heads(dim: int, dtype: torch.dtype, without: str) -> None:
    for group in (1, 3, 7, 8):
        page_size = (1, 16, 64)[(dim // 8 + group) % 3]
        step = make_step(forest(), page_size, seed=dim + group)
        check_attention(step, page_size, dtype, without, group=group, kv_heads=1 + dim % 3, dim=dim)


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 2, 17, 64, 65, 150])
def test_attention_of_every_kind_of_layer(window: int | None, dtype: torch.dtype, without: str) -> None:
    for page_size in (1, 3, 16, 64):
        step = make_step(forest(), page_size, seed=page_size)
        for softcap, sinks in ((None, False), (2.0, False), (None, True), (0.5, True)):
            check_attention(step, page_size, dtype, without, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "nodes",
    [
        [Node(0, rows=1)],
        [Node(500, rows=1)],
        [Node(0, rows=200)],
        [Node(300, children=[Node(2, rows=1) for _ in range(200)])],
    ],
    ids=["a row that sees itself", "a row", "a prompt", "many rows"],
)
def test_attention_of_one_row_and_of_many(nodes: list[Node], dtype: torch.dtype, threads: int) -> None:
    check_attention(make_step(nodes, 16), 16, dtype, group=4, dim=32)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(2, 90)),
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    page_size=st.sampled_from([1, 3, 16, 64]),
    window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.floats(0.1, 50),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    without=st.sampled_from(WITHOUT),
)
@settings(max_examples=60, deadline=None)
def test_attention_of_any_step(
    seed: int, shape: tuple[int, int, int], page_size: int, dtype: torch.dtype, without: str, **options: Any
) -> None:
    trees, levels, most = shape
    nodes = random_forest(np.random.default_rng(seed), trees=trees, levels=levels, most=most)
    step = make_step(nodes, page_size, seed=seed)
    check_attention(step, page_size, dtype, without, seed=seed % 1000, **options)


def test_a_step_without_rows_is_attended_to() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    work = AttentionWork(Reads(*[nothing] * 5), nothing, np.zeros((1, 1), dtype=np.int64), 16, 2, 2)
    found = kernels(torch.float32).attend(torch.empty(0, 2, 2, 8), some(16, 2, 2, 8), work, scale=1.0)
    assert found.shape == (0, 2, 2, 8)


@pytest.mark.parametrize("score", [3e4, -3e4])
@pytest.mark.parametrize("without", WITHOUT)
def test_extreme_scores_neither_overflow_nor_vanish(score: float, without: str) -> None:
    """A row whose scores are all far from 0 has the mean of its values, and so has one whose sink is far below."""
    step = make_step([Node(150, rows=1)], 16)
    layer = make_layer(step, 16)
    layer.query.fill_(1)
    layer.pool[:, 0] = score / 16
    work = work_of(step, 16, 2, 2)
    mean = layer.pool[step.visible(None)[0], 1].double().mean(dim=0)
    for sinks in (None, torch.full((2, 2), score - 200)):
        found = kernels(torch.float32, without).attend(layer.query, layer.pool, work, scale=1.0, sinks=sinks)
        torch.testing.assert_close(found[0], mean.float().expand(2, 2, 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_shows_in_the_rows_that_see_it_and_in_no_other(dtype: torch.dtype, without: str) -> None:
    """So that it is known whose the fault is."""
    step = make_step(forest(), 16)
    layer = make_layer(step, 16, dtype=dtype)
    work = work_of(step, 16, 2, 2)
    sound = kernels(dtype, without).attend(layer.query, layer.pool, work, **layer.options)
    layer.query[5] = float("nan")
    found = kernels(dtype, without).attend(layer.query, layer.pool, work, **layer.options)
    assert found[5].isnan().all()
    others = torch.arange(step.num_rows) != 5
    assert same_bits(found[others], sound[others])
    of = step.columns
    own = np.repeat(of.sequence, of.length)
    for part in (0, 1):
        layer = make_layer(step, 16, dtype=dtype)
        place = step.sees[-29][-1][1]  # the first row of the last chunk: all rows of the chunk see it
        layer.pool[place, part] = float("nan")
        found = kernels(dtype, without).attend(layer.query, layer.pool, work, **layer.options)
        mine = torch.from_numpy(own == own[-1])
        assert int(mine.sum()) == 29
        assert found[mine].isnan().all()
        assert same_bits(found[~mine], sound[~mine])


# A row's bits depend on the row and what it sees alone --------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(2, 90)),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 3)),
    dim=st.sampled_from([8, 15, 24, 32]),
    window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.just(2.0),
    sinks=st.booleans(),
    heights=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    some_threads=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    without=st.sampled_from(WITHOUT),
)
@settings(max_examples=60, deadline=None)
def test_attention_of_a_row_has_the_same_bits_in_any_step(
    seed: int,
    shape: tuple[int, int, int],
    heads: tuple[int, int],
    heights: tuple[int, int],
    some_threads: int,
    dtype: torch.dtype,
    without: str,
    **options: Any,
) -> None:
    """In its step; alone; beside others in any order, in blocks of other heights, by more threads, its KV elsewhere."""
    rng = np.random.default_rng(seed)
    trees, levels, most = shape
    step = make_step(random_forest(rng, trees=trees, levels=levels, most=most), 16, seed=seed)
    group, kv_heads = heads
    layer = make_layer(step, 16, group=group, kv_heads=kv_heads, dtype=dtype, seed=seed % 1000, **options)
    attend = kernels(dtype, without).attend
    in_step = attend(layer.query, layer.pool, work_of(step, 16, group, kv_heads), **layer.options)

    row = int(rng.integers(step.num_rows))
    alone = attend(
        layer.query[row : row + 1], layer.pool, work_of_rows(step, [row], 16, group, kv_heads), **layer.options
    )
    assert same_bits(alone[0], in_step[row])

    order = rng.permutation(step.num_rows)[: int(rng.integers(1, step.num_rows + 1))]
    places = step.columns.pages[:, :, None] * 16 + np.arange(16)  # as pages of one token each
    moved = torch.from_numpy(rng.permutation(len(layer.pool)))
    pages = moved.numpy()[places.reshape(len(places), -1)]
    elsewhere = torch.empty_like(layer.pool)
    elsewhere[moved] = layer.pool
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_FEWEST_VECTORS", heights[0])
        patch.setattr(cpu, "_VECTORS", heights[1])
        torch.set_num_threads(some_threads)
        try:
            works = [
                (order, layer.pool, work_of_rows(step, order, 16, group, kv_heads)),
                (order, elsewhere, work_of_rows(step, order, 1, group, kv_heads, pages)),
                (np.arange(step.num_rows), layer.pool, work_of(step, 16, group, kv_heads)),
            ]
        finally:
            torch.set_num_threads(before)
    for rows, pool, work in works:
        found = attend(layer.query[rows], pool, work, **layer.options)
        assert same_bits(found, in_step[rows])


@given(
    inner=st.integers(1, 40).map(lambda half: 2 * half),
    outer=st.integers(1, 120),
    rows=st.integers(1, 60),
    how=st.sampled_from(HOW),
    some_threads=st.integers(1, 5),
    seed=st.integers(0, 1000),
    case=st.sampled_from([(torch.bfloat16, ""), *((torch.float32, without) for without in WITHOUT)]),
)
@settings(max_examples=80, deadline=None)
def test_products_of_a_row_have_the_same_bits_beside_any_others(
    inner: int, outer: int, rows: int, how: str, some_threads: int, seed: int, case: tuple[torch.dtype, str]
) -> None:
    kernel = kernels(*case)
    if not products_are_right(kernel):
        return
    rng = np.random.default_rng(seed)
    weight = PackedWeight(kernel, some(outer, inner, dtype=kernel.dtype), some(outer, dtype=kernel.dtype))
    x = some(rows, inner, dtype=kernel.dtype, seed=seed)
    other = some(rows, outer, dtype=kernel.dtype, seed=seed + 1)
    up = PackedWeight(kernel, some(outer, inner, dtype=kernel.dtype, seed=seed + 2), None)

    def products(order: np.ndarray) -> torch.Tensor:
        if how == "gated":
            return kernel.multiply_gated(x[order], weight, up)
        return kernel.multiply(x[order], weight, other[order] if how == "plus" else None)

    together = products(np.arange(rows))
    row = rng.integers(rows, size=1)
    assert same_bits(products(row), together[row])
    order = rng.permutation(rows)[: int(rng.integers(1, rows + 1))]
    before = torch.get_num_threads()
    torch.set_num_threads(some_threads)
    try:
        assert same_bits(products(order), together[order])
    finally:
        torch.set_num_threads(before)


# Products ------------------------------------------------------------------------------------------------------------


def products_are_right(kernel: CpuKernels) -> bool:
    """bfloat16 is multiplied in pairs or not at all; what is not, `can_multiply` refuses."""
    return kernel.dtype == torch.float32 or kernel.can_multiply(2)


def check_products(
    kernel: CpuKernels, x: torch.Tensor, outer: int, *, how: str = "plain", bias: bool = True, seed: int = 0
) -> None:
    """Within what the roundings of a sum of so many products can come to, each at most half of its last bit: for any
    order of summing, `inner` roundings of the sum of the products' sizes."""
    dtype, inner = kernel.dtype, x.shape[-1]
    weight = some(outer, inner, dtype=dtype, seed=seed + 1)
    added = some(outer, dtype=dtype, seed=seed + 2) if bias else None
    packed = PackedWeight(kernel, weight, added)

    def exact(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The products, and what they may be off."""
        right, sizes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        if added is not None:
            right, sizes = right + added.double(), sizes + added.double().abs()
        return right, (inner + 1) * 2.0**-24 * sizes

    expected, bound = exact(weight)
    if how == "gated":
        up = some(outer, inner, dtype=dtype, seed=seed + 3)
        found = kernel.multiply_gated(x, packed, PackedWeight(kernel, up, added))
        expected = silu(expected)
        bound = 1.1 * bound + 2.0**-20 * expected.abs()  # its steepest; its power of 2 is good to 2 ulp
        others, off = exact(up)
        bound = bound * (others.abs() + off) + expected.abs() * off
        expected = expected * others
        bound += 2.0**-23 * expected.abs()
    elif how == "plus":
        other = some(*x.shape[:-1], outer, dtype=dtype, seed=seed + 3)
        found = kernel.multiply(x, packed, other)
        expected = expected + other.double()
    else:
        found = kernel.multiply(x, packed)
    assert found.shape == (*x.shape[:-1], outer)
    assert found.dtype == dtype
    bound += 1.01 * ROUNDING[dtype] * expected.abs() + 1e-35  # to the dtype, and to 0 next to it
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 17, 67])
def test_products(rows: int, dtype: torch.dtype, without: str, threads: int) -> None:
    kernel = kernels(dtype, without)
    if not products_are_right(kernel):
        assert not kernel.can_multiply(48)
        return
    for inner, outer in ((2, 1), (48, 48), (50, 49), (30, 95), (256, 200)):
        for how, bias in (("plain", False), ("plain", True), ("plus", False), ("gated", False), ("gated", True)):
            check_products(kernel, some(rows, inner, dtype=dtype), outer, how=how, bias=bias)


@given(
    inner=st.integers(1, 150),
    outer=st.integers(1, 200),
    leading=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    how=st.sampled_from(HOW),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=80, deadline=None)
def test_products_of_any_size(
    inner: int, outer: int, leading: list[int], how: str, bias: bool, seed: int, dtype: torch.dtype
) -> None:
    kernel = kernels(dtype)
    inner += inner % 2 and dtype == torch.bfloat16
    if products_are_right(kernel):
        check_products(kernel, some(*leading, inner, dtype=dtype, seed=seed), outer, how=how, bias=bias, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_an_odd_length_are_left_to_others(dtype: torch.dtype) -> None:
    assert not kernels(dtype).can_multiply(33)
    assert kernels(dtype).can_multiply(34) == kernels(dtype).can_multiply(2)


def test_products_of_rows_that_do_not_lie_one_after_the_other() -> None:
    kernel = kernels(torch.float32)
    wide = some(5, 3, 24)
    check_products(kernel, wide[:, 1], 17, how="plus")
    weight = some(24, 17).T  # turned
    found = kernel.multiply(wide[:, 2], PackedWeight(kernel, weight, None))
    torch.testing.assert_close(found, wide[:, 2] @ weight.T)


def test_products_that_are_no_numbers_stay_so() -> None:
    kernel = kernels(torch.float32)
    x = some(3, 8)
    x[1, 2] = float("nan")
    weight = PackedWeight(kernel, some(5, 8), None)
    for found in (kernel.multiply(x, weight), kernel.multiply_gated(x, weight, weight)):
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()
    far = torch.tensor([[1000.0], [-1000.0]]).expand(2, 8).contiguous()
    ones = PackedWeight(kernel, torch.ones(5, 8), None)
    found = kernel.multiply_gated(far, ones, ones)
    assert (found[0] == 8000.0**2).all()
    assert (found[1].abs() < 1e-26).all()


# Between products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_norm(rows: int, dtype: torch.dtype, without: str, threads: int) -> None:
    for size in (1, 8, 15, 16, 48, 129):
        check_norm(size, rows, dtype, without)


def check_norm(size: int, rows: int, dtype: torch.dtype, without: str) -> None:
    x, weight = some(rows, size, dtype=dtype) * 3, some(size, dtype=dtype, seed=1)
    found = kernels(dtype, without).norm(x, weight, 1e-6)
    assert found.dtype == dtype
    expected = rms_norm(x.double(), (size,), weight.double(), 1e-6)
    # All in float32 (a sum of squares has no cancellation), then to the dtype.
    torch.testing.assert_close(found.double(), expected, rtol=2e-6 + 1.01 * ROUNDING[dtype], atol=1e-30)
    if rows:
        assert same_bits(kernels(dtype, without).norm(x[rows // 2], weight, 1e-6), found[rows // 2])


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rows", [0, 150])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 8), (6, 2, 24), (7, 1, 34), (4, 4, 64)])
def test_take_in(
    heads: int, kv_heads: int, dim: int, rows: int, norms: bool, dtype: torch.dtype, without: str, threads: int
) -> None:
    """Queries come back, keys and values lie at their places, and at no other place does anything change."""
    qkv = some(rows, heads + 2 * kv_heads, dim, dtype=dtype)
    angle = some(rows, dim // 2, seed=1) * 10
    turn = torch.polar(torch.ones_like(angle), angle)
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(rows + 5, generator=generator)[:rows]
    pool = torch.full((rows + 5, 2, kv_heads, dim), float("nan"), dtype=dtype)
    weights = some(2, dim, dtype=dtype, seed=2)
    given = qkv.clone()
    query = kernels(dtype, without).take_in(
        given, turn, places, pool, (weights[0], weights[1], 1e-6) if norms else None
    )
    parts = list(qkv.split([heads, kv_heads, kv_heads], dim=1))
    if norms:  # a norm's result is of the dtype, as of a module's
        for i in (0, 1):
            parts[i] = rms_norm(parts[i].double(), (dim,), weights[i].double(), 1e-6).to(dtype)
    expected = [
        torch.view_as_real(torch.view_as_complex(part.double().unflatten(-1, (-1, 2))) * turn[:, None]).flatten(-2)
        for part in parts[:2]
    ]
    # A turn sums two products that may cancel: relative to the numbers that are turned. What a norm rounds to the dtype
    # may be rounded the other way.
    steps = 2.0**-21 + (3 if norms else 1.01) * ROUNDING[dtype]
    for found, whole in zip((query, pool[places, 0]), expected, strict=True):
        size = whole.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
        assert bool(((found.double() - whole).abs() <= steps * size + 1e-30).all())
    assert same_bits(pool[places, 1], parts[2].contiguous())
    untouched = torch.ones(len(pool), dtype=torch.bool)
    untouched[places] = False
    assert pool[untouched].isnan().all()


def test_there_are_no_kernels_for_other_dtypes() -> None:
    with pytest.raises(NotCompiled, match=r"torch\.float16"):
        CpuKernels(torch.float16)
