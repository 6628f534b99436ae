"""From lines to requests: tokens, defaults and seeds land in the right rows, whatever stands between them."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.config import derive_seed, load_config
from batchrun.formats.job import open_job, read_job
from batchrun.intake import Intake, read_requests
from batchrun.models import read_model_spec
from batchrun.request import ENDPOINTS, Endpoint, JobLine, LineOptions, TextColumn
from batchrun.specs import ModelSpec
from batchrun.tokenizer import load_tokenizer

CONTEXT = 512  # of the tiny models


@pytest.fixture
def intake(model_dir, tmp_path):
    """`intake(lines, **flags)`: what comes of a job of these lines, and the tokenizer."""

    def read(lines, *, template: str | None = "default", **flags):
        path = model_dir("llama") if template == "default" else model_dir("llama", chat_template=template)
        job = tmp_path / "job.jsonl"
        job.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        config = load_config(model=str(path), **flags)
        tokenizer = load_tokenizer(path, config.chat_template)
        spec, _, generation_config = read_model_spec(path)
        sound = (line for line in read_job(open_job(job)) if isinstance(line, JobLine))
        return read_requests(sound, tokenizer, spec, generation_config, config), tokenizer

    return read


def chat(text: str, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def faults(intake: Intake) -> list[tuple[int, str]]:
    return [(fault.number, fault.code) for fault in intake.faults]


def test_every_prompt_keeps_its_line_its_tokens_and_its_limit(intake):
    lines = [
        {"id": "a", "prompt": "apple pear", "max_tokens": 3},
        "",
        "{bad",
        {"id": "b", **chat("plum", max_tokens=4)},
        {"id": "c", "prompt": ["apple", "stock price", "apple"], "max_tokens": 5},
        {"id": "d", "prompt": [[5, 6, 7], [8]], "max_tokens": 6},
    ]
    result, tokenizer = intake(lines)
    requests = result.requests
    chat_text = tokenizer.render_chat([{"role": "user", "content": "plum"}])
    [rendered] = tokenizer.encode_batch([chat_text], add_special_tokens=False)
    texts = tokenizer.encode_batch(["apple pear", "apple", "stock price"])
    expected = [texts[0], rendered, texts[1], texts[2], texts[1], [5, 6, 7], [8]]
    assert [requests.tokens[i].tolist() for i in range(len(requests))] == expected
    assert requests.line.tolist() == [0, 1, 2, 2, 2, 3, 3]
    assert requests.line_numbers.tolist() == [1, 4, 5, 6]
    assert list(requests.custom_ids) == ["a", "b", "c", "d"]
    completion, dialogue = Endpoint.COMPLETIONS, Endpoint.CHAT
    assert [ENDPOINTS[place] for place in requests.endpoints] == [completion, dialogue, completion, completion]
    assert requests.max_new_tokens.tolist() == [3, 4, 5, 5, 5, 6, 6]
    assert result.faults == []


def test_lines_refused_in_between_shift_nothing_over_more_than_one_batch(intake, monkeypatch):
    """Tokenising goes by batches, chats and texts apart; a bad line must not shift its neighbours."""
    monkeypatch.setattr("batchrun.intake._BATCH", 50_000)
    lines = []
    for i in range(2100):
        match i % 7:
            case 0 | 3:
                lines.append({"id": str(i), **chat(f"apple {i}", max_tokens=1)})
            case 5:
                lines.append({"id": str(i), "prompt": [2_000_000], "max_tokens": 1})  # no such token
            case _:
                lines.append({"id": str(i), "prompt": f"pear {i}", "max_tokens": 1})
    result, tokenizer = intake(lines)
    assert [number for number, _ in faults(result)] == list(range(6, 2101, 7))
    requests = result.requests
    assert len(requests) == 1800
    for i in range(len(requests)):
        number = int(requests.custom_ids[i])
        assert requests.line_numbers[i] == number + 1
        fruit = "apple" if number % 7 in (0, 3) else "pear"
        assert f"{fruit} {number}" in tokenizer.decode(requests.tokens[i].tolist())


def test_what_only_the_model_can_refuse(intake):
    vocabulary = 384
    result, _ = intake(
        [
            {"prompt": "x y " * CONTEXT, "max_tokens": 1},
            {"prompt": [7] * CONTEXT, "max_tokens": 1},
            {"prompt": [7] * (CONTEXT - 1), "max_tokens": 1},
            {"prompt": [vocabulary], "max_tokens": 1},
            {"prompt": [vocabulary - 1], "max_tokens": 1},
        ]
    )
    assert faults(result) == [
        (1, "context_length_exceeded"),
        (2, "context_length_exceeded"),
        (4, "invalid_request"),
    ]
    assert result.requests.line_numbers.tolist() == [3, 5]
    assert "384" in result.faults[2].message
    assert "512" in result.faults[1].message


def test_a_chat_without_a_template_is_the_fault_of_its_line_alone(intake, tmp_path):
    lines = [chat("hello", max_tokens=1), {"prompt": "hello", "max_tokens": 1}]
    without, _ = intake(lines, template=None)
    assert faults(without) == [(1, "invalid_request")]
    assert "--chat-template" in without.faults[0].message
    assert without.requests.line_numbers.tolist() == [2]

    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    given, tokenizer = intake(lines, template=None, chat_template=str(template))
    assert given.faults == []
    assert given.requests.tokens[0].tolist() == tokenizer.encode_batch(["hello!"])[0]


def test_a_template_that_refuses_a_chat_says_why_on_that_line(intake, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no odd words') if 'odd' in messages[0]['content'] else 'fine' }}")
    result, _ = intake([chat("odd"), chat("even")], chat_template=str(template), max_tokens=1)
    assert faults(result) == [(1, "invalid_request")]
    assert "no odd words" in result.faults[0].message


TOOLS = {"tools": [{"type": "function", "function": {"name": "clock"}}]}


@pytest.mark.parametrize("field", [TOOLS, {"documents": [{"text": "a"}]}, {"reasoning_effort": "low"}])
def test_what_the_template_would_lose_is_a_fault(intake, tmp_path, field):
    [name] = field
    lines = [chat("a", **field), chat("a", max_tokens=1)]
    result, _ = intake(lines)
    assert faults(result) == [(1, "unsupported_field")]
    assert result.faults[0].param == name
    assert f"{name} is not known" in result.faults[0].message
    template = tmp_path / "template.jinja"
    template.write_text(f"{{{{ {name} }}}}{{{{ messages[0].content }}}}")
    assert faults(intake(lines, chat_template=str(template))[0]) == []


def test_tools_that_are_not_to_be_called_are_none(intake):
    result, _ = intake([chat("a", tool_choice="none", **TOOLS)])
    assert faults(result) == []


@pytest.mark.parametrize("known", [False, True])
def test_calls_that_nobody_will_find_are_counted(intake, tmp_path, known):
    template = tmp_path / "template.jinja"
    template.write_text("{{ tools }}{{ messages[0].content }}" + "{# <tool_call> #}" * known)
    lines = [chat("a", **TOOLS), chat("b", **TOOLS, tool_choice="none"), chat("c"), {"prompt": "d"}]
    result, _ = intake(lines, chat_template=str(template))
    assert faults(result) == []
    assert result.calls_not_read == (0 if known else 1)


@pytest.mark.parametrize("name", ["thinking", "reasoning_content"])
def test_thoughts_of_earlier_turns_reach_the_template(intake, tmp_path, name):
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{{ message." + name + " }}{% endfor %}")
    thought = {"role": "assistant", "content": "plum", "reasoning_content": "pear"}
    lines = [{"messages": [{"role": "user", "content": "apple"}, thought], "max_tokens": 1}]
    result, tokenizer = intake(lines, chat_template=str(template))
    assert result.requests.tokens[0].tolist() == tokenizer.encode_batch(["appleplumpear"])[0]


def test_limits_come_from_the_line_the_flag_or_the_api(intake):
    lines = [chat("a"), {"prompt": "a"}, chat("a", max_tokens=7), {"prompt": ["a", "a a"], "max_tokens": 100_000}]
    plain, _ = intake(lines)
    length = plain.requests.tokens.lengths
    left = CONTEXT - length
    assert plain.requests.max_new_tokens.tolist() == [left[0], 16, 7, left[3], left[4]]
    assert plain.defaulted.tolist() == [True, False, False, False, False]
    assert (plain.silent, plain.clipped) == (2, 1)

    flagged, _ = intake(lines, max_tokens=9)
    assert flagged.requests.max_new_tokens.tolist() == [9, 9, 7, left[3], left[4]]
    assert not flagged.defaulted.any()
    assert (flagged.silent, flagged.clipped) == (0, 1)


def test_seeds_hang_on_the_line_alone(intake):
    """A bad, blank or finished line before it must not change what a line draws."""
    sound = [{"prompt": "a"}, {"prompt": ["a", "a"]}, {"prompt": "a", "seed": 12}, {"prompt": ["a", "a"], "seed": 12}]
    result, _ = intake(sound, seed=3, max_tokens=1)
    assert result.requests.seed.tolist() == [
        derive_seed(3, 1, 0, None),
        derive_seed(3, 2, 0, None),
        derive_seed(3, 2, 1, None),
        12,
        12,
        13,
    ]
    mixed, _ = intake([sound[0], "{bad", "", sound[1]], seed=3, max_tokens=1)
    assert mixed.requests.seed.tolist()[1:] == [derive_seed(3, 4, 0, None), derive_seed(3, 4, 1, None)]
    other, _ = intake(sound, seed=4, max_tokens=1)
    assert set(other.requests.seed[:3].tolist()).isdisjoint(result.requests.seed[:3].tolist())
    assert other.requests.seed[3:].tolist() == result.requests.seed[3:].tolist()


def test_a_template_that_writes_nothing_makes_an_empty_prompt(intake, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] if 'said' in messages[0]['content'] }}")
    result, _ = intake([chat("said"), chat("silent")], chat_template=str(template), max_tokens=1)
    assert faults(result) == [(2, "empty_prompt")]


def test_hints_are_columns_and_never_more_than_the_limit(intake):
    lines = [
        chat("a", max_tokens=50, batchrun={"expected_tokens": 20}),
        {"prompt": "a", "max_tokens": 50},
        {"prompt": ["a", "b"], "max_tokens": 50, "batchrun": {"expected_tokens": 10**12}},
    ]
    requests = intake(lines)[0].requests
    assert requests.expected_tokens.tolist() == [20, 0, 50, 50]
    assert requests.take_lines(np.array([0, 2])).expected_tokens.tolist() == [20, 50, 50]
    without = intake([{k: v for k, v in line.items() if k != "batchrun"} for line in lines])[0].requests
    for name in ("sampling_id", "max_new_tokens", "seed"):
        assert getattr(requests, name).tolist() == getattr(without, name).tolist()


def test_tokenising_in_small_batches_changes_nothing(intake, monkeypatch):
    lines = [chat(f"apple {i % 3}", max_tokens=1) if i % 2 else {"prompt": [f"pear {i % 5}", "x"]} for i in range(40)]
    whole = intake(lines)[0].requests
    monkeypatch.setattr("batchrun.intake._BATCH", 200)
    cut = intake(lines)[0].requests
    assert cut.tokens.ids.tolist() == whole.tokens.ids.tolist()
    assert cut.tokens.offsets.tolist() == whole.tokens.offsets.tolist()


def test_memory_is_what_the_tokens_and_the_columns_take(intake):
    """4 bytes a prompt token and 200 bytes a request, beside what does not grow with the job."""

    def lines(count: int):
        for i in range(count):
            yield JobLine(i + 1, f"request-{i}", Endpoint.COMPLETIONS, LineOptions(), prompts=("a " * (200 + i % 2),))

    _, tokenizer = intake([])
    spec = ModelSpec("llama", 384, 8, 8, 1, 1, 1, 8, 4096, None, "float32")
    config = load_config(model="none")
    used, ids = [], []
    for count in (2000, 10_000):
        tracemalloc.start()
        try:
            requests = read_requests(lines(count), tokenizer, spec, {}, config).requests
            used.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        ids.append(requests.tokens.ids.nbytes)
    assert used[1] - used[0] < ids[1] - ids[0] + 200 * 8000


@given(st.lists(st.text(st.characters(), max_size=12) | st.text(max_size=12), max_size=8))
def test_a_column_of_texts_is_their_list(texts):
    column = TextColumn.of(texts)
    assert list(column) == texts
    assert [column[at] for at in np.arange(len(texts))] == texts
    for outside in (-1, len(texts)):
        with pytest.raises(IndexError):
            column[outside]


def test_equal_sampling_is_one_entry(intake):
    lines = [{"prompt": "a", "max_tokens": 1, "temperature": 0.5}] * 2
    lines = [{**line, "id": str(i)} for i, line in enumerate([*lines, {"prompt": "a", "max_tokens": 1}])]
    requests = intake(lines)[0].requests
    assert requests.sampling_id.tolist() == [0, 0, 1]
    assert [sampling.temperature for sampling in requests.sampling] == [0.5, 0.0]  # the model's own: do_sample false


def test_completions_and_continued_messages_go_on_from_their_prompt(intake):
    said = [{"role": "user", "content": "plum"}, {"role": "assistant", "content": "The capital is"}]
    lines = [
        {"prompt": "plum"},
        chat("plum"),
        {"messages": said, "continue_final_message": True},
        {"messages": said, "chat_template_kwargs": {"enable_thinking": False}},
    ]
    requests = intake([{"id": str(i), **line} for i, line in enumerate(lines)])[0].requests
    continues = [requests.sampling[i].continues for i in requests.sampling_id]
    assert continues == [True, False, True, False]


def test_a_job_of_which_nothing_is_left_makes_no_requests(intake):
    result, _ = intake([{"prompt": [7] * CONTEXT}])
    assert len(result.requests) == 0
    assert result.requests.tokens.lengths.size == 0
