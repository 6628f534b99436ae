"""A step as tensors: built once a step, read by every layer.

    T   rows of the step               Hq, Hkv  query heads, KV heads
    S   rows that sample               G        query heads per KV head
    C   chunks                         D        head_dim
    n   rows of a read or a piece      M        KV tokens that a read covers
    P   partial results per row        B        reads or pieces handled in one call

A row's attention is the sum of partial results over disjoint KV: one for each shared prefix it reads, and one or two
for its own sequence. Partial p of row t is written to place `[p, t]`; a row that has no partial p keeps -inf there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from batchrun_kernels.cpu import AttentionWork, CpuKernels, Reads

from batchrun.engine.kv_cache import PageTables
from batchrun.schedule.step import Step

_PIECE_ROWS = 128  # longer chunks are cut into pieces: a piece is spared the keys after it
_SHORT_ROWS = 16  # chunks up to this many rows are put together in one masked call
_SHORT_KV = 512  # and up to this many own KV tokens: beyond, copying KV costs more than a call
_KV_BUCKET = 64  # own lengths are rounded up to a multiple of this to find chunks of similar length


@dataclass(frozen=True, slots=True)
class KVTokens:
    """KV of B sequences, M tokens each: a view of the pool for one that lies there in one run, else a gather.

    Attributes:
        sequences: B.
        length: M.
        start: first place in the pool, for a view.
        index: int64 `[B * M]`, places in the pool, for a gather.
    """

    sequences: int
    length: int
    start: int = 0
    index: torch.Tensor | None = None

    def of(self, pool: torch.Tensor) -> torch.Tensor:
        """The tokens, `[B, M, 2, Hkv, D]`, of a layer's KV, `[places, 2, Hkv, D]`."""
        if self.index is None:
            return pool[None, self.start : self.start + self.length]
        return pool.index_select(0, self.index).unflatten(0, (self.sequences, self.length))


@dataclass(frozen=True, slots=True)
class Read:
    """n rows of each of B sequences see all of the KV that goes with theirs; with a mask, what it lets them see.

    Attributes:
        first: first row of the step, where the rows are neighbours.
        rows: n.
        row_index: int64 `[B * n]`, rows of the step, where they are not; padding repeats a row.
        real: int64 `[*]`, which of the `B * n` rows are no padding, or None where none is.
        mask: float `[B, 1, n * G, M]` to add to the scores, 0 or -inf, or None.
        blind: bool `[B * n]`, rows that the mask lets see nothing, or None where there are none.
    """

    partial: int
    rows: int
    kv: KVTokens
    first: int = 0
    row_index: torch.Tensor | None = None
    real: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    blind: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Causal:
    """B neighbouring chunks (or pieces) of n rows each, from row `first` on: each row sees its own up to itself."""

    partial: int
    first: int
    chunks: int
    rows: int


