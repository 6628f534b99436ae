"""Whatever text comes in a job, its token ids are those that the plain tokenizer has for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzz.cases import parts, repeatable
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as PlainTokenizer

from batchrun.config import configs_dir, load_config
from batchrun.formats.job import open_job, read_job
from batchrun.intake import read_requests
from batchrun.models import read_model_spec
from batchrun.request import JobLine, LineFault
from batchrun.tokenizer import PromptEncoder, load_tokenizer

DEMO = configs_dir() / "demo" / "model"
PLAIN = PlainTokenizer.from_file(str(DEMO / "tokenizer.json"))
SPEC, _, GENERATION = read_model_spec(DEMO)
CONFIG = load_config(model="demo")

LUMPS = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "start|>", "<|", "|>", "<|im_start|><|im_start|>"),
    *("{{ 7 * 7 }}", "{% raw %}", "{#", "{0.__class__}", "%s", "$x", "\\", "\\ud83d", '"', "'", "</s>", "<0x0A>"),
    *("\0", "\x1b[31m", "\x7f", "\x85", "\r\n", "\n\n\n", " ", "  \t", "\u00a0", "\u2028", "\u200b", "\ufeff"),
    *("\u202e", "Café", "e\u0301" * 40, "日本語", "👩‍👩‍👧‍👦", "🏳️‍🌈", "\U0010ffff", "\ufffe", "ſ", "x" * 600),
]  # fmt: skip
LONE = ["\ud83d", "\ude00", "\ud800", "\udfff"]
TEXTS = st.text(max_size=30) | st.lists(st.sampled_from(LUMPS) | st.text(max_size=4), max_size=10).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])


def in_template(messages: list[tuple[str, str]]) -> str:
    """A chat in the demo model's template."""
    told = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return told + "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def read(path: Path, lines: list[str]) -> list[JobLine | LineFault]:
    path.write_text("\n".join(lines), encoding="utf-8")
    return list(read_job(open_job(path)))


def check_ids(lines: list[JobLine | LineFault], texts: list[list[str]], tokenizer) -> None:
    """Each line has a request for each of its texts, with the ids of the whole text, or is too long."""
    assert all(isinstance(line, JobLine) for line in lines), lines
    intake = read_requests(lines, tokenizer, SPEC, GENERATION, CONFIG)
    requests = intake.requests
    ids = [requests.tokens[row].tolist() for row in range(len(requests))]
    found = {number: [] for number in range(1, len(lines) + 1)}
    for row, line in enumerate(requests.line.tolist()):
        found[int(requests.line_numbers[line])].append(ids[row])
    faults = {fault.number: fault.code for fault in intake.faults}
    for number, of_line in enumerate(texts, 1):
        wanted = [PLAIN.encode(text).ids for text in of_line]
        if any(len(row) >= SPEC.max_context for row in wanted):
            assert faults[number] == "context_length_exceeded"
            wanted = []
        assert found[number] == wanted


@parts(slow=6)
def test_prompts_and_chats_have_the_ids_of_the_plain_tokenizer(tmp_path, tokenizer, part):
    prompts = st.lists(TEXTS.filter(bool), min_size=1, max_size=3)
    chats = st.lists(st.tuples(ROLES, TEXTS), min_size=1, max_size=3)

    @repeatable(part, 1200)
    @given(st.lists(prompts | chats, min_size=1, max_size=4), st.booleans())
    def law(lines, escaped):
        written, texts = [], []
        for said in lines:
            if isinstance(said[0], str):
                written.append({"prompt": said})
                texts.append(said)
            else:
                written.append({"messages": [{"role": role, "content": content} for role, content in said]})
                texts.append([in_template(said)])
        read_lines = read(tmp_path / "job.jsonl", [json.dumps(line, ensure_ascii=escaped) for line in written])
        check_ids(read_lines, texts, tokenizer)

    law()


@parts(slow=1)
def test_surrogates_from_json_are_a_character_or_a_fault(tmp_path, tokenizer, part):
    texts = st.lists(st.sampled_from([*LONE, "\ud83d\ude00", "a", "<|im_end|>"]), min_size=1, max_size=4).map("".join)

    @repeatable(part, 2500)
    @given(texts)
    def law(text):
        lines = read(tmp_path / "job.jsonl", [json.dumps({"prompt": text}), json.dumps({"prompt": "behind"})])
        assert isinstance(lines[1], JobLine)
        try:
            meant = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            assert isinstance(lines[0], LineFault)
            assert lines[0].code == "invalid_json_line"
        else:
            check_ids(lines, [[meant], ["behind"]], tokenizer)

    law()


@parts(slow=1)
def test_an_encoder_that_remembers_has_the_ids_of_the_plain_tokenizer(tokenizer, part):
    encoder = PromptEncoder(tokenizer, kept_bytes=20_000, kept_from=0)  # so little that some is forgotten

    @repeatable(part, 2500)
    @given(st.lists(TEXTS, max_size=4), st.booleans())
    def law(texts, special):
        ids = [row.tolist() for row in encoder.encode(texts, add_special_tokens=special)]
        assert ids == [PLAIN.encode(text, add_special_tokens=special).ids for text in texts]

    law()
