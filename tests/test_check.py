"""`batchrun check`: every bad line and no other, lengths as the tokenizer has them, and nothing heavy loaded."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import CHAT_TEMPLATE, copy_without_weights
from jinja2 import Template
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer
from typer.testing import CliRunner, Result

import batchrun
from batchrun.check import Checked, Lengths
from batchrun.cli import app
from batchrun.errors import ExitCode
from batchrun.report.records import Warned
from batchrun.report.tables import print_check
from batchrun.request import LineFault

CONTEXT = 512  # of the models in factories.py
SOUND: list[Any] = [
    {"id": "a", "prompt": "apple pear", "max_tokens": 3},
    {"id": "b", "messages": [{"role": "user", "content": "plum"}], "max_tokens": 4},
]
BAD: list[Any] = [
    '{"prompt": "\x1b[31mred\x1b[0m [bold]" ',
    {"id": "a", "prompt": "again"},
    {"id": "\x1b[31mt", "prompt": "x", "tools": [1]},
    {"custom_id": "u", "method": "POST", "url": "/v1/nothing", "body": {}},
    {"messages": []},
]
CODES = {
    "invalid_json_line": 1,
    "duplicate_custom_id": 1,
    "unsupported_field": 1,
    "unsupported_url": 1,
    "empty_prompt": 1,
}


def write_job(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def check(here) -> Callable[..., Result]:
    """`check(lines, *flags)`: the command on a job of these lines, in this process."""

    def call(lines: list[Any], *flags: str) -> Result:
        write_job(here / "jobs.jsonl", lines)
        return CliRunner().invoke(app, ["check", "jobs.jsonl", *flags], catch_exceptions=False)

    return call


def completion(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"prompt": "apple", "max_tokens": 1} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


# --- lines


def test_every_bad_line_is_shown_with_its_id_and_counted_by_code(check, here):
    done = check([*SOUND, *BAD])
    assert done.exit_code == ExitCode.SOME_FAILED
    shown = " ".join(done.stdout.split())
    assert shown.startswith("5 of 7 lines cannot run. Lines 2 can run 5 bad Errors 1 duplicate_custom_id 1 empty_")
    assert "line 3 invalid_json_line: not valid JSON" in shown
    assert "line 4 a: duplicate_custom_id: custom_id 'a' was taken by line 1" in shown
    assert r"line 5 \x1b[31mt: unsupported_field: tools is not supported yet" in shown
    assert "line 6 u: unsupported_url: url '/v1/nothing' is not one of" in shown
    assert "line 7 empty_prompt: messages is empty" in shown
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert [path.name for path in here.iterdir()] == ["jobs.jsonl"]


def test_json_has_every_bad_line_and_the_table_the_first_twenty(check):
    lines = [*SOUND, *({"id": f"bad-{i}", "prompt": ""} for i in range(25))]
    shown = check(lines).stdout
    assert "bad-19: empty_prompt" in shown
    assert "bad-20" not in shown
    assert "and 5 more in --json" in shown
    document = json.loads(check(lines, "--json").stdout)
    assert [(fault["number"], fault["custom_id"]) for fault in document["faults"]] == [
        (3 + i, f"bad-{i}") for i in range(25)
    ]
    assert (document["total"], document["sound"], document["errors"]) == (27, 2, {"empty_prompt": 25})
    assert document["lengths"] is None


def test_a_check_and_a_run_find_the_same(check, here, model_dir):
    lines = [*SOUND, *BAD, {"id": "long", "prompt": [7] * 600}, {"id": "hole", "prompt": [10**6]}]
    found = json.loads(check(lines, "--json", "--model", str(model_dir())).stdout)
    batchrun.run("jobs.jsonl", model=str(model_dir()))
    written = [json.loads(line) for line in (here / "jobs.run" / "errors.jsonl").read_text().splitlines()]
    errors = [
        {"number": line["batchrun"]["line"], "custom_id": line["custom_id"]}
        | {name: line["response"]["body"]["error"][name] for name in ("code", "message", "param")}
        for line in written
    ]
    assert found["faults"] == sorted(errors, key=lambda error: error["number"])
    assert found["errors"] == CODES | {"invalid_request": 1, "context_length_exceeded": 1}


def test_names_of_models_and_unknown_fields_are_counted(check, model_dir):
    lines = [
        *(completion(f"m{i}", model="gpt-4", colour="red") for i in range(3)),
        completion("mine", model=str(model_dir())),
        completion("bad", model="gpt-4", max_tokens="ten"),
        SOUND[0],
    ]
    document = json.loads(check(lines, "--json").stdout)
    assert document["models"] == {"gpt-4": 3, str(model_dir()): 1}
    assert document["unknown_fields"] == {"colour": 3}
    assert (document["model"], document["other_model"]) == (None, None)
    assert [warning["code"] for warning in document["warnings"]] == ["unknown_field"]

    document = json.loads(check(lines, "--json", "--model", str(model_dir())).stdout)
    assert (document["model"], document["other_model"]) == (str(model_dir()), 3)
    assert [(warning["code"], warning["count"]) for warning in document["warnings"]] == [
        ("unknown_field", 3),
        ("model_mismatch", 3),
    ]
    shown = " ".join(check(lines, "--model", str(model_dir())).stdout.split())
    assert "Models 3 gpt-4" in shown
    assert "3 other than" in shown
    assert "Warnings 3 unknown_field: field 'colour' is not known and was ignored" in shown


@pytest.mark.parametrize(
    ("lines", "flags", "code"),
    [
        (SOUND, [], ExitCode.OK),
        (SOUND[:1], [], ExitCode.OK),
        ([*SOUND, "{bad"], [], ExitCode.SOME_FAILED),
        ([*SOUND, "{bad"], ["--limit", "2"], ExitCode.OK),
        (["{bad", "{bad"], [], ExitCode.NOTHING_RUNNABLE),
        (["", "  "], [], ExitCode.NOTHING_RUNNABLE),
        (SOUND, ["--limit", "0"], ExitCode.USAGE),
        (SOUND, ["--max-tokens", "9"], ExitCode.USAGE),  # of a model, and there is none
        (SOUND, ["--model", "no-such-model"], ExitCode.USAGE),
    ],
)
def test_exit_codes(lines, flags, code, check):
    done = check(lines, *flags)
    assert done.exit_code == code
    assert check(lines, *flags, "--json").exit_code == code
    assert (done.stderr == "") == (code != ExitCode.USAGE)
    titles = {
        ExitCode.OK: "can run.\n",
        ExitCode.SOME_FAILED: "1 of 3 lines cannot run.\n",
        ExitCode.NOTHING_RUNNABLE: "2 of 2 lines cannot run.\n" if "{bad" in lines else "The job has no requests",
    }
    assert titles.get(code, "") in done.stdout


def test_a_job_that_is_not_there(here):
    done = CliRunner().invoke(app, ["check", "none.jsonl", "--json"])
    assert done.exit_code == ExitCode.USAGE
    assert "There is no job file none.jsonl" in json.loads(done.stdout)["error"]["message"]


def test_standard_input_can_be_checked(here, model_dir):
    text = write_job(here / "jobs.jsonl", [*SOUND, "{bad"]).read_bytes()
    for flags in ([], ["--model", str(model_dir())]):
        done = CliRunner().invoke(app, ["check", "-", *flags], input=text)
        assert done.exit_code == ExitCode.SOME_FAILED
        assert done.stdout == CliRunner().invoke(app, ["check", "jobs.jsonl", *flags]).stdout


# --- lengths


def test_lengths_are_those_of_the_tokenizer(check, model_dir):
    texts = ["apple pear plum " * count for count in (1, 7, 30)]
    lines = [
        *({"prompt": text, "max_tokens": 1} for text in texts),
        {"prompt": ["apple", "pear plum"], "max_tokens": 1},  # two requests
        {"prompt": [5, 6, 7, 8], "max_tokens": 1},
        {"messages": [{"role": "user", "content": "plum"}], "max_tokens": 1},
        {"prompt": "not counted", "tools": [1]},
    ]
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    chat = Template(CHAT_TEMPLATE).render(messages=SOUND[1]["messages"], add_generation_prompt=True)
    wanted = sorted([4, *(len(tokenizer.encode(text).ids) for text in [*texts, "apple", "pear plum", chat])])
    found = json.loads(check(lines, "--json", "--model", str(model_dir())).stdout)["lengths"]
    assert found == {
        "requests": 7,
        "shortest": wanted[0],
        "median": np.median(wanted),
        "longest": wanted[-1],
        "total": sum(wanted),
        "max_context": CONTEXT,
        "too_long": 0,
    }
    shown = " ".join(check(lines, "--model", str(model_dir())).stdout.split())
    median = f"{np.median(wanted):.1f}".removesuffix(".0")
    assert f"Prompts {sum(wanted)} tokens in 7 prompts {wanted[0]} in the shortest {median} in the median" in shown
    assert f"{wanted[-1]} in the longest; the context has {CONTEXT}" in shown


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT])
def test_a_prompt_that_leaves_no_room_is_too_long(length, check, model_dir):
    too_long = length == CONTEXT
    done = check([{"id": "long", "prompt": [7] * length, "max_tokens": 1}], "--json", "--model", str(model_dir()))
    document = json.loads(done.stdout)
    assert done.exit_code == (ExitCode.NOTHING_RUNNABLE if too_long else ExitCode.OK)
    assert document["sound"] == (0 if too_long else 1)
    assert document["errors"] == ({"context_length_exceeded": 1} if too_long else {})
    assert document["lengths"]["too_long"] == (1 if too_long else 0)
    assert document["lengths"]["longest"] == (0 if too_long else length)


def test_limits_that_are_cut_are_warned_of(check, model_dir):
    lines = [{"prompt": "apple", "max_tokens": 600}, {"prompt": "apple"}]
    codes = {}
    for flags in ([], ["--max-tokens", "600"]):
        document = json.loads(check(lines, "--json", "--model", str(model_dir()), *flags).stdout)
        codes[bool(flags)] = [(warning["code"], warning["count"]) for warning in document["warnings"]]
    assert codes == {
        False: [("max_tokens_default", 1), ("max_tokens_clipped", 1)],
        True: [("max_tokens_clipped", 2)],
    }


def test_calls_that_nobody_will_find_are_warned_of(check, here, model_dir):
    (here / "template.jinja").write_text("{{ tools }}{{ messages[0].content }}")
    tools = [{"type": "function", "function": {"name": "clock"}}]
    lines = [{"messages": [{"role": "user", "content": "What time is it?"}], "tools": tools, "max_tokens": 1}] * 2
    lines = [{"id": str(i), **line} for i, line in enumerate(lines)]
    done = check(lines, "--json", "--model", str(model_dir()), "--chat-template", "template.jinja")
    warnings = [(warning["code"], warning["count"]) for warning in json.loads(done.stdout)["warnings"]]
    assert warnings == [("tool_calls_not_read", 2)]


def test_a_model_in_the_configuration_file_counts(check, here, model_dir):
    (here / "own.toml").write_text(f"model = '{model_dir()}'\nlimit = 1\n")
    document = json.loads(check(SOUND, "--json", "--config", "own.toml").stdout)
    assert (document["total"], document["lengths"]["requests"]) == (1, 1)


def test_a_configuration_file_without_a_model_says_how_to_read_the_job(check, here):
    (here / "own.toml").write_text("limit = 1\n")
    document = json.loads(check(SOUND, "--json", "--config", "own.toml").stdout)
    assert (document["total"], document["model"], document["lengths"]) == (1, None, None)
    (here / "wrong.toml").write_text("colour = 1\n")
    assert check(SOUND, "--config", "wrong.toml").exit_code == ExitCode.USAGE


def test_no_torch_is_loaded_no_weights_are_read_and_nothing_is_written(here, model_dir):
    copy_without_weights(model_dir(), here / "bare")
    write_job(here / "jobs.jsonl", [*SOUND, "{bad"])
    before = snapshot(here)
    code = (
        "import json, sys\n"
        "from batchrun.cli import app\n"
        "for flags in ([], ['--model', 'bare']):\n"
        "    try:\n"
        "        app(['check', 'jobs.jsonl', '--json', *flags])\n"
        "    except SystemExit as end:\n"
        "        heavy = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "        print('END', json.dumps([end.code, heavy]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    ends = [json.loads(line[4:]) for line in done.stderr.splitlines() if line.startswith("END ")]
    assert ends == [[3, []], [3, ["transformers"]]]
    assert snapshot(here) == before


# --- what is shown

HOSTILE = "\x1b[31m[red]\u202e[/red]<script>\x00\x9b\ud800" + "x" * 150 + "漢字" * 90


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_hostile_contents_are_escaped_and_stay_within_80_columns(encoding):
    checked = Checked(
        total=10**12,
        sound=10**12 - 25,
        errors={HOSTILE: 25},
        faults=[LineFault(10**11 + i, HOSTILE, HOSTILE, HOSTILE) for i in range(25)],
        models={HOSTILE * (i + 1): 10**11 for i in range(9)},
        model=HOSTILE,
        other_model=10**12,
        unknown_fields={HOSTILE: 1},
        lengths=Lengths(10**12, 1, 10**9 + 0.5, 10**10, 10**15, 10**6, 10**9),
        warnings=[Warned(HOSTILE, 10**12, HOSTILE)],
    )
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    print_check(Console(file=pipe, width=80, markup=False, highlight=False, emoji=False), checked)
    pipe.seek(0)
    text = pipe.read()
    for line in text.splitlines():
        assert cell_len(line) <= 80, line
        assert line.isprintable(), line
    assert text.count(r"\x1b[31m[red]") > 40
