"""How many tokens an answer is expected to have.

In order of trust: a length that is known exactly; a hint on the line; the lengths of the answers seen so far, of the
same prefix-sharing group before the job's; a first guess. Never more than the request's limit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.prefix.groups import PrefixGroups
from batchrun.request import Requests

Int32 = npt.NDArray[np.int32]
Ints = npt.NDArray[np.integer[Any]]

FIRST_GUESS = 256
_MARGIN = 1.15  # on means: an answer that outgrows its estimate may have to be computed again
_WIDEST_MARGIN = 2.0
_ENOUGH = 8  # answers of a group before its mean is taken for it
_REMEMBERED = 2048  # answers that the conditional mean looks at (Tokasaurus)


class OutputLengths:
    """Expected lengths of answers, learnt as answers finish.

    Attributes:
        exact: bool `[R]`, whether the length is known: it is then the request's limit.
    """

    def __init__(self, requests: Requests, groups: PrefixGroups | None = None, first_guess: int = FIRST_GUESS) -> None:
        self.exact = requests.ignore_eos
        self._limit = requests.max_new_tokens
        self._hint = getattr(requests, "expected_tokens", np.zeros(len(requests), dtype=np.int32))
        self._first_guess = first_guess
        self._margin = _MARGIN
        # One place for each group, and the last one for the job.
        count = len(groups) if groups is not None else 0
        self._group = groups.request_group if groups is not None else np.full(len(requests), -1, dtype=np.int32)
        self._parent = groups.parent if groups is not None else np.empty(0, dtype=np.int32)
        self._seen = np.zeros(count + 1, dtype=np.int64)
        self._tokens = np.zeros(count + 1, dtype=np.int64)
        self._recent = np.zeros(_REMEMBERED, dtype=np.int32)
        self._sorted: npt.NDArray[np.int64] | None = None

    def observe(self, requests: Ints, lengths: Ints) -> None:
        """Learn from finished answers, int32 `[F]` each; exact ones teach nothing."""
        learnt = ~self.exact[requests]
        if not learnt.any():
            return
        requests, lengths = requests[learnt], lengths[learnt]
        at = (self._seen[-1] + np.arange(lengths.size)) % _REMEMBERED
        self._recent[at] = lengths
        self._sorted = None
        self._seen[-1] += lengths.size
        self._tokens[-1] += lengths.sum()
        group = self._group[requests]
        while (group >= 0).any():
            lengths, group = lengths[group >= 0], group[group >= 0]
            np.add.at(self._seen, group, 1)
            np.add.at(self._tokens, group, lengths)
            group = self._parent[group]

    def expected(self, requests: Ints | slice = slice(None)) -> Int32:
        """Expected tokens of answers not begun, int32, at least 1 and at most their limits."""
        limit = self._limit[requests]
        if self._seen[-1]:
            # The deepest group that has seen enough, else the job; [-1] is the job's place.
            group = self._group[requests].copy()
            while (poor := (group >= 0) & (self._seen[group] < _ENOUGH)).any():
                group[poor] = self._parent[group[poor]]
            guess = (self._margin * self._tokens[group] / self._seen[group]).astype(np.int32) + 1
        else:
            guess = np.full(limit.shape, self._first_guess, dtype=np.int32)
        hint = self._hint[requests]
        guess = np.where(self.exact[requests], limit, np.where(hint > 0, hint, guess))
        return np.minimum(limit, guess).astype(np.int32)

    def longer(self, requests: Ints, sampled: Ints) -> Int32:
        """Expected tokens of answers that have outgrown what was expected of them, int32 `[F]`: the mean of the
        recent answers that are longer than these are now; where there are none, half as much again.

        Args:
            sampled: int32 `[F]`, their tokens so far, less than their limits.
        """
        if self._sorted is None:
            self._sorted = np.sort(self._recent[: min(int(self._seen[-1]), _REMEMBERED)]).astype(np.int64)
        ahead = np.searchsorted(self._sorted, sampled, side="right")
        count = self._sorted.size - ahead
        total = np.append(np.cumsum(self._sorted[::-1])[::-1], 0)[ahead]
        guess = np.where(count > 0, self._margin * total / np.maximum(count, 1), 1.5 * sampled)
        return np.minimum(self._limit[requests], np.maximum(guess, sampled + 1)).astype(np.int32)

    def widen(self) -> None:
        """Estimates were too short, and cost a preemption: be more careful from here on."""
        self._margin = min(1.05 * self._margin, _WIDEST_MARGIN)
