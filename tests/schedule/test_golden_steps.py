"""The steps of some small jobs, as they were when a person last looked at them (tests/golden_steps.py)."""

from __future__ import annotations

import pytest
from golden_steps import GOLDEN, JOBS, difference


@pytest.mark.parametrize("name", JOBS)
def test_steps_are_the_golden_ones(name):
    changes = difference(name)
    assert not changes, "\n".join(["if this is meant: python tests/golden_steps.py --write", *changes])


def test_no_golden_file_is_left_over():
    assert sorted(path.stem for path in GOLDEN.glob("*.jsonl")) == sorted(JOBS)
