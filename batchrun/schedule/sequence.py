"""Sequences: the only moving part. A shared prefix is a sequence that never samples."""

from __future__ import annotations

from typing import ClassVar

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
        num_prompt: own tokens that come from the table.
        num_tokens: own tokens there are, sampled ones included, also those that the steps under way will sample.
        num_computed: own tokens whose KV is computed, or will be by the steps under way.
        num_sampled: tokens sampled, or that will be by the steps under way.
        max_new_tokens: 0 for a shared prefix.
        num_pages: pages held.
        last_page: the page taken last, or -1.
        readers: requests under way that read it (shared prefixes only).
        until: the step before which its pages are booked.
        growth: what to add to a step's number for the tokens booked in it, where it is booked as one that grows.
        held: pages booked in each step where it is booked as one that holds all it needs from the start, else 0.
        token_start: where its own tokens begin in `TokenTable.ids`.
        admitted: number of its admission; smaller is older.
        sampled: int32 `[slots, *]`, the sampled tokens; for one that the step under way samples, -1 - its place among
            those that the step samples.
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
        "num_pages",
        "last_page",
        "readers",
        "until",
        "growth",
        "held",
        "token_start",
        "admitted",
    )
    _NOT_ZERO: ClassVar = {"request": -1, "group": -1, "parent": -1, "last_page": -1}

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
    num_pages: np.ndarray
    last_page: np.ndarray
    readers: np.ndarray
    until: np.ndarray
    growth: np.ndarray
    held: np.ndarray
    token_start: np.ndarray
    admitted: np.ndarray

    def __init__(self) -> None:
        self._blank = np.array([self._NOT_ZERO.get(name, 0) for name in self._COLUMNS], dtype=np.int64)
        self._place = {name: at for at, name in enumerate(self._COLUMNS)}
        self._table = np.zeros((len(self._COLUMNS), 0), dtype=np.int64)
        self.sampled = np.zeros((0, 16), dtype=np.int32)
        self._vacant: list[int] = []
        self._admissions = 0
        self._grow(_FIRST_SLOTS)

    def add(self, **columns: int) -> int:
        """Put a new sequence into a vacant slot; columns not given are 0, or -1 where they name something. Returns the
        slot."""
        if not self._vacant:
            self._grow(2 * self.request.size)
        slot = self._vacant.pop()
        entry = self._blank.copy()
        for name, value in columns.items():
            entry[self._place[name]] = value
        self._table[:, slot] = entry
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

    def sample(self, slots: np.ndarray) -> None:
        """Count a token more for each of the slots: those that the step being made samples, in its order. Unless it is
        the last that the request may have, it is to be computed too."""
        at = self.num_sampled[slots]
        if at.size and int(at.max()) >= self.sampled.shape[1]:
            self.sampled = np.concatenate((self.sampled, np.zeros_like(self.sampled)), axis=1)
        self.sampled[slots, at] = -1 - np.arange(slots.size)
        self.num_sampled[slots] = at + 1
        self.num_tokens[slots] += at + 1 < self.max_new_tokens[slots]

    def _grow(self, size: int) -> None:
        old = self._table.shape[1]
        self._table = np.concatenate((self._table, np.zeros((len(self._COLUMNS), size - old), dtype=np.int64)), axis=1)
        for name, column in zip(self._COLUMNS, self._table, strict=True):
            setattr(self, name, column)
        self.sampled = np.concatenate((self.sampled, np.zeros((size - old, self.sampled.shape[1]), dtype=np.int32)))
        self._vacant.extend(range(size - 1, old - 1, -1))
