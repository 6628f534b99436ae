"""Sampling follows the exact distribution of each request's settings, whatever rows it shares a step with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from oracles import make_requests

from batchrun.engine.sampler import Sampler, uniform
from batchrun.request import Requests, SamplingParams

EOS = frozenset({2, 5})
VOCABULARY = 12
# Far from even, no two alike.
LOGITS = torch.tensor([0.3, 1.9, -0.4, 2.2, 0.9, 1.1, -2.0, 2.05, 0.0, -1.0, 1.5, 0.6])
DRAWS = 20_000


def requests_of(sampling: list[SamplingParams], seeds: npt.ArrayLike | None = None) -> Requests:
    """A request for each of the settings."""
    requests = make_requests([[1]] * len(sampling), [9] * len(sampling))
    distinct = list(dict.fromkeys(sampling))
    seed = requests.seed if seeds is None else np.asarray(seeds, dtype=np.uint64)
    ids = np.array([distinct.index(each) for each in sampling], dtype=np.int32)
    return replace(requests, sampling=distinct, sampling_id=ids, seed=seed)


def rows(count: int) -> npt.NDArray[np.int32]:
    return np.arange(count, dtype=np.int32)


def exact(setting: SamplingParams) -> npt.NDArray[np.float64]:
    """The distribution by its definition: temperature, min_p, top_k, top_p, in plain Python."""
    weight = torch.softmax(LOGITS.double() / setting.temperature, dim=0).tolist()
    kept = [token for token in range(VOCABULARY) if weight[token] >= setting.min_p * max(weight)]
    kept.sort(key=lambda token: -weight[token])
    if setting.top_k:
        kept = kept[: setting.top_k]
    total, nucleus = sum(weight[token] for token in kept), []
    for token in kept:
        if sum(weight[other] for other in nucleus) / total >= setting.top_p:
            break
        nucleus.append(token)
    result = np.zeros(VOCABULARY)
    for token in nucleus:
        result[token] = weight[token]
    return result / result.sum()


@pytest.mark.parametrize(
    "setting",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=1),
        SamplingParams(top_k=4),
        SamplingParams(top_k=100),
        SamplingParams(top_p=0.6),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=0.3),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1.3, top_k=7, top_p=0.8, min_p=0.1),
    ],
)
def test_draws_follow_the_exact_distribution(setting: SamplingParams) -> None:
    requests = requests_of([setting] * DRAWS)
    sampler = Sampler(requests, EOS)
    drawn, _ = sampler.sample(LOGITS.repeat(DRAWS, 1), rows(DRAWS), np.zeros(DRAWS, dtype=np.int32))
    expected = exact(setting) * DRAWS
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert (counts[expected == 0] == 0).all()
    some = expected > 0
    chi_square = float(((counts[some] - expected[some]) ** 2 / expected[some]).sum())
    freedom = int(some.sum()) - 1
    # Five standard deviations above the mean of the chi-square distribution; the seeds are fixed.
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5


def test_greedy_is_the_largest_logit() -> None:
    requests = requests_of([SamplingParams(temperature=0.0)] * 3)
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    found, _ = Sampler(requests, EOS).sample(logits.clone(), rows(3), rows(3))
    assert found.tolist() == logits.argmax(dim=-1).tolist()
    assert found.dtype == np.int32


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-42, 1e-60])
def test_a_temperature_near_zero_is_nearly_greedy(temperature: float) -> None:
    requests = requests_of([SamplingParams(temperature=temperature)] * 100)
    found, _ = Sampler(requests, EOS).sample(100 * LOGITS.repeat(100, 1), rows(100), rows(100))
    assert set(found.tolist()) == {int(LOGITS.argmax())}


def test_a_row_is_sampled_the_same_in_any_batch_and_order() -> None:
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(temperature=0.7, top_p=0.9, min_tokens=2),
        SamplingParams(min_p=0.2, stop_token_ids=(7,)),
    ] * 8
    count = len(settings)
    requests = requests_of(settings, seeds=np.arange(count) * 7919)
    sampler = Sampler(requests, EOS)
    logits = torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2
    done = (rows(count) * 3 % 5).astype(np.int32)
    together = sampler.sample(logits.clone(), rows(count), done)
    order = np.random.default_rng(0).permutation(count).astype(np.int32)
    shuffled = sampler.sample(logits[torch.from_numpy(order).long()].clone(), order, done[order])
    for whole, other in zip(together, shuffled, strict=True):
        assert whole[order].tolist() == other.tolist()
    for row in range(count):
        alone = sampler.sample(logits[row : row + 1].clone(), rows(count)[row : row + 1], done[row : row + 1])
        assert [part[row] for part in together] == [part[0] for part in alone]


def test_seed_and_count_decide_and_differ() -> None:
    setting = [SamplingParams(temperature=1.5)] * 400
    zeros = np.zeros(400, dtype=np.int32)

    def draw(seeds: npt.ArrayLike, counts: npt.NDArray[np.int32]) -> list[int]:
        return Sampler(requests_of(setting, seeds), EOS).sample(LOGITS.repeat(400, 1), rows(400), counts)[0].tolist()

    by_seed, by_count = draw(np.arange(400), zeros), draw([11] * 400, rows(400))
    assert by_seed == draw(np.arange(400), zeros)
    assert len(set(draw([11] * 400, zeros))) == 1
    assert by_seed != by_count
    assert len(set(by_seed)) == len(set(by_count)) == VOCABULARY


def test_uniform_is_uniform_over_seeds_and_counts() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    seeds[: seeds.size // 2] += np.uint64(2**64 - 100)
    counts = np.tile(np.arange(200, dtype=np.int32), 200)
    numbers = uniform(seeds, counts).reshape(200, 200)
    assert (numbers >= 0).all() and (numbers < 1).all()
    spread = 5 / np.sqrt(12 * 200)  # five standard deviations of the mean of 200
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < spread
    assert np.abs(numbers.mean(axis=1) - 0.5).max() < spread
    assert np.unique(numbers).size > 0.99 * numbers.size


@pytest.mark.parametrize(
    ("setting", "ends"),
    [
        (SamplingParams(temperature=0.0), {2, 5}),
        (SamplingParams(temperature=0.0, stop_token_ids=(7,)), {2, 5, 7}),
        (SamplingParams(temperature=0.0, ignore_eos=True), set()),
        (SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=(5, 9)), {5, 9}),
    ],
)
def test_which_tokens_end_an_answer(setting: SamplingParams, ends: set[int]) -> None:
    sampler = Sampler(requests_of([setting] * VOCABULARY), EOS)
    found, ended = sampler.sample(torch.eye(VOCABULARY), rows(VOCABULARY), rows(VOCABULARY))
    assert found.tolist() == list(range(VOCABULARY))
    assert {token for token in range(VOCABULARY) if ended[token]} == ends


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_before_min_tokens(temperature: float) -> None:
    held = SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=(7, VOCABULARY + 4))
    free = SamplingParams(temperature=temperature)
    sampler = Sampler(requests_of([held] * 5 + [free]), EOS)
    logits = torch.zeros(6, VOCABULARY)
    logits[:, [2, 5, 7]] = 50.0
    found, ended = sampler.sample(logits, rows(6), np.array([0, 1, 2, 3, 4, 0], dtype=np.int32))
    assert not ended[:3].any() and not set(found[:3].tolist()) & {2, 5, 7}
    assert ended[3:5].all()
    assert found[5] in (2, 5, 7)


def test_a_step_without_sampled_rows() -> None:
    none = rows(0)
    found, ended = Sampler(requests_of([SamplingParams()]), EOS).sample(torch.empty(0, VOCABULARY), none, none)
    assert found.size == ended.size == 0


def test_half_precision_logits() -> None:
    requests = requests_of([SamplingParams(temperature=0.0), SamplingParams(top_k=1)])
    found, _ = Sampler(requests, EOS).sample(LOGITS.repeat(2, 1).bfloat16(), rows(2), rows(2))
    assert found.tolist() == [3, 3]
