"""Sampling follows the exact distribution of each request's settings, whatever rows it shares a step with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import make_requests

from batchrun.engine import sampler as sampler_module
from batchrun.engine.sampler import Sampler as EngineSampler
from batchrun.engine.sampler import uniform
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


class Sampler(EngineSampler):
    """What the worker does with a sampler, in one call."""

    def __call__(
        self, logits: torch.Tensor, requests: npt.NDArray[np.int32], num_sampled: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        sampling = self.prepare(requests, num_sampled, logits.shape[-1])
        arrays = {name: torch.from_numpy(array) for name, array in sampling.arrays.items()}
        found = self.sample(logits, sampling, arrays).token_ids.numpy().astype(np.int32)
        return found, self.ended(requests, found)


def rows(count: int) -> npt.NDArray[np.int32]:
    return np.arange(count, dtype=np.int32)


def exact(setting: SamplingParams, logits: torch.Tensor = LOGITS) -> npt.NDArray[np.float64]:
    """The distribution by its definition: temperature, min_p, top_k, top_p, in plain Python; no two logits alike."""
    weight = torch.softmax(logits.double() / setting.temperature, dim=0).tolist()
    kept = [token for token in range(len(weight)) if weight[token] >= setting.min_p * max(weight)]
    kept.sort(key=lambda token: -weight[token])
    if setting.top_k:
        kept = kept[: setting.top_k]
    total, nucleus = sum(weight[token] for token in kept), []
    for token in kept:
        if sum(weight[other] for other in nucleus) / total >= setting.top_p:
            break
        nucleus.append(token)
    result = np.zeros(len(weight))
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
    drawn, _ = sampler(LOGITS.repeat(DRAWS, 1), rows(DRAWS), np.zeros(DRAWS, dtype=np.int32))
    expected = exact(setting) * DRAWS
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert (counts[expected == 0] == 0).all()
    some = expected > 0
    chi_square = float(((counts[some] - expected[some]) ** 2 / expected[some]).sum())
    freedom = int(some.sum()) - 1
    # Five standard deviations above the mean of the chi-square distribution; the seeds are fixed.
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5


@given(
    setting=st.builds(
        SamplingParams,
        temperature=st.floats(0.05, 2),
        top_k=st.integers(0, 8),
        top_p=st.floats(0.01, 1),
        min_p=st.floats(0, 0.6),
    ),
    logits=st.lists(st.integers(-4000, 4000), unique=True, min_size=2, max_size=9),
)
@settings(max_examples=300, deadline=None)
def test_a_draw_is_where_the_random_number_falls(setting: SamplingParams, logits: list[int]) -> None:
    """Whatever the settings and the logits: each random number gives the token at its place of the distribution."""
    row = torch.tensor(logits) / 1000
    counts = rows(64)
    found, _ = Sampler(requests_of([setting] * 64, seeds=[3] * 64), frozenset())(row.repeat(64, 1), counts, counts)
    cumulative = exact(setting, row).cumsum()
    points = uniform(np.full(64, 3, dtype=np.uint64), counts)
    # What is cut off may hang on a rounding error; then the whole distribution is another.
    probability = torch.softmax(row.double() / setting.temperature, dim=0).numpy()
    ordered = np.sort(probability[probability >= setting.min_p * probability.max()])[::-1]
    ordered = ordered[: setting.top_k or None]
    assume(np.abs(ordered.cumsum() / ordered.sum() - setting.top_p).min() > 1e-5 or setting.top_p == 1)
    assume(np.abs(probability - setting.min_p * probability.max()).min() > 1e-6)
    clear = np.abs(cumulative[:, None] - points).min(axis=0) > 1e-5
    expected = (cumulative[:, None] <= points).sum(axis=0)
    assert found[clear].tolist() == expected[clear].tolist()


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    """Which of them were kept would be chance; as in vLLM's top_k, all are."""
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0])
    for setting, kept in (
        (SamplingParams(top_k=1), {1, 3}),
        (SamplingParams(top_k=3), {1, 2, 3, 4}),
        (SamplingParams(top_p=0.2), {1, 3}),
    ):
        found, _ = Sampler(requests_of([setting] * 200), EOS)(logits.repeat(200, 1), rows(200), rows(200))
        assert set(found.tolist()) == kept


def test_no_generator_of_the_process_is_used_and_greedy_uses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    Sampler(requests_of([SamplingParams()] * 3), EOS)(LOGITS.repeat(3, 1), rows(3), rows(3))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()

    def none(*_: object) -> None:
        raise AssertionError("a random number was asked for")

    monkeypatch.setattr(sampler_module, "uniform", none)
    greedy = requests_of([SamplingParams(temperature=0.0)] * 3)
    Sampler(greedy, EOS)(LOGITS.repeat(3, 1), rows(3), rows(3))
    with pytest.raises(AssertionError, match="asked for"):
        Sampler(requests_of([SamplingParams()] * 3), EOS)(LOGITS.repeat(3, 1), rows(3), rows(3))


