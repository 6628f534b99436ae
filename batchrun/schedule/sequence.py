"""Sequences: the only moving part. A shared prefix is a sequence that never samples."""

from __future__ import annotations

import numpy as np

_FIRST_SLOTS = 64


class Sequences:
    """Live sequences in columns, by slot; a slot is used again once its sequence is gone.

    A sequence has tokens of its own (a group's run of tokens, or what of a request no group computes, then what the
    request has sampled), and advances by computing them in order. Prefill of a prefix, prefill of a request,
    decode, and the second computing after a preemption are all "num_computed catches up with num_tokens".

    Attributes (all by slot):
        request: request, or -1 for a shared prefix.
        group: the group that the sequence computes, or -1 for a request.
        parent: the deepest group it reads, or -1.
        rank: place in forest order.
        depth: tokens of groups before its own first token.
        token_start: where its own tokens begin in `TokenTable.ids`.
        num_prompt: own tokens that come from the table.
        num_tokens: own tokens known so far, sampled ones included.
        num_computed: own tokens whose KV is computed, or will be by the steps under way.
        num_sampled: tokens sampled.
        max_new_tokens: 0 for a shared prefix.
        expected_new: tokens it is expected to sample.
        num_pages: pages held.
        admitted: number of its admission; smaller is older.
        readers: requests under way that read it (shared prefixes only).
        sampled: int32 `[slots, *]`, the sampled tokens.
    """

    _COLUMNS = (
        "request",
        "group",
        "parent",
        "rank",
        "depth",
        "num_prompt",
        "num_tokens",
        "num_computed",
        "num_sampled",
        "max_new_tokens",
        "expected_new",
        "num_pages",
        "readers",
    )

    def __init__(self) -> None:
        for name in self._COLUMNS:
            setattr(self, name, np.zeros(_FIRST_SLOTS, dtype=np.int32))
        self.token_start = np.zeros(_FIRST_SLOTS, dtype=np.int64)
        self.admitted = np.zeros(_FIRST_SLOTS, dtype=np.int64)
        self.sampled = np.zeros((_FIRST_SLOTS, 16), dtype=np.int32)
        self._vacant = list(range(_FIRST_SLOTS - 1, -1, -1))
        self._admissions = 0

    request: np.ndarray
    group: np.ndarray
    parent: np.ndarray
    rank: np.ndarray
    depth: np.ndarray
    num_prompt: np.ndarray
    num_tokens: np.ndarray
    num_computed: np.ndarray
    num_sampled: np.ndarray
    max_new_tokens: np.ndarray
    expected_new: np.ndarray
    num_pages: np.ndarray
    readers: np.ndarray

    def add(self, *, token_start: int, **columns: int) -> int:
        """Put a new sequence into a vacant slot; columns not given are 0. Returns the slot."""
        if not self._vacant:
            self._grow()
        slot = self._vacant.pop()
        for name in self._COLUMNS:
            getattr(self, name)[slot] = columns.get(name, 0)
        self.token_start[slot] = token_start
        self.stamp(slot)
        return slot

    def stamp(self, slot: int) -> None:
        """Give a sequence the next admission number."""
        self.admitted[slot] = self._admissions
        self._admissions += 1

    def remove(self, slot: int) -> None:
        """Vacate a slot."""
        self.request[slot] = -1
        self._vacant.append(slot)

    def append_sampled(self, slots: np.ndarray, token_ids: np.ndarray) -> None:
        """Record one sampled token for each of the slots."""
        at = self.num_sampled[slots]
        if at.size and int(at.max()) >= self.sampled.shape[1]:
            self.sampled = np.concatenate((self.sampled, np.zeros_like(self.sampled)), axis=1)
        self.sampled[slots, at] = token_ids
        self.num_sampled[slots] += 1

    def _grow(self) -> None:
        size = self.request.size
        for name in (*self._COLUMNS, "token_start", "admitted", "sampled"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros_like(column))))
        self._vacant.extend(range(2 * size - 1, size - 1, -1))
