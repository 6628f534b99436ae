"""Penalties, biases, forbidden words and logprobs, each against a reference of its own, for many rows at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_requests
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from batchrun.engine.sampler import Sampler, concat_sampled
from batchrun.request import Requests, SamplingParams
from batchrun.schedule.step import PastTokens

VOCABULARY = 9
EOS = frozenset({8})


@dataclass
class Row:
    """A row of a step: how it samples, its prompt, and what it has sampled."""

    sampling: SamplingParams
    prompt: list[int]
    answer: list[int]


def requests_of(rows: list[Row]) -> Requests:
    distinct = list(dict.fromkeys(row.sampling for row in rows))
    requests = make_requests([row.prompt for row in rows], [50] * len(rows))
    ids = np.array([distinct.index(row.sampling) for row in rows], dtype=np.int32)
    return replace(requests, sampling=distinct, sampling_id=ids)


def sample(rows: list[Row], logits: torch.Tensor, in_flight: bool = False):
    """Sample the rows; if `in_flight`, the last token of each answer is known to the step before alone."""
    requests = requests_of(rows)
    sampler = Sampler(requests, EOS)
    past = [row.answer if row.sampling.looks_back else [] for row in rows]
    before = torch.tensor([0, *(row.answer[-1] if row.answer else 0 for row in rows)])
    marked = [[*answer[:-1], -1 - (place + 1)] if in_flight and answer else answer for place, answer in enumerate(past)]
    tokens = PastTokens(
        np.array([len(answer) for answer in past], dtype=np.int32),
        np.array([token for answer in marked for token in answer], dtype=np.int32),
    )
    count = np.array([len(row.answer) for row in rows], dtype=np.int32)
    which = np.arange(len(rows), dtype=np.int32)
    sampling = sampler.prepare(which, count, VOCABULARY, tokens)
    arrays = {name: torch.from_numpy(array) for name, array in sampling.arrays.items()}
    found = sampler.sample(logits.clone(), sampling, arrays, before if in_flight else None)
    return found, sampler.logprob_rows(which)


def adjusted(row: Row, logits: list[float]) -> list[float]:
    """The logits of a row by the definitions, in plain Python, in vLLM's order."""
    sampling, adjusted = row.sampling, list(logits)
    for word in sampling.bad_words:
        head, last = list(word[:-1]), word[-1]
        if not head or row.answer[-len(head) :] == head:
            adjusted[last] = float("-inf")
    for token, bias in sampling.logit_bias:
        if token < VOCABULARY:
            adjusted[token] += bias
    for token in set(row.prompt + row.answer):
        value = adjusted[token]
        adjusted[token] = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
    for token in set(row.answer):
        adjusted[token] -= sampling.frequency_penalty * row.answer.count(token) + sampling.presence_penalty
    if len(row.answer) < sampling.min_tokens:
        for token in {*sampling.stop_token_ids, *EOS}:
            adjusted[token] = float("-inf")
    return adjusted


