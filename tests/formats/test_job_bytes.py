"""Job files as bytes: compression, damage, line ends, sizes; and whatever bytes come, one item a line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import OutputError, UsageError
from batchrun.formats import job
from batchrun.formats.job import lint_job, open_job, read_job, spool_stdin
from batchrun.request import JobLine, LineFault

LINES = [json.dumps({"id": f"r{i}", "prompt": f"Question {i}? " + "why " * (i % 50)}).encode() for i in range(5000)]
RAW = b"\n".join(LINES) + b"\n"


def zstd_in_frames(raw: bytes) -> bytes:
    """Two frames with a skippable one between them, as parallel compressors and `cat` make."""
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"skip!"
    half = len(raw) // 2
    return zstandard.compress(raw[:half]) + skippable + zstandard.compress(raw[half:])


PACKED = {
    "jobs.jsonl": RAW,
    "jobs.jsonl.gz": gzip.compress(RAW),
    "two members.jsonl.gz": gzip.compress(RAW[:1000]) + gzip.compress(RAW[1000:]),
    "jobs.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(RAW),
    "frames.jsonl.zst": zstd_in_frames(RAW),
}


def write(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", PACKED)
def test_compressed_and_plain_are_one_job(tmp_path, name):
    source = open_job(write(tmp_path, name, PACKED[name]))
    assert list(source.lines()) == list(enumerate(LINES, 1))
    assert list(source.lines()) == list(enumerate(LINES, 1)), "a second pass gives the same"
    assert source.fingerprint() == hashlib.sha256(RAW).hexdigest()


@pytest.mark.parametrize("name", PACKED)
def test_file_cut_short_is_an_error_unless_plain(tmp_path, name):
    data = PACKED[name]
    source = open_job(write(tmp_path, name, data[: len(data) * 3 // 4]))
    if name == "jobs.jsonl":
        assert isinstance(list(read_job(source))[-1], LineFault)
    else:
        with pytest.raises(UsageError, match=r"after \d+ lines"):
            lint_job(source)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage(tmp_path, suffix):
    data = bytearray(PACKED[f"jobs.jsonl{suffix}"])
    data[len(data) // 2] ^= 0xFF
    for bad in (bytes(data), RAW, b"\x1f"):
        with pytest.raises(UsageError, match=r"after \d+ lines"):
            open_job(write(tmp_path, f"bad.jsonl{suffix}", bad)).fingerprint()


def test_damage_in_the_middle_says_how_far_it_came(tmp_path):
    many = b"\n".join(os.urandom(500).hex().encode() for _ in range(8000))
    data = gzip.compress(many)
    read = 0
    with pytest.raises(UsageError) as caught:
        for _ in open_job(write(tmp_path, "bad.jsonl.gz", data[:-2000])).lines():
            read += 1
    assert f"after {read} lines" in caught.value.message
    assert 0 < read < 8000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_empty_file_is_a_job_without_lines(tmp_path, name):
    lint = lint_job(open_job(write(tmp_path, name, b"")))
    assert (lint.total, lint.fingerprint) == (0, hashlib.sha256(b"").hexdigest())


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("jobs.jsonl", "jobs.run"),
        ("jobs.jsonl.gz", "jobs.run"),
        ("jobs.jsonl.zst", "jobs.run"),
        ("v1.2.jsonl", "v1.2.run"),
        ("jobs", "jobs.run"),
    ],
)
def test_default_out_lies_beside_the_job(tmp_path, name, out):
    assert open_job(write(tmp_path, name, b"")).default_out() == tmp_path / out


def test_paths_that_are_no_job_file(tmp_path):
    with pytest.raises(UsageError, match="no job file"):
        open_job(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="is a directory"):
        open_job(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a regular file"):
        open_job(tmp_path / "fifo")
    write(tmp_path, "file", b"")
    with pytest.raises(UsageError, match="cannot be read"):
        open_job(tmp_path / "file" / "jobs.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path, "jobs.jsonl", RAW)
    path.chmod(0)
    with pytest.raises(UsageError, match="cannot be read"):
        open_job(path)


def test_fingerprint_needs_no_pass_after_a_full_read(tmp_path):
    path = write(tmp_path, "jobs.jsonl", RAW)
    source = open_job(path)
    lint = lint_job(source)
    path.unlink()
    assert source.fingerprint() == lint.fingerprint == hashlib.sha256(RAW).hexdigest()


def test_fingerprint_after_a_partial_read_is_of_the_whole_file(tmp_path):
    source = open_job(write(tmp_path, "jobs.jsonl", RAW))
    next(source.lines())
    assert source.fingerprint() == hashlib.sha256(RAW).hexdigest()


def fingerprint(tmp_path: Path, *lines: str) -> str:
    return open_job(write(tmp_path, "jobs.jsonl", "\n".join(lines).encode())).fingerprint()


def test_hints_are_not_part_of_the_fingerprint(tmp_path):
    """A hint put in, changed or taken out between two starts leaves the run resumable."""
    body = '"prompt": "why, oh why?", "max_tokens": 5'
    bare = f'{{"custom_id": "a", "url": "/v1/completions", "body": {{{body}}}}}'
    hints = [
        '"batchrun": {"expected_tokens": 5}',
        '"batchrun":{"expected_tokens":1234}',
        '"batchrun" :\t{ "expected_tokens" : 6 }',
    ]
    for hint in hints:
        hinted = [
            bare[:-1] + f", {hint}}}",
            bare[:-1] + f",{hint}}}",
            f"{{{hint}, {bare[1:]}",
            bare.replace('"url"', f'{hint}, "url"'),
            bare.replace(body, f"{body}, {hint}"),
            bare.replace(body, f"{hint}, {body}"),
        ]
        for line in hinted:
            assert json.loads(line)
            assert fingerprint(tmp_path, bare, line, bare) == fingerprint(tmp_path, bare, bare, bare)
    assert fingerprint(tmp_path, "{" + hints[0] + "}") == fingerprint(tmp_path, "{}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Not sound: the line may be a fault with one and run with the other.
        ('{"prompt": "a", "batchrun": {"expected_tokens": 5}}', '{"prompt": "a", "batchrun": {"expected_tokens": 0}}'),
        (
            '{"prompt": "a", "batchrun": {"expected_tokens": 5}}',
            '{"prompt": "a", "batchrun": {"expected_tokens": 5.5}}',
        ),
        ('{"prompt": "a", "batchrun": {"expected_tokens": 5}}', '{"prompt": "a", "batchrun": 5}'),
        ('{"prompt": "a", "batchrun": {"expected_tokens": 5}}', '{"prompt": "a" "batchrun": {"expected_tokens": 5}}'),
        ('{"prompt": "a", "batchrun": {"expected_tokens": 5}}', '{"prompt": "a", "batchrun": {"expected_tokens": 5}'),
        ('{"prompt": "a", "batchrun": {"expected_tokens": 5}}', '{"prompt": "b", "batchrun": {"expected_tokens": 5}}'),
        # What looks like a hint is a prompt's text.
        (
            json.dumps({"prompt": 'a, "batchrun": {"expected_tokens": 5}}'}),
            json.dumps({"prompt": 'a, "batchrun": {"expected_tokens": 6}}'}),
        ),
    ],
)
def test_everything_else_is_part_of_the_fingerprint(tmp_path, one, other):
    assert fingerprint(tmp_path, one) != fingerprint(tmp_path, other)


def test_a_hint_that_changes_between_two_passes_does_no_harm(tmp_path):
    line = b'{"prompt": "a", "batchrun": {"expected_tokens": %d}}\n'
    source = open_job(write(tmp_path, "jobs.jsonl", line % 5))
    lint_job(source)
    write(tmp_path, "jobs.jsonl", line % 700)
    (item,) = read_job(source)
    assert isinstance(item, JobLine)
    assert item.options.expected_tokens == 700


def test_file_that_changes_between_two_passes_is_refused(tmp_path):
    path = write(tmp_path, "jobs.jsonl", RAW)
    source = open_job(path)
    lint_job(source)
    path.write_bytes(RAW + b"{}\n")
    with pytest.raises(UsageError, match="changed"):
        list(source.lines())


def test_standard_input_is_spooled_whole(tmp_path):
    source = spool_stdin(tmp_path / "stdin.jsonl", io.BytesIO(RAW))
    assert source.path.read_bytes() == RAW
    assert [p.name for p in tmp_path.iterdir()] == ["stdin.jsonl"]
    assert lint_job(source).sound == len(LINES)
    with pytest.raises(OutputError):
        spool_stdin(tmp_path / "missing" / "stdin.jsonl", io.BytesIO(RAW))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n\r\n \t\n"])
def test_line_ends_bom_and_blank_lines(tmp_path, start, end, last):
    data = start + LINES[0] + end + end + LINES[1] + (end if last else b"")
    items = list(read_job(open_job(write(tmp_path, "jobs.jsonl", data))))
    blanks = start.count(b"\n")
    assert [(x.number, x.custom_id) for x in items] == [(1 + blanks, "r0"), (3 + blanks, "r1")]
    assert all(isinstance(x, JobLine) for x in items)


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    prompt = "a\u2028b\u2029c\x85d\x0be"
    data = json.dumps({"prompt": prompt}, ensure_ascii=False).replace("\x0b", "\\u000b").encode()
    (item,) = read_job(open_job(write(tmp_path, "jobs.jsonl", data)))
    assert isinstance(item, JobLine)
    assert item.prompts == (prompt,)


def test_line_of_50_mb_sound_or_not(tmp_path):
    big = b'{"id": "big", "prompt": "' + b"x" * 50_000_000 + b'"}'
    data = b"\n".join([LINES[0], big, big[:-2], LINES[1]])
    items = list(read_job(open_job(write(tmp_path, "jobs.jsonl", data))))
    assert [x.number for x in items] == [1, 2, 3, 4]
    assert [type(x) for x in items] == [JobLine, JobLine, LineFault, JobLine]


def test_line_without_end_is_cut_and_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "MAX_LINE_BYTES", 1 << 20)
    data = b"\n".join([LINES[0], b"x" * (64 << 20), LINES[1]])
    source = open_job(write(tmp_path, "jobs.jsonl.gz", gzip.compress(data, 1)))
    del data
    tracemalloc.start()
    try:
        items = list(read_job(source))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [x.number for x in items] == [1, 2, 3]
    assert isinstance(items[1], LineFault)
    assert items[1].code == "invalid_json_line"
    assert peak < 16 << 20


def test_reading_a_job_holds_no_lines(tmp_path):
    lines = [json.dumps({"id": i, "prompt": "x" * 20_000}).encode() for i in range(2000)]
    source = open_job(write(tmp_path, "jobs.jsonl.zst", zstandard.compress(b"\n".join(lines))))
    del lines
    tracemalloc.start()
    try:
        lint = lint_job(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lint.sound == 2000
    assert peak < 32 << 20, "of 40 MB of lines"


# --- whatever comes ---------------------------------------------------------------------------------------------

BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    "max_tokens": 5,
    "temperature": 0.5,
    "stop": ["a"],
}
OPENAI = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
TOKENS = {"id": 3, "prompt": [[1, 2], [3]], "top_k": 5, "seed": 1, "stop_token_ids": [1]}
FIELDS = st.sampled_from(
    [
        *job._CHECKS,
        *job._NOT_BUILT,
        *job._HINTS,
        "batchrun",
        "prompt",
        "messages",
        "body",
        "url",
        "method",
        "custom_id",
        "id",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def mutated(draw: st.DrawFn, value: object) -> object:
    """`value` with one place of it replaced, dropped or joined by something else."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        copy = value.copy()
        copy[key] = mutated(draw, value[key])
        return copy
    if isinstance(value, dict) and draw(st.booleans()):
        return {**value, draw(FIELDS): draw(VALUES)}
    return draw(VALUES)


