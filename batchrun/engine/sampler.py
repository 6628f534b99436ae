"""From logits to tokens, for all rows of a step at once.

The random number of a token is a function of its request's seed and of how many tokens the request has sampled before:
so a request gets the same tokens alone, in any batch and in any order, as long as its logits are the same; their last
bits depend on what else is in a step, and decide where the random number falls between two tokens as closely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batchrun.request import Requests

_NEVER = float("-inf")
_DRAWN_AT_ONCE = 1 << 24  # logits; drawing takes some 40 bytes for each


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the rows of a step are sampled.

    Attributes:
        arrays: what `Sampler.sample` wants on the device.
        by_share: whether a row asks for min_p.
        by_rank: whether a row asks for top_k or top_p.
    """

    arrays: dict[str, npt.NDArray[Any]]
    by_share: bool
    by_rank: bool


class Sampler:
    """Samples by each request's own settings, in vLLM's order: temperature, min_p, top_k, top_p.

    Args:
        requests: whose columns say how each is sampled.
        eos_token_ids: the model's ends of text.
        device: where the logits are.
    """

    def __init__(self, requests: Requests, eos_token_ids: frozenset[int], device: str = "cpu") -> None:
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
        columns = {
            "temperature": self._temperature,
            "min_p": self._min_p,
            "top_k": self._top_k,
            "top_p": self._top_p.astype(np.float64),
        }
        self._columns = {name: torch.from_numpy(column).to(device) for name, column in columns.items()}

    def prepare(self, requests: npt.NDArray[np.int32], num_sampled: npt.NDArray[np.int32], vocab_size: int) -> Sampling:
        """What sampling a step takes.

        Args:
            requests: int32 `[S]`, the request of each row.
            num_sampled: int32 `[S]`, tokens that the request has sampled before.
        """
        settings = self._requests.sampling_id[requests]
        arrays: dict[str, npt.NDArray[Any]] = {}
        # No answer ends before it has its `min_tokens`.
        early = num_sampled < self._min_tokens[settings]
        if early.any():
            held = []
            for which in np.unique(settings[early]).tolist():
                ends = self._ends[which]
                ends = ends[(ends >= 0) & (ends < vocab_size)]
                rows = np.flatnonzero(early & (settings == which))
                held.append((np.repeat(rows, ends.size), np.tile(ends, rows.size)))
            arrays["held_row"], arrays["held_token"] = map(np.concatenate, zip(*held, strict=True))
        drawn = np.flatnonzero(self._temperature[settings] > 0)
        if drawn.size:
            arrays["drawn"] = drawn
            arrays["settings"] = settings[drawn].astype(np.int64)
            arrays["point"] = uniform(self._requests.seed[requests[drawn]], num_sampled[drawn])
        asked = settings[drawn]
        return Sampling(
            arrays,
            by_share=bool(self._min_p[asked].any()),
            by_rank=bool(self._top_k[asked].any() or (self._top_p[asked] < 1).any()),
        )

    def sample(self, logits: torch.Tensor, sampling: Sampling, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sample a token for each row, int64 `[S]`, on the device and without waiting for it; -1 for a row whose logits
        are no numbers.

        Args:
            logits: `[S, vocabulary]`, any float dtype; may be written to.
            sampling: what `prepare` said of the rows.
            arrays: its arrays, on the device.
        """
        if "held_row" in arrays:
            logits[arrays["held_row"], arrays["held_token"]] = _NEVER
        token_ids = logits.argmax(dim=-1)
        # The largest of a row with a NaN in it is NaN.
        sound = logits.gather(-1, token_ids[:, None])[:, 0].isfinite()
        if "drawn" in arrays:
            some = max(_DRAWN_AT_ONCE // logits.shape[-1], 1)
            parts = (arrays[name].split(some) for name in ("drawn", "settings", "point"))
            for drawn, settings, point in zip(*parts, strict=True):
                token_ids[drawn] = self._draw(logits[drawn].float(), sampling, settings, point)
        return torch.where(sound, token_ids, -1)

    def ended(self, requests: npt.NDArray[np.int32], token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Whether tokens end the answers of requests, bool `[S]`."""
        ended = np.zeros(token_ids.size, dtype=bool)
        end_set = self._end_set[self._requests.sampling_id[requests]]
        for which in np.unique(end_set).tolist():
            rows_of = end_set == which
            ended[rows_of] = np.isin(token_ids[rows_of], self._end_sets[which])
        return ended

    def _draw(
        self, logits: torch.Tensor, sampling: Sampling, settings: torch.Tensor, point: torch.Tensor
    ) -> torch.Tensor:
        """Draw a token for each row, int64 `[K]`, from float32 logits `[K, vocabulary]`.

        Args:
            settings: int64 `[K]`.
            point: float64 `[K]`, random numbers in [0, 1).
        """

        def column(name: str) -> torch.Tensor:
            return self._columns[name][settings][:, None]

        # Largest first made 0, so that a temperature near zero overflows to -inf for the others and to NaN for none.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / column("temperature")
        if sampling.by_share:
            # p < min_p * p_max, without the normaliser of both.
            logits = logits.masked_fill(logits < column("min_p").log(), _NEVER)
        if sampling.by_rank:
            logits = logits.masked_fill(logits < _threshold(logits, column("top_k"), column("top_p")), _NEVER)
        # In order of token id, not of probability: a rounding difference between two near-equal tokens then moves a
        # boundary by as little, where a sorted order would swap them.
        cumulative = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum(dim=-1)
        return torch.searchsorted(cumulative, point[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _threshold(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit that top_k, and then top_p, keeps, `[K, 1]`. Tokens that tie with it are kept too.

    Args:
        top_k: int64 `[K, 1]`, 0 where nothing was asked.
        top_p: float64 `[K, 1]`.
    """
    ordered = logits.sort(dim=-1, descending=True).values
    vocabulary = logits.shape[-1]
    k = torch.where(top_k > 0, top_k.clamp(max=vocabulary), vocabulary)
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=logits.device) >= k, _NEVER)
    probability = torch.softmax(ordered, dim=-1, dtype=torch.float64)
    before = probability.cumsum(dim=-1) - probability
    kept = ((before < top_p) | (top_p >= 1)) & (ordered > _NEVER)
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
