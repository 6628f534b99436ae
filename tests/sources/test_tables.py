"""CSV and Parquet as jobs: every row one line, in order, and a bad one the error of that row alone."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from batchrun.config import InputConfig, load_config
from batchrun.errors import ExitCode, RunDirError, UsageError
from batchrun.formats.job import read_job
from batchrun.pipeline import plan_job, run_job
from batchrun.request import JobLine, LineFault
from batchrun.sources.opening import open_to_read


@pytest.fixture
def lines(here) -> Iterator[Callable[..., list[JobLine | LineFault]]]:
    """`lines("t.csv", prompt_column="q")`: the lines that a table makes."""
    with ExitStack() as stack:
        yield lambda job, **config: list(read_job(open_to_read(job, InputConfig(**config), stack).job))


def told(found: list[JobLine | LineFault]) -> list[Any]:
    """Of each line what it asks, or what is wrong with it."""
    return [
        (line.code, line.message) if isinstance(line, LineFault) else (line.prompts or line.messages) for line in found
    ]


# --- CSV


CSV = 'id,q,n\n1,"a, ""b""",x\n2,"two\nlines\r\n and more",\n\n3, spaces ,é\n4,,\n'
ROWS = ['a, "b"', "two\nlines\r\n and more", " spaces "]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.CSV", "t.csv.gz", "t.tsv.zst"])
def test_quotes_line_ends_and_boms_of_csv(bom, end, name, lines, here):
    text = CSV.replace(",", "\t") if ".tsv" in name else CSV
    if end == "\r\n":
        head, _, rest = text.partition("\n")
        text = head + "\r\n" + rest.replace('"\n', '"\r\n')
    data = bom + text.rstrip("\n").encode() + end.encode()
    (here / name).write_bytes(
        {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)(data)
    )
    found = lines(name, prompt_column="q", id_column="id")
    wanted = [row.replace(",", "\t") for row in ROWS] if ".tsv" in name else ROWS
    assert [line.custom_id for line in found] == ["1", "2", "3", "4"]
    assert told(found) == [*((row,) for row in wanted), ("empty_prompt", "prompt is empty")]
    assert [line.number for line in found] == [1, 2, 3, 4]


def test_bad_rows_of_csv_are_errors_and_the_others_run(lines, here):
    (here / "t.csv").write_bytes(b"q,x\nfine,1\nshort\nlong,2,3\nb\xe9d,4\nfine too,b\xe9d\nx\0y,5\nlast,6\n")
    assert told(lines("t.csv", prompt_column="q")) == [
        ("fine",),
        ("invalid_row", "the row has 1 fields, and the header 2"),
        ("invalid_row", "the row has 3 fields, and the header 2"),
        ("invalid_row", "column 'q' is not in UTF-8"),
        ("fine too",),
        ("x\0y",),
        ("last",),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", ["t.csv is empty"]),
        (b"\n\n", ["t.csv is empty"]),
        (b"q,q\n1,2\n", ["two columns of the name 'q'"]),
        (b'q\n"never closed\nx\n', ["not sound CSV in line 3"]),
        (b'q\n"a"b\nx\n', ["not sound CSV in line 2"]),
        ("q\nx\n".encode("utf-16"), ["not in UTF-8"]),
        (b"a,b\nx,y\n", ["no column 'q' (--prompt-column)"]),
    ],
)
def test_a_csv_that_is_none_is_refused(text, words, lines, here):
    (here / "t.csv").write_bytes(text)
    with pytest.raises(UsageError) as caught:
        lines("t.csv", prompt_column="q")
    for word in words:
        assert word in caught.value.message


def test_a_long_field_is_a_prompt(lines, here):
    (here / "t.csv").write_text("q\n" + "x" * 300_000 + "\n")
    assert told(lines("t.csv", prompt_column="q")) == [("x" * 300_000,)]


# --- which column is what


