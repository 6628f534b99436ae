"""The tokenizer: equal to transformers' own in ids, chat and text; decoding as tokens come; stop strings."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from batchrun.errors import ModelRefused, UsageError
from batchrun.tokenizer import IncrementalDecoder, StopStrings, load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello world, hello!",
    "  two leading spaces, one trailing ",
    "naïve café, cafe\u0301 — “quotes”",
    "日本語のテキストと 中文。",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 thumb",
    "tabs\tand\r\nlines\n\n\nmany",
    "x = 3.14159; y = 2026 / 12",
    "a <s> b </s> <|im_end|> <|tool|> c",
    "can't won't I'M",
    "\u200b\ufeff\ufffd end",
    "don ' t , stop .",
]
CORPUS = [*TEXTS, "the cat sat on the mat and the dog sat on the log", "hello world hello world hello"] * 3
TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
ROOT = TemporaryDirectory(prefix="tokenizers-")  # gone when the process ends
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """As Llama 3: BPE over bytes; BOS added by the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    add_tokens(tokenizer)
    return tokenizer


def qwen() -> Tokenizer:
    """As Qwen: BPE over bytes of normalised text, nothing added."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sentencepiece(legacy: bool) -> Tokenizer:
    """As Mistral v0.3, or (`legacy`) as Llama 2: BPE over characters, bytes where there is no token for one."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        ["the cat sat on the mat, hello world! 日本 café"] * 3, trainers.BpeTrainer(vocab_size=90)
    )
    model = json.loads(trained.to_str())["model"]
    names = [*SPECIAL, *BYTE_TOKENS, *sorted(model["vocab"], key=model["vocab"].get)]
    vocab = {name: id for id, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    add_tokens(tokenizer)
    return tokenizer


def add_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])


KINDS = {
    "byte_level": byte_level,
    "qwen": qwen,
    "mistral": lambda: sentencepiece(legacy=False),
    "llama2": lambda: sentencepiece(legacy=True),
}


@cache
def saved(kind: str, model_type: str = "llama", declared: str | None = "PreTrainedTokenizerFast") -> Path:
    """A model directory with the tokenizer of that kind."""
    folder = Path(mkdtemp(dir=ROOT.name))
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    if declared is not None:
        config["tokenizer_class"] = declared
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@cache
def ours(kind: str):
    return load_tokenizer(saved(kind))


every_kind = pytest.mark.parametrize("kind", KINDS)
any_kind = st.sampled_from(list(KINDS))


# --- equal to transformers


@every_kind
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "declared",
    ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", None],
)
def test_the_tokenizer_is_the_one_that_transformers_builds(kind, model_type, declared):
    from transformers import AutoTokenizer

    folder = saved(kind, model_type, declared)
    theirs = AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_batch(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]
    messages = [{"role": "system", "content": TEXTS[3]}, {"role": "user", "content": TEXTS[5], "name": None}]
    chat = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chats([tuple(messages)]) == [chat]
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.eos_token_ids({}) == {theirs.eos_token_id}


