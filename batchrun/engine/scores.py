"""Which rows of a step tell the log-probabilities of tokens of prompts, and those, for requests that want them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batchrun.columns import concat_ranges
from batchrun.request import Requests
from batchrun.schedule.step import Step

_AT_ONCE = 1 << 26  # logits of a forward pass for scores; some 12 bytes are taken for each

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows of a step whose next tokens are known and whose logprobs are wanted.

    Attributes:
        row: int64 `[Q]`, of the step, ascending.
        request: int32 `[Q]`.
        place: int32 `[Q]`, of the next token in its prompt.
        token: int64 `[Q]`, that token.
        alternatives: likeliest tokens to name.
    """

    row: Int64
    request: Int32
    place: Int32
    token: Int64
    alternatives: int


class PromptScores:
    """Finds the rows that are scored.

    Args:
        requests: with the prompts of those that want it. Their chunks are of whole prompts: they share nothing.
    """

    def __init__(self, requests: Requests) -> None:
        wanted = [-1 if sampling.scores is None else sampling.scores for sampling in requests.sampling]
        self._wanted = np.array(wanted, dtype=np.int32)
        self._requests = requests
        self._any = bool((self._wanted >= 0).any())

    def rows(self, step: Step) -> ScoredRows | None:
        """The rows of a step that are scored; None where there are none."""
        if not self._any:
            return None
        wanted = np.where(step.request >= 0, self._wanted[self._requests.sampling_id[step.request]], -1)
        chunks = np.flatnonzero(wanted >= 0)
        if not chunks.size:
            return None
        request, begin = step.request[chunks], (step.depth + step.start)[chunks].astype(np.int64)
        tokens = self._requests.tokens
        # The last token of a prompt has none of the prompt behind it.
        last = tokens.offsets[request + 1] - tokens.offsets[request] - 1
        count = np.clip(np.minimum(begin + step.length[chunks], last) - begin, 0, None)
        if not count.any():
            return None
        first = (np.cumsum(step.length, dtype=np.int64) - step.length)[chunks]
        request, place = np.repeat(request, count), concat_ranges(begin + 1, count)
        return ScoredRows(
            row=concat_ranges(first, count),
            request=request.astype(np.int32),
            place=place.astype(np.int32),
            token=tokens.ids[tokens.offsets[request] + place].astype(np.int64),
            alternatives=int(wanted.max()),
        )

    def pieces(self, step: Step, vocab_size: int) -> Iterator[Step]:
        """The step, cut where its scored rows have more logits than there may be at once."""
        scored = self.rows(step)
        most = max(_AT_ONCE // vocab_size, 1)
        while scored is not None and scored.row.size > most:
            piece, step = step.split(int(scored.row[most]))
            yield piece
            scored = self.rows(step)
        yield step


def score(
    logits: torch.Tensor, tokens: torch.Tensor, alternatives: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs of tokens, `[Q]`, their ranks `[Q]`, and ids and logprobs of the likeliest, `[Q, alternatives]`.

    Args:
        logits: `[Q, vocabulary]`, any float dtype.
        tokens: int64 `[Q]`.
    """
    raw = logits.float().log_softmax(dim=-1)
    own = raw.gather(-1, tokens[:, None])
    top, top_ids = raw.topk(min(alternatives, raw.shape[-1]), dim=-1)
    return own[:, 0], (raw > own).sum(dim=-1) + 1, top_ids, top
