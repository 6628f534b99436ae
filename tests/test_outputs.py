"""What lines may ask of an answer besides its text: each through a whole run of a real model."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion

import batchrun

PROMPTS = ["The quick brown fox jumps over", "The quick brown fox sleeps", "Numbers: 1 2 3 1 2 3", "apple pear apple"]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture
def run(model_dir, tmp_path):
    """`run(lines)`: the result lines of a run on a tiny model, by custom_id."""

    def call(lines: list[dict[str, Any]], **options: Any) -> dict[str, dict[str, Any]]:
        path = tmp_path / "jobs.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.run"
        options = {"scheduler": {"grouping": "tree", "step_tokens": 16}} | options
        batchrun.run(path, model=str(model_dir()), out=out, **options)
        found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        return {line["custom_id"]: line["response"]["body"] for line in found}

    return call


@pytest.fixture
def reference(model_dir):
    """The same model and tokenizer in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path: Path = model_dir()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def texts(body: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


def test_repetition_penalty_is_that_of_transformers(run, reference):
    model, tokenizer = reference
    penalty = 1.3
    found = run(
        [{"id": str(i), "prompt": prompt, **GREEDY, "repetition_penalty": penalty} for i, prompt in enumerate(PROMPTS)]
    )
    plain = run([{"id": str(i), "prompt": prompt, **GREEDY} for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, repetition_penalty=penalty, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert texts(found[str(i)]) == [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]
    assert any(texts(found[key]) != texts(plain[key]) for key in found)


def test_logprobs_are_those_of_the_model(run, reference):
    model, tokenizer = reference
    lines = [{"id": str(i), "prompt": prompt, **GREEDY, "logprobs": i} for i, prompt in enumerate(PROMPTS)]
    found = run(lines)
    for i, prompt in enumerate(PROMPTS):
        choice = Completion.model_validate(found[str(i)], strict=True).choices[0]
        logprobs = choice.logprobs
        assert logprobs is not None
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        with torch.no_grad():
            expected = model(out).logits[0, ids.shape[1] - 1 : -1].float().log_softmax(-1)
        answer = out[0, ids.shape[1] :]
        assert logprobs.token_logprobs == pytest.approx(expected.gather(1, answer[:, None])[:, 0].tolist(), abs=1e-4)
        for place, top in enumerate(logprobs.top_logprobs):
            best = expected[place].sort(descending=True).values[: max(i, 1)].tolist()
            # Two tokens may have one text, such as parts of characters.
            assert sorted(top.values(), reverse=True) == pytest.approx(best[: len(top)], abs=1e-4)
        if "\ufffd" not in choice.text:
            assert "".join(logprobs.tokens) == choice.text
            ends = zip(logprobs.text_offset, logprobs.tokens, strict=True)
            assert [choice.text[at : at + len(token)] for at, token in ends] == logprobs.tokens


def test_logprobs_of_a_chat_have_bytes_that_make_its_text(run):
    messages = [{"role": "user", "content": "What is the price of the apple?"}]
    found = run([{"id": "chat", "messages": messages, **GREEDY, "logprobs": True, "top_logprobs": 3}])
    chat = ChatCompletion.model_validate(found["chat"], strict=True).choices[0]
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    assert len(chat.logprobs.content) == 12
    written = b"".join(bytes(token.bytes or ()) for token in chat.logprobs.content)
    assert written.decode(errors="replace") == chat.message.content
    for token in chat.logprobs.content:
        values = [other.logprob for other in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert token.logprob == values[0]  # greedy, and nothing changes its logits


def test_n_answers_are_those_of_n_lines_with_their_seeds(run):
    drawn = {"temperature": 1.2, "max_tokens": 8, "ignore_eos": True}
    lines = [
        {"id": "all", "prompt": PROMPTS[:2], **drawn, "n": 3, "seed": 7},
        *({"id": f"{i}", "prompt": PROMPTS[i // 3], **drawn, "seed": 7 + i} for i in range(6)),
        {"id": "greedy", "prompt": PROMPTS[2], **GREEDY, "n": 2},
    ]
    found = run(lines)
    assert texts(found["all"]) == [texts(found[f"{i}"])[0] for i in range(6)]
    assert [choice["index"] for choice in found["all"]["choices"]] == list(range(6))
    assert len(set(texts(found["all"]))) == 6
    assert len(set(texts(found["greedy"]))) == 1
    usage = found["all"]["usage"]
    assert usage["completion_tokens"] == 48
    assert usage["prompt_tokens"] == sum(found[key]["usage"]["prompt_tokens"] for key in ("0", "3"))


def test_words_that_are_bad_and_tokens_that_are_biased_are_not_written(run, reference):
    _, tokenizer = reference
    line = {"id": "a", "prompt": PROMPTS[0], **GREEDY, "logprobs": 0}
    plain = run([line])["a"]["choices"][0]["logprobs"]["tokens"]
    # Those that are a token of their own.
    words = [word for word in plain if len(tokenizer.encode(word, add_special_tokens=False)) == 1]
    assert len(words) > 2
    other = run([line | {"bad_words": words}])["a"]["choices"][0]["logprobs"]["tokens"]
    assert not set(words) & set(other)
    pair = next(one + two for one, two in pairwise(plain) if "\ufffd" not in one + two)
    ids = tokenizer.encode(pair, add_special_tokens=False)
    assert len(ids) > 1
    again = run([line | {"bad_words": [pair]}])["a"]["choices"][0]["logprobs"]["tokens"]
    assert pair not in "".join(again)
    first = tokenizer.encode(words[0], add_special_tokens=False)[0]
    biased = run([{"id": "a", "prompt": PROMPTS[0], **GREEDY, "logit_bias": {str(first): 100}}])
    assert texts(biased["a"]) == [tokenizer.decode([first] * 12)]


def test_what_the_text_has(run, reference):
    _, tokenizer = reference
    [plain] = texts(run([{"id": "a", "prompt": PROMPTS[0], **GREEDY}])["a"])
    stop = plain[5:7]
    eos = tokenizer.eos_token_id
    lines = [
        {"id": "echo", "prompt": PROMPTS[0], **GREEDY, "echo": True},
        {"id": "cut", "prompt": PROMPTS[0], **GREEDY, "stop": stop},
        {"id": "kept", "prompt": PROMPTS[0], **GREEDY, "stop": stop, "include_stop_str_in_output": True},
        {"id": "special", "prompt": PROMPTS[0], **GREEDY, "logit_bias": {str(eos): 100}, "skip_special_tokens": False},
        {"id": "skipped", "prompt": PROMPTS[0], **GREEDY, "logit_bias": {str(eos): 100}},
        {"id": "short", "prompt": list(range(20, 60)), **GREEDY, "truncate_prompt_tokens": 7},
        {"id": "short too", "prompt": list(range(53, 60)), **GREEDY},
        {"id": "fits", "prompt": list(range(20, 60)) * 30, **GREEDY, "truncate_prompt_tokens": -1},
        {"id": "whole", "prompt": list(range(20, 60)), "max_tokens": 512, "truncate_prompt_tokens": -1},
    ]
    found = run(lines)
    assert texts(found["echo"]) == [PROMPTS[0] + plain]
    at = plain.index(stop)
    assert texts(found["cut"]) == [plain[:at]]
    assert texts(found["kept"]) == [plain[: at + len(stop)]]
    assert texts(found["special"]) == [tokenizer.decode([eos] * 12)]
    assert texts(found["skipped"]) == [""]
    assert texts(found["short"]) == texts(found["short too"])
    assert found["short"]["usage"]["prompt_tokens"] == 7
    assert found["fits"]["usage"]["prompt_tokens"] == 512 - 1
    assert found["whole"]["usage"]["prompt_tokens"] == 40  # whatever the answer may take


def scored(model: Any, ids: Any) -> torch.Tensor:
    """Logprobs of all tokens at each place of a prompt but the first, `[tokens - 1, vocabulary]`."""
    with torch.no_grad():
        return model(ids).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("pieces", [False, True], ids=["whole steps", "steps in pieces"])
def test_logprobs_of_prompts_are_those_of_the_model_whatever_else_is_run(run, reference, pieces, monkeypatch):
    model, tokenizer = reference
    if pieces:
        monkeypatch.setattr("batchrun.engine.scores._AT_ONCE", 3 * model.config.vocab_size)
    prompts = [*PROMPTS, PROMPTS[0], " ".join(PROMPTS * 4)]  # the last one is computed in parts
    wanted = [i % 3 for i in range(len(prompts))]
    lines = [
        {"id": str(i), "prompt": prompt, **GREEDY, "prompt_logprobs": wanted[i]} for i, prompt in enumerate(prompts)
    ]
    lines += [{"id": f"plain {i}", "prompt": prompt, **GREEDY} for i, prompt in enumerate(prompts)]
    lines += [{"id": "one token", "prompt": [40], **GREEDY, "prompt_logprobs": 1}]
    lines += [
        {"id": "chat", "messages": [{"role": "user", "content": "apple"}], **GREEDY, "prompt_logprobs": 1, "n": 2}
    ]
    found = run(lines)
    for i, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = scored(model, ids)
        places = found[str(i)]["choices"][0]["prompt_logprobs"]
        assert places[0] is None and len(places) == ids.shape[1]
        for place, token_id, values in zip(places[1:], ids[0, 1:].tolist(), expected, strict=True):
            assert next(iter(place)) == str(token_id)
            assert wanted[i] <= len(place) <= wanted[i] + 1
            for key, told in place.items():
                assert told["logprob"] == pytest.approx(float(values[int(key)]), abs=1e-4)
                assert told["rank"] == 1 + int((values > values[int(key)]).sum())
                assert told["decoded_token"] in tokenizer.decode([40, int(key)])
            assert {told["rank"] for told in place.values()} >= set(range(1, wanted[i] + 1))
        assert texts(found[str(i)]) == texts(found[f"plain {i}"])
        assert "prompt_logprobs" not in found[f"plain {i}"]["choices"][0]
    assert found["one token"]["choices"][0]["prompt_logprobs"] == [None]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "apple"}], add_generation_prompt=True)["input_ids"]
    assert len(found["chat"]["prompt_logprobs"]) == len(ids)
    assert found["0"]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # what is shared has no logprobs


def test_echo_with_logprobs_scores_the_prompt(run, reference):
    model, tokenizer = reference
    lines = [
        {"id": str(i), "prompt": prompt, **GREEDY, "logprobs": i, "echo": True} for i, prompt in enumerate(PROMPTS)
    ]
    lines += [{**line, "id": f"only {line['id']}", "max_tokens": 0, "stop": ["e", " "]} for line in lines]
    lines += [{"id": "unscored", "prompt": PROMPTS[0], "echo": True, "max_tokens": 0}]
    found = run(lines)
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = scored(model, ids)
        own = expected.gather(1, ids[0, 1:, None])[:, 0].tolist()
        whole, only = (found[key]["choices"][0] for key in (str(i), f"only {i}"))
        size = ids.shape[1]
        assert (only["text"], only["finish_reason"], len(only["logprobs"]["tokens"])) == (prompt, "length", size)
        assert found[f"only {i}"]["usage"]["completion_tokens"] == 0
        assert whole["text"].startswith(prompt)
        assert len(whole["logprobs"]["tokens"]) == size + 12
        for choice in (whole, only):
            logprobs = choice["logprobs"]
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
            assert logprobs["token_logprobs"][1:size] == pytest.approx(own, abs=1e-4)
            assert "".join(logprobs["tokens"][:size]) == prompt
            assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
            assert len({len(column) for column in logprobs.values()}) == 1
            for top, values in zip(logprobs["top_logprobs"][1:size], expected, strict=True):
                best = values.sort(descending=True).values[:i].tolist()
                assert sorted(top.values(), reverse=True)[: len(best)] == pytest.approx(best[: len(top)], abs=1e-4)
    assert texts(found["unscored"]) == [PROMPTS[0]]
    assert found["unscored"]["choices"][0]["logprobs"] is None
