"""Plots of characters: what a column stands for, and that every place of it is right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.report.plots import ASCII, BLOCKS, course, framed, glyphs, plot
from batchrun.report.records import StepLog, StepRecord


def steps_of(rows: list[tuple[int, int, int, float]]) -> np.ndarray:
    """Steps of (decode rows, prefill rows, pages, seconds)."""
    log = StepLog()
    for index, (decode, prefill, pages, seconds) in enumerate(rows):
        log.append(StepRecord(index, decode + prefill, decode, prefill, decode, pages, seconds))
    return log.columns


def test_columns_are_of_equal_time():
    over = course(steps_of([(4, 100, 7, 3.0), (8, 0, 9, 1.0)]), 4)
    assert over.seconds == 4.0
    assert over.decode == pytest.approx([4, 4, 4, 8])
    assert over.prefill == pytest.approx([100, 100, 100, 0])
    assert over.pages.tolist() == [7, 7, 7, 9]


def test_a_column_of_several_steps_has_their_mean_and_their_most_pages():
    over = course(steps_of([(10, 0, 1, 1.0), (20, 0, 5, 3.0), (0, 6, 2, 2.0), (0, 0, 4, 2.0)]), 2)
    assert over.decode == pytest.approx([70 / 4, 0])
    assert over.prefill == pytest.approx([0, 3])
    assert over.pages.tolist() == [5, 4]


counts = st.integers(0, 99)
seconds = st.just(0.0) | st.floats(1e-9, 10)
steps = st.lists(st.tuples(counts, counts, counts, seconds), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(1, 70))
def test_nothing_is_lost_between_columns(rows, columns):
    made = steps_of(rows)
    over = course(made, columns)
    seconds = made["seconds"] if made["seconds"].sum() > 0 else np.ones(made.size)
    width = seconds.sum() / columns
    assert over.seconds == pytest.approx(made["seconds"].sum())
    for column, name in ((over.decode, "decode_rows"), (over.prefill, "prefill_rows")):
        assert column.sum() * width == pytest.approx(float((made[name] * seconds).sum()), abs=1e-6)
        assert column.min() >= -1e-6
        assert column.max() <= made[name].max() + 1e-6
    under_way = seconds > 1e-6 * seconds.sum()  # a step of no time may fall between two columns
    assert over.pages.max() >= made["pages_used"][under_way].max()
    assert set(over.pages.tolist()) <= set(made["pages_used"].tolist())


def test_one_layer_has_parts_of_a_place():
    heights = np.array([0, 0.5, 8, 9, 16, 12])
    assert plot([heights], 16, 2, BLOCKS) == ["   ▁█▄", " ▁████"]
    assert plot([heights], 16, 2, ASCII) == ["    #_", " _####"]


def test_layers_stand_on_each_other_and_little_is_seen():
    decode, prefill = np.array([0, 2, 4, 0.01, 1]), np.array([4, 2, 0, 0, 0])
    assert plot([decode, prefill], 4, 4, BLOCKS) == ["░░█  ", "░░█  ", "░██  ", "░████"]
    assert plot([decode, prefill], 4, 4, ASCII) == ["..#  ", "..#  ", ".##  ", ".####"]


def test_nothing_at_all_is_an_empty_plot():
    assert plot([np.zeros(3)], 0, 2, BLOCKS) == ["   ", "   "]
    assert plot([np.zeros(3), np.zeros(3)], 0, 2, BLOCKS) == ["   ", "   "]


heights = st.just(0.0) | st.floats(1e-6, 1e6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(heights, heights), min_size=1, max_size=30),
    st.integers(1, 9),
    st.sampled_from([BLOCKS, ASCII]),
)
def test_columns_have_no_holes_and_stay_within(pairs, height, drawn):
    layers = [np.array(column) for column in zip(*pairs, strict=True)]
    for shown in (layers[:1], layers):
        lines = plot(shown, float(np.sum(shown, axis=0).max()), height, drawn)
        assert len(lines) == height
        for column, total in zip(zip(*lines, strict=True), np.sum(shown, axis=0).tolist(), strict=True):
            filled = "".join(column).lstrip()
            assert " " not in filled
            assert (filled != "") == (total > 0)


def test_a_frame_has_the_highest_value_and_the_time():
    assert framed(["█   ", "██░░"], "1,024", 90.0, 7, BLOCKS) == [
        "  1,024 │█   ",
        "        │██░░",
        "      0 └────",
        "         01 min 30 s",
    ]
    assert framed(["#" * 12], "9", 0.5, 3, ASCII) == ["  9 |" + "#" * 12, "  0 +" + "-" * 12, "     0     500 ms"]


@pytest.mark.parametrize(
    ("encoding", "drawn"),
    [("utf-8", BLOCKS), ("cp437", ASCII), ("ascii", ASCII), ("latin-1", ASCII)],
)
def test_glyphs_are_those_that_the_console_has(encoding, drawn):
    assert glyphs(encoding) is drawn
