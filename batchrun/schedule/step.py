"""A step: everything a worker needs for one forward pass, and what it gives back.

Shape letters: C chunks, T rows (tokens) of the step, S rows that sample, P prefix reads, G pages granted, L rows whose
logprobs are wanted, K likeliest tokens that are named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.planning.cost import Work

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

_BY_CHUNK = ("sequence", "request", "depth", "num_sampled")  # the same for all parts of a chunk


@dataclass(frozen=True, slots=True)
class PrefixReads:
    """Which rows read the KV of which shared prefix, in columns; entry j says: rows
    `[first_row[j], first_row[j] + rows[j])` attend to all of the first `length[j]` tokens of the KV of sequence
    `sequence[j]`. Rows are in forest order, so the readers of a prefix are always one range.

    Attributes:
        level: int32 `[P]`, depth of the prefix in the tree of shared prefixes, the root's being 0; entries of one
            level have disjoint row ranges. Sorted by level, then by first row.
        first_row, rows, sequence, length: int32 `[P]`.
        position: int32 `[P]`, position (from the start of the prompt) of the first token of that KV.
    """

    level: Int32
    first_row: Int32
    rows: Int32
    sequence: Int32
    length: Int32
    position: Int32

    def cut(self, first_row: npt.NDArray[np.integer[Any]], rows: Int32) -> PrefixReads:
        """The same reads by other rows, `[P]`; those of no rows are left out."""
        left = rows > 0
        columns = replace(self, first_row=first_row.astype(np.int32), rows=rows)
        return PrefixReads(*(getattr(columns, field.name)[left] for field in fields(columns)))


@dataclass(frozen=True, slots=True)
class PastTokens:
    """What requests have sampled before, for those whose next token depends on it (`SamplingParams.looks_back`).

    Attributes:
        length: int32 `[C]`, tokens of each chunk's request; 0 where the chunk does not sample or does not look back.
        token_ids: int32 `[sum of length]`, one request after another, in order; marked as in `Step.token_ids` where the
            step before was still under way.
    """

    length: Int32
    token_ids: Int32


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass. It is complete: any worker can run it, and a log can replay it.

    Chunks stand in forest order (depth first) of their sequences. Chunk c advances `sequence[c]` by `length[c]`
    tokens from its own token `start[c]`; the rows of chunk c follow those of chunk c - 1. A chunk of length 1 that
    samples is a decode; nobody asks which. A row sees all KV of the prefixes it reads (`prefix_reads`), then its
    sequence's own tokens up to and including itself.

    Attributes:
        index: number of the step, from 0.
        sequence: int32 `[C]`, slot of the sequence. Slots are small integers, used again once released.
        request: int32 `[C]`, request of the sequence, or -1 for a shared prefix.
        start: int32 `[C]`, the first of the sequence's own tokens that this chunk computes.
        length: int32 `[C]`, at least 1.
        depth: int32 `[C]`, tokens of shared prefixes before the sequence's own first token; the position of row k
            of chunk c is `depth[c] + start[c] + k`.
        samples: bool `[C]`, whether the last row of the chunk is sampled.
        num_sampled: int32 `[C]`, tokens this request has sampled before this step (the counter of its random
            numbers); 0 for shared prefixes.
        token_ids: int32 `[T]`, the input of each row; where the step before was still under way when this one was made,
            -1 - k stands for the token that it samples at place k of its `[S]`.
        prefix_reads: which rows read which shared prefix.
        releases: int32 `[*]`, slots whose pages all return to the pool, before anything else of this step.
        grant_sequence, grant_page: int32 `[G]`, pages given to sequences, after the releases, each at the end of
            its sequence's page list. KV of own token t of a sequence is in its page t // page_size.
        past: what requests have sampled before, where one looks back; else None.
    """

    index: int
    sequence: Int32
    request: Int32
    start: Int32
    length: Int32
    depth: Int32
    samples: npt.NDArray[np.bool_]
    num_sampled: Int32
    token_ids: Int32
    prefix_reads: PrefixReads
    releases: Int32
    grant_sequence: Int32
    grant_page: Int32
    past: PastTokens | None = None

    @property
    def num_rows(self) -> int:
        return self.token_ids.size

    def split(self, rows: int) -> tuple[Step, Step]:
        """The first `rows` rows and the others as two steps, to be run one after the other: a row sees nothing of rows
        after it. Releases and grants go with the first."""
        first = np.cumsum(self.length) - self.length
        before = np.clip(rows - first, 0, self.length).astype(np.int32)  # rows of each chunk that go with the first
        head, tail = before > 0, before < self.length
        reads = self.prefix_reads
        read_before = np.clip(rows - reads.first_row, 0, reads.rows).astype(np.int32)
        past_one = past_two = None
        if self.past is not None:
            of_first = np.where(tail, 0, self.past.length)  # a chunk that is cut samples in the second
            at = int(of_first.sum())
            past_one = PastTokens(of_first[head], self.past.token_ids[:at])
            past_two = PastTokens(self.past.length[tail], self.past.token_ids[at:])
        one = replace(
            self,
            **{name: getattr(self, name)[head] for name in _BY_CHUNK},
            start=self.start[head],
            length=before[head],
            samples=(self.samples & ~tail)[head],
            token_ids=self.token_ids[:rows],
            prefix_reads=reads.cut(reads.first_row, read_before),
            past=past_one,
        )
        two = replace(
            self,
            **{name: getattr(self, name)[tail] for name in _BY_CHUNK},
            start=(self.start + before)[tail],
            length=(self.length - before)[tail],
            samples=self.samples[tail],
            token_ids=self.token_ids[rows:],
            prefix_reads=reads.cut(np.maximum(reads.first_row - rows, 0), reads.rows - read_before),
            releases=self.releases[:0],
            grant_sequence=self.grant_sequence[:0],
            grant_page=self.grant_page[:0],
            past=past_two,
        )
        return one, two

    @property
    def work(self) -> Work:
        """What the step computes, reads and writes, to be priced."""
        reads, length = self.prefix_reads, self.length.astype(np.int64)
        return Work(
            steps=1,
            rows=self.token_ids.size,
            sampled=int(self.samples.sum()),
            chunks=length.size,
            reads=reads.level.size,
            # A chunk's rows see their own tokens up to themselves.
            pairs=int(
                (reads.rows.astype(np.int64) * reads.length).sum()
                + (length * self.start + length * (length + 1) // 2).sum()
            ),
            prefix_kv=int(reads.length.sum(dtype=np.int64)),
            suffix_kv=int((self.start + length).sum()),
            merges=int(reads.rows.sum(dtype=np.int64)),
        )


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """Log-probabilities by the model's own distribution, before penalties, temperature and what cuts it.

    Attributes:
        rows: int32 `[L]`, places among the sampling chunks.
        sampled: float32 `[L]`, of the sampled token.
        top_ids: int32 `[L, K]`, the likeliest tokens, likeliest first; of a row only the first that it asked for count.
        top: float32 `[L, K]`, theirs.
    """

    rows: Int32
    sampled: Float32
    top_ids: Int32
    top: Float32


@dataclass(frozen=True, slots=True)
class StepScores:
    """Log-probabilities of tokens of prompts, by the model's own distribution; Q of them.

    Attributes:
        request: int32 `[Q]`, whose prompt; those of one are neighbours.
        place: int32 `[Q]`, of the token in it, at least 1; ascending for a request.
        own: float32 `[Q]`, of the token.
        rank: int32 `[Q]`, its place among all tokens, 1 for the likeliest.
        top_ids, top: as in `StepLogprobs`.
    """

    request: Int32
    place: Int32
    own: Float32
    rank: Int32
    top_ids: Int32
    top: Float32


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a worker gives back for a step, in the order of its sampling chunks.

    Attributes:
        token_ids: int32 `[S]`, the sampled tokens; -1 where the logits were no numbers.
        ended: bool `[S]`, whether the token ends the answer by itself (end of text or a stop token; it is then not
            part of the answer).
        seconds: time the step took on the device.
        padded_rows: rows computed beyond those of the step.
        parts: forward passes that it took: more than one where memory ran out.
        logprobs: where requests asked for them, else None.
        scores: of tokens of prompts, where requests asked for them, else None.
        stuck: why a grammar allows no token, by place among the sampling chunks; -1 is their token.
    """

    token_ids: Int32
    ended: npt.NDArray[np.bool_]
    seconds: float
    padded_rows: int = 0
    parts: int = 1
    logprobs: StepLogprobs | None = None
    scores: StepScores | None = None
    stuck: dict[int, str] = field(default_factory=dict)