@st.composite
def mutated_lines(draw: st.DrawFn) -> bytes:
    line = json.dumps(mutated(draw, draw(st.sampled_from([OPENAI, TOKENS])))).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=3)) + line[at + draw(st.integers(0, 2)) :]
    return line


@settings(max_examples=300, deadline=None)
@given(st.lists(mutated_lines() | st.binary(max_size=60) | st.sampled_from([b"", b" ", b"\r"]), max_size=6))
def test_every_non_blank_line_gives_one_item_with_its_number(lines):
    marker = b'{"id": "marker-%d", "prompt": "x"}'
    data = b"\n".join(part for i, line in enumerate(lines) for part in (line, marker % i))
    with tempfile.TemporaryDirectory() as folder:
        items = list(read_job(open_job(write(Path(folder), "jobs.jsonl", data))))
    physical = data.split(b"\n")
    stripped = [line.removeprefix(b"\xef\xbb\xbf").strip() for line in physical]
    assert [x.number for x in items] == [i for i, line in enumerate(stripped, 1) if line]
    markers = [x for x in items if isinstance(x, JobLine) and x.custom_id.startswith("marker-")]
    assert [x.number for x in markers] == [
        i for i, line in enumerate(physical, 1) if line.startswith(b'{"id": "marker-')
    ]
    for item in items:
        if isinstance(item, LineFault):
            assert item.message.isprintable()
            assert len(item.message) < 400
        else:
            assert (item.messages is None) is not (item.prompts is None)


