"""How many tokens an answer is expected to have.

In order of trust: a length that is known exactly; a hint on the line; the lengths of the answers seen so far, those of
the same prefix-sharing group weighing most; a first guess. Never more than the request's limit.
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
_PRIOR = 4  # answers of a group that weigh as much as what is known of the requests around it
_REMEMBERED = 2048  # answers that the conditional mean looks at (Tokasaurus)


def known_lengths(requests: Requests) -> npt.NDArray[np.bool_]:
    """Which answers have as many tokens as their limit says, bool `[R]`."""
    return requests.ignore_eos | (requests.max_new_tokens == 1)


def _used(path: Int32) -> Int32:
    """The columns of `[F, L]` paths that any of them reaches, as rows; the others are -1 in all."""
    return path[:, : int((path >= 0).sum(axis=1).max(initial=0))].T


class OutputLengths:
    """Expected lengths of answers, learnt as answers finish.

    Attributes:
        exact: bool `[R]`, whether the length is known: it is then the request's limit.
    """

    def __init__(self, requests: Requests, groups: PrefixGroups | None = None, first_guess: int = FIRST_GUESS) -> None:
        self.exact = known_lengths(requests)
        self._limit = requests.max_new_tokens
        self._hint = requests.expected_tokens
        self._first_guess = first_guess
        self._margin = _MARGIN
        # One place for each group, and the last one for the job.
        count = len(groups) if groups is not None else 0
        self._group = groups.request_group if groups is not None else np.full(len(requests), -1, dtype=np.int32)
        # The groups from the root down to each one; [-1] is that of a request without any.
        path = groups.path if groups is not None else np.empty((0, 0), dtype=np.int32)
        self._path = np.concatenate((path, np.full((1, path.shape[1]), -1, dtype=np.int32)))
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
        for path in _used(self._path[self._group[requests]]):
            np.add.at(self._seen, path[path >= 0], 1)
            np.add.at(self._tokens, path[path >= 0], lengths[path >= 0])

    def expected(self, requests: Ints | slice = slice(None)) -> Int32:
        """Expected tokens of answers not begun, int32, at least 1 and at most their limits."""
        limit = self._limit[requests]
        if self._seen[-1]:
            # From the job's mean down to that of the deepest group, each drawn towards the one above it.
            mean = np.full(limit.shape, self._tokens[-1] / self._seen[-1])
            group = self._group[requests]
            for path in _used(self._path[group]):
                inside = path >= 0
                seen, tokens = self._seen[path[inside]], self._tokens[path[inside]]
                mean[inside] = (tokens + _PRIOR * mean[inside]) / (seen + _PRIOR)
            guess = (self._margin * mean).astype(np.int32) + 1
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
