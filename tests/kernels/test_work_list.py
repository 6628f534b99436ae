"""Work lists: every row is given all that it sees, once, whatever the rules; what is unmasked is seen by all."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from batchrun_kernels.work_list import HEADER, ITEM, TALL, TILE, Columns, Rules, WorkList, make_work_list
from forest_steps import ForestStep, Node, make_step, random_forest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.schedule.step import PrefixReads, Step

PAGE = 16
APART = {"merge_cost": 0.0, "item_cost": -1e9}
ALONG = {"item_cost": 1e9}


def rules(**changes: object) -> Rules:
    defaults = {"group": 2, "kv_heads": 2, "page_size": PAGE, "short": 4, "tall": 16, "programs": 8, "min_split": 32}
    return Rules(**{**defaults, **changes})  # type: ignore[arg-type]


def follow(work: WorkList, step: ForestStep, window: int | None) -> None:
    """Walk a list as the kernel does, item by item and row by row, and compare with what each row sees."""
    items, tiles, positions = work.part("items"), work.part("tiles"), work.part("positions")
    seen: list[list[tuple[int, int]]] = [[] for _ in step.sees]
    slots_of: dict[int, list[int]] = {}
    direct = []
    for item in items.tolist():
        _, first_row, rows, begin, full_begin, full_end, end, slot = item
        assert begin <= full_begin <= full_end <= end
        assert begin < end
        for row in range(first_row, first_row + rows):
            if slot < 0:
                direct.append(row)
            else:
                slots_of.setdefault(row, []).append(slot + row - first_row)
            for index in range(begin, end):
                page, position, tokens = tiles[index].tolist()
                visible = [
                    (position + token, page * PAGE + token)
                    for token in range(tokens)
                    if position + token <= positions[row]
                    and (window is None or position + token > positions[row] - window)
                ]
                if full_begin <= index < full_end:
                    assert len(visible) == PAGE
                seen[row] += visible
    low = [sees[-1][0] - window if window is not None else -1 for sees in step.sees]
    assert [sorted(places) for places in seen] == [
        sorted(place for place in sees if place[0] > least) for sees, least in zip(step.sees, low, strict=True)
    ]
    # Each row is written once, by its only item or by the merge; each slot is written once and read once.
    merged, begins, slots = work.part("merged"), work.part("begins"), work.part("slots")
    assert sorted([*direct, *merged.tolist()]) == list(range(work.num_rows))
    for entry, row in enumerate(merged.tolist()):
        assert sorted(slots[begins[entry] : begins[entry + 1]].tolist()) == sorted(slots_of.pop(row))
    assert not slots_of
    assert sorted(slots.tolist()) == list(range(work.num_slots))
    assert (work.num_items, work.num_merged, work.num_rows) == (len(items), len(merged), len(step.sees))
    sizes = items[:, ITEM.index("end")] - items[:, ITEM.index("begin")]
    assert (np.diff(sizes) <= 0).all()


@given(
    seed=st.integers(0, 1 << 30),
    trees=st.integers(0, 4),
    levels=st.integers(0, 3),
    most=st.integers(2, 90),
    window=st.none() | st.integers(1, 100),
    group=st.sampled_from([1, 2, 3]),
    programs=st.sampled_from([1, 8, 1000]),
    changes=st.sampled_from(
        [{}, APART, ALONG, {"merge_cost": 1.0, "item_cost": 0.0}, {"deterministic": True, "fixed_split": 32}]
    ),
)
@settings(max_examples=150, deadline=None)
def test_every_row_is_given_what_it_sees_once(
    seed: int,
    trees: int,
    levels: int,
    most: int,
    window: int | None,
    group: int,
    programs: int,
    changes: dict[str, float],
) -> None:
    step = make_step(random_forest(np.random.default_rng(seed), trees=trees, levels=levels, most=most), PAGE, seed=seed)
    asked = rules(group=group, programs=programs, **changes)
    work = make_work_list(step.columns, asked, window=window)
    follow(work, step, window)
    heights = np.array([asked.short, asked.tall])[work.part("items")[:, 0]]
    assert (work.part("items")[:, ITEM.index("rows")] * group <= heights).all()
    assert np.array_equal(make_work_list(step.columns, asked, window=window).data, work.data)


def node(readers: int, tokens: int, own: int = 5) -> ForestStep:
    return make_step([Node(tokens, children=[Node(own, 1) for _ in range(readers)])], PAGE)


def test_the_gate_reads_a_prefix_apart_where_that_saves_more_than_merging_costs() -> None:
    """Two query heads per KV head: a partial result costs 4 tokens, an item 128."""
    for readers, tokens, apart in ((1, 5000, False), (2, 130, False), (2, 140, True), (7, 26, False), (7, 27, True)):
        work = make_work_list(node(readers, tokens).columns, rules(programs=1))
        assert (work.num_items == readers + 1) == apart, (readers, tokens)
        assert work.num_slots == (2 * readers if apart else 0)


def test_without_sharing_every_row_is_written_directly() -> None:
    step = make_step([Node(40, 1), Node(0, 30), Node(90, 3)], PAGE)
    work = make_work_list(step.columns, rules(programs=1))
    assert (work.num_merged, work.num_slots) == (0, 0)


def test_splits_shorten_the_longest_item_to_half_of_what_a_program_has_to_do() -> None:
    step = make_step([Node(1599, 1)], PAGE)  # 100 tiles, 2 KV heads
    for programs, most in ((1, 100), (8, 13), (50, 2), (1000, 2)):
        work = make_work_list(step.columns, rules(programs=programs))
        sizes = work.part("items")[:, ITEM.index("end")] - work.part("items")[:, ITEM.index("begin")]
        assert sizes.max() == most
        assert sizes.min() >= most - 1
        assert sizes.sum() == 100


def test_deterministic_items_of_a_row_do_not_depend_on_its_step() -> None:
    """The pieces of KV that a row's results are made of, and their order, are those of the row alone."""
    asked = rules(deterministic=True, fixed_split=48)

    def pieces(step: ForestStep, row: int, window: int | None) -> list[tuple[int, ...]]:
        work = make_work_list(step.columns, asked, window=window)
        items, tiles = work.part("items"), work.part("tiles")
        assert (items[:, 0] == TALL).all()
        mine = [item for item in items.tolist() if item[1] <= row < item[1] + item[2]]
        if mine[0][-1] >= 0:
            entry = work.part("merged").tolist().index(row)
            order = work.part("slots")[slice(*work.part("begins")[entry : entry + 2])].tolist()
            mine.sort(key=lambda item: order.index(item[-1] + row - item[1]))
        position = work.part("positions")[row]
        least = -1 if window is None else position - window  # the last position that the row does not see
        seen = [
            tuple(
                at for _, at, tokens in tiles[item[3] : item[6]].tolist() if least < at + tokens - 1 and at <= position
            )
            for item in mine
        ]
        return [piece for piece in seen if piece]

    for window in (None, 60):
        alone = make_step([Node(100, children=[Node(70, 1)])], PAGE)
        for others in (1, 7, 40):
            readers = [Node(70, 1), *(Node(7 * i, 1 + i % 3) for i in range(others))]
            among = make_step([Node(100, children=readers), Node(300, 9)], PAGE)
            assert pieces(among, 0, window) == pieces(alone, 0, window)
        chunk = make_step([Node(100, children=[Node(60, 20)])], PAGE)
        assert pieces(chunk, 10, window) == pieces(alone, 0, window)


def test_layout() -> None:
    work = make_work_list(node(3, 200).columns, rules())
    assert len(HEADER) == 8
    assert work.data[: len(HEADER)].tolist() == [
        work.num_items,
        *(int(work.part(name).ctypes.data - work.data.ctypes.data) // 4 for name in ("items", "tiles", "positions")),
        work.num_merged,
        *(int(work.part(name).ctypes.data - work.data.ctypes.data) // 4 for name in ("merged", "begins", "slots")),
    ]
    assert work.part("items").shape == (work.num_items, len(ITEM))
    assert work.part("tiles").shape[1] == len(TILE)


def test_the_columns_are_those_of_a_step() -> None:
    chunk = {"sequence", "start", "length", "depth"}
    assert chunk <= {field.name for field in fields(Step)}
    reads = {"first_row", "rows", "sequence", "length", "position"}
    assert reads <= {field.name for field in fields(PrefixReads)}
    ours = {field.name for field in fields(Columns)}
    assert ours == chunk | {"first_row", "rows", "read_sequence", "tokens", "position", "pages"}


@pytest.mark.parametrize("changes", [{"group": 5}, {"kv_heads": 0}, {"programs": 0}, {"min_split": 0}])
def test_rules_that_cannot_be_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        rules(**changes)
