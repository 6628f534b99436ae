"""What a job says is content and nothing else: no part of a file's name, no order to a terminal, no HTML."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

from fuzz.cases import parts, repeatable
from html_page import HOSTILE, Page, assert_self_contained, without_scripts
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from batchrun.cli import app
from batchrun.formats.results import encode_json, error_line, read_line_number
from batchrun.formats.rundir import RUN_FILES
from batchrun.report.charts import scripts
from batchrun.report.markup import note, pairs, text
from batchrun.report.wording import printable
from batchrun.request import LineFault

HOSTILE_IDS = [
    "../../outside",
    "/tmp/outside",
    "..",
    "sub/dir",
    "C:\\outside",
    "~/outside",
    "$(touch outside)`touch outside`; touch outside",
    "\x1b[2J\x1b]0;title\x07\x9b31m\r\b",
    "\u202eright to left\u2066",
    "{0.__class__} {custom_id} {{}} %s %(name)s %n $outcome ${subject}",
    "[bold red]markup[/] :skull:",
    "<script>alert(1)</script>\"' onload=x",
    "results.jsonl",
    "a\nb\r\nc\u2028d\x85e",
    "\0",
    "-o",
    "x" * 512,
]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def a_job(ids: list[str]) -> list[dict]:
    """A sound line, one of unknown fields and a bad one for each id."""
    return [
        line
        for i, custom_id in enumerate(ids)
        for line in (
            {"custom_id": custom_id, "prompt": "apple", "max_tokens": 2, "model": custom_id, custom_id: 1},
            {"custom_id": f"{i} {custom_id}"[:512], "prompt": "apple", "temperature": custom_id},
        )
    ]


def test_a_run_of_hostile_ids_has_the_files_of_any_run_and_shows_only_text(tmp_path, model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in a_job(HOSTILE_IDS)))
    shown = CliRunner().invoke(app, ["run", "jobs.jsonl", "--model", str(model_dir())], catch_exceptions=False)
    assert shown.exit_code == 3
    assert all(letter.isprintable() or letter == "\n" for letter in shown.output)
    of_a_run = {"lock", *RUN_FILES} - {
        "job.jsonl",
        "columns.parquet",
        "replaced.jsonl",
    }  # those of standard input and of a retry
    assert set(files(tmp_path)) == {"jobs.jsonl", "jobs.run", *(f"jobs.run/{name}" for name in of_a_run)}

    out = tmp_path / "jobs.run"
    results, errors = ((out / name).read_bytes().splitlines() for name in ("results.jsonl", "errors.jsonl"))
    assert sorted(json.loads(line)["custom_id"] for line in results) == sorted(HOSTILE_IDS)
    assert [read_line_number(line)[0] for line in errors] == list(range(2, 2 * len(HOSTILE_IDS) + 1, 2))
    assert len({json.loads(line)["id"] for line in results + errors}) == 2 * len(HOSTILE_IDS)

    html = (out / "report.html").read_text(encoding="utf-8")
    assert_self_contained(html, scripts())
    for _, attributes in Page(html).tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")]
    for name in ("report.html", "run.log"):
        told = without_scripts((out / name).read_text(encoding="utf-8"))
        assert all(letter.isprintable() or letter == "\n" for letter in told), name


def test_a_plan_explains_a_line_of_a_hostile_id(tmp_path, model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"id": custom_id, "prompt": "apple", "max_tokens": 2} for custom_id in HOSTILE_IDS]
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for custom_id in HOSTILE_IDS:
        command = ["plan", "jobs.jsonl", "--model", str(model_dir()), "--html", "plan.html", f"--explain={custom_id}"]
        shown = CliRunner().invoke(app, command, catch_exceptions=False)
        assert shown.exit_code == 0
        assert all(letter.isprintable() or letter == "\n" for letter in shown.output)
        html = Path("plan.html").read_text(encoding="utf-8")
        assert_self_contained(html, scripts())
        assert "alert(1)</script>" not in html
    assert files(tmp_path) == ["jobs.jsonl", "plan.html"]


# --- any text ---

ANY = st.text(max_size=60) | st.text(st.characters(), max_size=20) | st.sampled_from([*HOSTILE_IDS, HOSTILE])


@parts(slow=1)
def test_any_text_is_text_on_a_page(part):
    @repeatable(part, 4000)
    @given(ANY)
    def law(words):
        html = text(words)
        assert not set(html) & set("<>\"'")
        assert all(letter.isprintable() for letter in html)
        assert unescape(html) == printable(words, limit=2000)
        page = Page(f"<!doctype html>{note(words)}{pairs([(words, words)])}")
        assert {tag for tag, _ in page.tags} <= {"p", "table", "tr", "td"}

    law()


@parts(slow=1)
def test_a_line_of_any_content_is_one_line_and_reads_back(part):
    @repeatable(part, 4000)
    @given(ANY, ANY, st.integers(1, 2**63 - 1))
    def law(custom_id, message, number):
        line = error_line(LineFault(number, custom_id, "invalid_request", message))
        assert line.endswith(b"\n") and line.count(b"\n") == 1
        assert not any(byte < 0x20 for byte in line[:-1])
        assert read_line_number(line) == (number, "invalid_request")
        entry = json.loads(line)
        whole = [
            words.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for words in (custom_id, message)
        ]
        assert [entry["custom_id"], entry["response"]["body"]["error"]["message"]] == whole
        assert json.loads(encode_json({custom_id: message}, indent=True)) == {whole[0]: whole[1]}

    law()