tokens = st.integers(0, VOCABULARY - 1)
penalties = st.sampled_from([0.0, 0.5, -1.25, 2.0])
samplings = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    logit_bias=st.sampled_from([(), ((3, 4.0),), ((0, -100.0), (5, 2.0), (20, 1.0))]),
    bad_words=st.sampled_from([(), ((4,),), ((1, 2),), ((2, 2, 3), (6,), (0, 1))]),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([(), (7,)]),
    logprobs=st.sampled_from([None, None, 0, 2, 5]),
)
some_rows = st.lists(
    st.builds(Row, samplings, st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=7)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(some_rows, st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_of_all_kinds_in_one_step(rows, seed, in_flight, dtype):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (len(rows), VOCABULARY))).to(dtype)
    found, with_logprobs = sample(rows, logits, in_flight)
    raw = logits.float().log_softmax(-1)
    for place, row in enumerate(rows):
        expected = torch.tensor(adjusted(row, logits[place].float().tolist()))
        token = int(found.token_ids[place])
        assert float(expected[token]) == pytest.approx(float(expected.max()), abs=1e-4)
    assert with_logprobs.tolist() == [place for place, row in enumerate(rows) if row.sampling.logprobs is not None]
    if found.logprobs is None:
        assert not with_logprobs.size
        return
    sampled, top_ids, top = found.logprobs
    assert top_ids.shape == top.shape == (with_logprobs.size, max(rows[p].sampling.logprobs for p in with_logprobs))
    for at, place in enumerate(with_logprobs.tolist()):
        assert float(sampled[at]) == pytest.approx(float(raw[place, found.token_ids[place]]), abs=1e-5)
        best = raw[place].sort(descending=True).values[: top.shape[1]]
        assert torch.allclose(top[at], best)
        assert torch.allclose(raw[place, top_ids[at]], top[at])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6), st.sampled_from([1.05, 1.5, 0.8]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_as_transformers_has_it(prompt, answer, penalty, seed):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (1, VOCABULARY))).float()
    whole = torch.tensor([prompt + answer])
    row = Row(SamplingParams(0.0, repetition_penalty=penalty), prompt, answer)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(whole, logits.clone())
    assert int(sample([row], logits)[0].token_ids) == int(expected.argmax())
    words = [[1, 2], [4], [0, 0, 3]]
    row = Row(SamplingParams(0.0, bad_words=tuple(map(tuple, words))), [5], answer)
    forbid = NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor(sorted(EOS)))
    # Theirs looks back into the prompt, whose last token here is in no word.
    expected = forbid(torch.tensor([[5, *answer]]), logits.clone())
    assert int(sample([row], logits)[0].token_ids) == int(expected.argmax())


def test_drawn_tokens_follow_the_adjusted_distribution():
    """Chi-square over many draws, of a row with everything at once."""
    logits = torch.tensor([0.3, 1.9, -0.4, 2.2, 0.9, 1.1, -2.0, 2.05, 0.0])
    sampling = SamplingParams(
        0.8, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.2, logit_bias=((2, 1.5),),
        bad_words=((1, 3),),
    )  # fmt: skip
    row = Row(sampling, [7, 7, 0], [4, 4, 1])
    count = 20_000
    found, _ = sample([row] * count, logits.expand(count, -1))
    expected = torch.softmax(torch.tensor(adjusted(row, logits.tolist())) / 0.8, dim=0).double().numpy()
    drawn = np.bincount(found.token_ids.numpy(), minlength=VOCABULARY)
    assert drawn[3] == 0
    there = expected > 0
    square = ((drawn - count * expected)[there] ** 2 / (count * expected[there])).sum()
    assert square < 26.1  # 7 degrees of freedom: exceeded once in two thousand


def test_parts_of_a_step_name_as_many_alternatives_as_the_widest():
    rows = [Row(SamplingParams(0.0, logprobs=k), [1], []) for k in (None, 1, 3)]
    logits = torch.randn(3, VOCABULARY)
    parts = [sample([row], logits[i : i + 1])[0] for i, row in enumerate(rows)]
    joined = concat_sampled(parts)
    whole, _ = sample(rows, logits)
    assert torch.equal(joined.token_ids, whole.token_ids)
    for one, other in zip(joined.logprobs, whole.logprobs, strict=True):
        assert one.shape == other.shape
    assert torch.equal(joined.logprobs[0], whole.logprobs[0])
    assert torch.equal(joined.logprobs[1][1], whole.logprobs[1][1])
    assert torch.equal(joined.logprobs[1][0, :1], whole.logprobs[1][0, :1])


def test_logits_that_are_no_numbers_are_still_seen():
    rows = [Row(SamplingParams(0.0, presence_penalty=1.0, logprobs=2), [1], [2]) for _ in range(2)]
    logits = torch.randn(2, VOCABULARY)
    logits[1, 4] = float("nan")
    assert (sample(rows, logits)[0].token_ids >= 0).tolist() == [True, False]
