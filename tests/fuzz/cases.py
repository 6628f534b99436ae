"""Fuzzing that repeats: the seed of each part is its number, and nothing is kept between runs.

Part 0 is small and runs with the other tests; the parts after it are marked slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

FEW = 300

# What makes trouble in lines of JSON and in text.
LUMPS = [
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b" ", b"\t", b"\r", b"\n", b"\r\n", b"\n\n", b"\0", b"\x7f"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"-0", b"1e999", b"1.0", b"9" * 400, b"18446744073709551616", b"{}"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xc2\x85", b"\x1b[2J"),
    *(rb"\ud800", rb"\udc00 ", rb"\ud83d\ude00", rb"\u0000", rb"\x00", b"\0" * 300, b"[" * 1500, b'{"a":' * 1500),
]  # fmt: skip


SLOW = (pytest.mark.slow, pytest.mark.timeout(900))


def parts(slow: int) -> pytest.MarkDecorator:
    """A test's parameter `part`: 0, and as many slow ones."""
    return pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=SLOW) for n in range(1, slow + 1))])


def repeatable(part: int, cases: int) -> Callable[[Any], Any]:
    """Settings of a law given to hypothesis: the same cases each time, `FEW` in part 0 and else `cases`."""
    how = settings(
        max_examples=cases if part else FEW, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    return lambda law: seed(part)(how(law))


@st.composite
def edited(draw: st.DrawFn, content: bytes, lumps: list[bytes] = LUMPS, most: int = 3) -> bytes:
    """`content` with up to `most` places of it cut out, replaced or added to."""
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(content)))
        inserted = draw(st.sampled_from(lumps) | st.binary(max_size=3))
        content = content[:at] + inserted + content[at + draw(st.sampled_from([0, 0, 1, 2, 5, 40])) :]
    return content
