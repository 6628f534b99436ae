"""From logits to tokens, for all rows of a step at once.

The random number of a token is a function of its request's seed and of how many tokens the request has sampled before:
so a request gets the same tokens alone, in any batch and in any order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from batchrun.request import Requests

_NEVER = float("-inf")


class Sampler:
    """Samples by each request's own settings, in vLLM's order: temperature, min_p, top_k, top_p.

    Args:
        requests: whose columns say how each is sampled.
        eos_token_ids: the model's ends of text.
    """

    def __init__(self, requests: Requests, eos_token_ids: frozenset[int]) -> None:
        self._requests = requests
        settings = requests.sampling
        self._temperature = np.array([s.temperature for s in settings], dtype=np.float32)
        self._min_p = np.array([s.min_p for s in settings], dtype=np.float32)
        self._top_k = np.array([s.top_k for s in settings], dtype=np.int64)
        self._top_p = np.array([s.top_p for s in settings], dtype=np.float32)
        self._min_tokens = np.array([s.min_tokens for s in settings], dtype=np.int32)
        # The ids that end an answer, by settings: as an array for lookup, one for each distinct set.
        self._ends = [
            np.array(
                sorted({*s.stop_token_ids, *(frozenset[int]() if s.ignore_eos else eos_token_ids)}), dtype=np.int64
            )
            for s in settings
        ]
        ends: dict[tuple[int, ...], int] = {}
        self._end_set = np.array([ends.setdefault(tuple(e.tolist()), len(ends)) for e in self._ends], dtype=np.int64)
        self._end_sets = [np.array(e, dtype=np.int64) for e in ends]

    def sample(
        self, logits: torch.Tensor, requests: npt.NDArray[np.int32], num_sampled: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Sample a token for each row.

        Args:
            logits: `[S, vocabulary]`, any float dtype; may be written to.
            requests: int32 `[S]`, the request of each row.
            num_sampled: int32 `[S]`, tokens that the request has sampled before.

        Returns:
            The tokens, int32 `[S]`, and whether each ends its answer, bool `[S]`.
        """
        settings = self._requests.sampling_id[requests]
        self._hold_back_ends(logits, settings, num_sampled)
        token_ids = logits.argmax(dim=-1)
        drawn = np.flatnonzero(self._temperature[settings] > 0)
        if drawn.size:
            rows = torch.from_numpy(drawn).to(logits.device)
            token_ids[rows] = self._draw(
                logits[rows].float(), settings[drawn], self._requests.seed[requests[drawn]], num_sampled[drawn]
            )
        found = token_ids.cpu().numpy().astype(np.int32)
        ended = np.zeros(found.size, dtype=bool)
        end_set = self._end_set[settings]
        for which in np.unique(end_set).tolist():
            rows_of = end_set == which
            ended[rows_of] = np.isin(found[rows_of], self._end_sets[which])
        return found, ended

    def _hold_back_ends(
        self, logits: torch.Tensor, settings: npt.NDArray[np.int32], num_sampled: npt.NDArray[np.int32]
    ) -> None:
        """No answer ends before it has its `min_tokens`."""
        early = num_sampled < self._min_tokens[settings]
        for which in np.unique(settings[early]).tolist():
            ends = self._ends[which]
            ends = ends[(ends >= 0) & (ends < logits.shape[-1])]
            rows = np.flatnonzero(early & (settings == which))
            rows_of, columns = (torch.from_numpy(index).to(logits.device) for index in (rows, ends))
            logits[rows_of[:, None], columns[None]] = _NEVER

    def _draw(
        self,
        logits: torch.Tensor,
        settings: npt.NDArray[np.int32],
        seed: npt.NDArray[np.uint64],
        num_sampled: npt.NDArray[np.int32],
    ) -> torch.Tensor:
        """Draw a token for each row, int64 `[K]`, from float32 logits `[K, vocabulary]`."""

        def column(values: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(values[settings])[:, None].to(logits.device)

        # Largest first made 0, so that a temperature near zero overflows to -inf for the others and to NaN for none.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / column(self._temperature)
        if self._min_p[settings].any():
            # p < min_p * p_max, without the normaliser of both.
            logits = logits.masked_fill(logits < column(self._min_p).log(), _NEVER)
        top_k, top_p = self._top_k[settings], self._top_p[settings]
        if top_k.any() or (top_p < 1).any():
            logits = logits.masked_fill(logits < _threshold(logits, top_k, top_p), _NEVER)
        # In order of token id, not of probability: a rounding difference between two near-equal tokens then moves a
        # boundary by as little, where a sorted order would swap them.
        cumulative = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum(dim=-1)
        point = torch.from_numpy(uniform(seed, num_sampled))[:, None].to(logits.device) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True)[:, 0]


def _threshold(logits: torch.Tensor, top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float32]) -> torch.Tensor:
    """The smallest logit that top_k, and then top_p, keeps, `[K, 1]`. Tokens that tie with it are kept too."""
    ordered = logits.sort(dim=-1, descending=True).values
    vocabulary = logits.shape[-1]
    k = torch.from_numpy(np.where(top_k > 0, np.minimum(top_k, vocabulary), vocabulary))[:, None].to(logits.device)
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=logits.device) >= k, _NEVER)
    probability = torch.softmax(ordered, dim=-1, dtype=torch.float64)
    before = probability.cumsum(dim=-1) - probability
    p = torch.from_numpy(top_p.astype(np.float64))[:, None].to(logits.device)
    kept = ((before < p) | (p >= 1)) & (ordered > _NEVER)
    kept[:, 0] = True
    return ordered.gather(-1, kept.sum(dim=-1, keepdim=True) - 1)


def uniform(seed: npt.NDArray[np.uint64], counter: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """A random number in [0, 1) for each (seed, counter): output `counter` of the SplitMix64 generator (Steele, Lea and
    Flood, OOPSLA 2014) whose state begins at the mixed seed."""
    state = _mix(seed.astype(np.uint64)) + counter.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser; arithmetic modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
