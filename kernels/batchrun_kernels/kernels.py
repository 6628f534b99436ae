"""The device code. `attention.py` launches it; `work_list.py` makes the list that it walks; `reference.py` says what it
means. Importing this module loads triton, and `TRITON_INTERPRET=1` counts if it is set before triton is first loaded.

    T  rows            G  query heads per KV head         M  rows of a tile times G, padded to the tile's height
    D  head_dim        W  D padded to a power of two      N  page_size, the KV tokens of a tile
"""

# mypy: disable-error-code="no-untyped-def"
# Whether an argument is a tensor, a pointer or a descriptor is up to the launch; triton reads annotations its own way.

from __future__ import annotations

import triton
import triton.language as tl

# Columns of an item, of a tile, and the header of a work list: the meaning is in work_list.py, a test compares them.
ITEM: tl.constexpr = tl.constexpr(8)
TILE: tl.constexpr = tl.constexpr(3)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_tile(pool, page, kv_head, tokens, KV_HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
               W: tl.constexpr, TMA: tl.constexpr, CUT: tl.constexpr):  # fmt: skip
    """K or V of one page and one KV head, `[N, W]`: contiguous in the pool `[pages, KV_HEADS, N, D]`. Columns from D
    on are 0; with CUT so are rows from `tokens` on: what was never written may be NaN, and 0 * NaN is NaN."""
    first = (page * KV_HEADS + kv_head) * N
    token = tl.arange(0, N)[:, None]
    if TMA:
        tile = pool.load([first, 0])
        if CUT:
            tile = tl.where(token < tokens, tile, 0.0)
    else:
        column = tl.arange(0, W)[None, :]
        place = pool + first.to(tl.int64) * D + (token * D + column)
        if CUT:
            tile = tl.load(place, mask=(token < tokens) & (column < D), other=0.0)
        elif W == D:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=column < D, other=0.0)
    return tile