def test_greedy_is_the_largest_logit() -> None:
    requests = requests_of([SamplingParams(temperature=0.0)] * 3)
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    found, _ = Sampler(requests, EOS)(logits.clone(), rows(3), rows(3))
    assert found.tolist() == logits.argmax(dim=-1).tolist()
    assert found.dtype == np.int32


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-42, 1e-60])
def test_a_temperature_near_zero_is_nearly_greedy(temperature: float) -> None:
    requests = requests_of([SamplingParams(temperature=temperature)] * 100)
    found, _ = Sampler(requests, EOS)(100 * LOGITS.repeat(100, 1), rows(100), rows(100))
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
    together = sampler(logits.clone(), rows(count), done)
    order = np.random.default_rng(0).permutation(count).astype(np.int32)
    shuffled = sampler(logits[torch.from_numpy(order).long()].clone(), order, done[order])
    for whole, other in zip(together, shuffled, strict=True):
        assert whole[order].tolist() == other.tolist()
    for row in range(count):
        alone = sampler(logits[row : row + 1].clone(), rows(count)[row : row + 1], done[row : row + 1])
        assert [part[row] for part in together] == [part[0] for part in alone]


def test_seed_and_count_decide_and_differ() -> None:
    setting = [SamplingParams(temperature=1.5)] * 400
    zeros = np.zeros(400, dtype=np.int32)

    def draw(seeds: npt.ArrayLike, counts: npt.NDArray[np.int32]) -> list[int]:
        return Sampler(requests_of(setting, seeds), EOS)(LOGITS.repeat(400, 1), rows(400), counts)[0].tolist()

    by_seed, by_count = draw(np.arange(400), zeros), draw([11] * 400, rows(400))
    assert by_seed == draw(np.arange(400), zeros)
    assert len(set(draw([11] * 400, zeros))) == 1
    assert by_seed != by_count
    assert len(set(by_seed)) == len(set(by_count)) == VOCABULARY


def splitmix64(state: int, count: int) -> list[int]:
    """The first outputs of the generator from a state, in Python's integers."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ z >> 31)
    return outputs


def test_uniform_is_splitmix64_from_the_mixed_seed() -> None:
    # The outputs that are published for this state.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for seed in (0, 1, 1234567, 2**63, 2**64 - 1):
        (mixed,) = splitmix64(seed, 1)
        expected = [output / 2**64 for output in splitmix64(mixed, 50)]
        found = uniform(np.full(50, seed, dtype=np.uint64), rows(50))
        assert np.abs(found - expected).max() <= 2.0**-53
        assert (found * 2**53 == np.floor(found * 2**53)).all()


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
        (SamplingParams(temperature=0.0, stop_token_ids=(VOCABULARY, 10**9)), {2, 5}),
    ],
)
def test_which_tokens_end_an_answer(setting: SamplingParams, ends: set[int]) -> None:
    sampler = Sampler(requests_of([setting] * VOCABULARY), EOS)
    found, ended = sampler(torch.eye(VOCABULARY), rows(VOCABULARY), rows(VOCABULARY))
    assert found.tolist() == list(range(VOCABULARY))
    assert {token for token in range(VOCABULARY) if ended[token]} == ends


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_before_min_tokens(temperature: float) -> None:
    # The last two are no tokens; they must not be taken for places from the end of the vocabulary, or beyond it.
    held = SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=(7, VOCABULARY + 4, -1))
    free = SamplingParams(temperature=temperature)
    sampler = Sampler(requests_of([held] * 5 + [free]), EOS)
    logits = torch.zeros(6, VOCABULARY)
    logits[:, [2, 5, 7]] = 50.0
    logits[:, -1] = 25.0
    found, ended = sampler(logits, rows(6), np.array([0, 1, 2, 3, 4, 0], dtype=np.int32))
    assert found[:3].tolist() == [VOCABULARY - 1] * 3
    assert not ended[:3].any()
    assert ended[3:5].all()
    assert found[5] in (2, 5, 7)


def test_min_tokens_do_not_hold_back_what_does_not_end_the_answer() -> None:
    held = SamplingParams(temperature=0.0, min_tokens=3, ignore_eos=True, stop_token_ids=(7,))
    logits = torch.zeros(1, VOCABULARY)
    logits[:, [2, 7]] = torch.tensor([40.0, 50.0])
    found, ended = Sampler(requests_of([held]), EOS)(logits, rows(1), rows(1))
    assert (found.tolist(), ended.tolist()) == ([2], [False])


def test_a_step_without_sampled_rows() -> None:
    none = rows(0)
    found, ended = Sampler(requests_of([SamplingParams()]), EOS)(torch.empty(0, VOCABULARY), none, none)
    assert found.size == ended.size == 0


def test_half_precision_logits() -> None:
    requests = requests_of([SamplingParams(temperature=0.0), SamplingParams(top_k=1)])
    found, _ = Sampler(requests, EOS)(LOGITS.repeat(2, 1).bfloat16(), rows(2), rows(2))
    assert found.tolist() == [3, 3]
