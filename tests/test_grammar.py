"""What a grammar allows is what a brute-force filter leaves: every token that keeps the text a beginning of one of the
language's texts, and no other; an end exactly behind one of its texts."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_requests

from batchrun import grammar as grammar_module
from batchrun.engine.masks import Masks
from batchrun.engine.sampler import Sampler
from batchrun.grammar import GrammarError, Grammars
from batchrun.request import Grammar, Requests, SamplingParams
from batchrun.schedule.step import PastTokens, PrefixReads, Step

LETTERS = ["a", "b", "é", "/"]
# A special token, letters, parts of a character, tokens of several letters, and two that are written alike.
VOCABULARY = [b"", b"a", b"b", b"/", b"\xc3", b"\xa9", "é".encode(), b"ab", b"ba", b"aab", "bé".encode(), b"a", b"b/"]
EOS, ALSO_ENDS = 0, 3

# A language of finitely many texts, and the regular expression that has them.
Language = tuple[str, frozenset[str]]


def _joined(parts: list[Language]) -> Language:
    texts = frozenset("".join(pieces) for pieces in itertools.product(*(texts for _, texts in parts)))
    return "".join(f"({source})" for source, _ in parts), texts


def _either(parts: list[Language]) -> Language:
    return "|".join(f"({source})" for source, _ in parts), frozenset().union(*(texts for _, texts in parts))


def _repeated(part: Language, most: int) -> Language:
    texts = frozenset("".join(pieces) for n in range(most + 1) for pieces in itertools.product(part[1], repeat=n))
    return f"({part[0]}){{0,{most}}}", texts


LETTER = st.sampled_from([(letter, frozenset([letter])) for letter in LETTERS])
LANGUAGES: st.SearchStrategy[Language] = st.recursive(
    LETTER,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(_joined),
        st.lists(inner, min_size=1, max_size=3).map(_either),
        st.builds(_repeated, inner, st.integers(1, 2)),
    ),
    max_leaves=6,
).filter(lambda language: len(language[1]) <= 60)


def by_brute_force(language: frozenset[str], written: bytes) -> tuple[set[int], bool]:
    """The tokens that may follow, and whether the text may end."""
    texts = [text.encode() for text in language]
    allowed = {
        token
        for token, piece in enumerate(VOCABULARY)
        if piece and any(text.startswith(written + piece) for text in texts)
    }
    return allowed, written in texts


def tokens_in(words: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def grammar_of(language: Language, kind: str) -> Grammar:
    source, texts = language
    if kind == "regex":
        return Grammar("regex", source)
    if kind == "choice":
        return Grammar("choice", json.dumps(sorted(texts)))
    alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in sorted(texts))
    return Grammar("grammar", f"{'start:' if kind == 'lark' else 'root ::='} {alternatives}")


@given(language=LANGUAGES, kind=st.sampled_from(["regex", "choice", "lark", "gbnf"]), data=st.data())
@settings(max_examples=150, deadline=None)
def test_allowed_tokens_are_those_of_a_brute_force_filter(language: Language, kind: str, data: st.DataObject) -> None:
    grammars = Grammars(VOCABULARY)
    matcher = grammars.matcher(grammar_of(language, kind))
    written = b""
    while True:
        words, may_end = grammars.allowed([matcher])
        allowed, ends = by_brute_force(language[1], written)
        if not allowed and not ends:
            assert matcher.fault is not None  # the vocabulary leads to no text of the language
            return
        assert matcher.fault is None
        assert (tokens_in(words), may_end.tolist()) == (allowed, [ends])
        if not allowed:
            return
        token = data.draw(st.sampled_from(sorted(allowed)))
        matcher.consume([token])
        written += VOCABULARY[token]


def make_step(past: list[list[int]], rows: list[int], slots: list[int]) -> Step:
    """A step in which some requests, which have sampled `past`, decode; `rows` are their indices."""
    count, nothing = len(rows), np.zeros(0, dtype=np.int32)
    length = np.array([len(past[row]) for row in rows], dtype=np.int32)
    zeros = np.zeros(count, dtype=np.int32)
    return Step(
        index=0,
        sequence=np.array(slots, dtype=np.int32),
        request=np.array(rows, dtype=np.int32),
        start=zeros,
        length=zeros + 1,
        depth=zeros,
        samples=np.ones(count, dtype=bool),
        num_sampled=length,
        token_ids=zeros,
        prefix_reads=PrefixReads(*([nothing] * 6)),
        releases=nothing,
        grant_sequence=nothing,
        grant_page=nothing,
        past=PastTokens(length, np.array([token for row in rows for token in past[row]], dtype=np.int32)),
    )


def requests_with(sampling: list[SamplingParams]) -> Requests:
    requests = make_requests([[1]] * len(sampling), [50] * len(sampling))
    requests.sampling = sampling
    requests.sampling_id = np.arange(len(sampling), dtype=np.int32)
    return requests


@given(
    languages=st.lists(LANGUAGES, min_size=1, max_size=4),
    free=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    min_tokens=st.sampled_from([0, 2]),
    top_k=st.sampled_from([0, 2]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=100, deadline=None)
def test_masked_sampling_is_sampling_of_what_a_brute_force_filter_leaves(
    languages: list[Language], free: bool, temperature: float, min_tokens: int, top_k: int, seed: int
) -> None:
    """Also where matchers are lost on the way, and slots change."""
    options = {"temperature": temperature, "min_tokens": min_tokens, "stop_token_ids": (ALSO_ENDS,), "top_k": top_k}
    grammars = [grammar_of(language, "regex") for language in languages]
    sampling = [SamplingParams(grammar=grammar, **options) for grammar in grammars]
    sampling += [SamplingParams(**options)] * free
    requests = requests_with(sampling)
    random = np.random.default_rng(seed)
    masks = Masks(requests, VOCABULARY, frozenset([EOS]))
    sampler = Sampler(requests, frozenset([EOS]))
    past: list[list[int]] = [[] for _ in sampling]
    alive = list(range(len(sampling)))
    for _ in range(6):
        if random.random() < 0.3:
            masks.close()
            masks = Masks(requests, VOCABULARY, frozenset([EOS]))
        slots = random.permutation(len(alive)).tolist()
        step = make_step(past, alive, slots)
        logits = torch.from_numpy(random.normal(size=(len(alive), len(VOCABULARY))).astype(np.float32))
        filtered = logits.clone()
        for place, row in enumerate(alive):
            if row < len(languages):
                written = b"".join(VOCABULARY[token] for token in past[row])
                allowed, ends = by_brute_force(languages[row][1], written)
                allowed -= {EOS, ALSO_ENDS}
                if ends and (not allowed or len(past[row]) >= min_tokens):
                    allowed |= {EOS, ALSO_ENDS}
                filtered[place, [token for token in range(len(VOCABULARY)) if token not in allowed]] = -np.inf
        finding = masks.begin(step)
        mask = None
        if finding is not None:
            found = finding.result()
            mask = torch.from_numpy(found.rows), torch.from_numpy(found.bits)
        prepared = sampler.prepare(step.request, step.num_sampled, len(VOCABULARY), step.past)
        tensors = {name: torch.from_numpy(array) for name, array in prepared.arrays.items()}
        expected = sampler.sample(filtered, prepared, tensors).token_ids.tolist()
        assert sampler.sample(logits, prepared, tensors, mask=mask).token_ids.tolist() == expected
        for row, token in zip(list(alive), expected, strict=True):
            if token in (-1, EOS, ALSO_ENDS):
                alive.remove(row)
            past[row].append(token)
        if not alive:
            break
    masks.close()


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json", '{"type":"nope"}'), "nope"),
        (Grammar("json", '{"not":{"type":"string"}}'), "not"),
        (Grammar("json", '{"$ref":"#/$defs/missing"}'), "missing"),
        (Grammar("json", '{"type":"integer","minimum":5,"maximum":3}'), "minimum"),
        (Grammar("regex", "(ab"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", "z"), "no token"),
        (Grammar("grammar", "start: nowhere"), "nowhere"),
        (Grammar("grammar", "root ::= nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_compiled_says_why(grammar: Grammar, reason: str) -> None:
    grammars = Grammars(VOCABULARY)
    fault = grammars.fault(grammar)
    assert fault is not None
    assert reason in fault
    assert "\n" not in fault
    with pytest.raises(GrammarError):
        grammars.matcher(grammar)


@pytest.mark.parametrize(("kept", "compiled"), [(2, 2), (1, 6)])
def test_a_grammar_is_compiled_once_as_long_as_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, kept: int, compiled: int
) -> None:
    monkeypatch.setattr(grammar_module, "_KEPT", kept)
    grammars = Grammars(VOCABULARY)
    for _ in range(3):
        for source in ("a+", "b+"):
            assert grammars.fault(Grammar("regex", source)) is None
            grammars.matcher(Grammar("regex", source))
    assert grammars._compile.cache_info().misses == compiled