HINTED = st.recursive(
    st.integers(0, 9)
    | st.text('ab,{}"\\: ', max_size=6)
    | st.just({"expected_tokens": 5})
    | st.just('x, "batchrun": {"expected_tokens": 5}'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["batchrun", "a", ",", 'b"']), inner, max_size=3)
    ),
    max_leaves=8,
)


def unhinted(value: object) -> object:
    if isinstance(value, list):
        return [unhinted(item) for item in value]
    if isinstance(value, dict):
        return {k: unhinted(v) for k, v in value.items() if (k, v) != ("batchrun", {"expected_tokens": 5})}
    return value


@settings(max_examples=500, deadline=None)
@given(HINTED, st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")]))
def test_what_is_left_out_of_a_fingerprint_is_hints_alone(value, separators):
    left = job._without_hints(json.dumps(value, separators=separators).encode())
    assert json.loads(left) == unhinted(value)
    if separators[1] != " : ":  # as every program writes
        assert left == json.dumps(unhinted(value), separators=separators).encode()


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 40))
def test_where_blocks_end_makes_no_difference(data, size):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        source = open_job(write(Path(folder), "jobs.jsonl", data))
        patch.setattr(job, "_BLOCK", size)
        lines = [line for _, line in source.lines()]
    want = data.split(b"\n")
    assert lines == (want if want[-1] else want[:-1])
