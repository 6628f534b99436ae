"""The tokenizer: equal to transformers' own in ids, chat and text; decoding as tokens come; stop strings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import pytest
from factories import make_tokenizer
from hypothesis import given, note, settings
from hypothesis import strategies as st
from packaging.version import Version
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from batchrun.errors import ModelRefused, UsageError
from batchrun.supported import MODEL_TYPES
from batchrun.tokenizer import IncrementalDecoder, PromptEncoder, StopStrings, _section_starts, load_tokenizer
from batchrun.tokenizer import Tokenizer as BatchrunTokenizer

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


def gemma() -> Tokenizer:
    """As Gemma: BPE over whole texts in which spaces are written out, bytes where there is no token for a character."""
    tokenizer = sentencepiece(legacy=False)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
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
    "gemma": gemma,
}


def bert() -> Tokenizer:
    """As BERT: pieces of lower-case words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    add_tokens(tokenizer)
    return tokenizer


def unigram() -> Tokenizer:
    """As T5: the likeliest pieces, each section beginning with a space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    add_tokens(tokenizer)
    return tokenizer


# Tokenizers of other kinds of models.
MORE_KINDS = {"bert": bert, "unigram": unigram}


@cache
def saved(kind: str, model_type: str = "llama", declared: str | None = "PreTrainedTokenizerFast") -> Path:
    """A model directory with the tokenizer of that kind."""
    folder = Path(mkdtemp(dir=ROOT.name))
    (KINDS | MORE_KINDS)[kind]().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    if declared is not None:
        config["tokenizer_class"] = declared
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@cache
def ours(kind: str):
    return load_tokenizer(saved(kind))


def encode_chat(tokenizer, messages) -> list[int]:
    """As intake does."""
    [ids] = PromptEncoder(tokenizer).encode([tokenizer.render_chat(messages)], add_special_tokens=False)
    return ids.tolist()


def is_before(release: str) -> bool:
    """Whether this transformers is older than a release."""
    return Version(version("transformers")) < Version(release)


every_kind = pytest.mark.parametrize("kind", KINDS)
any_kind = st.sampled_from(list(KINDS))


# --- equal to transformers


@every_kind
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    "declared",
    [
        *("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer"),
        *("GemmaTokenizer", None),
    ],
)
def test_the_tokenizer_is_the_one_that_transformers_builds(kind, model_type, declared):
    from transformers import AutoTokenizer

    folder = saved(kind, model_type, declared)
    theirs = AutoTokenizer.from_pretrained(folder)
    if is_before("5.22") and type(theirs).__name__ == "LlamaTokenizer" and kind in ("byte_level", "qwen"):
        pytest.skip("before 5.22 transformers did not look into tokenizer.json for how a LlamaTokenizer splits text")
    tokenizer = load_tokenizer(folder)
    try:
        expected = [theirs(text)["input_ids"] for text in TEXTS]
    except Exception as refusal:  # a class that asks for tokens which this vocabulary has not
        with pytest.raises(Exception, match=re.escape(str(refusal))):
            tokenizer.encode_batch(TEXTS)
        assert declared in ("GemmaTokenizer", None)
        return
    assert tokenizer.encode_batch(TEXTS) == expected
    messages = [{"role": "system", "content": TEXTS[3]}, {"role": "user", "content": TEXTS[5], "name": None}]
    chat = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_chat(tokenizer, tuple(messages)) == chat
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
    chat = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_chat(tokenizer, messages) == chat
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
    ids = encode_chat(tokenizer, [{"role": "user", "content": "hi"}])
    [bos] = tokenizer.encode_batch([""])
    if bos:
        assert ids[: len(bos)] == bos and ids.count(bos[0]) == 1


def test_eos_ids_are_those_of_the_model_and_of_the_tokenizer():
    tokenizer = ours("byte_level")
    [own] = tokenizer.eos_token_ids({})
    assert tokenizer.eos_token_ids({"eos_token_id": None}) == {own}
    assert tokenizer.eos_token_ids({"eos_token_id": 5}) == {own, 5}
    assert tokenizer.eos_token_ids({"eos_token_id": [5, 6, own]}) == {own, 5, 6}


# --- text that is tokenised once


class Spied:
    """A tokenizer that notes what it is asked to encode."""

    def __init__(self, tokenizer: BatchrunTokenizer) -> None:
        self._tokenizer = tokenizer
        self.asked: list[str] = []

    def section_starts(self):
        return self._tokenizer.section_starts()

    def encode_batch(self, texts, *, add_special_tokens):
        self.asked += texts
        return self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)


def wrapped(tokenizer: Tokenizer) -> BatchrunTokenizer:
    from transformers import PreTrainedTokenizerFast

    return BatchrunTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def check_encoder(tokenizer: BatchrunTokenizer, texts: list[str], kept_bytes: int = 1 << 20) -> None:
    """Ids are those of the whole texts, whatever is remembered of the texts before."""
    encoder = PromptEncoder(tokenizer, kept_bytes=kept_bytes, kept_from=0)
    for add_special_tokens in (False, True, False):
        expected = tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        for some in (slice(0, None, 2), slice(None)):
            found = encoder.encode(texts[some], add_special_tokens=add_special_tokens)
            assert [ids.tolist() for ids in found] == expected[some]
            assert all(ids.dtype == np.int32 for ids in found)


@cache
def pieces_of_words() -> dict[str, Any]:
    """Models that know some words and all their letters."""
    letters = sorted({*"".join(CORPUS), *pre_tokenizers.ByteLevel.alphabet(), "▁"})
    trained = {}
    for name, model, trainer in (
        ("BPE", models.BPE(), trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters)),
        (
            "WordPiece",
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"]),
        ),
        ("Unigram", models.Unigram(), trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>")),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer.show_progress = False
        tokenizer.train_from_iterator([*CORPUS, "x a| aa <a |> <|a b|>"] * 3, trainer)
        trained[name] = json.loads(tokenizer.to_str())["model"]
    trained["BPE"]["unk_token"] = None
    vocab = {"?": 0, "the": 1, "cat": 2, "▁the": 3, "▁cat": 4, "a": 5, "Ġcat": 6}
    trained["WordLevel"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "?"}
    return trained


NORMALIZERS = [
    None,
    normalizers.NFC(),
    normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    normalizers.Sequence([normalizers.Strip(), normalizers.Replace("a", "e")]),
    normalizers.BertNormalizer(),
    normalizers.ByteLevel(),
]
PRE_TOKENIZERS = [
    None,
    pre_tokenizers.ByteLevel(add_prefix_space=False),
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.Metaspace(prepend_scheme="always"),
    pre_tokenizers.Metaspace(prepend_scheme="first"),
    pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    pre_tokenizers.Metaspace(prepend_scheme="never"),
    pre_tokenizers.BertPreTokenizer(),
    pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s?\w+|[^\s\w]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    ),
    pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]),
    pre_tokenizers.FixedLength(length=3),
    pre_tokenizers.UnicodeScripts(),
]
POST_PROCESSORS = [
    None,
    processors.ByteLevel(),
    processors.BertProcessing(("</s>", 1), ("<s>", 0)),
    processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    processors.TemplateProcessing(single="<s> <s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]),
    processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])]
    ),
]
# Tokens that overlap, hold one another, are words, or begin and end with spaces or letters.
CONTENTS = [
    "<s>",
    "</s>",
    "<s></s>",
    "<|a|>",
    "<|a|>b",
    "|>",
    "<|",
    "a",
    "aa",
    " <|b|>",
    "<|b|> ",
    "cat",
    "[x]",
    "_",
    "é.",
]
FLAGS = ["normalized", "single_word", "lstrip", "rstrip", "special"]
LUMPS = [
    *CONTENTS,
    " ",
    "  ",
    "\n",
    "the cat",
    "Café",
    "cafe\u0301",
    "日本",
    "<",
    "s>",
    "|",
    "b",
    ".",
    "▁",
    "\u00a0",
    "12",
]
texts_of_lumps = st.lists(st.sampled_from(LUMPS), max_size=12).map("".join)


@given(st.data())
@settings(deadline=None, max_examples=600)
def test_what_is_tokenised_once_has_the_ids_of_the_whole_text(data):
    """Whatever the tokenizer is made of, and whatever flags its added tokens have."""
    config = json.loads(Tokenizer(models.BPE()).to_str())
    model = data.draw(st.sampled_from(sorted(pieces_of_words())))
    tokenizer = Tokenizer.from_str(json.dumps(config | {"model": pieces_of_words()[model]}))
    if (normalizer := data.draw(st.sampled_from(NORMALIZERS))) is not None:
        tokenizer.normalizer = normalizer
    if (pre_tokenizer := data.draw(st.sampled_from(PRE_TOKENIZERS))) is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if (post_processor := data.draw(st.sampled_from(POST_PROCESSORS))) is not None:
        tokenizer.post_processor = post_processor
    flags = st.fixed_dictionaries({}, optional=dict.fromkeys(FLAGS, st.booleans()))
    added = data.draw(st.dictionaries(st.sampled_from(CONTENTS), flags))
    tokenizer.add_tokens(
        [AddedToken(content, **flags) for content, flags in ({"[x]": {"normalized": False}} | added).items()]
    )
    texts = data.draw(st.lists(texts_of_lumps, min_size=1, max_size=5))
    note((model, normalizer, pre_tokenizer, post_processor, added, texts))
    check_encoder(wrapped(tokenizer), texts, data.draw(st.sampled_from([0, 600, 1 << 20])))


@given(st.sampled_from([*KINDS, *MORE_KINDS]), st.lists(st.text() | texts_of_lumps, max_size=4), st.text())
@settings(deadline=None, max_examples=300)
def test_chats_of_every_kind_of_tokenizer_have_the_ids_of_the_whole_text(kind, contents, system):
    tokenizer = ours(kind)
    assert tokenizer.section_starts() is not None
    texts = [
        tokenizer.render_chat([{"role": "system", "content": system}, {"role": "user", "content": content}])
        for content in contents
    ]
    check_encoder(tokenizer, texts)


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_a_system_prompt_is_tokenised_once(kind):
    tokenizer = Spied(ours(kind))
    encoder = PromptEncoder(tokenizer)
    system = {"role": "system", "content": "the cat sat on the mat " * 50}
    for batch in range(2):
        encoder.encode(
            [ours(kind).render_chat([system, {"role": "user", "content": f"question {batch} {i}"}]) for i in range(5)],
            add_special_tokens=False,
        )
    assert sum(system["content"] in text for text in tokenizer.asked) == 1
    assert len(tokenizer.asked) < 10 + 2 * 6  # the questions, and in each batch what the template puts around them


def test_identical_texts_are_tokenised_once():
    for whole in (Tokenizer(models.BPE()), byte_level()):
        tokenizer = Spied(wrapped(whole))
        encoder = PromptEncoder(tokenizer, kept_from=0)
        for _ in range(2):
            encoder.encode(["hello", "the cat", "hello"], add_special_tokens=True)
        assert sorted(tokenizer.asked) == ["hello", "the cat"]


def test_what_is_remembered_is_bounded_and_is_what_was_used_last():
    tokenizer = Spied(ours("byte_level"))
    encoder = PromptEncoder(tokenizer, kept_bytes=10_000, kept_from=0)
    for i in range(200):
        encoder.encode([f"the cat {i}" + " sat" * 20, "hello"], add_special_tokens=False)
        held = sum(sys.getsizeof(text) + ids.nbytes for (_, text), ids in encoder._kept.items())
        assert 0 < held < 10_000
    assert tokenizer.asked.count("hello") == 1
    encoder.encode(["long " * 10_000, "the cat 199" + " sat" * 20], add_special_tokens=False)
    assert tokenizer.asked.count("the cat 199" + " sat" * 20) == 1
    assert not encoder._kept


def test_short_texts_are_known_within_a_call_only():
    tokenizer = Spied(ours("byte_level"))
    encoder = PromptEncoder(tokenizer, kept_from=10)
    for _ in range(2):
        encoder.encode(["a hat", "a hat", "the cat sat"], add_special_tokens=False)
    assert sorted(tokenizer.asked) == ["a hat", "a hat", "the cat sat"]


def test_texts_are_cut_in_front_of_tokens_that_stand_for_themselves():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<strip>", lstrip=True, special=True), AddedToken("word", special=True)])
    starts = wrapped(tokenizer).section_starts()
    assert starts.cut("") == []
    assert starts.cut("a <s><s> b <strip> word </s>") == ["a ", "<s>", "<s> b <strip> word ", "</s>"]
    tokenizer.add_tokens([AddedToken(" </s>", special=True)])
    assert wrapped(tokenizer).section_starts().cut("a </s>b</s>") == ["a </s>b", "</s>"]


def uncut() -> dict[str, Tokenizer]:
    """Tokenizers whose sections cannot be shown to be tokenised by themselves."""

    class Own:
        def pre_tokenize(self, text):
            text.split(lambda i, part: [part] if i else part.split(" ", "isolated"))

    made = {name: byte_level() for name in ("text twice", "special tokens as text", "random", "written in Python")}
    made["no special tokens"] = Tokenizer(models.BPE({"a": 0}, []))
    twice = processors.TemplateProcessing(single="$A $A", special_tokens=[])
    made["text twice"].post_processor = processors.Sequence([twice])
    made["special tokens as text"].encode_special_tokens = True
    made["random"].model.dropout = 0.5
    made["written in Python"].pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Own())
    return made


@pytest.mark.parametrize("why", uncut())
def test_other_tokenizers_get_whole_texts(why):
    assert _section_starts(byte_level()) is not None
    assert _section_starts(uncut()[why]) is None


# --- faults


def test_a_chat_that_the_template_refuses_says_why():
    tokenizer = ours("byte_level")
    with pytest.raises(ValueError, match=r"^the chat template refuses these messages: no tools here$"):
        tokenizer.render_chat([{"role": "tool", "content": "hi"}])
    with pytest.raises(ValueError, match="empty conversation"):
        tokenizer.render_chat([])


def test_a_template_cannot_reach_outside(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="unsafe"):
        load_tokenizer(saved("byte_level"), template).render_chat([{"role": "user", "content": ""}])


def test_a_template_file_takes_the_place_of_the_models(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load_tokenizer(saved("qwen"), template).render_chat([{"role": "user", "content": "hello"}]) == "hello"
    with pytest.raises(UsageError, match="cannot be read"):
        load_tokenizer(saved("qwen"), tmp_path / "none.jinja")
    template.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UsageError, match="not valid Jinja: line 2"):
        load_tokenizer(saved("qwen"), template).render_chat([{"role": "user", "content": "hello"}])


def test_a_model_without_a_template_says_so(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.has_chat_template and ours("qwen").has_chat_template
    with pytest.raises(ValueError, match="refuses"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


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


@pytest.mark.skipif(is_before("5.18"), reason="before 5.18 transformers loaded it for any tokenizer")
@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer"])
def test_tokenising_loads_no_torch(declared):
    folder = saved("mistral" if declared == "LlamaTokenizer" else "qwen", "llama", declared)
    code = f"""