def test_prompts_are_in_the_columns_that_json_lines_have_them_in(lines, here):
    (here / "p.csv").write_text("prompt,custom_id,other\nx,a,1\ny,,2\n")
    found = lines("p.csv")
    assert [(line.custom_id, told([line])[0]) for line in found] == [("a", ("x",)), ("line-2", ("y",))]
    said = [{"role": "user", "content": "plum"}]
    (here / "m.csv").write_text('messages\n"' + json.dumps(said).replace('"', '""') + '"\n{bad\n')
    found = lines("m.csv")
    assert told(found) == [
        tuple(said),
        ("invalid_row", ANY),
    ]
    assert found[1].message.startswith("column 'messages' is not valid JSON: unexpected character")


@pytest.mark.parametrize(
    ("head", "config", "words"),
    [
        ("a,b", {}, "no column 'messages' or 'prompt'"),
        ("prompt,messages", {}, "has both column 'messages' and 'prompt'"),
        ("prompt", {"id_column": "x"}, "no column 'x' (--id-column)"),
        ("prompt", {"field_columns": ("seed",)}, "no column 'seed' (--field-columns)"),
        ("prompt,id", {"field_columns": ("id",)}, "'id' is no field that says how to answer"),
        ("a", {"prompt_column": "a", "template": "{{ a }}"}, "from --prompt-column or from --template"),
        ("a", {"template": "{{ a }} {{ b }}"}, "The template reads 'b', which is no column"),
        ("a", {"template": "{{ 7 }}"}, "The template reads no column"),
        ("a", {"template": "{{ a "}, "The template is not valid Jinja: line 1"),
        ("a", {"template": "none.jinja"}, "The template none.jinja cannot be read: No such file"),
    ],
)
def test_columns_that_are_not_there_or_not_told_apart(head, config, words, lines, here):
    (here / "t.csv").write_text(f"{head}\n" + "x," * head.count(",") + "x\n")
    with pytest.raises(UsageError) as caught:
        lines("t.csv", **config)
    assert words in caught.value.message


def test_columns_named_like_fields_are_taken_only_if_named(lines, here):
    (here / "t.csv").write_text('prompt,max_tokens,temperature,stop,seed\nx,5,0.5,END,\ny,no,0,"[""a""]",3\nz,,,,\n')
    assert [line.options.max_tokens for line in lines("t.csv")] == [None] * 3  # type: ignore[union-attr]
    first, bad, last = lines("t.csv", field_columns=("max_tokens", "temperature", "stop", "seed"))
    assert isinstance(first, JobLine)
    assert isinstance(bad, LineFault)
    assert isinstance(last, JobLine)
    assert (first.options.max_tokens, first.options.temperature, first.options.stop) == (5, 0.5, ("END",))
    assert first.options.seed is None
    assert bad.message == "max_tokens must be an integer of at least 1, and is 'no'"
    assert last.options.max_tokens is None
    with pytest.raises(UsageError, match="no column"):
        lines("t.csv", field_columns="max_tokens,nothing")


def test_a_prompt_may_be_what_a_user_says(lines, here):
    (here / "t.csv").write_text("q\nx\n")
    said = ({"role": "user", "content": "x"},)
    assert told(lines("t.csv", prompt_column="q", chat=True)) == [said]
    said = ({"role": "user", "content": "Say x."},)
    assert told(lines("t.csv", template="Say {{ q }}.", chat=True)) == [said]


# --- Parquet


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), path, **options)


