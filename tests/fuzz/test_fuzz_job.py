"""Whatever the bytes of one line of a job, its neighbours come out as they are without it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from fuzz.cases import edited, parts, repeatable
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import UsageError
from batchrun.formats.job import lint_job, open_job, read_job
from batchrun.request import Endpoint, JobLine, LineFault, LineOptions

PACK = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}

CHAT = {
    "custom_id": "m",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "x", "messages": [{"role": "user", "content": [{"type": "text", "text": "grüße"}]}], "seed": 1},
}
TOKENS = {"id": 3, "prompt": [[1, 2], [3]], "top_k": 5, "stop": ["a"], "batchrun": {"expected_tokens": 4}}
LINES = [
    json.dumps(line, ensure_ascii=ascii).encode() for line in (CHAT, TOKENS, {"prompt": "a"}) for ascii in (False, True)
]

# Good lines, and what they are wherever they stand.
NEIGHBOURS = [
    (
        b'{"custom_id": "the neighbour before", "prompt": "a", "temperature": 0.5, "model": "n"}',
        JobLine(
            0, "the neighbour before", Endpoint.COMPLETIONS, LineOptions(temperature=0.5), prompts=("a",), model="n"
        ),
    ),
    (
        b'{"id": "the neighbour behind", "messages": [{"role": "user", "content": "b"}], "mood": 1}',
        JobLine(
            0,
            "the neighbour behind",
            Endpoint.CHAT,
            LineOptions(),
            messages=({"role": "user", "content": "b"},),
            unknown_fields=("mood",),
        ),
    ),
    (b'{"prompt": [1, 2]}', JobLine(0, "", Endpoint.COMPLETIONS, LineOptions(), prompts=((1, 2),))),
]


def standing_at(number: int, line: JobLine) -> JobLine:
    return replace(line, number=number, custom_id=line.custom_id or f"line-{number}")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(b"\xef\xbb\xbf").strip()


@parts(slow=6)
def test_neighbours_of_a_mutated_line_are_as_without_it(tmp_path, part):
    @repeatable(part, 2500)
    @given(
        st.sampled_from(LINES).flatmap(edited) | st.binary(max_size=80),
        st.lists(st.sampled_from(NEIGHBOURS), max_size=3, unique_by=lambda neighbour: neighbour[0]),
        st.integers(0, 3),
        st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
        st.booleans(),
        st.sampled_from(sorted(PACK)),
    )
    def law(mutated, neighbours, before, end, last_end, suffix):
        before = min(before, len(neighbours))
        lines = [line for line, _ in neighbours]
        lines.insert(before, mutated)
        data = end.join(lines) + (end if last_end else b"")
        source = open_job(write(tmp_path / f"job{suffix}", PACK[suffix](data)))
        items = list(read_job(source))

        physical = data.split(b"\n")
        assert [item.number for item in items] == [i for i, line in enumerate(physical, 1) if not is_blank(line)]
        ends = end.count(b"\n")
        after = len(neighbours) - before
        above = [standing_at(1 + ends * i, good) for i, (_, good) in enumerate(neighbours[:before])]
        last = len(physical) - (ends if last_end else 0)
        below = [standing_at(last - ends * (after - 1 - i), good) for i, (_, good) in enumerate(neighbours[before:])]
        assert items[:before] == above
        assert items[len(items) - after :] == below

        for item in items:
            if isinstance(item, LineFault):
                assert item.message.isprintable() and len(item.message) < 400
            else:
                assert (item.messages is None) is not (item.prompts is None)
        lint = lint_job(open_job(source.path))
        sound = [item for item in items if isinstance(item, JobLine)]
        assert (lint.total, lint.sound) == (len(items), len(sound))
        assert lint.faults == [item for item in items if isinstance(item, LineFault)]
        assert lint.models == Counter(item.model for item in sound if item.model is not None)
        assert lint.unknown_fields == Counter(name for item in sound for name in item.unknown_fields)
        assert lint.fingerprint == source.fingerprint()
        assert list(read_job(source)) == items, "a second pass gives the same"

    law()


@parts(slow=2)
def test_a_damaged_file_is_read_or_refused(tmp_path, part):
    """Bytes of the packed file are wrong. What is read before the damage is found are lines with their numbers."""
    good = b"\n".join(line for line, _ in NEIGHBOURS) * 40
    packed = {suffix: pack(good) for suffix, pack in PACK.items()}

    @repeatable(part, 2500)
    @given(st.sampled_from(sorted(PACK)).flatmap(lambda suffix: st.tuples(st.just(suffix), edited(packed[suffix]))))
    def law(case):
        suffix, data = case
        source = open_job(write(tmp_path / f"job{suffix}", data))
        read = 0
        try:
            for _ in source.lines():
                read += 1
            assert lint_job(source).total <= read
        except UsageError as error:
            assert f"after {read} lines" in error.message
            assert suffix != ".jsonl"

    law()


# --- all that is met in the wild ---

WILD = {
    "invalid UTF-8": b'{"prompt": "caf\xe9"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "lone high surrogate": rb'{"prompt": "\ud800"}',
    "lone low surrogate": rb'{"prompt": "\udc00"}',
    "two BOMs": b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "a"}',
    "BOM inside": b'{"prompt":\xef\xbb\xbf "a"}',
    "UTF-16 BOM": b'\xff\xfe{"prompt": "a"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "nesting bomb": b"[" * 1_000_000,
    "nesting bomb in a field": b'{"prompt": "a", "metadata": ' + b'{"a":' * 100_000 + b"}" * 100_001,
    "NULs": b"\x00" * 4096,
    "two objects with a lone CR between them": b'{"prompt": "a"}\r{"prompt": "b"}',
    "cut short": b'{"prompt": "a',
}
SOUND = {
    "BOM": b'\xef\xbb\xbf{"prompt": "a"}',
    "surrogate pair": rb'{"prompt": "\ud83d\ude00"}',
    "escaped NUL": rb'{"prompt": "\u0000"}',
    "line separators of Unicode": '{"prompt": "a\u2028\u2029\x85"}'.encode(),
    "a lone CR as white space": b'{"prompt":\r"a"\r}',
    "a key that is there twice": b'{"prompt": 1, "prompt": "a"}',
}
BLANK = {"empty": b"", "spaces": b" \t ", "form feed": b"\x0c", "only a BOM": b"\xef\xbb\xbf", "a lone CR": b"\r"}


@pytest.mark.parametrize("suffix", sorted(PACK))
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last_end", [True, False])
def test_all_that_is_met_in_the_wild_in_one_file_harms_no_line_beside_it(tmp_path, suffix, end, last_end):
    lines, wanted = [], []
    for name, line in (WILD | SOUND | BLANK).items():
        lines += [line, b'{"id": "behind %s", "prompt": "x"}' % name.encode()]
        if name not in BLANK:
            wanted.append((len(lines) - 1, f"line-{len(lines) - 1}", name in SOUND))
        wanted.append((len(lines), f"behind {name}", True))
    data = end.join(lines) + (end if last_end else b"")
    items = list(read_job(open_job(write(tmp_path / f"job{suffix}", PACK[suffix](data)))))
    assert [(item.number, item.custom_id, isinstance(item, JobLine)) for item in items] == wanted
    assert {item.code for item in items if isinstance(item, LineFault)} == {"invalid_json_line"}


def test_a_whole_file_in_utf_16_is_faults_with_their_lines(tmp_path):
    data = "\n".join(['{"prompt": "a"}'] * 5).encode("utf-16")
    items = list(read_job(open_job(write(tmp_path / "job.jsonl", data))))
    assert [(item.number, type(item)) for item in items] == [(number, LineFault) for number in range(1, 6)]


def test_old_mac_line_ends_are_one_fault(tmp_path):
    [item] = read_job(open_job(write(tmp_path / "job.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}\r')))
    assert isinstance(item, LineFault)
    assert (item.number, item.code) == (1, "invalid_json_line")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(
    "big", [b" " * 50_000_000, b"\0" * 50_000_000, b"[" * 50_000_000], ids=["blank", "NULs", "bomb"]
)
def test_a_line_of_50_mb_between_two_others(tmp_path, suffix, big):
    pack = {".jsonl.gz": lambda data: gzip.compress(data, 1), ".jsonl.zst": zstandard.compress}[suffix]
    data = b'{"id": "a", "prompt": "x"}\n' + big + b'\n{"id": "b", "prompt": "x"}'
    items = list(read_job(open_job(write(tmp_path / f"job{suffix}", pack(data)))))
    faults = [] if big.isspace() else [(2, "line-2", LineFault)]
    found = [(item.number, item.custom_id, type(item)) for item in items]
    assert found == [(1, "a", JobLine), *faults, (3, "b", JobLine)]


@pytest.mark.parametrize("field", ["min_tokens", "top_k", "stop_token_ids"])
def test_a_number_that_no_column_holds_is_the_fault_of_its_line(tmp_path, field):
    """They are int32 and int64: such a number would end the whole run, and each start after it."""
    for value, sound in ((2**31 - 1, True), (2**31, False), (2**64 - 1, False)):
        line = {"prompt": "a", field: [value] if field == "stop_token_ids" else value}
        [item] = read_job(open_job(write(tmp_path / "job.jsonl", json.dumps(line).encode())))
        assert isinstance(item, JobLine) is sound
        if isinstance(item, LineFault):
            assert (item.code, (item.param or "").partition("[")[0]) == ("invalid_request", field)