def test_what_transformers_saves_is_read_the_same(tmp_path):
    """save_pretrained writes the template into a file of its own and settings that from_pretrained applies."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|im_end|>", chat_template=TEMPLATE)
    fast.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(TEXTS) == theirs(TEXTS)["input_ids"]
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.encode_chats([messages]) == [
        theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ]
    assert tokenizer.eos_token_ids({"eos_token_id": 7}) == {7, theirs.eos_token_id}


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    long, short = load_tokenizer(tmp_path).encode_batch(["the cat sat on the mat and the dog", "a"])
    assert len(long) > 4 and len(short) == 2


@every_kind
def test_a_chat_has_the_template_and_nothing_added(kind):
    tokenizer = ours(kind)
    [ids] = tokenizer.encode_chats([[{"role": "user", "content": "hi"}]])
    [bos] = tokenizer.encode_batch([""])
    if bos:
        assert ids[: len(bos)] == bos and ids.count(bos[0]) == 1


def test_eos_ids_are_those_of_the_model_and_of_the_tokenizer():
    tokenizer = ours("byte_level")
    [own] = tokenizer.eos_token_ids({})
    assert tokenizer.eos_token_ids({"eos_token_id": None}) == {own}
    assert tokenizer.eos_token_ids({"eos_token_id": 5}) == {own, 5}
    assert tokenizer.eos_token_ids({"eos_token_id": [5, 6, own]}) == {own, 5, 6}


# --- faults


def test_a_chat_that_the_template_refuses_is_a_fault_of_its_own():
    good = [{"role": "user", "content": "hi"}]
    tool = [{"role": "tool", "content": "hi"}]
    first, refused, empty, last = ours("byte_level").encode_chats([good, tool, [], good])
    assert first == last and isinstance(first, list)
    assert refused == "the chat template refuses these messages: no tools here"
    assert isinstance(empty, str) and "empty conversation" in empty
    assert ours("byte_level").encode_chats([]) == []


def test_a_template_cannot_reach_outside(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    [fault] = load_tokenizer(saved("byte_level"), template).encode_chats([[{"role": "user", "content": ""}]])
    assert "unsafe" in fault


def test_a_template_file_takes_the_place_of_the_models(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(saved("qwen"), template)
    assert tokenizer.encode_chats([[{"role": "user", "content": "hello"}]]) == tokenizer.encode_batch(["hello"])
    with pytest.raises(UsageError, match="cannot be read"):
        load_tokenizer(saved("qwen"), tmp_path / "none.jinja")
    template.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UsageError, match="not valid Jinja: line 2"):
        load_tokenizer(saved("qwen"), template).encode_chats([[{"role": "user", "content": "hello"}]])


def test_a_model_without_a_template_says_so(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.has_chat_template and ours("qwen").has_chat_template
    [fault] = tokenizer.encode_chats([[{"role": "user", "content": "hi"}]])
    assert isinstance(fault, str)


def test_a_tokenizer_that_is_broken_or_rewrites_its_text_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelRefused, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({"a": 0, ".": 1, "?": 2}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    with pytest.raises(ModelRefused, match="cleans up spaces"):
        load_tokenizer(tmp_path)


def test_a_bpe_tokenizer_that_asks_for_clean_up_is_decoded_as_transformers_does(tmp_path):
    """Llama 3 asks for it in its tokenizer_config.json; transformers does not do it for BPE."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text((saved("byte_level") / name).read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    tokenizer, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    [ids] = tokenizer.encode_batch(["don ' t , stop ."])
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "don ' t , stop ."


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_tokenising_loads_no_torch(declared):
    folder = saved("mistral" if declared == "LlamaTokenizer" else "qwen", "llama", declared)
    code = f"""
import sys
from pathlib import Path
from batchrun.tokenizer import load_tokenizer
assert "transformers" not in sys.modules
tokenizer = load_tokenizer(Path({str(folder)!r}))
[ids] = tokenizer.encode_batch(["hello"])
[chat] = tokenizer.encode_chats([[{{"role": "user", "content": "hi"}}]])
assert tokenizer.decode(ids) == "hello" and isinstance(chat, list)
print("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- incremental decoding


def check_incremental(tokenizer, ids: list[int]) -> None:
    """What was given out stays true, whether the answer ends here or goes on; in the end it is everything."""
    decoder = IncrementalDecoder(tokenizer)
    text = ""
    for n, token_id in enumerate(ids, start=1):
        text += decoder.push(token_id)
        assert tokenizer.decode(ids[:n]).startswith(text)
    assert text + decoder.flush() == tokenizer.decode(ids)


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_text_decoded_as_it_comes_is_the_text(kind, text):
    for ids in ours(kind).encode_batch([text]):
        check_incremental(ours(kind), ids)
        check_incremental(ours(kind), ids[1:])


@given(any_kind, st.text())
@settings(deadline=None, max_examples=5000)
def test_any_text_decoded_as_it_comes_is_the_text(kind, text):
    [ids] = ours(kind).encode_batch([text])
    check_incremental(ours(kind), ids)


@given(any_kind, st.data())
@settings(deadline=None, max_examples=500)
def test_any_token_ids_decoded_as_they_come_are_their_text(kind, data):
    """A model may say anything: broken characters, special tokens in the middle, ids that no token has."""
    tokenizer = ours(kind)
    broken = tokenizer.encode_batch(["日👍é"])[0][1:]
    anything = st.one_of(st.sampled_from(broken), st.integers(0, tokenizer.vocab_size + 3))
    check_incremental(tokenizer, data.draw(st.lists(anything, max_size=40)))


@every_kind
def test_text_is_not_held_back_without_need(kind):
    tokenizer = ours(kind)
    [ids] = tokenizer.encode_batch(["the cat sat on the mat"])
    decoder, text = IncrementalDecoder(tokenizer), ""
    for n, token_id in enumerate(ids, start=1):
        text += decoder.push(token_id)
        assert text == tokenizer.decode(ids[:n])
    assert decoder.flush() == ""


@every_kind
def test_a_broken_character_is_never_given_out(kind):
    tokenizer = ours(kind)
    [ids] = tokenizer.encode_batch(["👩‍👩‍👧‍👦 日本語 مرحبا 👍🏽"])
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in ids] + [decoder.flush()]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(ids)


# --- stop strings


def first_stop(text: str, stop: list[str]) -> str | None:
    """By definition: what stands before the first stop string to be completed, the longest of equals."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - len(max(ending, key=len))]
    return None


@given(st.data())
@settings(deadline=None, max_examples=500)
def test_stop_strings_are_found_however_the_text_is_cut(data):
    letters = st.text("ab ", max_size=12)
    pieces = data.draw(st.lists(st.text("ab ", max_size=5), max_size=8))
    stop = data.draw(st.lists(letters.filter(bool).map(lambda s: s[:4]), min_size=1, max_size=3))
    text = "".join(pieces)
    watch = StopStrings(stop)
    stopped = [watch.feed(piece) for piece in pieces]
    expected = first_stop(text, stop)
    assert watch.stopped == (expected is not None) == (True in stopped)
    assert watch.text == (text if expected is None else expected)
    if expected is not None:
        # It is told at once: the text before that piece has no stop string in it.
        assert first_stop("".join(pieces[: stopped.index(True)]), stop) is None


def test_a_stop_string_is_cut_across_pieces_and_what_follows_is_dropped():
    watch = StopStrings(("\n\n", "END"))
    assert not watch.feed("one E")
    assert not watch.feed("N")
    assert watch.feed("D of it\n\n")
    assert watch.feed("more")
    assert watch.text == "one "


@every_kind
def test_a_stop_string_is_found_in_decoded_tokens(kind):
    tokenizer = ours(kind)
    [ids] = tokenizer.encode_batch(["the cat 日本 sat on 👍 the mat"])
    for stop, expected in (("sat on", "the cat 日本 "), ("👍 t", "the cat 日本 sat on "), ("本", "the cat 日")):
        decoder, watch = IncrementalDecoder(tokenizer), StopStrings((stop,))
        assert any(watch.feed(decoder.push(token_id)) for token_id in ids)
        assert watch.text == expected
