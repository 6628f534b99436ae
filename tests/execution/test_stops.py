"""Stop strings end an answer where they occur in its text, however tokens cut it; every answer gets its own text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tokenizers
from factories import CORPUS, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_requests
from transformers import PreTrainedTokenizerFast

import batchrun
from batchrun.execution.stops import TextStops
from batchrun.request import FinishReason, Requests, SamplingParams
from batchrun.schedule.scheduler import Finished
from batchrun.tokenizer import Tokenizer, load_tokenizer

ModelFactory = Callable[..., Path]
END = 1


@cache
def tokenizer() -> Tokenizer:
    with TemporaryDirectory() as folder:
        make_tokenizer(Path(folder))
        return load_tokenizer(Path(folder))


@cache
def pieces() -> Tokenizer:
    """A tokenizer as Llama 2 and Mistral have one: a word begins with its space, but for the first of a text."""
    words = ["<unk>", "</s>", *(f"\u2581{word}" for word in ("The", "capital", "is", "Paris")), "."]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>"))


@pytest.mark.parametrize("stop", [(), (".",)])
@pytest.mark.parametrize(
    ("prompt", "sampling", "text"),
    [
        ("The capital is", {"continues": True}, " Paris"),
        ("The capital is", {"continues": True, "echo": True}, "The capital is Paris"),
        ("The capital is", {}, "Paris"),  # of a chat
        ("</s>", {"continues": True}, "Paris"),  # there is no text to go on from
        ("</s>", {"continues": True, "skip_special_tokens": False}, " Paris"),
    ],
)
def test_an_answer_goes_on_from_its_prompt(
    stop: tuple[str, ...], prompt: str, sampling: dict[str, bool], text: str
) -> None:
    """Without a space the two would run into each other: decoders leave out that of a text's first word."""
    requests = make_requests(pieces().encode_batch([prompt]), [4])
    requests.sampling[0] = SamplingParams(temperature=0.0, stop=stop, **sampling)
    answer = np.array([5, 6], dtype=np.int32)
    stops = TextStops(pieces(), requests)
    for token in answer:
        stops.watch(np.array([0], dtype=np.int32), np.array([token], dtype=np.int32), np.array([False]))
    finished = Finished(0, answer, FinishReason.LENGTH, ended=False, cached_tokens=0)
    assert stops.text(finished) == (text if stop else text + ".", bool(stop))


def ids_of(text: str) -> list[int]:
    (ids,) = tokenizer().encode_batch([text])
    return ids


def bytes_of(text: str) -> list[int]:
    """The text with a token for each byte, as a model may write it."""
    vocabulary = tokenizer()._fast.get_vocab()
    symbols = tokenizer()._backend.pre_tokenizer.pre_tokenize_str(text)
    return [vocabulary[symbol] for piece, _ in symbols for symbol in piece]


def requests_of(*sampling: SamplingParams) -> Requests:
    requests = make_requests([[9]] * len(sampling), [500] * len(sampling))
    return replace(requests, sampling=list(sampling), sampling_id=np.arange(len(sampling), dtype=np.int32))


def answer(ids: list[int], *stop: str, min_tokens: int = 0, ended: bool = False) -> tuple[str, bool, int]:
    """Sample the tokens one by one as the loop does, until a stop string ends the answer or they run out.

    Args:
        ended: whether the last token ends the answer by itself.

    Returns:
        The text, whether a stop string ended it, and the tokens sampled.
    """
    texts = TextStops(tokenizer(), requests_of(SamplingParams(stop=stop, min_tokens=min_tokens)))
    request = np.zeros(1, dtype=np.int32)
    done = 0
    stopped = False
    while done < len(ids) and not stopped:
        last = ended and done == len(ids) - 1
        (stopped,) = texts.watch(request, np.array([ids[done]], dtype=np.int32), np.array([last]))
        done += 1
    by_token = ended and done == len(ids) and not stopped
    reason = FinishReason.STOP if stopped or by_token else FinishReason.LENGTH
    text, by_text = texts.text(Finished(0, np.array(ids[:done], dtype=np.int32), reason, by_token, 0))
    assert by_text or not stopped
    return text, by_text, done


# One answer ---------------------------------------------------------------------------------------------------------