@triton.jit
def _attend_tile(q, peak, total, acc, keys, values, page, tile, position, kv_head, scale, softcap, window,
                 KV_HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr, TMA: tl.constexpr,
                 SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr,
                 PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Take one KV tile, `page`, into a running softmax, in powers of two: weights 2^(score - peak), their sum
    `total [M]`, and `acc [M, W]`, the values summed with these weights. `tile` is its entry in the work list, read with
    MASKED only."""
    k = _load_tile(keys, page, kv_head, N, KV_HEADS, N, D, W, TMA, False)
    if UPCAST:
        k = k.to(tl.float32)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if SOFTCAP:
        # softcap * tanh(score): scale holds 1 / softcap. exp of what is not positive cannot overflow.
        decay = tl.exp2(tl.abs(score) * (-2.0 * LOG2E))
        tanh = (1.0 - decay) / (1.0 + decay)
        score = tl.where(score < 0.0, -tanh, tanh) * (softcap * LOG2E)
    tokens = N
    if MASKED:
        tokens = tl.load(tile + 2)
        token = tl.arange(0, N)
        at = tl.load(tile + 1) + token
        seen = (token < tokens)[None, :] & (at[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (at[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weight = tl.exp2(score - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(weight, 1)
    v = _load_tile(values, page, kv_head, tokens, KV_HEADS, N, D, W, TMA, MASKED)
    if UPCAST:
        v = v.to(tl.float32)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_peak, total, acc


@triton.jit
def _attend_item(query, keys, values, out, partial_out, partial_lse, sinks, item, tiles, positions, kv_head, scale,
                 softcap, window, M: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
                 D: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, SOFTCAP: tl.constexpr,
                 WINDOW: tl.constexpr, SINKS: tl.constexpr, UPCAST: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """The rows of one item and the query heads of one KV head attend to the KV tiles of the item."""
    first_row = tl.load(item + 1)
    rows = tl.load(item + 2)
    begin = tl.load(item + 3)
    full_begin = tl.load(item + 4)
    full_end = tl.load(item + 5)
    end = tl.load(item + 6)
    slot = tl.load(item + 7)

    lane = tl.arange(0, M)
    head = lane % G
    real = lane < rows * G
    column = tl.arange(0, W)[None, :]
    inside = real[:, None] & (column < D)
    # Places in [T, heads, D] from the item's first: 32 bits, because a tile of 64-bit places fills the registers.
    place = (lane // G) * (KV_HEADS * G) + head
    first_place = first_row.to(tl.int64) * (KV_HEADS * G) + kv_head * G
    q = tl.load(query + first_place * D + (place[:, None] * D + column), mask=inside, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    position = tl.load(positions + first_row + lane // G, mask=real, other=0)

    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, W], tl.float32)
    # The page of the tile after this one is read along with it, so that no copy of KV waits for its address. Behind
    # the last tile of a list are the positions of its rows: what is read there is not used.
    page = tl.load(tiles + full_begin * TILE)
    for index in tl.range(full_begin, full_end, num_stages=STAGES):
        next_page = tl.load(tiles + (index + 1) * TILE)
        peak, total, acc = _attend_tile(
            q, peak, total, acc, keys, values, page, tiles, position, kv_head, scale, softcap, window,
            KV_HEADS, N, D, W, TMA, SOFTCAP, WINDOW, UPCAST, PRECISION, False)  # fmt: skip
        page = next_page
    # What lies before and after the full tiles.
    index = tl.where(begin < full_begin, begin, full_end)
    page = tl.load(tiles + index * TILE)
    for nth in tl.range(begin, end - (full_end - full_begin), num_stages=STAGES):
        next_index = tl.where(nth + 1 < full_begin, nth + 1, nth + 1 + (full_end - full_begin))
        next_page = tl.load(tiles + next_index * TILE)
        peak, total, acc = _attend_tile(
            q, peak, total, acc, keys, values, page, tiles + index * TILE, position, kv_head, scale, softcap, window,
            KV_HEADS, N, D, W, TMA, SOFTCAP, WINDOW, UPCAST, PRECISION, True)  # fmt: skip
        index = next_index
        page = next_page

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    acc = acc / total[:, None]
    lse = tl.where(some, (peak + tl.log2(total)) * LN2, float("-inf"))
    if slot < 0:
        if SINKS:
            weight, total = _beside_sink(lse, tl.load(sinks + kv_head * G + head).to(tl.float32))
            acc = acc * weight[:, None] / total[:, None]  # in the order of merge_states, for the same bits
        tl.store(out + first_place * D + (place[:, None] * D + column), acc.to(out.dtype.element_ty), mask=inside)
    else:
        first_place = slot.to(tl.int64) * (KV_HEADS * G) + kv_head * G
        tl.store(partial_out + first_place * D + (place[:, None] * D + column), acc, mask=inside)
        tl.store(partial_lse + first_place + place, lse, mask=real)


@triton.jit
def _beside_sink(lse, sink):
    """The weight of what is left beside a sink, a key of score `sink` whose value is 0, and the weight of both."""
    peak = tl.maximum(lse, sink)
    weight = tl.exp2((lse - peak) * LOG2E)
    return weight, tl.exp2((sink - peak) * LOG2E) + weight


@triton.jit
def shared_prefix_attention(query, keys, values, out, partial_out, partial_lse, sinks, work, scale, softcap, window,
                            SHORT: tl.constexpr, TALL: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr,
                            N: tl.constexpr, D: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
                            SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
                            UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Attention of all rows of a step over all KV that they see. Programs walk items x KV heads, the largest first.

    Args:
        query, out: `[T, KV_HEADS * G, D]`, contiguous.
        keys, values: the pools, `[pages, KV_HEADS, N, D]`: with TMA descriptors of blocks `[N, W]` of the pool as
            `[pages * KV_HEADS * N, D]`, else pointers.
        partial_out, partial_lse: float32 `[slots, KV_HEADS * G, D]` and `[slots, KV_HEADS * G]`, natural logarithms.
        sinks: `[KV_HEADS * G]`, read with SINKS only.
        work: the work list, int32.
        scale: to base 2: the scale times log2(e); with SOFTCAP the scale over the soft-cap.
        softcap: read with SOFTCAP only. window: keys a row sees at most, itself included, read with WINDOW only.
        SHORT, TALL: heights of the tiles of items of kind 0 and 1, in rows times G.
        UPCAST: compute in float32 (the interpreter has no bfloat16 dot).
        PRECISION: of products, as `tl.dot` takes it.
    """
    count = tl.load(work) * KV_HEADS
    items = work + tl.load(work + 1)
    tiles = work + tl.load(work + 2)
    positions = work + tl.load(work + 3)
    for unit in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=1):
        item = items + (unit // KV_HEADS) * ITEM
        kv_head = unit % KV_HEADS
        if tl.load(item) == 0:
            _attend_item(query, keys, values, out, partial_out, partial_lse, sinks, item, tiles, positions, kv_head,
                         scale, softcap, window, SHORT, KV_HEADS, G, N, D, W, STAGES, TMA, SOFTCAP, WINDOW, SINKS,
                         UPCAST, PRECISION)  # fmt: skip
        else:
            _attend_item(query, keys, values, out, partial_out, partial_lse, sinks, item, tiles, positions, kv_head,
                         scale, softcap, window, TALL, KV_HEADS, G, N, D, W, STAGES, TMA, SOFTCAP, WINDOW, SINKS,
                         UPCAST, PRECISION)  # fmt: skip


@triton.jit
def merge_states(partial_out, partial_lse, out, sinks, work, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                 W: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """Merge the partial results of each row that has any, and the sink with them. Programs walk rows x blocks of H
    query heads.

    Args:
        partial_out, partial_lse, out, sinks, work: as for `shared_prefix_attention`; HEADS query heads in all.
    """
    blocks: tl.constexpr = (HEADS + H - 1) // H
    count = tl.load(work + 4) * blocks
    rows = work + tl.load(work + 5)
    starts = work + tl.load(work + 6)
    slots = work + tl.load(work + 7)
    column = tl.arange(0, W)
    for unit in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=1):
        entry = unit // blocks
        head = (unit % blocks) * H + tl.arange(0, H)
        inside = (head < HEADS)[:, None] & (column < D)[None, :]
        begin = tl.load(starts + entry)
        end = tl.load(starts + entry + 1)
        peak = tl.full([H], float("-inf"), tl.float32)
        if SINKS:
            sink = tl.load(sinks + head, mask=head < HEADS, other=0.0).to(tl.float32)
            peak = sink
        for index in range(begin, end):
            place = tl.load(slots + index).to(tl.int64) * HEADS + head
            peak = tl.maximum(peak, tl.load(partial_lse + place, mask=head < HEADS, other=float("-inf")))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.zeros([H], tl.float32)
        if SINKS:
            total = tl.exp2((sink - base) * LOG2E)
        acc = tl.zeros([H, W], tl.float32)
        for index in range(begin, end):
            place = tl.load(slots + index).to(tl.int64) * HEADS + head
            lse = tl.load(partial_lse + place, mask=head < HEADS, other=float("-inf"))
            weight = tl.exp2((lse - base) * LOG2E)
            part = tl.load(partial_out + place[:, None] * D + column[None, :], mask=inside, other=0.0)
            acc += weight[:, None] * part
            total += weight
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        row = tl.load(rows + entry).to(tl.int64)
        offset = (row * HEADS + head)[:, None] * D + column[None, :]
        tl.store(out + offset, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_kv(key, value, keys, values, places, num_rows, key_stride, value_stride, R: tl.constexpr,
             KV_HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Write new K and V to their pages. Program (i, h) writes KV head h of rows [i * R, (i + 1) * R).

    Args:
        key, value: `[T, KV_HEADS, D]`, rows `key_stride` and `value_stride` elements apart.
        keys, values: the pools, `[pages, KV_HEADS, N, D]`.
        places: int64 `[T]`, page * N + place in the page; negative for rows that are not stored.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    kv_head = tl.program_id(1)
    place = tl.load(places + row, mask=row < num_rows, other=-1)
    column = tl.arange(0, W)[None, :]
    inside = (place >= 0)[:, None] & (column < D)
    to = ((place // N * KV_HEADS + kv_head) * N + place % N)[:, None] * D + column
    row = row.to(tl.int64)
    k = tl.load(key + (row * key_stride + kv_head * D)[:, None] + column, mask=inside)
    tl.store(keys + to, k, mask=inside)
    v = tl.load(value + (row * value_stride + kv_head * D)[:, None] + column, mask=inside)
    tl.store(values + to, v, mask=inside)