def test_kinds_of_columns_of_parquet(lines, here):
    said = [{"role": "user", "content": "plum", "name": None}]
    values: dict[str, tuple[Any, Any]] = {
        "text": (["x", None], ("x",)),
        "large": (pa.array(["x", None], pa.large_string()), ("x",)),
        "few": (pa.array(["x", None]).dictionary_encode(), ("x",)),
        "ids": ([[1, 2], None], ((1, 2),)),
        "texts": ([["x", "y"], None], ("x", "y")),
        "said": ([said, None], ({"role": "user", "content": "plum"},)),
        "messages": ([json.dumps(said), None], ({"role": "user", "content": "plum"},)),
        "number": ([7, None], "an integer"),
        "share": ([0.5, None], "a number"),
        "truth": ([True, None], "true or false"),
        "bytes": ([b"x", None], "bytes"),
        "day": ([datetime.date(2026, 1, 2), None], "a date"),
        "money": ([decimal.Decimal("1.50"), None], "a Decimal"),
        "empty": (pa.nulls(2), None),
    }
    parquet(here / "t.parquet", {name: column for name, (column, _) in values.items()})
    for name, (_, wanted) in values.items():
        first, second = told(lines("t.parquet", prompt_column=name))
        if wanted is None:
            assert first == ("invalid_row", f"column '{name}' is null")
        elif isinstance(wanted, str):
            assert first[0] == "invalid_row"
            assert f"has {wanted} and not a text; --template '{{{{ {name} }}}}'" in first[1]
        else:
            assert first == wanted
        assert second == ("invalid_row", f"column '{name}' is null")
    template = "{{ day }} {{ money }} {{ number }} {{ truth }} {{ share }} {{ text }}"
    assert told(lines("t.parquet", template=template))[0] == ("2026-01-02 1.50 7 True 0.5 x",)


def test_fields_and_ids_of_parquet(lines, here):
    parquet(
        here / "t.parquet",
        {
            "prompt": ["a", "b", "c", "d"],
            "max_tokens": [5.0, None, float("nan"), 2.5],  # as pandas writes integers with nulls
            "stop": [["x"], [], None, None],
            "name": [1, 2, None, 4],
            "odd": [1.5, 2.5, 3.5, None],
        },
    )
    found = lines("t.parquet", field_columns=("max_tokens", "stop"), id_column="name")
    assert [line.custom_id for line in found] == ["1", "2", "line-3", "4"]
    assert [line.options.max_tokens if isinstance(line, JobLine) else line.message for line in found] == [
        5, None, None, "max_tokens must be an integer of at least 1, and is 2.5"
    ]  # fmt: skip
    odd = lines("t.parquet", id_column="odd")
    assert told(odd)[0] == ("invalid_row", "column 'odd' must have a text or an integer, and has a number")
    assert told(odd)[3] == ("d",)


def test_a_text_that_is_none_is_the_error_of_its_row(lines, here):
    bad = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).cast(pa.string(), safe=False)
    parquet(here / "t.parquet", {"prompt": bad})
    found = told(lines("t.parquet"))
    assert (found[0], found[2]) == (("a",), ("c",))
    assert found[1][0] == "invalid_row"
    assert "can't decode" in found[1][1]


def test_names_of_columns_may_be_anything(lines, here):
    parquet(here / "t.parquet", {"a.b": ["x"], "a": ["y"], "s": [{"b": "z"}], "": ["w"], "row": ["v"], "range": ["u"]})
    assert told(lines("t.parquet", prompt_column="a.b")) == [("x",)]
    assert told(lines("t.parquet", prompt_column="a")) == [("y",)]
    assert told(lines("t.parquet", prompt_column="")) == [("w",)]
    assert told(lines("t.parquet", template="{{ s.b }} {{ row }} {{ range }}")) == [("z v u",)]


def test_many_rows_keep_their_order_and_numbers(lines, here):
    parquet(here / "t.parquet", {"prompt": [f"p{i}" for i in range(5000)]}, row_group_size=700)
    found = lines("t.parquet")
    assert told(found) == [(f"p{i}",) for i in range(5000)]
    assert [line.number for line in found] == list(range(1, 5001))


