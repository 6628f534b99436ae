"""Which tokens the grammars of requests allow, found on threads of their own while the model computes logits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchrun.columns import concat_ranges
from batchrun.grammar import Grammars, Matcher
from batchrun.request import Requests
from batchrun.schedule.step import PastTokens, Step

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Mask:
    """The tokens that may be sampled in some rows.

    Attributes:
        rows: int64 `[M]`, places among the sampling chunks.
        bits: uint8 `[M, *]`, token t being bit t % 8 of byte t // 8; none where a row is stuck.
        stuck: why nothing can be sampled, by place.
    """

    rows: npt.NDArray[np.int64]
    bits: npt.NDArray[np.uint8]
    stuck: dict[int, str]


class Masks:
    """Follows the grammars of the requests under way.

    The tokens that end an answer are allowed exactly where its grammar may end, and, as long as anything else can
    follow, not before it has its `min_tokens`.

    Args:
        requests: those that steps speak of.
        vocabulary: as for `Grammars`.
        eos_token_ids: the model's ends of text.
    """

    def __init__(self, requests: Requests, vocabulary: Sequence[bytes], eos_token_ids: frozenset[int]) -> None:
        settings = requests.sampling
        self._requests = requests
        self._constrained = np.array([s.grammar is not None for s in settings], dtype=bool)
        self._min_tokens = np.array([s.min_tokens for s in settings], dtype=np.int32)
        ends = [tuple(end for end in s.ends(eos_token_ids) if end < len(vocabulary)) for s in settings]
        self._ends = np.array([end for some in ends for end in some], dtype=np.int64)
        self._num_ends = np.array([len(some) for some in ends], dtype=np.int64)
        self._first_end = np.cumsum(self._num_ends) - self._num_ends
        self._under_way: dict[int, tuple[int, Matcher]] = {}  # by slot, the request that it has
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        # Taking in a large vocabulary takes a while, in which the first step can begin.
        self._grammars = self._thread.submit(Grammars, vocabulary)

    def begin(self, step: Step) -> Future[Mask] | None:
        """Begin to find the mask of a step; None where it needs none."""
        for slot in step.releases.tolist():
            self._under_way.pop(slot, None)
        requests = step.request[step.samples]
        rows = np.flatnonzero(self._constrained[self._requests.sampling_id[requests]])
        if not rows.size:
            return None
        assert step.past is not None
        past = PastTokens(step.past.length[step.samples], step.past.token_ids)
        return self._thread.submit(self._find, rows, requests[rows], step.sequence[step.samples][rows], past)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._under_way.clear()

    def _find(self, rows: npt.NDArray[np.int64], requests: Int32, slots: Int32, past: PastTokens) -> Mask:
        length = past.length[rows]
        stop = np.cumsum(past.length)[rows]
        matchers = []
        for request, slot, begin, end in zip(
            *(c.tolist() for c in (requests, slots, stop - length, stop)), strict=True
        ):
            matcher = self._matcher(slot, request, end - begin)
            if matcher.consumed < end - begin:
                matcher.consume(past.token_ids[begin + matcher.consumed : end].tolist())
            matchers.append(matcher)
        words, may_end = self._grammars.result().allowed(matchers)
        stuck = {row: fault for row, matcher in zip(rows.tolist(), matchers, strict=True) if (fault := matcher.fault)}
        if stuck:
            at_fault = np.isin(rows, list(stuck))
            words[at_fault], may_end[at_fault] = 0, False
        self._allow_ends(words, may_end, self._requests.sampling_id[requests], length)
        return Mask(rows, words.view(np.uint8), stuck)

    def _matcher(self, slot: int, request: int, sampled: int) -> Matcher:
        """The matcher of a request, which has sampled so many tokens; a new one where there is none that fits."""
        owner, matcher = self._under_way.get(slot, (-1, None))
        if matcher is None or owner != request or matcher.consumed > sampled:
            grammar = self._requests.sampling[self._requests.sampling_id[request]].grammar
            assert grammar is not None
            matcher = self._grammars.result().matcher(grammar)
            self._under_way[slot] = request, matcher
        return matcher

    def _allow_ends(self, words: Int32, may_end: npt.NDArray[np.bool_], settings: Int32, sampled: Int32) -> None:
        """Set the bits of the tokens that end an answer."""
        count = self._num_ends[settings]
        row = np.repeat(np.arange(settings.size), count)
        token = self._ends[concat_ranges(self._first_end[settings], count)]
        bit = np.left_shift(np.int32(1), (token % 32).astype(np.int32))
        np.bitwise_and.at(words, (row, token // 32), ~bit)
        may_end &= (sampled >= self._min_tokens[settings]) | ~words.any(axis=1)
        np.bitwise_or.at(words, (row, token // 32), np.where(may_end[row], bit, np.int32(0)))
