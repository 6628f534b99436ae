"""From logits to tokens, for all rows of a step at once.

The random number of a token is a function of its request's seed and of how many tokens the request has sampled before:
so a request gets the same tokens alone, in any batch and in any order, as long as its logits are the same; their last
bits depend on what else is in a step, and decide where the random number falls between two tokens as closely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from batchrun.columns import concat_ranges
from batchrun.request import Requests
from batchrun.schedule.step import PastTokens

_NEVER = float("-inf")
_DRAWN_AT_ONCE = 1 << 24  # logits; drawing takes some 40 bytes for each
_ANY, _NONE = 2**31 - 1, 2**31 - 2  # in words that are forbidden: any token at all, and no token

Arrays = dict[str, npt.NDArray[Any]]
Tensors = Mapping[str, torch.Tensor]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the rows of a step are sampled.

    Attributes:
        arrays: what `Sampler.sample` wants on the device.
        adjusts: whether the logits of a row are changed before its token is chosen.
        by_share: whether a row asks for min_p.
        by_rank: whether a row asks for top_k or top_p.
        alternatives: likeliest tokens that are named for rows whose logprobs are wanted.
    """

    arrays: Arrays
    adjusts: bool
    by_share: bool
    by_rank: bool
    alternatives: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was sampled, on the device.

    Attributes:
        token_ids: int64 `[S]`; -1 for a row whose logits are no numbers.
        logprobs: as in `StepLogprobs`: `[L]` of the sampled tokens, and `[L, K]` ids and logprobs of the likeliest;
            None where nobody asked.
    """

    token_ids: torch.Tensor
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


def concat_sampled(parts: Sequence[Sampled]) -> Sampled:
    """What the parts of a step sampled, as one."""
    if len(parts) == 1:
        return parts[0]
    token_ids = torch.cat([part.token_ids for part in parts])
    with_logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    if not with_logprobs:
        return Sampled(token_ids, None)
    # A part names as many alternatives as its own rows ask for.
    width = max(ids.shape[1] for _, ids, _ in with_logprobs)
    sampled = torch.cat([sampled for sampled, _, _ in with_logprobs])
    ids = torch.cat([pad(ids, (0, width - ids.shape[1])) for _, ids, _ in with_logprobs])
    top = torch.cat([pad(top, (0, width - top.shape[1])) for _, _, top in with_logprobs])
    return Sampled(token_ids, (sampled, ids, top))


class _Lists:
    """A list of values for each of the settings, in one array."""

    def __init__(self, lists: Sequence[npt.NDArray[Any]]) -> None:
        self.length = np.array([values.shape[0] for values in lists], dtype=np.int64)
        self._begin = np.cumsum(self.length) - self.length
        self.values = np.concatenate(lists)

    def of(self, settings: Int32, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """The values of the settings of some rows: the row of each, and the values, `[sum of their number]`."""
        which = settings[rows]
        length = self.length[which]
        return np.repeat(rows, length), self.values[concat_ranges(self._begin[which], length)]


class Sampler:
    """Samples by each request's own settings, in vLLM's order: forbidden words, logit_bias, penalties, min_tokens,
    temperature, min_p, top_k, top_p.

    Args:
        requests: whose columns say how each is sampled.
        eos_token_ids: the model's ends of text.
        device: where the logits are.
    """

    def __init__(self, requests: Requests, eos_token_ids: frozenset[int], device: str = "cpu") -> None:
        self._requests = requests
        settings = requests.sampling
        # Of an answer with a grammar, its mask says where it may end.
        self._min_tokens = np.array([0 if s.grammar else s.min_tokens for s in settings], dtype=np.int32)
        self._ends = _Lists([np.array(s.ends(eos_token_ids), dtype=np.int64) for s in settings])
        self._bias = _Lists([np.array(list(s.logit_bias), dtype=_BIAS) for s in settings])
        longest = max((len(word) for s in settings for word in s.bad_words), default=1)
        self._words = _Lists(
            [
                np.array([_padded(word, longest) for word in s.bad_words], np.int64).reshape(-1, longest)
                for s in settings
            ]
        )
        self._logprobs = np.array([-1 if s.logprobs is None else s.logprobs for s in settings], dtype=np.int32)
        self._repeats = np.array([s.repetition_penalty != 1 for s in settings], dtype=bool)
        self._counts = np.array([bool(s.presence_penalty or s.frequency_penalty) for s in settings], dtype=bool)
        by_setting: Arrays = {
            "temperature": np.array([s.temperature for s in settings], dtype=np.float32),
            "min_p": np.array([s.min_p for s in settings], dtype=np.float32),
            "top_k": np.array([s.top_k for s in settings], dtype=np.int64),
            "top_p": np.array([s.top_p for s in settings], dtype=np.float32).astype(np.float64),
            "presence": np.array([s.presence_penalty for s in settings], dtype=np.float32),
            "frequency": np.array([s.frequency_penalty for s in settings], dtype=np.float32),
            "repetition": np.array([s.repetition_penalty for s in settings], dtype=np.float32),
        }
        self._by_setting = by_setting
        self._columns = {name: torch.from_numpy(column).to(device) for name, column in by_setting.items()}

    def prepare(self, requests: Int32, num_sampled: Int32, vocab_size: int, past: PastTokens | None = None) -> Sampling:
        """What sampling a step takes.

        Args:
            requests: int32 `[S]`, the request of each row.
            num_sampled: int32 `[S]`, tokens that the request has sampled before.
            past: of these rows alone, `[S]`; needed where a request looks back.
        """
        settings = self._requests.sampling_id[requests]
        arrays: Arrays = {}
        adjusts = self._forbid(settings, past, vocab_size, arrays)
        adjusts |= self._add_bias(settings, vocab_size, arrays)
        adjusts |= self._penalise(requests, settings, past, arrays)
        # No answer ends before it has its `min_tokens`.
        early = np.flatnonzero(num_sampled < self._min_tokens[settings])
        if early.size:
            rows, ends = self._ends.of(settings, early)
            there = (ends >= 0) & (ends < vocab_size)
            arrays["held_row"], arrays["held_token"] = rows[there], ends[there]
        drawn = np.flatnonzero(self._by_setting["temperature"][settings] > 0)
        if drawn.size:
            arrays["drawn"] = drawn
            arrays["drawn_settings"] = settings[drawn].astype(np.int64)
            arrays["point"] = uniform(self._requests.seed[requests[drawn]], num_sampled[drawn])
        wanted = np.flatnonzero(self._logprobs[settings] >= 0)
        if wanted.size:
            arrays["logprob_row"] = wanted
        asked = settings[drawn]
        return Sampling(
            arrays,
            adjusts=adjusts,
            by_share=bool(self._by_setting["min_p"][asked].any()),
            by_rank=bool(self._by_setting["top_k"][asked].any() or (self._by_setting["top_p"][asked] < 1).any()),
            alternatives=min(int(self._logprobs[settings].max(initial=0)), vocab_size),
        )

    def sample(
        self,
        logits: torch.Tensor,
        sampling: Sampling,
        arrays: Tensors,
        before: torch.Tensor | None = None,
        mask: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Sampled:
        """Sample a token for each row, on the device and without waiting for it.

        Args:
            logits: `[S, vocabulary]`, any float dtype; may be written to.
            sampling: what `prepare` said of the rows.
            arrays: its arrays, on the device.
            before: int64, what the step before sampled; needed where past tokens are marked.
            mask: rows and bits as in `masks.Mask`: the tokens that may be sampled.
        """
        raw = logits[arrays["logprob_row"]].float().log_softmax(dim=-1) if "logprob_row" in arrays else None
        if sampling.adjusts:
            logits = self._adjust(logits.float(), arrays, before)
        if "held_row" in arrays:
            logits[arrays["held_row"], arrays["held_token"]] = _NEVER
        if mask is not None:
            _exclude(logits, *mask)
        token_ids = _likeliest(logits)
        # The largest of a row with a NaN in it is NaN.
        sound = logits.gather(-1, token_ids[:, None])[:, 0].isfinite()
        if "drawn" in arrays:
            some = max(_DRAWN_AT_ONCE // logits.shape[-1], 1)
            parts = (arrays[name].split(some) for name in ("drawn", "drawn_settings", "point"))
            for drawn, settings, point in zip(*parts, strict=True):
                token_ids[drawn] = self._draw(logits[drawn].float(), sampling, settings, point)
        if raw is None:
            return Sampled(torch.where(sound, token_ids, -1), None)
        top, top_ids = raw.topk(sampling.alternatives, dim=-1)
        chosen = raw.gather(-1, token_ids[arrays["logprob_row"], None])[:, 0]
        return Sampled(torch.where(sound, token_ids, -1), (chosen, top_ids, top))

    def logprob_rows(self, requests: Int32) -> Int32:
        """Places of the rows whose logprobs are wanted, int32 `[L]`."""
        wanted = self._logprobs[self._requests.sampling_id[requests]] >= 0
        return np.flatnonzero(wanted).astype(np.int32)

    def ended(self, requests: Int32, token_ids: Int32) -> npt.NDArray[np.bool_]:
        """Whether tokens end the answers of requests, bool `[S]`."""
        rows, ends = self._ends.of(self._requests.sampling_id[requests], np.arange(token_ids.size))
        ended = np.zeros(token_ids.size, dtype=bool)
        ended[rows[ends == token_ids[rows]]] = True
        return ended

    def _forbid(self, settings: Int32, past: PastTokens | None, vocab_size: int, arrays: Arrays) -> bool:
        """What it takes to forbid the last token of a word where the answer ends with all that is before it."""
        rows, words = self._words.of(settings, np.flatnonzero(self._words.length[settings]))
        there = words[:, -1] < vocab_size
        rows, words = rows[there], words[there]
        if not rows.size:
            return False
        width = words.shape[1] - 1
        arrays["word_row"], arrays["word_last"] = rows, np.ascontiguousarray(words[:, -1])
        if width:
            assert past is not None
            ends = np.cumsum(past.length, dtype=np.int64)[rows, None]
            place = ends - width + np.arange(width)
            inside = place >= ends - past.length[rows, None]
            tail = np.full(place.shape, _NONE, dtype=np.int64)
            tail[inside] = past.token_ids[place[inside]]
            arrays["word_head"], arrays["word_tail"] = np.ascontiguousarray(words[:, :-1]), tail
        return True

    def _add_bias(self, settings: Int32, vocab_size: int, arrays: Arrays) -> bool:
        rows, bias = self._bias.of(settings, np.flatnonzero(self._bias.length[settings]))
        there = bias["token"] < vocab_size
        if there.any():
            arrays["bias_row"] = rows[there]
            arrays["bias_token"], arrays["bias"] = bias["token"][there], bias["bias"][there]
        return bool(there.any())

    def _penalise(self, requests: Int32, settings: Int32, past: PastTokens | None, arrays: Arrays) -> bool:
        """The tokens that count against rows: those of prompts and answers, and those of answers alone."""
        repeats, counts = self._repeats[settings], self._counts[settings]
        if not (repeats.any() or counts.any()):
            return False
        assert past is not None
        answer_row = np.repeat(np.arange(settings.size), past.length)
        answer_token = past.token_ids.astype(np.int64)
        if repeats.any():
            tokens, rows = self._requests.tokens, np.flatnonzero(repeats)
            begin, end = tokens.offsets[requests[rows]], tokens.offsets[requests[rows] + 1]
            length = end - begin
            of_answer = repeats[answer_row]
            row = np.concatenate((np.repeat(rows, length), answer_row[of_answer]))
            arrays["seen_row"], arrays["seen_settings"] = row, settings[row].astype(np.int64)
            prompt = tokens.ids[concat_ranges(begin, length)]
            arrays["seen_token"] = np.concatenate((prompt.astype(np.int64), answer_token[of_answer]))
        if counts.any():
            of_answer = counts[answer_row]
            row = answer_row[of_answer]
            arrays["said_row"], arrays["said_settings"] = row, settings[row].astype(np.int64)
            arrays["said_token"] = answer_token[of_answer]
        return True

    def _adjust(self, logits: torch.Tensor, arrays: Tensors, before: torch.Tensor | None) -> torch.Tensor:
        """Float32 logits without forbidden words, with bias and penalties; what they are made from is written to.

        A token may stand several times among those that count against a row: what is done once for each of them is
        written as often, each time the same.
        """
        if "word_row" in arrays:
            row, last = arrays["word_row"], arrays["word_last"]
            value = torch.full_like(row, _NEVER, dtype=logits.dtype)
            if "word_head" in arrays:
                head, tail = arrays["word_head"], _resolved(arrays["word_tail"], before)
                value = torch.where(((head == tail) | (head == _ANY)).all(dim=-1), value, logits[row, last])
            logits.view(-1).scatter_reduce_(0, row * logits.shape[-1] + last, value, "amin")
        if "bias_row" in arrays:
            logits.index_put_((arrays["bias_row"], arrays["bias_token"]), arrays["bias"], accumulate=True)
        if "seen_row" in arrays:
            place = arrays["seen_row"], _resolved(arrays["seen_token"], before)
            penalty, value = self._columns["repetition"][arrays["seen_settings"]], logits[place]
            logits[place] = torch.where(value > 0, value / penalty, value * penalty)
        if "said_row" in arrays:
            place, settings = (arrays["said_row"], _resolved(arrays["said_token"], before)), arrays["said_settings"]
            logits.index_put_(place, -self._columns["frequency"][settings], accumulate=True)
            logits[place] = logits[place] - self._columns["presence"][settings]
        return logits

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
        drawn = torch.searchsorted(cumulative, point[:, None] * cumulative[:, -1:], right=True)[:, 0]
        return drawn.clamp(max=logits.shape[-1] - 1)  # logits that are no numbers lead behind the last


_BIAS = np.dtype([("token", np.int64), ("bias", np.float32)])


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The place of the largest of each row, the first of them; of a NaN where there is one. int64 `[S]`."""
    if logits.device.type == "cpu":  # where numpy is ten times as fast
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _exclude(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """Exclude the tokens whose bits are not set, some rows at a time: what their bytes say is added, so that it takes
    no branch for each token."""
    byte = torch.arange(256, device=logits.device)[:, None] >> torch.arange(8, device=logits.device) & 1
    by_byte = torch.zeros(byte.shape, dtype=logits.dtype, device=logits.device).masked_fill_(byte == 0, _NEVER)
    some = max(_DRAWN_AT_ONCE // logits.shape[-1], 1)
    for row, of_row in zip(rows.split(some), bits.split(some), strict=True):
        penalty = torch.nn.functional.embedding(of_row.int(), by_byte).flatten(1)[:, : logits.shape[-1]]
        if row.numel() == logits.shape[0]:  # all of them, in order
            logits.add_(penalty)
        else:
            logits[row] = logits[row].add_(penalty)


def _padded(word: tuple[int, ...], length: int) -> list[int]:
    return [_ANY] * (length - len(word)) + list(word)


def _resolved(token_ids: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Token ids for those that are marked: -1 - k is what the step before sampled at place k."""
    if before is None or not before.numel():
        return token_ids
    marked = before[(-1 - token_ids).clamp(0, before.numel() - 1)]
    return torch.where(token_ids < 0, marked.clamp(min=0), token_ids)


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