def test_shards_of_tables_name_row_and_shard(lines, here):
    (here / "shards").mkdir()
    parquet(here / "shards" / "0.parquet", {"prompt": ["a", "b"], "x": [1, 2]})
    parquet(here / "shards" / "1.parquet", {"x": [1, 2], "prompt": ["c", None]})
    assert told(lines("shards")) == [
        ("a",),
        ("b",),
        ("c",),
        ("invalid_row", "column 'prompt' is null (row 2 of 1.parquet)"),
    ]
    parquet(here / "shards" / "2.parquet", {"x": [1, 2]})
    with pytest.raises(UsageError, match=r"2\.parquet has no column 'messages' or 'prompt'"):
        lines("shards")


def test_what_is_no_parquet_is_refused(lines, here):
    (here / "t.parquet").write_bytes(b"not that")
    with pytest.raises(UsageError, match=r"t\.parquet cannot be read: ArrowInvalid"):
        lines("t.parquet")
    with pytest.raises(UsageError, match=r"no job file none\.parquet"):
        lines("none.parquet")


def test_without_pyarrow_parquet_is_one_error_and_csv_is_read(lines, here, monkeypatch):
    parquet(here / "t.parquet", {"prompt": ["a"]})
    (here / "t.csv").write_text("prompt\na\n")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="Parquet needs pyarrow") as caught:
        lines("t.parquet")
    assert caught.value.hint == "Install it with pip install 'batchrun[parquet]'."
    assert told(lines("t.csv")) == [("a",)]
    with pytest.raises(UsageError, match="Parquet needs pyarrow"):
        run_job("t.csv", load_config(model="demo", output={"results": "x.parquet"}))
    assert not (here / "t.run").exists()


# --- templates


def test_a_template_makes_prompts_of_columns(lines, here):
    (here / "t.csv").write_text("name,The age,x\nAda,36,1\nÉva,,2\n")
    (here / "my.jinja").write_text("Who is {{ name }}? {% if row['The age'] %}{{ row['The age'] }}{% endif %}\n")
    assert told(lines("t.csv", template="my.jinja")) == [("Who is Ada? 36",), ("Who is Éva? ",)]
    assert told(lines("t.csv", template="{{ name | upper }}\n\n")) == [("ADA\n",), ("ÉVA\n",)]


def test_a_row_that_a_template_refuses_is_the_error_of_that_row(lines, here):
    parquet(here / "t.parquet", {"a": ["x", None, "y"], "b": [1.0, 2.0, float("nan")], "n": [1, 0, 2]})
    found = told(lines("t.parquet", template="{{ a }} {{ b }} {{ 6 // n }}"))
    assert found[0] == ("x 1.0 6",)
    assert found[1][0] == found[2][0] == "invalid_row"
    assert "a value that is null" in found[1][1]
    assert found[1][1].endswith("(null in this row: a)")
    assert "no number" in found[2][1]
    found = told(lines("t.parquet", template="{{ a or 'nobody' }} {{ 6 // n }} {% if a is none %}!{% endif %}"))
    assert [found[0], found[2]] == [("x 6 ",), ("y 3 ",)]
    assert "division" in found[1][1]
    found = told(lines("t.parquet", template="{{ a.nothing }}"))
    assert all("has no attribute 'nothing'" in message for _, message in found)


@pytest.mark.parametrize(
    "template",
    [
        "{{ a.__class__.__mro__ }}",
        "{{ lipsum.__globals__['os'].system('touch mark') }}{{ a }}",
        "{% include '/etc/passwd' %}{{ a }}",
        "{% set _ = row.clear() %}{{ a }}",
        "{% for i in range(10 ** 12) %}{{ a }}{% endfor %}",
        "{{ '{0.__class__.__mro__}'.format(a) }}",
    ],
)
def test_a_template_reaches_nothing_but_its_row(template, lines, here):
    (here / "t.csv").write_text("a\nx\n")
    [(code, message)] = told(lines("t.csv", template=template))
    assert (code, message[:30]) == ("invalid_row", "the template refuses this row:")
    assert not (here / "mark").exists()


