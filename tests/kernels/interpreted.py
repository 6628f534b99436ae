"""The kernels equal the reference, run by triton's interpreter on the CPU. `test_interpreted.py` runs this file in a
process of its own, because the interpreter has to be chosen before triton is loaded.

Outputs, partial results and all of the pool that no row may see are NaN before a run, so that what is read without
having been written, or not written at all, shows.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from batchrun_kernels import kernels, reference
from batchrun_kernels.attention import SharedPrefixAttention, store_kv
from batchrun_kernels.tiles import Tile
from batchrun_kernels.work_list import Columns
from forest_steps import ForestStep, Node, make_step, random_forest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAN = float("nan")
SMALL = Tile(16, 32, 4, 2, 2)


def pools(step: ForestStep, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype, seed: int) -> Any:
    """K and V pools `[pages, Hkv, N, D]` in which what was computed before the step is random and the rest NaN, and K
    and V of the step's rows `[T, Hkv, D]`."""
    generator = torch.Generator().manual_seed(seed)
    mine = set(step.places.tolist())
    before = torch.tensor(sorted({place for sees in step.sees for _, place in sees} - mine), dtype=torch.int64)
    made = []
    for _ in range(2):
        pool = torch.full((step.num_pages, kv_heads, page_size, head_dim), NAN, dtype=dtype)
        pool[before // page_size, :, before % page_size] = torch.randn(
            before.numel(), kv_heads, head_dim, generator=generator
        ).to(dtype)
        made.append(pool)
    new = [torch.randn(step.num_rows, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2)]
    return *made, *new


def by_place(pool: torch.Tensor) -> torch.Tensor:
    """`[pages, Hkv, N, D]` as the reference has it, `[places, Hkv, D]`."""
    return pool.transpose(1, 2).flatten(0, 1)


def check(
    step: ForestStep,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    scale: float = 0.3,
    deterministic: bool = False,
    tma: bool = True,
    tile: Tile = SMALL,
    seed: int = 0,
    **rules: Any,
) -> tuple[torch.Tensor, Any]:
    """Run a step and compare each row with the reference; gives the result and the plan."""
    heads_q, heads_kv = heads
    attention = SharedPrefixAttention(
        heads=heads_q,
        kv_heads=heads_kv,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        device="cpu",
        deterministic=deterministic,
        tile=tile,
        rules=rules,
        tma=tma,
    )
    keys, values, new_key, new_value = pools(step, heads_kv, page_size, head_dim, dtype, seed)
    store_kv(new_key, new_value, keys, values, step.places)
    assert torch.equal(by_place(keys)[step.places], new_key)
    assert torch.equal(by_place(values)[step.places], new_value)
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(step.num_rows, heads_q, head_dim, generator=generator).to(dtype)
    sink = torch.randn(heads_q, generator=generator).to(dtype) if sinks else None

    plan = attention.plan(step.columns, window=window)
    attention._partial_out.fill_(NAN)
    attention._partial_lse.fill_(NAN)
    out = torch.full_like(query, NAN)
    attention.run(query, keys, values, plan, scale=scale, softcap=softcap, sinks=sink, out=out)
    expected, _ = reference.shared_prefix_attention(
        query, by_place(keys), by_place(values), step.visible(window), scale=scale, softcap=softcap, sinks=sink
    )
    if step.num_rows:
        error = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.max()) < TOLERANCE[dtype], error.amax(dim=1)  # NaN is not below
    return out, plan


def group(prefix: int, readers: int, own: tuple[int, ...], rows: tuple[int, ...] = (1,)) -> Node:
    """A prefix and its readers; reader i has computed `own[i % ...]` tokens and computes `rows[i % ...]`."""
    return Node(prefix, children=[Node(own[i % len(own)], rows[i % len(rows)]) for i in range(readers)])


def deep(*lengths: int, branching: int, own: tuple[int, ...], rows: tuple[int, ...] = (1,)) -> Node:
    """A tree of prefixes, one length a level, each with `branching` children."""
    if len(lengths) == 1:
        return group(lengths[0], branching, own, rows)
    return Node(
        lengths[0], children=[deep(*lengths[1:], branching=branching, own=own, rows=rows) for _ in range(branching)]
    )