import sys
from pathlib import Path
from batchrun.tokenizer import load_tokenizer
assert "transformers" not in sys.modules
tokenizer = load_tokenizer(Path({str(folder)!r}))
[ids] = tokenizer.encode_batch(["hello"])
assert tokenizer.decode(ids) == "hello" and "hi" in tokenizer.render_chat([{{"role": "user", "content": "hi"}}])
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


def test_of_several_chat_templates_all_are_known(tmp_path):
    """As Hermes 3 has them: how calls are written stands in the one for tools alone."""
    make_tokenizer(tmp_path, chat_template=None)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    texts = {"default": "{{ messages[0].content }}", "tool_use": "<tool_call>{{ tools }}{{ messages[0].content }}"}
    settings["chat_template"] = [{"name": name, "template": text} for name, text in texts.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "\n".join(texts.values())
    assert (tokenizer.template_for(tools=False), tokenizer.template_for(tools=True)) == tuple(texts.values())
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    assert load_tokenizer(tmp_path, template).template_for(tools=True) == "{{ messages }}"


def test_words_that_are_forbidden_are_so_at_the_beginning_and_behind_a_space():
    tokenizer = ours("byte_level")
    assert tokenizer.encode_words([" one"]) == tokenizer.encode_words(["one"])
    assert len(tokenizer.encode_words([" one"])) == 2


def test_a_vocabulary_without_letters_has_texts_all_the_same():
    """As one that is made for token ids alone."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<0>": 0, "<1>": 1}))
    tokenizer = BatchrunTokenizer(PreTrainedTokenizerFast(tokenizer_object=made))
    assert tokenizer.decode([1, 0]) == tokenizer.decode([1, 0], continues=True) == "<1> <0>"
    assert tokenizer.token(1).text == "<1>"
