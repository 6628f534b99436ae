"""What the attention of a step consists of, as one int32 array that the kernel walks; made once a step, in numpy.

A task is what some rows read together: the readers of a prefix and its KV, or the rows of a chunk and their sequence's
own KV. A task's KV is a list of tiles, one page each. Its rows are cut into tiles too, as high as the kernel takes, and
where that leaves programs without work the list of KV tiles is cut into pieces (KV splits). Rows of one tile x a piece
of the list is an item.

    header  [8]          HEADER: how many items and merged rows, and where the parts begin
    items   [items, 8]   ITEM, the largest first
    tiles   [tiles, 3]   TILE: page, position of its first token, tokens in it
    positions [T]        position of each row
    merged rows [R], begins [R + 1], slots [*]
                         row `merged[i]` is the merge of the partial results `slots[begins[i] : begins[i + 1]]`

Row r of an item sees the first `tokens` tokens of a tile, of these what lies at positions up to its own, and with a
window of w only what lies at positions above its own less w. Of the tiles `[full_begin, full_end)` all rows of the item
see all.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.integer[Any]]
Int64 = npt.NDArray[np.int64]
# Pages of sequences that follow each other, in four columns: where in the table of pages the first stands, the position
# of its first token, how many they are (at least one), tokens in the last; all but the last are full.
Runs = tuple[Int64, ...]

HEADER = ("items", "items_at", "tiles_at", "positions_at", "merged", "merged_at", "begins_at", "slots_at")
ITEM = ("kind", "first_row", "rows", "begin", "full_begin", "full_end", "end", "slot")
TILE = ("page", "position", "tokens")
SHORT, TALL = 0, 1


@dataclass(frozen=True, slots=True)
class Rules:
    """How a step is cut into items.

    Attributes:
        group: query heads per KV head.
        kv_heads: KV heads that one launch computes.
        page_size: tokens of a page.
        short, tall: heights of the two kinds of row tiles, in rows times `group`.
        programs: programs that run at a time on the device.
        min_split: fewest KV tokens of a piece.
        fixed_split: KV tokens of a piece when deterministic.
        merge_cost: what a row's partial result costs to write, read and merge, in KV tokens that could be read instead.
            A token is 2 D elements of 2 bytes, a partial result `group` times D float32 written and read.
        item_cost: what another item costs, in KV tokens.
        deterministic: a row's result depends on the row alone, to the bit: every prefix is read apart, all tiles are
            tall, pieces end at multiples of `fixed_split`.
    """

    group: int
    kv_heads: int
    page_size: int
    short: int
    tall: int
    programs: int
    min_split: int = 256
    fixed_split: int = 1024
    merge_cost: float | None = None
    item_cost: float = 128.0
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.group > min(self.short, self.tall):
            raise ValueError(f"A tile of {min(self.short, self.tall)} cannot hold one row of {self.group} query heads.")
        if min(self.kv_heads, self.page_size, self.programs, self.min_split, self.fixed_split) < 1:
            raise ValueError("KV heads, page size, programs and split sizes have to be positive.")

    def read_apart(self, tokens: Int, rows: Int, chunks: Int) -> npt.NDArray[np.bool_]:
        """The cost gate: whether reading `tokens` of KV once for all rows, and merging, is cheaper than reading them
        again for each of the chunks along with its own KV."""
        if self.deterministic:
            return np.ones(np.shape(tokens), dtype=bool)
        merge_cost = 2.0 * self.group if self.merge_cost is None else self.merge_cost
        saved: npt.NDArray[np.bool_] = (chunks - 1) * tokens > rows * merge_cost + self.item_cost
        return saved


@dataclass(frozen=True, slots=True)
class Columns:
    """What of a step attention asks for; the meaning is that of `batchrun.schedule.step.Step`.

    C chunks of T rows in all, the rows of a chunk after those of the one before. Row k of chunk c is own token
    `start[c] + k` of its sequence, at position `depth[c] + start[c] + k`; it sees the prefixes that it reads, and its
    sequence's own tokens up to itself. Read j: rows `[first_row[j], first_row[j] + rows[j])` see the first
    `tokens[j]` tokens of the KV of sequence `read_sequence[j]`, which begins at `position[j]`.

    Attributes:
        sequence, start, length, depth: integers `[C]`.
        first_row, rows, read_sequence, tokens, position: integers `[P]`.
        pages: integers `[slots, *]`, contiguous (else all of it is copied): own token t of a sequence lies in its page
            `pages[sequence, t // page_size]`.
    """

    sequence: Int
    start: Int
    length: Int
    depth: Int
    first_row: Int
    rows: Int
    read_sequence: Int
    tokens: Int
    position: Int
    pages: Int


@dataclass(frozen=True, slots=True)
class WorkList:
    """Attributes:
    data: int32, the whole list.
    num_rows: T.
    num_items: items.
    num_merged: rows that are merged.
    num_slots: partial results that there has to be room for.
    """

    data: npt.NDArray[np.int32]
    num_rows: int
    num_items: int
    num_merged: int
    num_slots: int

    def part(self, name: str) -> npt.NDArray[np.int32]:
        """The items, tiles, positions, merged rows, begins or slots, as a table or a column."""
        header = dict(zip(HEADER, self.data[: len(HEADER)].tolist(), strict=True))
        order = ("items", "tiles", "positions", "merged", "begins", "slots")
        stops = [header[f"{part}_at"] for part in order[1:]] + [self.data.size]
        at = order.index(name)
        part = self.data[header[f"{name}_at"] : stops[at]]
        return part.reshape(-1, {"items": len(ITEM), "tiles": len(TILE)}[name]) if at < 2 else part


def make_work_list(step: Columns, rules: Rules, *, window: int | None = None) -> WorkList:
    """Make the work list of a step.

    Args:
        window: keys that a row sees at most, itself included; None for all.
    """
    page_size = rules.page_size
    chunks = step.length.size
    ends = np.zeros(chunks + 1, dtype=np.int64)
    step.length.cumsum(out=ends[1:])
    chunk_first, num_rows = ends[:-1], int(ends[-1])
    positions = np.arange(num_rows) + np.repeat(step.depth + step.start - chunk_first, step.length)
    if window is not None and positions.max(initial=0) < window:
        window = None

    # Which reads are tasks of their own, and which are left to each chunk.
    low = np.zeros(step.tokens.size, dtype=np.int64)  # tokens that no reader sees any more
    if window is not None:
        unseen = _lowest(positions, step.first_row, step.rows) - step.position - (window - 1)
        low = np.minimum(np.maximum(unseen, 0), step.tokens)
    stop_row = step.first_row + step.rows
    first_chunk, last_chunk = chunk_first.searchsorted(step.first_row), chunk_first.searchsorted(stop_row)
    splits_chunks = (ends[first_chunk] != step.first_row) | (ends[last_chunk] != stop_row)
    apart = splits_chunks | rules.read_apart(step.tokens - low, step.rows, last_chunk - first_chunk)
    seen = low < step.tokens
    [own_task] = (seen & apart).nonzero()
    [along] = (seen & ~apart).nonzero()

    # Tasks: the reads kept apart, then the chunks. Each sees `base` tokens, and a chunk's row k sees k + 1 more.
    reads, tasks = own_task.size, own_task.size + chunks
    base = np.concatenate((step.tokens[own_task], step.start), dtype=np.int64)
    grows: Int64 = np.ones(tasks, dtype=np.int64)
    grows[:reads] = 0
    task_first = np.concatenate((step.first_row[own_task], chunk_first))
    task_rows = np.concatenate((step.rows[own_task], step.length), dtype=np.int64)
    task_position = np.concatenate((step.position[own_task], step.depth), dtype=np.int64)
    sequence = np.concatenate((step.read_sequence[own_task], step.sequence), dtype=np.int64)
    tokens = base + grows * task_rows
    count = -(-tokens // page_size)
    runs: Runs = (sequence * step.pages.shape[1], task_position, count, tokens - (count - 1) * page_size)
    # Tiles of a task's list before its own: partly filled ones, then full ones.
    lead = lead_partial = np.zeros(tasks, dtype=np.int64)
    list_size = count
    if along.size:
        chunk, partial, others = _read_along(step, along, first_chunk, last_chunk, low, page_size)
        task = reads + chunk
        lead = np.bincount(task, others[2], tasks).astype(np.int64)
        lead_partial = np.bincount(task[partial], minlength=tasks)
        list_size = lead + count
        order = _stable_argsort(np.concatenate((3 * task + ~partial, np.arange(2, 3 * tasks, 3))), 3 * tasks)
        runs = tuple(np.concatenate(parts)[order] for parts in zip(others, runs, strict=True))
    list_begin = list_size.cumsum() - list_size

    # Row tiles: rows of a task, and what of its list they see, in tiles from where the list begins.
    heights = np.array((rules.short // rules.group, rules.tall // rules.group))
    kind = np.where(rules.deterministic | (task_rows > heights[SHORT]), TALL, SHORT)
    height = heights[kind]
    row_tiles = -(-task_rows // height)
    task, nth = _expand(row_tiles)
    height, grows = height[task], grows[task]
    offset = nth * height
    rows = np.minimum(height, task_rows[task] - offset)
    first_row = task_first[task] + offset
    sees_first = base[task] + grows * (offset + 1)
    sees_last = sees_first + grows * (rows - 1)
    begin = np.zeros(offset.size, dtype=np.int64)
    end = lead[task] + -(-sees_last // page_size)
    if window is None:
        full_begin, full_end = lead_partial[task], lead[task] + sees_first // page_size
    else:
        # All tiles are masked. A list that begins with the KV of others was cut when it was made.
        of_reads = int(row_tiles[:reads].sum())
        lowest = positions[first_row]  # a chunk's rows are in order
        lowest[:of_reads] = _lowest(positions, first_row[:of_reads], rows[:of_reads])
        unseen = lowest - task_position[task] - (window - 1)
        begin = np.minimum(np.maximum(unseen, 0) // page_size, end)
        if along.size:
            begin[lead[task] > 0] = 0
        full_begin = full_end = begin

    # Pieces of equal length, or cut at fixed places; what no row of a tile sees has none.
    span = end - begin
    size = _split_size(span, rules)
    if span.size and (span.min() < 1 or (end if rules.deterministic else span).max() > size):
        if rules.deterministic:
            first_piece = begin // size
            which, nth = _expand(np.where(span > 0, -(-end // size) - first_piece, 0))
            cut = (first_piece[which] + nth) * size
            begin, end = np.maximum(begin[which], cut), np.minimum(end[which], cut + size)
        else:
            pieces = -(-span // size)
            which, nth = _expand(pieces)
            span, pieces, cut = span[which], pieces[which], begin[which]
            begin, end = cut + span * nth // pieces, cut + span * (nth + 1) // pieces
        task = np.arange(tasks)[task][which]
        first_row, rows = first_row[which], rows[which]
        full_begin = np.minimum(np.maximum(full_begin[which], begin), end)
        full_end = np.minimum(np.maximum(full_end[which], begin), end)
        span = end - begin
    slot, num_slots, merged, begins, slots = _partial_results(first_row, rows, num_rows)

    # Write it all down.
    num_items, num_tiles = rows.size, int(list_size.sum())
    sizes = (len(HEADER), num_items * len(ITEM), num_tiles * len(TILE), num_rows, merged.size, begins.size, slots.size)
    at = list(accumulate(sizes))
    data = np.empty(at[-1], dtype=np.int32)
    data[: at[0]] = (num_items, at[0], at[1], at[2], merged.size, at[3], at[4], at[5])
    from_list = list_begin[task]
    columns = (
        kind[task],
        first_row,
        rows,
        from_list + begin,
        from_list + full_begin,
        from_list + full_end,
        from_list + end,
        slot,
    )
    items = np.empty((num_items, len(ITEM)), dtype=np.int32)
    for column, values in enumerate(columns):
        items[:, column] = values
    most = int(span.max(initial=0))
    largest_first = _stable_argsort(most - span, most)
    # Without a mode, take would copy what it writes to.
    items.take(largest_first, axis=0, out=data[at[0] : at[1]].reshape(items.shape), mode="clip")
    _write_tiles(data[at[1] : at[2]].reshape(num_tiles, len(TILE)), step.pages, runs, page_size)
    for part, values in enumerate((positions, merged, begins, slots), start=2):
        data[at[part] : at[part + 1]] = values
    return WorkList(data, num_rows, num_items, merged.size, num_slots)


def _read_along(
    step: Columns, along: Int, first_chunk: Int, last_chunk: Int, low: Int, page_size: int
) -> tuple[Int64, npt.NDArray[np.bool_], Runs]:
    """The reads that are left to each of their chunks: for each its last page where that is not full, and its full
    pages.

    Returns:
        chunk of each run; whether it is a page that is not full; the runs.
    """
    pair, nth = _expand(last_chunk[along] - first_chunk[along])
    read = along[pair]
    chunk = first_chunk[read] + nth
    tokens, position = step.tokens[read].astype(np.int64), step.position[read]
    begin, end = low[read] // page_size, tokens // page_size  # of the full pages
    last = tokens - end * page_size
    place = step.read_sequence[read].astype(np.int64) * step.pages.shape[1]
    some = np.concatenate((last > 0, end > begin))
    partial = np.arange(some.size) < read.size
    runs = (
        np.concatenate((place + end, place + begin)),
        np.concatenate((position + end * page_size, position + begin * page_size)),
        np.concatenate((np.ones_like(end), end - begin)),
        np.concatenate((last, np.full_like(last, page_size))),
    )
    return np.concatenate((chunk, chunk))[some], partial[some], tuple(column[some] for column in runs)


def _write_tiles(tiles: npt.NDArray[np.int32], pages: Int, runs: Runs, page_size: int) -> None:
    """Write down the pages of runs, one after another."""
    place, position, count, last = runs
    stop = count.cumsum()
    begin = stop - count
    nth = np.arange(len(tiles))
    tiles[:, 0] = pages.ravel().take(nth + np.repeat(place - begin, count))
    tiles[:, 1] = nth * page_size + np.repeat(position - begin * page_size, count)
    tiles[:, 2] = page_size
    tiles[stop - 1, 2] = last


def _split_size(span: Int64, rules: Rules) -> int:
    """KV tiles of a piece at most: half of what a program has to do, so that programs end together."""
    if rules.deterministic:
        return max(1, rules.fixed_split // rules.page_size)
    share = int(span.sum()) * rules.kv_heads / rules.programs
    return max(1, -(-rules.min_split // rules.page_size), int(np.ceil(share / 2)))


def _partial_results(first_row: Int, rows: Int, num_rows: int) -> tuple[Int64, int, Int64, Int64, Int64]:
    """Where items write. An item all of whose rows have no other item writes their results, slot -1; the others have
    a slot for each of their rows.

    Returns:
        slot of each item; how many slots; rows that are merged; where the slots of each begin; slots.
    """
    last_row = first_row + rows
    begun, ended = np.bincount(first_row, minlength=num_rows + 1), np.bincount(last_row, minlength=num_rows + 1)
    several = (begun - ended).cumsum() > 1  # items of each row
    before = several.cumsum()
    before -= several
    writes_partials = before[last_row] > before[first_row]
    counted = rows * writes_partials
    stop = counted.cumsum()
    num_slots = int(stop[-1]) if stop.size else 0
    if not num_slots:
        empty = np.empty(0, dtype=np.int64)
        return np.full(first_row.size, -1), 0, empty, np.zeros(1, dtype=np.int64), empty
    stop -= counted
    slot = np.where(writes_partials, stop, -1)
    row = np.repeat(first_row - stop, counted)  # of slot 0, 1, ...
    row += np.arange(num_slots)
    # The partial results of a row stay in the order of the items.
    slots = _stable_argsort(row, num_rows)
    count = np.bincount(row, minlength=num_rows)
    [merged] = count.nonzero()
    begins = np.zeros(merged.size + 1, dtype=np.int64)
    count[merged].cumsum(out=begins[1:])
    return slot, num_slots, merged, begins, slots


def _stable_argsort(values: Int64, bound: int) -> Int64:
    """What sorts values of 0 to `bound`; numpy has a radix sort for 16 bits."""
    return (values.astype(np.uint16) if bound < 1 << 16 else values).argsort(kind="stable")


def _expand(count: Int) -> tuple[Int64 | slice, Int64]:
    """For counts n_0, n_1, ...: an index that takes entry 0 n_0 times, entry 1 n_1 times, ...; and 0 ... n_0 - 1,
    0 ... n_1 - 1, ... Where all counts are 1 the index takes everything as it is, which costs nothing."""
    stop = count.cumsum()
    total = int(stop[-1]) if stop.size else 0
    if total == count.size and count.all():
        return slice(None), np.zeros(total, dtype=np.int64)
    nth = np.arange(total)
    stop -= count
    nth -= np.repeat(stop, count)
    return np.repeat(np.arange(count.size), count), nth


def _lowest(values: Int64, first: Int, count: Int) -> Int64:
    """The minimum of `values[first : first + count]`, for each."""
    if not first.size:
        return np.empty(0, dtype=np.int64)
    bounds = np.empty(2 * first.size, dtype=np.int64)
    bounds[::2] = first
    np.add(first, count, out=bounds[1::2])
    lowest: Int64 = np.minimum.reduceat(np.append(values, 0), bounds)[::2]
    return lowest
