"""What the doctor says of a job is so: each fault is found with the right numbers, and no saving is claimed that the
forest of the rewritten prompts does not have."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from factories import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_requests

from batchrun.prefix import doctor
from batchrun.prefix.doctor import Diagnosis, diagnose
from batchrun.prefix.forest import build_forest
from batchrun.tokenizer import Tokenizer, load_tokenizer

NEWLINE = 0


def decode(ids: Sequence[int]) -> str:
    """Every token is a word; the token 0 ends a line."""
    return "".join("\n" if token == NEWLINE else f"w{token} " for token in ids)


def examined(prompts: list[list[int]], decode=decode) -> Diagnosis:
    requests = make_requests(prompts, [1] * len(prompts))
    return diagnose(requests, build_forest(requests.tokens), decode)


def trie_tokens(prompts: list[list[int]]) -> int:
    """Tokens of the forest, counted one by one."""
    return len({tuple(prompt[:stop]) for prompt in prompts for stop in range(1, len(prompt) + 1)})


_next_word = itertools.count(100)


def words(count: int) -> list[int]:
    """Words that are nowhere else."""
    return list(itertools.islice(_next_word, count))


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


# --- numbers, on prompts of token ids


@pytest.mark.parametrize("field_tokens", [1, 3, 40])
@pytest.mark.parametrize("head_tokens", [0, 1, 90])
def test_a_field_in_front_is_found_and_its_saving_is_that_of_the_moved_field(field_tokens, head_tokens):
    head, body = words(head_tokens), words(200)
    parts = [(words(field_tokens), words(5)) for _ in range(50)]
    prompts = [[*head, *field, *body, *question] for field, question in parts]
    [found] = examined(prompts).findings
    moved = [[*head, *body, *field, *question] for field, question in parts]
    assert found.spared_tokens == trie_tokens(prompts) - trie_tokens(moved) == 49 * 200
    assert found.saving == found.spared_tokens / sum(map(len, prompts))
    assert (found.requests, found.shared_tokens, found.alike_tokens) == (50, head_tokens, 200)
    assert found.lines[0] != found.lines[1]
    fields = [decode(field).split() for field, _ in parts]
    assert {tuple(text.split()[-field_tokens:]) for text in found.texts} <= set(map(tuple, fields))


def test_fields_of_different_lengths_and_none_at_all():
    body = words(100)
    fields = [words(count) for count in (0, 1, 2, 7, 30, 64)]
    prompts = [[*field, *body, *words(3)] for field in fields for _ in range(4)]
    [found] = examined(prompts).findings
    assert found.requests == 24
    assert found.alike_tokens == 100
    assert found.spared_tokens == 5 * 100


def test_a_difference_that_is_too_long_is_no_field():
    body = words(200)
    assert examined([[*words(70), *body] for _ in range(20)]).findings == ()


def test_the_same_documents_behind_ids():
    """Nothing of the texts after the ids is common to all; each document stands behind some of them."""
    documents = [words(150) for _ in range(12)]
    prompts = [[5, *words(3), 6, *documents[i % 12], *words(4)] for i in range(96)]
    [found] = examined(prompts).findings
    assert found.requests == 96
    assert found.alike_tokens == 151
    # The token before the documents is shared by all of them.
    assert found.spared_tokens == (96 - 12) * 150 + 95


def test_two_faults_in_two_parts_of_a_job_are_two_findings():
    kinds = [(words(30), words(100)), (words(50), words(150))]
    prompts = [[*head, *words(2), *body, *words(2)] for head, body in kinds for _ in range(20)]
    more, less = examined(prompts).findings
    assert (more.shared_tokens, more.alike_tokens, more.spared_tokens) == (50, 150, 19 * 150)
    assert (less.shared_tokens, less.alike_tokens, less.spared_tokens) == (30, 100, 19 * 100)


def test_one_fault_is_one_finding_however_many_branches_it_makes():
    """The digits of a date branch on several levels."""
    body = words(200)
    parts = [(list(divmod(day, 10)), words(3)) for day in range(10, 40) for _ in range(3)]
    prompts = [[1, 2, *day, *body, *question] for day, question in parts]
    [found] = examined(prompts).findings
    assert (found.requests, found.shared_tokens) == (90, 2)
    moved = [[1, 2, *body, *day, *question] for day, question in parts]
    assert found.spared_tokens == trie_tokens(prompts) - trie_tokens(moved)


@pytest.mark.parametrize("last_ends_another_way", [False, True])
def test_the_same_lines_in_another_order(last_ends_another_way, rng):
    """Few-shot examples, shuffled: one order for all saves what a set of prompts in that order has in common."""
    head = [*words(20), NEWLINE]
    lines = [words(12) for _ in range(8)]
    prompts, sorted_prompts = [], []
    for _ in range(40):
        question = [NEWLINE, *words(6)] if last_ends_another_way else words(6)
        shuffled = rng.sample(lines, len(lines))
        for order, made in ((shuffled, prompts), (lines, sorted_prompts)):
            made.append([*head, *(token for line in order for token in [*line, NEWLINE]), *question])
    [found] = examined(prompts).findings
    assert found.cause == "order"
    assert (found.requests, found.shared_tokens, found.alike_tokens) == (40, 21, 8 * 13 + last_ends_another_way)
    assert found.spared_tokens == trie_tokens(prompts) - trie_tokens(sorted_prompts)
    assert set(found.texts) <= {decode(line).strip() for line in lines}


def test_lines_that_begin_alike_are_compared_from_their_beginning(rng):
    """The prompts part within a line, whose first words all lines have."""
    lines = [[7, 8, *words(10)] for _ in range(6)]
    prompts = [
        [1, 2, NEWLINE, *(token for line in rng.sample(lines, 6) for token in [*line, NEWLINE]), *words(5)]
        for _ in range(30)
    ]
    [found] = examined(prompts).findings
    assert (found.cause, found.requests, found.shared_tokens) == ("order", 30, 3)


@pytest.mark.parametrize("made", ["shared", "unrelated", "identical", "one", "short"])
def test_a_job_without_such_a_fault_is_told_so(made):
    head = words(100)
    prompts = {
        "shared": [[*head, *words(40)] for _ in range(30)],
        "unrelated": [words(100) for _ in range(30)],
        "identical": [head] * 30,
        "one": [head],
        "short": [[token] for token in range(1, 30)],
    }[made]
    assert examined(prompts).findings == ()


def test_what_is_not_worth_it_is_not_mentioned(monkeypatch):
    head, body = words(400), words(20)
    prompts = [[*head, *words(200), field, *body] for field in range(1, 4) for _ in range(10)]
    prompts += [[*head, field, *body, *words(200)] for field in range(1, 4) for _ in range(10)]
    assert examined(prompts).findings == ()  # 40 tokens of some 37,000
    monkeypatch.setattr(doctor, "_WORTH", 0.001)
    assert [found.spared_tokens for found in examined(prompts).findings] == [40]


# --- causes, on text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder)


SYSTEM = "The quick brown fox answers questions about the table of apples and pears. Where it is not there, say so.\n"


def with_field(field: str, index: int) -> str:
    return f"{field}{SYSTEM}Question {index * 7919 % 1000}: where is it?"


def random_uuid(index: int) -> str:
    return str(uuid.UUID(int=random.Random(index).getrandbits(128)))


CAUSES = {
    "date": (lambda i: f"Today is 2026-11-{1 + i % 28:02}. ", "2026-11-"),
    "time": (lambda i: f"It is {i % 24:02}:{i * 7 % 60:02} now. ", ":"),
    "uuid": (lambda i: f"<{random_uuid(i)}> ", "-"),
    "email": (lambda i: f"For user{i}@example.org: ", "@example.org"),
    "number": (lambda i: f"Number {i}: ", ""),
    "id": (lambda i: f"Request q-{i:04}x. ", "q-"),
    "name": (lambda i: f"Dear {'ABCDEFGHIJ'[i % 10]}{['nora', 'ella', 'itus'][i % 3]}, ", ""),
    "text": (lambda i: f"Be {['quick', 'very kind', 'so', 'brief and plain'][i % 4]} in {'xyz'[i % 3]} ways. ", ""),
    "white space": (lambda i: " " * (i % 3) + "\n" * (i % 2), ""),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_causes_have_names(cause, tokenizer):
    make, inside = CAUSES[cause]
    texts = [with_field(make(index), index) for index in range(40)]
    prompts = tokenizer.encode_batch(texts)
    [found] = examined(prompts, tokenizer.decode).findings
    assert found.cause == cause
    assert found.requests == 40
    different = len({make(index) for index in range(40)})
    system = len(tokenizer.encode_batch([SYSTEM])[0])
    assert found.spared_tokens > 0.9 * (different - 1) * system
    for text, line in zip(found.texts, found.lines, strict=True):
        assert inside in text
        assert text.strip() in texts[int(line[1:])]
    assert found.texts[0] != found.texts[1]


def test_prompts_that_differ_in_tokens_without_text():
    """Special tokens leave nothing to show."""
    body = words(100)
    prompts = [[special, *body, *words(3)] for special in (1, 2, 3) for _ in range(3)]
    [found] = examined(prompts, lambda ids: decode([token for token in ids if token > 3])).findings
    assert found.cause == "text"
    assert found.texts[0] == found.texts[1]


# --- what holds for every job

ANCHORS = ((2, 0.5), *doctor._ANCHORS)


@st.composite
def jobs(draw: st.DrawFn) -> list[list[int]]:
    """Prompts made of a few heads, fields, bodies, shuffled lines and endings, each of which may be empty."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    vocabulary = draw(st.sampled_from([2, 12, 1000]))

    def some(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    heads = [some(rng.randrange(6)) for _ in range(draw(st.integers(1, 3)))]
    bodies = [some(rng.randrange(80)) for _ in range(draw(st.integers(1, 3)))]
    lines = [[*some(rng.randrange(1, 7)), NEWLINE] for _ in range(draw(st.integers(1, 5)))]
    prompts = []
    for _ in range(draw(st.integers(1, 30))):
        shuffled = [token for line in rng.sample(lines, rng.randrange(len(lines) + 1)) for token in line]
        prompts.append(
            [*rng.choice(heads), *some(rng.randrange(5)), *shuffled, *rng.choice(bodies), *some(rng.randrange(4)), 1]
        )
    return prompts


def rewritten_jobs(prompts: list[list[int]]) -> list[tuple[int, list[list[int]]]]:
    """Every way to mend something below any branch point: what is said to be spared, and all prompts after it."""
    requests = make_requests(prompts, [1] * len(prompts))
    tokens, forest = requests.tokens, build_forest(requests.tokens)
    line_ends = doctor._line_ends(tokens.ids, decode)
    found = []
    for node in [-1, *range(len(forest))]:
        for branch, mend in (
            *((doctor._branch(forest, node), doctor._field_mend(*anchor)) for anchor in ANCHORS),
            (doctor._line_start(tokens, forest, node, line_ends), doctor._line_mend(line_ends)),
        ):
            spared, members, mended = doctor._mend(tokens, forest, branch, mend, 1000)
            if mended is not None:
                after = [list(prompt) for prompt in prompts]
                for place, request in enumerate(members.tolist()):
                    after[request][branch.depth :] = mended.tails[place].tolist()
                found.append((spared, after))
    return found


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_mending_moves_tokens_and_spares_what_the_forest_of_the_whole_job_says(prompts):
    before = trie_tokens(prompts)
    for spared, after in rewritten_jobs(prompts):
        assert [sorted(prompt) for prompt in after] == [sorted(prompt) for prompt in prompts]
        assert spared == before - trie_tokens(after)


@settings(max_examples=100, deadline=None)
@given(jobs(), st.sampled_from([3, 10, 1 << 14]))
def test_no_job_makes_it_fail_and_no_saving_is_more_than_there_is(prompts, looked_at):
    """Also where branch points are chosen on a part of the job."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_EXAMINED", "_COMPARED", "_PROBED", "_SHOWN"):
            patch.setattr(doctor, name, looked_at)
        patch.setattr(doctor, "_ANCHORS", ANCHORS)
        patch.setattr(doctor, "_WORTH", 0.0)
        diagnosis = examined(prompts)
    shared = trie_tokens(prompts)
    least = len({token for prompt in prompts for token in prompt[:1]})
    assert sum(found.spared_tokens for found in diagnosis.findings) <= shared - least
    ways = {spared for spared, _ in rewritten_jobs(prompts)}
    for found in diagnosis.findings:
        assert found.spared_tokens in ways or looked_at < len(prompts)
        assert found.spared_tokens > 0
        assert 0 < found.saving < 1
        assert 1 < found.requests <= len(prompts)
    spared = [found.spared_tokens for found in diagnosis.findings]
    assert spared == sorted(spared, reverse=True)
    assert diagnosis.examined == min(len(prompts), looked_at)


def test_a_part_of_a_large_job_is_enough_and_numbers_are_of_the_whole(monkeypatch):
    head, body = words(20), words(100)
    prompts = [[*head, *words(3), *body, *words(5)] for _ in range(600)]
    whole = examined(prompts)
    for name, size in (("_EXAMINED", 50), ("_BLOCK", 7), ("_COMPARED_AGAIN", 200)):
        monkeypatch.setattr(doctor, name, size)
    part = examined(prompts)
    assert part.findings[0].spared_tokens == whole.findings[0].spared_tokens == 599 * 100
    assert part.findings[0].requests == 600
    assert (part.examined, whole.examined) == (50, 600)


def test_faults_within_each_other_are_not_counted_twice():
    def fault(first: int, requests: int, spared: int, depth: int = 1) -> doctor._Fault:
        return doctor._Fault(doctor._Branch(first, requests, depth, 0), SimpleNamespace(), spared)

    whole, left, right, inner = fault(0, 10, 70), fault(0, 5, 40), fault(5, 5, 30), fault(6, 2, 31)
    assert doctor._disjoint([whole, left]) == [whole]
    assert doctor._disjoint([left, right]) == [left, right]
    assert doctor._disjoint([whole, left, right]) == [whole]  # of equal worth, the one that is one
    assert doctor._disjoint([whole, left, right, inner]) == [left, inner]
    same = fault(0, 10, 71, depth=3)
    assert doctor._disjoint([whole, same]) == doctor._disjoint([same, whole]) == [same]