def test_an_answer_without_stop_strings_is_its_decoded_tokens() -> None:
    text = "Zwölf Boxkämpfer 日本語 🙂, the quick brown fox"
    assert answer(ids_of(text)) == (text, False, len(ids_of(text)))
    assert answer([*ids_of(text), END], ended=True)[0] == text
    assert answer([END], ended=True) == ("", False, 1)
    assert answer([END], "x", ended=True) == ("", False, 1)


@pytest.mark.parametrize("stop", ["brown", "own f", "k brown fox j", "b", " ", "fox jumps over the lazy dog."])
def test_the_text_ends_where_the_stop_string_begins(stop: str) -> None:
    text = "The quick brown fox jumps over the lazy dog. And more, and more."
    for ids in (ids_of(text), bytes_of(text)):
        found, stopped, done = answer(ids, stop)
        assert (found, stopped) == (text[: text.index(stop)], True)
        # It ends with the token that completes the stop string, not before and not later.
        assert stop in tokenizer().decode(ids[:done])
        assert stop not in tokenizer().decode(ids[: done - 1])


def test_the_stop_string_that_is_completed_first_counts() -> None:
    text = "one two three"
    assert answer(bytes_of(text), "three", "wo", "two t")[0] == "one t"
    assert answer(bytes_of(text), "two", "o", "one tw")[0] == ""  # "o" is its first character
    assert answer(bytes_of(text), "wo", "two", "x")[0] == "one "  # both end here: the longer one


@pytest.mark.parametrize("stop", ["ö", "🙂", "本語", "f B", "語 🙂"])
def test_characters_of_several_tokens(stop: str) -> None:
    text = "Zwölf Boxkämpfer 日本語 🙂 end"
    found, stopped, done = answer(bytes_of(text), stop)
    assert (found, stopped) == (text[: text.index(stop)], True)
    assert done == len(text[: text.index(stop) + len(stop)].encode())


def test_half_of_a_character_is_no_stop_string() -> None:
    """The replacement that stands for bytes without a character counts only once it is sure to stay."""
    text = "a🙂b"
    assert answer(bytes_of(text), "\ufffd") == (text, False, len(bytes_of(text)))
    broken = [*bytes_of("a🙂")[:-1], *bytes_of("b")]
    assert answer(broken, "\ufffd")[:2] == ("a", True)


def test_a_stop_string_in_what_was_held_back_is_found_at_the_end() -> None:
    """The answer reaches its limit while a character is not whole: what is there of it counts."""
    ids = bytes_of("so 🙂")[:-1]
    assert answer(ids, "\ufffd") == ("so ", True, len(ids))
    assert answer(ids, "x") == ("so \ufffd", False, len(ids))


def test_a_token_that_ends_the_answer_is_no_part_of_its_text() -> None:
    ids = ids_of("apple pear")
    plum = bytes_of("!")  # as a stop token: it has a text, which does not count
    assert answer([*ids, *plum], "!", ended=True) == ("apple pear", False, len(ids) + 1)
    assert answer([*ids, *plum], "pear", ended=True) == ("apple ", True, len(ids))


def test_special_tokens_inside_an_answer_leave_no_trace() -> None:
    """With ignore_eos an answer goes on past an end of text; text on both sides of it is neighbouring text."""
    ids = [*bytes_of("ab"), END, 2, *bytes_of("cd")]
    assert answer(ids) == ("abcd", False, 6)
    assert answer(ids, "bc") == ("a", True, 5)


@pytest.mark.parametrize("min_tokens", range(8))
def test_stop_strings_count_after_min_tokens(min_tokens: int) -> None:
    text = "ab.ab.ab"
    found, stopped, done = answer(bytes_of(text), ".", min_tokens=min_tokens)
    expected = text.find(".", min_tokens)
    assert found == (text[:expected] if expected >= 0 else text)
    assert stopped == (expected >= 0)
    assert done > min_tokens


def test_a_stop_string_that_begins_before_min_tokens_is_none() -> None:
    assert answer(bytes_of("xyz xyz"), "xyz", min_tokens=1)[0] == "xyz "