APART = {"merge_cost": 0.0, "item_cost": -1e9}  # every prefix is an item of its own
ALONG = {"item_cost": 1e9}  # none is

any_case = st.fixed_dictionaries({
    "seed": st.integers(0, 1 << 30),
    "trees": st.integers(1, 3),
    "levels": st.integers(0, 3),
    "ratio": st.sampled_from([1, 2, 3, 5]),
    "window": st.none() | st.integers(1, 60),
    "programs": st.sampled_from([1, 3, 200]),
    "rules": st.sampled_from([{}, APART, ALONG, {"merge_cost": 1.0, "item_cost": 0.0}, {"deterministic": True}]),
    "features": st.booleans(),
    "tma": st.booleans(),
})  # fmt: skip


class TestGrid:
    @pytest.mark.parametrize("page_size", [16, 64])
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("ratio", [1, 2, 4, 7, 8])
    def test_ratios_heads_and_pages(self, ratio: int, head_dim: int, page_size: int) -> None:
        step = make_step([group(page_size + 3, 3, (4, 0, page_size), (1, 1, 6)), Node(3, 2)], page_size)
        kv_heads = 2 if ratio < 4 else 1
        check(step, heads=(ratio * kv_heads, kv_heads), head_dim=head_dim, page_size=page_size, dtype=torch.float16,
              tma=ratio != 2, **APART)  # fmt: skip

    @pytest.mark.parametrize("head_dim", [24, 80, 96, 192, 256])
    @pytest.mark.parametrize("tma", [False, True])
    def test_heads_that_are_no_power_of_two_and_wide_ones(self, head_dim: int, tma: bool) -> None:
        check(make_step([group(20, 3, (4,))], 16), heads=(4, 2), head_dim=head_dim, dtype=torch.float16, tma=tma)

    @pytest.mark.parametrize("heads", [(3, 3), (17, 1), (40, 1), (14, 2)])
    def test_mha_mqa_and_odd_ratios(self, heads: tuple[int, int]) -> None:
        tall = Tile(max(16, 1 << (heads[0] // heads[1] - 1).bit_length()), 64, 4, 2, 2)
        check(make_step([group(20, 3, (4,), (1, 5))], 16), heads=heads, tile=tall, **APART)

    @pytest.mark.parametrize("page_size", [16, 32, 64])
    @pytest.mark.parametrize("off", [-1, 0, 1])
    def test_page_boundaries(self, page_size: int, off: int) -> None:
        n = page_size + off
        step = make_step([group(n, 3, (n - 1, n, page_size + n), (1, 1, 20)), Node(n - 1, 1)], page_size)
        check(step, heads=(2, 1), page_size=page_size, **APART)
        check(step, heads=(2, 1), page_size=page_size, **ALONG)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("tma", [False, True])
    def test_dtypes(self, dtype: torch.dtype, tma: bool) -> None:
        step = make_step([group(17, 2, (1, 30), (1, 20)), Node(40, 3)], 16)
        check(step, dtype=dtype, tma=tma, **APART)


class TestForests:
    @pytest.mark.parametrize("rules", [{}, APART, ALONG])
    @pytest.mark.parametrize("lengths", [(), (9,), (33, 5), (16, 40, 3)])
    def test_levels(self, lengths: tuple[int, ...], rules: dict[str, float]) -> None:
        forest = [deep(*lengths, branching=2, own=(0, 18), rows=(1, 3))] if lengths else []
        forest += [Node(0, 1), Node(0, 40), Node(31, 1), Node(5, 21)]
        _, plan = check(make_step(forest, 16), heads=(2, 1), **rules)
        if rules:
            assert bool(plan.host.num_slots) == (rules is APART and bool(lengths))

    def test_groups_of_one_and_prompts_that_end_inside_a_prefix(self) -> None:
        forest = [Node(20, children=[Node(0, 1, cut=1), Node(0, 1, cut=20), Node(0, 2), Node(7, 1, cut=4)]),
                  Node(16, children=[Node(0, 1)])]  # fmt: skip
        check(make_step(forest, 16), **APART)
        check(make_step(forest, 16), **ALONG)

    def test_a_read_that_cuts_a_chunk_is_read_apart(self) -> None:
        step = make_step([group(20, 2, (3,), (4,))], 16)
        step.columns.rows[0] = 6  # the last two rows of the second chunk see nothing of it
        for row in (6, 7):
            step.sees[row] = step.sees[row][20:]
        check(step, **ALONG)

    @pytest.mark.parametrize("programs", [1, 64])
    @pytest.mark.parametrize("min_split", [1, 32, 10_000])
    def test_splits(self, programs: int, min_split: int) -> None:
        forest = [group(100, 2, (50, 3)), Node(90, 1), Node(20, 40)]
        _, plan = check(make_step(forest, 16), programs=programs, min_split=min_split, **APART)
        splits = plan.host.num_items > 1 + 2 + 1 + 40 // 16 + 1
        assert splits == (min_split < 10_000 and programs == 64)

    def test_every_row_of_a_step_can_be_in_many_pieces(self) -> None:
        step = make_step([deep(40, 70, branching=2, own=(33, 50))], 16)
        check(step, heads=(2, 1), programs=10_000, min_split=1, **APART)

    def test_a_step_of_nothing(self) -> None:
        out, plan = check(make_step([], 16))
        assert out.shape[0] == plan.host.num_items == 0

    @given(case=any_case)
    @settings(max_examples=10, deadline=None, derandomize=True)
    def test_any_step(self, case: dict[str, Any]) -> None:
        self.any_step(most=30, **case)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    @given(case=any_case)
    @settings(max_examples=100, deadline=None)
    def test_many_steps(self, case: dict[str, Any]) -> None:
        self.any_step(most=60, **case)

    def any_step(self, *, most: int, seed: int, trees: int, levels: int, ratio: int, features: bool,
                 rules: dict[str, Any], **options: Any) -> None:  # fmt: skip
        step = make_step(
            random_forest(np.random.default_rng(seed), trees=trees, levels=levels, most=most), 16, seed=seed
        )
        check(step, heads=(ratio, 1), min_split=32, fixed_split=32, softcap=2.0 if features else None, sinks=features,
              seed=seed, **rules, **options)  # fmt: skip


class TestFeatures:
    @pytest.mark.parametrize("rules", [APART, ALONG, {"deterministic": True, "fixed_split": 32}])
    @pytest.mark.parametrize("window", [1, 17, 33])
    def test_windows(self, window: int, rules: dict[str, Any]) -> None:
        forest = [deep(19, 33, branching=1, own=(0, 40), rows=(1,)), group(9, 2, (0, 1), (30, 2)), Node(0, 50)]
        check(make_step(forest, 16), heads=(2, 1), window=window, **rules)

    def test_a_window_leaves_out_the_tiles_that_no_row_sees(self) -> None:
        step = make_step([group(160, 3, (160,))], 16)
        _, plan = check(step, window=20, **APART)
        items = plan.host.part("items")
        assert (items[:, 6] - items[:, 3] <= 3).all()
        assert len(items) == 3  # the prefix is out of sight

    @pytest.mark.parametrize("softcap", [0.5, 30.0])
    @pytest.mark.parametrize("scale", [0.1, 4.0])
    def test_softcap(self, softcap: float, scale: float) -> None:
        check(make_step([group(20, 3, (4, 20), (1, 3))], 16), softcap=softcap, scale=scale, **APART)

    @pytest.mark.parametrize("rules", [APART, ALONG])
    @pytest.mark.parametrize("heads", [(4, 2), (10, 2), (20, 1)])
    def test_sinks_enter_once(self, heads: tuple[int, int], rules: dict[str, float]) -> None:
        tile = Tile(32, 32, 4, 2, 2)
        step = make_step([group(40, 3, (4, 20), (1, 3)), Node(0, 1)], 16)
        check(step, heads=heads, sinks=True, tile=tile, **rules)
        check(step, heads=heads, sinks=True, window=10, softcap=5.0, tile=tile, programs=1000, min_split=1, **rules)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
    def test_scales(self, scale: float) -> None:
        check(make_step([group(20, 3, (4,))], 16), scale=scale, dtype=torch.float32, **APART)


class TestDeterministic:
    @pytest.mark.parametrize("prefix", [0, 43])  # without one some rows have a partial result in some steps only
    def test_the_bits_of_a_row_do_not_depend_on_its_step(self, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Chunks of one sequence and its decodes, alone and among others, cut in different places."""

        # numpy's matrix product rounds a row by where in the matrix it stands; a matrix unit adds every row alike.
        def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> TensorHandle:
            products = a.data.astype(np.float32)[:, :, None] * b.data.astype(np.float32)
            return TensorHandle(products.sum(axis=1) + d.data, d.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
        rng = np.random.default_rng(5)
        heads_q, heads_kv, head_dim, page_size, window = 2, 1, 16, 16, 50
        total = 70
        pages = np.stack([rng.permutation(40)[:12] for _ in range(3)])
        generator = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(40, heads_kv, page_size, head_dim, generator=generator) for _ in range(2))
        query = torch.randn(total, heads_q, head_dim, generator=generator)
        sinks = torch.randn(heads_q, generator=generator)

        def rows(begin: int, stop: int, before: int, after: int, window: int | None,
                 deterministic: bool = True) -> torch.Tensor:  # fmt: skip
            """Own tokens [begin, stop) of sequence 1 in a step, with other readers of its prefix before and after."""
            attention = SharedPrefixAttention(heads=heads_q, kv_heads=heads_kv, head_dim=head_dim, page_size=page_size,
                                              dtype=torch.float32, device="cpu", tile=SMALL,
                                              deterministic=deterministic, rules={"fixed_split": 32})  # fmt: skip
            others = np.array([1] * before + [stop - begin] + [1] * after, np.int32)
            at = before
            start = np.full(others.size, 50, np.int32)
            start[at] = begin
            sequence = np.full(others.size, 2, np.int32)
            sequence[at] = 1
            reads = [np.array([n], np.int32)[: prefix > 0] for n in (0, int(others.sum()), 0, prefix, 0)]
            step = Columns(sequence, start, others, np.full(others.size, prefix, np.int32), *reads, pages=pages)
            here = torch.randn(int(others.sum()), heads_q, head_dim, generator=generator)
            here[before : before + stop - begin] = query[begin:stop]
            plan = attention.plan(step, window=window)
            out = attention.run(here, keys, values, plan, scale=0.2, sinks=sinks, softcap=20.0)
            return out[before : before + stop - begin]

        for w in (None, window) if prefix else (None,):
            whole = rows(0, total, 0, 0, w)
            for cuts, before, after in (([0, 1, 40, 70], 3, 2), ([0, 33, 69, 70], 0, 9)):
                parts = [rows(a, b, before, after, w) for a, b in pairwise(cuts)]
                assert torch.equal(torch.cat(parts), whole)
        if prefix:  # otherwise they do: it is read along by one chunk, and apart for many
            assert not torch.equal(rows(60, 70, 0, 0, None, False), rows(60, 70, 0, 60, None, False))


class TestMerge:
    @pytest.mark.parametrize("sinks", [False, True])
    @pytest.mark.parametrize("heads", [1, 3, 8, 12])
    def test_merge_equals_the_reference(self, heads: int, sinks: bool) -> None:
        """Rows of one to seven partial results: some empty, all empty, and with scores that would overflow."""
        generator = torch.Generator().manual_seed(0)
        dim, counts = 24, [1, 7, 2, 3, 2, 2]
        slots = torch.randperm(sum(counts), generator=generator)
        outs = torch.randn(sum(counts), heads, dim, generator=generator)
        lses = torch.randn(sum(counts), heads, generator=generator) * 4
        begins = np.cumsum([0, *counts])
        lses[slots[1:3]] = float("-inf")
        lses[slots[begins[3] : begins[4]]] = float("-inf")
        lses[slots[begins[4]]], lses[slots[begins[5]]] = 500.0, -500.0
        outs[lses == float("-inf")] = 0.0
        rows = [4, 0, 9, 3, 5, 7]
        parts = [rows, begins.tolist(), slots.tolist()]
        at = np.cumsum([8, *map(len, parts)])
        work = torch.tensor([0, 0, 0, 0, len(rows), *at[:3], *chain(*parts)], dtype=torch.int32)
        sink = torch.randn(heads, generator=generator) if sinks else None
        out = torch.full((10, heads, dim), NAN)
        kernels.merge_states[(2,)](outs, lses, out, lses if sink is None else sink, work, H=4, HEADS=heads, D=dim,
                                   W=32, SINKS=sinks)  # fmt: skip
        for entry, row in enumerate(rows):
            mine = slots[begins[entry] : begins[entry + 1]]
            expected, _ = reference.merge_states(outs[mine], lses[mine], sink)
            torch.testing.assert_close(out[row], expected)
        untouched = [row for row in range(10) if row not in rows]
        assert out[untouched].isnan().all()


class TestStore:
    @pytest.mark.parametrize("head_dim", [64, 80])
    @pytest.mark.parametrize("rows", [0, 1, 16, 37])
    def test_rows_go_to_their_places_and_nowhere_else(self, rows: int, head_dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        packed = torch.randn(rows, 3 * 2 * head_dim, generator=generator)  # q, k, v of two heads side by side
        key, value = (packed[:, n * 2 * head_dim : (n + 1) * 2 * head_dim].unflatten(1, (2, head_dim)) for n in (1, 2))
        keys, values = (torch.full((5, 2, 16, head_dim), NAN) for _ in range(2))
        places = torch.randperm(80, generator=generator)[:rows]
        places[::3] = -1
        store_kv(key, value, keys, values, places)
        stored = places >= 0
        for pool, new in ((keys, key), (values, value)):
            expected = torch.full((80, 2, head_dim), NAN)
            expected[places[stored]] = new[stored]
            torch.testing.assert_close(by_place(pool), expected, equal_nan=True, rtol=0, atol=0)


class TestInterface:
    def make(self, **changes: Any) -> SharedPrefixAttention:
        shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "page_size": 16, "dtype": torch.float32, "device": "cpu"}
        return SharedPrefixAttention(**{**shape, **changes})

    @pytest.mark.parametrize("changes", [{"heads": 3}, {"head_dim": 20}, {"head_dim": 264}, {"page_size": 24},
                                         {"page_size": 8}, {"dtype": torch.float64}, {"device": "cuda"}])  # fmt: skip
    def test_what_is_not_computed_is_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError):
            self.make(**changes)

    def test_tensors_of_other_shapes_are_refused(self) -> None:
        attention = self.make()
        step = make_step([Node(0, 3)], 16)
        plan = attention.plan(step.columns)
        query, pool = torch.zeros(3, 4, 16), torch.zeros(4, 2, 16, 16)
        attention.run(query, pool, pool, plan, scale=1.0)
        for bad in ((query[:2], pool, pool), (query.half(), pool, pool), (query, pool.transpose(1, 2), pool),
                    (query, pool, pool[:, :1])):  # fmt: skip
            with pytest.raises(ValueError):
                attention.run(*bad, plan, scale=1.0)
        with pytest.raises(ValueError):
            attention.run(query, pool, pool, plan, scale=1.0, sinks=torch.zeros(3))
        with pytest.raises(ValueError):
            store_kv(torch.zeros(3, 2, 16), torch.zeros(3, 1, 16), pool, pool, torch.zeros(3, dtype=torch.int64))

    def test_work_lists_stay_in_place_until_they_outgrow_it(self) -> None:
        attention = self.make(ints=100, slots=4)
        small, large = make_step([Node(0, 3)], 16), make_step([group(40, 9, (20,))], 16)
        first = attention.plan(small.columns).work.data_ptr()
        assert attention.plan(small.columns).work.data_ptr() == first
        grown = attention.plan(large.columns).work.data_ptr()
        assert grown == attention.plan(small.columns).work.data_ptr() != first

    def test_rows_beyond_the_plan_are_left_alone(self) -> None:
        attention = self.make()
        step = make_step([Node(0, 3)], 16)
        query, pool = torch.ones(8, 4, 16), torch.ones(4, 2, 16, 16)
        out = torch.full_like(query, NAN)
        attention.run(query, pool, pool, attention.plan(step.columns), scale=1.0, out=out)
        assert not out[:3].isnan().any()
        assert out[3:].isnan().all()
