"""How many tokens an answer is expected to have.

In order of trust: a length that is known exactly, the lengths of the answers seen so far, a first guess.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchrun.request import Requests

FIRST_GUESS = 256
_MARGIN = 1.25  # on the mean of the lengths seen: an answer that outgrows its estimate may have to be computed again


class OutputLengths:
    """Expected lengths of answers, learnt as answers finish.

    Attributes:
        exact: bool `[R]`, whether the length is known: it is then the request's limit.
    """

    def __init__(self, requests: Requests, first_guess: int = FIRST_GUESS) -> None:
        self.exact = requests.ignore_eos
        self._limit = requests.max_new_tokens
        self._first_guess = first_guess
        self._seen = 0
        self._seen_tokens = 0

    def observe(self, requests: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> None:
        """Learn from finished answers, int32 `[F]` each; exact ones teach nothing."""
        learnt = ~self.exact[requests]
        self._seen += int(learnt.sum())
        self._seen_tokens += int(lengths[learnt].sum())

    def expected(self, requests: npt.NDArray[np.int32] | slice = slice(None)) -> npt.NDArray[np.int32]:
        """Expected tokens of the answers, int32, at least 1 and at most their limits."""
        guess = int(_MARGIN * self._seen_tokens / self._seen) + 1 if self._seen else self._first_guess
        limit = self._limit[requests]
        return np.where(self.exact[requests], limit, np.minimum(limit, guess)).astype(np.int32)