@given(
    ids=st.lists(st.integers(0, 383), min_size=1, max_size=40)
    | st.lists(st.sampled_from(CORPUS[:4]), min_size=1, max_size=2).map(lambda texts: bytes_of("".join(texts))),
    stop=st.lists(st.text("aeinort ,.öä日🙂", min_size=1, max_size=3), min_size=1, max_size=4, unique=True),
    ended=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_answer_is_cut_at_the_first_stop_string_of_its_whole_text(
    ids: list[int], stop: list[str], ended: bool
) -> None:
    whole = tokenizer().decode(ids[:-1] if ended else ids)
    found, stopped, done = answer(ids, *stop, ended=ended)
    at = [(whole.index(each) + len(each), whole.index(each)) for each in stop if each in whole]
    assert found == (whole[: min(at)[1]] if at else whole)
    assert stopped == bool(at)
    if not stopped:
        assert done == len(ids)


# Many answers -------------------------------------------------------------------------------------------------------


def test_answers_under_way_together_do_not_mix() -> None:
    texts = ["the fox and the dog", "apple, pear, plum", "no stop at all", "日本語 and 🙂 and"]
    sampling = [SamplingParams(stop=("dog",)), SamplingParams(stop=("pear", ",")), SamplingParams()]
    sampling.append(SamplingParams(stop=("🙂",), min_tokens=3))
    stops = TextStops(tokenizer(), requests_of(*sampling))
    rows = [bytes_of(text) for text in texts]
    ended_at: dict[int, int] = {}
    for step in range(max(map(len, rows))):
        # Another order in each step, and only those still under way.
        live = [i for i in range(4) if i not in ended_at and step < len(rows[i])][:: 1 if step % 2 else -1]
        stopped = stops.watch(
            np.array(live, dtype=np.int32),
            np.array([rows[i][step] for i in live], dtype=np.int32),
            np.zeros(len(live), dtype=bool),
        )
        assert stopped.shape == (len(live),)
        ended_at |= {i: step + 1 for i, stop in zip(live, stopped.tolist(), strict=True) if stop}
    assert ended_at == {0: 19, 1: 6, 3: len("日本語 and 🙂".encode())}
    for i, expected in enumerate(["the fox and the ", "apple", "no stop at all", "日本語 and "]):
        ids = np.array(rows[i][: ended_at.get(i)], dtype=np.int32)
        assert stops.text(Finished(i, ids, FinishReason.LENGTH, False, 0)) == (expected, i in ended_at)


# Through the whole program ----------------------------------------------------------------------------------------


def run(folder: Path, name: str, model: Path, bodies: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """Text, finish reason and completion tokens of each body."""
    job = folder / f"{name}.jsonl"
    lines = [{"custom_id": str(i), "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)]
    job.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batchrun.run(job, model=str(model), dtype="float32")
    results = [json.loads(line) for line in (folder / f"{name}.run" / "results.jsonl").read_text().splitlines()]
    results.sort(key=lambda result: int(result["custom_id"]))
    assert len(results) == len(bodies)
    read = []
    for result in results:
        body = result["response"]["body"]
        (choice,) = body["choices"]
        read.append((choice["text"], choice["finish_reason"], body["usage"]["completion_tokens"]))
    return read


def test_a_run_cuts_answers_at_their_stop_strings(model_dir: ModelFactory, tmp_path: Path) -> None:
    model = model_dir("llama")
    prompts = [f"The quick brown fox asks for number {i}" for i in range(8)]
    plain = [{"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True} for prompt in prompts]
    free = run(tmp_path, "free", model, plain)
    assert {(reason, tokens) for _, reason, tokens in free} == {("length", 24)}

    stops = [text[len(text) // 2 :][:3] for text, _, _ in free]
    stopped = run(tmp_path, "stopped", model, [{**body, "stop": stop} for body, stop in zip(plain, stops, strict=True)])
    for (text, _, _), stop, (found, reason, tokens) in zip(free, stops, stopped, strict=True):
        assert (found, reason) == (text[: text.index(stop)], "stop")
        assert 0 < tokens < 24

    # A stop string that never comes changes nothing, beside one that does.
    mixed = [{**plain[0], "stop": ["never in this text"]}, {**plain[0], "stop": ["never in this text", stops[0]]}]
    assert run(tmp_path, "mixed", model, mixed) == [free[0], stopped[0]]
