"""Mutated tables: whatever is in a CSV or Parquet file, it is lines of a job, one for each row, or refused in a
sentence."""

from __future__ import annotations

import csv
import io
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.cases import LUMPS, edited, parts, repeatable
from hypothesis import given
from hypothesis import strategies as st

from batchrun.config import InputConfig
from batchrun.errors import UsageError
from batchrun.formats.job import read_job
from batchrun.request import JobLine, LineFault
from batchrun.sources.opening import open_to_read

CSV = b'custom_id,q,n\r\n1,"a ""b"",\nc",5\r\n2,plain,\r\n\r\n3,"",x\n4,\xc3\xa9t\xc3\xa9,7\n'
HOW = [
    InputConfig(prompt_column="q"),
    InputConfig(prompt_column="q", chat=True, field_columns=("n",)),
    InputConfig(template="{{ n }}: {{ q }}", id_column="n"),
    InputConfig(template="{{ row }}"),
]


def lines_of(path: Path, how: InputConfig) -> list[JobLine | LineFault] | None:
    """The lines of a table; None where it is refused."""
    with ExitStack() as stack:
        try:
            opened = open_to_read(str(path), how, stack)
        except UsageError as error:
            assert error.message.isprintable()
            assert len(error.message) < 2000
            return None
        items = list(read_job(opened.job))
        assert [item.number for item in items] == list(range(1, len(items) + 1))
        for item in items:
            if isinstance(item, LineFault):
                assert item.message.isprintable() and len(item.message) < 400
        return items


@parts(slow=4)
def test_mutated_csv_is_one_line_a_row_or_refused(tmp_path, part):
    path = tmp_path / "t.csv"

    @repeatable(part, 2500)
    @given(edited(CSV, [*LUMPS, b'""', b'"a"', b"q", b"n,"]), st.sampled_from(HOW))
    def law(data, how):
        path.write_bytes(data)
        if (items := lines_of(path, how)) is not None:
            text = io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline="")
            assert len(items) == sum(map(bool, csv.reader(text))) - 1

    law()


@parts(slow=2)
def test_mutated_parquet_is_read_or_refused(tmp_path, part):
    path = tmp_path / "t.parquet"
    table = pa.table({"q": ["a", None, "été"] * 9, "n": [1.0, None, 3.5] * 9, "custom_id": list(map(str, range(27)))})
    pq.write_table(table, path, row_group_size=10, compression="none")
    good = path.read_bytes()
    assert len(lines_of(path, HOW[0]) or []) == 27

    @repeatable(part, 2500)
    @given(edited(good), st.sampled_from(HOW))
    def law(data, how):
        path.write_bytes(data)
        items = lines_of(path, how)
        assert items is None or data != good or len(items) == 27

    law()