@dataclass(frozen=True, slots=True)
class AttentionCalls:
    """The calls that make up the attention of a layer.

    Attributes:
        partials: P.
    """

    partials: int
    reads: tuple[Read, ...]
    causal: tuple[Causal, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The chunks of a step, long ones cut into neighbouring pieces, in columns; a piece is attended to as a chunk is.

    Attributes:
        sequence: slot of the sequence.
        first: first row of the step.
        start, length: own tokens `[start, start + length)` of the sequence.
    """

    sequence: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    @classmethod
    def cut(cls, step: Step, rows: int) -> Pieces:
        """Cut the chunks of a step into pieces of `rows` rows at most."""
        count = -(-step.length.astype(np.int64) // rows)
        chunk = np.repeat(np.arange(count.size), count)
        offset = (np.arange(chunk.size) - np.repeat(np.cumsum(count) - count, count)) * rows
        first = np.cumsum(step.length) - step.length
        return cls(
            sequence=step.sequence[chunk].astype(np.int64),
            first=first[chunk] + offset,
            start=step.start[chunk] + offset,
            length=np.minimum(rows, step.length[chunk] - offset),
        )


class StepTensors:
    """The rows of a step as tensors, whatever computes their attention: arrays first, which `bind` takes from the
    device when they are there.

    Attributes:
        arrays: what the device wants to know of the step.
        input_ids, positions: int64 `[1, T]`.
        store_index: int64 `[T]`, where in the pool the K and V of each row go; -1 for padding.
        sample_index: int64 `[S]`, rows that sample.
        num_rows: T, padding included.

    Args:
        rows: T, where the step is to be padded to so many; what is computed in rows of padding is not read.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    store_index: torch.Tensor
    sample_index: torch.Tensor

    def __init__(self, step: Step, tables: PageTables, rows: int | None = None) -> None:
        self._step = step
        self._tables = tables
        self.num_rows = rows or step.num_rows
        self._padded = rows is not None
        first = np.cumsum(step.length) - step.length  # [C]
        own = np.arange(step.num_rows) - np.repeat(first - step.start, step.length)  # [T]
        self._positions = own + np.repeat(step.depth, step.length)
        sample_index = (first + step.length - 1)[step.samples]
        self.arrays: dict[str, npt.NDArray[np.integer[Any]]] = {
            "input_ids": step.token_ids.astype(np.int64),
            "positions": self._positions,
            "store_index": tables.index(np.repeat(step.sequence, step.length), own),
            "sample_index": sample_index,
        }
        padding = self.num_rows - step.num_rows
        if padding:
            for name, filler in (("input_ids", 0), ("positions", 0), ("store_index", -1)):
                self.arrays[name] = np.append(self.arrays[name], np.full(padding, filler))
            self.arrays["sample_index"] = np.append(sample_index, np.arange(step.num_rows, self.num_rows))

    @property
    def graph_key(self) -> tuple[Hashable, Hashable] | None:
        """The same for steps that a captured graph can run alike: the kernels that are launched, and the places of what
        they read. None for one that no graph runs."""
        return None

    def bind(self, tensors: Mapping[str, torch.Tensor], sampled_before: torch.Tensor | None) -> None:
        """Take the arrays from the device.

        Args:
            sampled_before: what the step before this one sampled, int64 `[*]`, if there was one.
        """
        ids = tensors["input_ids"]
        if sampled_before is not None and self._step.token_ids.size and self._step.token_ids.min() < 0:
            # What could not be sampled counts for nothing, but has to be the input of something.
            ids.copy_(torch.where(ids < 0, sampled_before[(-1 - ids).clamp(min=0)].clamp(min=0), ids))
        self.input_ids, self.positions = ids[None], tensors["positions"][None]
        self.store_index, self.sample_index = tensors["store_index"], tensors["sample_index"]


class CompiledBatch(StepTensors):
    """A step on the CPU for the compiled kernels: its rows, and who reads what.

    Attributes:
        kernels: that attend.
        attention: what they do.
    """

    def __init__(self, step: Step, tables: PageTables, kernels: CpuKernels, group_size: int, kv_heads: int) -> None:
        super().__init__(step, tables)
        self.kernels = kernels
        prefixes = step.prefix_reads
        first = np.cumsum(step.length) - step.length
        reads = Reads(
            sequence=np.concatenate((prefixes.sequence, step.sequence)),
            tokens=np.concatenate((prefixes.length, step.start + step.length)),
            position=np.concatenate((prefixes.position, step.depth)),
            first_row=np.concatenate((prefixes.first_row, first)),
            rows=np.concatenate((prefixes.rows, step.length)),
        )
        self.attention = AttentionWork(reads, self._positions, tables.pages, tables.page_size, group_size, kv_heads)


class Batch(StepTensors):
    """A step on the CPU where there are no compiled kernels: its rows, and the calls of torch that make up its
    attention."""

    def __init__(self, step: Step, tables: PageTables, group_size: int, dtype: torch.dtype) -> None:
        super().__init__(step, tables)
        self._group_size = group_size
        self._dtype = dtype
        self._pieces = Pieces.cut(step, _PIECE_ROWS)
        self._work: dict[int | None, AttentionCalls] = {}
        self._partials: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def work(self, window: int | None) -> AttentionCalls:
        """The attention calls of a layer whose rows see `window` keys at most; made once a step for each window."""
        if window not in self._work:
            self._work[window] = self._make_work(window)
        return self._work[window]

    def partial_results(self, window: int | None, heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the partial results of a layer, float32 `[P, T, Hq, D]` and `[P, T, Hq]`. All layers of a window
        write the same places, so that the empty ones (0 and -inf) stay as they are."""
        if window not in self._partials:
            shape = (self.work(window).partials, self.num_rows, heads)
            self._partials[window] = torch.zeros((*shape, head_dim)), torch.full(shape, float("-inf"))
        return self._partials[window]

    def _make_work(self, window: int | None) -> AttentionCalls:
        pieces = self._pieces
        reads = list(self._prefix_reads(window))
        levels = int(self._step.prefix_reads.level.max(initial=-1)) + 1
        stop = pieces.start + pieces.length
        # A window cuts into the own KV of a piece if the last row cannot see the first own token.
        whole = np.ones(stop.size, dtype=bool) if window is None else stop <= window
        short = (pieces.length <= _SHORT_ROWS) & (stop <= _SHORT_KV)
        single = (pieces.length == 1) & ~short
        for c in np.flatnonzero(single).tolist():
            low = max(0, int(stop[c]) - window) if window is not None else 0
            kv = self._kv_tokens(int(pieces.sequence[c]), low, int(stop[c]))
            reads.append(Read(levels, 1, kv, int(pieces.first[c])))
        long = ~short & ~single
        for c in np.flatnonzero(long & ~whole).tolist():
            reads.append(self._windowed_piece(c, levels, window or 0))
        plain = long & whole
        causal = self._causal_pieces(np.flatnonzero(plain), levels)
        earlier = np.flatnonzero(plain & (pieces.start > 0)).tolist()
        for c in earlier:
            kv = self._kv_tokens(int(pieces.sequence[c]), 0, int(pieces.start[c]))
            reads.append(Read(levels + 1, int(pieces.length[c]), kv, int(pieces.first[c])))
        reads += self._short_pieces(np.flatnonzero(short), levels, window)
        return AttentionCalls(levels + 1 + bool(earlier), tuple(reads), tuple(causal))

    def _prefix_reads(self, window: int | None) -> Iterator[Read]:
        reads = self._step.prefix_reads
        for level, first, rows, slot, length, position in zip(
            *(
                column.tolist()
                for column in (reads.level, reads.first_row, reads.rows, reads.sequence, reads.length, reads.position)
            ),
            strict=True,
        ):
            if window is None:
                yield Read(level, rows, self._kv_tokens(slot, 0, length), first)
                continue
            seen_from = self._positions[first : first + rows] - window + 1 - position  # first KV token that a row sees
            low = max(0, int(seen_from.min()))
            if low >= length:
                continue
            kv = self._kv_tokens(slot, low, length)
            if int(seen_from.max()) <= low:
                yield Read(level, rows, kv, first)
                continue
            seen = np.arange(low, length) >= seen_from[:, None]
            blind = ~seen.any(axis=1)
            yield Read(
                level,
                rows,
                kv,
                first,
                mask=self._mask(seen[None]),
                blind=torch.from_numpy(blind) if blind.any() else None,
            )

    def _windowed_piece(self, c: int, partial: int, window: int) -> Read:
        """A long piece whose own KV is longer than the window."""
        pieces = self._pieces
        start, rows = int(pieces.start[c]), int(pieces.length[c])
        low = max(0, start - window + 1)
        row = np.arange(start, start + rows)[:, None]
        key = np.arange(low, start + rows)
        seen = (key <= row) & (key > row - window)
        kv = self._kv_tokens(int(pieces.sequence[c]), low, start + rows)
        return Read(partial, rows, kv, int(pieces.first[c]), mask=self._mask(seen[None]))

    def _causal_pieces(self, which: npt.NDArray[np.int64], partial: int) -> Iterator[Causal]:
        """Neighbouring pieces of equal length in one call."""
        if not which.size:
            return
        length = self._pieces.length[which]
        breaks = np.flatnonzero((np.diff(which) != 1) | (np.diff(length) != 0)) + 1
        for part in np.split(which, breaks):
            yield Causal(partial, int(self._pieces.first[part[0]]), part.size, int(self._pieces.length[part[0]]))

    def _short_pieces(self, which: npt.NDArray[np.int64], partial: int, window: int | None) -> Iterator[Read]:
        """Short pieces of similar size in one call each, padded to n rows and M tokens."""
        pieces = self._pieces
        start, length = pieces.start[which], pieces.length[which]
        row_bucket = np.where(length == 1, 1, _SHORT_ROWS)
        kv_bucket = -(-(start + length) // _KV_BUCKET)
        buckets, of_bucket = np.unique(np.stack((row_bucket, kv_bucket)), axis=1, return_inverse=True)
        for bucket in range(buckets.shape[1]):
            inside = which[of_bucket.ravel() == bucket]
            first, begin, count = pieces.first[inside], pieces.start[inside], pieces.length[inside]
            rows, tokens = int(count.max()), int((begin + count).max())
            row = np.minimum(np.arange(rows), count[:, None] - 1)  # [B, n]; padding repeats the last row
            key = np.arange(tokens)
            own = begin[:, None] + row
            seen = key <= own[..., None]  # [B, n, M]
            if window is not None:
                seen &= key > own[..., None] - window
            places = self._tables.index(pieces.sequence[inside][:, None], np.minimum(key, (begin + count)[:, None] - 1))
            real = np.arange(rows) < count[:, None]
            index = (first[:, None] + row).ravel()
            neighbours = bool((np.diff(index) == 1).all())
            yield Read(
                partial,
                rows,
                KVTokens(inside.size, tokens, index=torch.from_numpy(places.ravel())),
                first=int(index[0]),
                row_index=None if neighbours else torch.from_numpy(index),
                real=None if real.all() else torch.from_numpy(np.flatnonzero(real.ravel())),
                mask=None if seen.all() else self._mask(seen),
            )

    def _kv_tokens(self, slot: int, start: int, stop: int) -> KVTokens:
        run = self._tables.run(slot, start, stop)
        if run is not None:
            return KVTokens(1, stop - start, run)
        places = self._tables.index(slot, np.arange(start, stop))
        return KVTokens(1, stop - start, index=torch.from_numpy(places))

    def _mask(self, seen: npt.NDArray[np.bool_]) -> torch.Tensor:
        """`[B, n, M]` as what to add to the scores, `[B, 1, n * G, M]`: the query heads of a row and KV head are rows
        of the same call."""
        bias = torch.zeros(seen.shape, dtype=self._dtype)
        bias.masked_fill_(torch.from_numpy(~seen), float("-inf"))
        return bias.repeat_interleave(self._group_size, dim=-2)[:, None]