def test_what_a_row_says_is_no_template(lines, here):
    (here / "t.csv").write_text("a\n{{ 7 * 7 }} {% raw %}\n")
    assert told(lines("t.csv", template="{{ a }}")) == [("{{ 7 * 7 }} {% raw %}",)]


SHARED = "Answer in one word, and never more than that. " * 5


@pytest.mark.parametrize(
    ("template", "warned"),
    [
        (SHARED + "{{ q }}", None),
        (SHARED + "{{ q }} Answer:", None),
        ("{{ q }} " + SHARED, "behind q,"),
        ("{% for c in q %}{{ c }}{% endfor %}" + SHARED, "behind c, q,"),
        ("{% set x = q %}" + SHARED + "{{ x }}", None),
        ("{# {{ q }} #}" + SHARED + "{{ q }}", None),
        ("{{ '=' * 3 }}" + SHARED + "{{ q }}", None),
    ],
)
def test_shared_text_behind_a_variable_is_warned_of_and_left_there(template, warned, here, model_dir):
    (here / "t.csv").write_text("q\nWhy?\nHow?\n")
    planned = plan_job("t.csv", load_config(model=str(model_dir()), input={"template": template}))
    found = [warning.message for warning in planned.warnings if warning.code == "template_order"]
    assert len(found) == (warned is not None)
    assert warned is None or (warned in found[0] and "put the text first" in found[0])


# --- runs


def test_a_changed_template_or_column_is_another_run(here, model_dir):
    (here / "t.csv").write_text("q,p\nx,y\n")

    def run(**config: Any) -> ExitCode:
        config.setdefault("prompt_column", "q")
        return run_job("t.csv", load_config(model=str(model_dir()), max_tokens=2, input=config)).exit_code

    assert run() is ExitCode.OK
    assert run() is ExitCode.OK
    with pytest.raises(RunDirError, match=r"source\.prompt_column is 'q' there and 'p' now"):
        run(prompt_column="p")
    with pytest.raises(RunDirError, match=r"source\.template is None there and '"):
        run(prompt_column=None, template="{{ q }}!")
    with pytest.raises(RunDirError, match=r"source\.chat is False there and True now"):
        run(chat=True)
    assert run(prompt_column=None, template="{{ q }}") is ExitCode.OK  # the same lines, made in another way


# --- JSON lines as a table

JSON_ROWS = (
    b'\xef\xbb\xbf{"key": 7, "q": "a", "about": {"city": "Bern"}, "temperature": 9}\n'
    b'\n{"q": "b\\n", "about": {"city": "Chur"}, "max_tokens": 3}\r\n'
    b'{"q": null, "about": {"city": "Zug"}}\n[1]\n{"q": \n{"about": {}, "q": "c"}'
)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz"])
def test_json_lines_are_a_table_where_prompts_are_made_of_them(name, lines, here):
    (here / name).write_bytes(gzip.compress(JSON_ROWS) if name.endswith(".gz") else JSON_ROWS)
    config = {"id_column": "key", "field_columns": ("max_tokens",)}
    found = lines(name, template="{{ about.city }}: {{ q }}", **config)
    assert [line.number for line in found] == [1, 2, 3, 4, 5, 6]
    assert [(line.custom_id, line.prompts, line.options.max_tokens) for line in found[:2]] == [
        ("7", ("Bern: a",), None),
        ("line-2", ("Chur: b\n",), 3),
    ]
    assert [line.code for line in found[2:]] == ["invalid_row"] * 4
    assert "it writes a value that is null" in found[2].message
    assert "no JSON object" in found[3].message and "not valid JSON" in found[4].message
    assert [line.messages for line in lines(name, prompt_column="q", chat=True) if isinstance(line, JobLine)] == [
        ({"role": "user", "content": text},) for text in ("a", "b\n", "c")
    ]
    with pytest.raises(UsageError, match="reads 'town', which is no column"):
        lines(name, template="{{ town }}")
