"""Everything that formats.md names as met in the wild, in one job and through the whole run: each line gets what it
should, and the line behind it the answer that it has without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batchrun.cli import app
from batchrun.errors import ExitCode

SOUND, BLANK = "sound", "blank"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def openai(url: str = COMPLETIONS, **body: Any) -> bytes:
    return line(custom_id=f"{url} {json.dumps(body)}", method="POST", url=url, body=body)


# What a line is, and what it gets: an error code, an answer, or nothing at all.
LINES: dict[str, tuple[bytes, str]] = {
    "invalid UTF-8": (b'{"prompt": "caf\xe9"}', "invalid_json_line"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16-le").replace(b"\n", b""), "invalid_json_line"),
    "BOM": (b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}', SOUND),
    "CRLF": (b'{"prompt": "a", "max_tokens": 1}\r', SOUND),
    "blank line": (b"", BLANK),
    "line of spaces": (b" \t ", BLANK),
    "blank line of CRLF": (b"\r", BLANK),
    "blank line with a BOM": (b"\xef\xbb\xbf", BLANK),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "invalid_json_line"),
    "Infinity": (b'{"prompt": "a", "temperature": -Infinity}', "invalid_json_line"),
    "nesting bomb": (b"[" * 1_000_000, "invalid_json_line"),
    "nesting bomb of objects": (b'{"prompt": ' * 500_000, "invalid_json_line"),
    "deep but closed": (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "invalid_request"),
    "50 MB that are no JSON": (b"[" * 50_000_000, "invalid_json_line"),
    "50 MB that are sound": (line(prompt="a", max_tokens=1, metadata="x" * 50_000_000), SOUND),
    "lone high surrogate": (rb'{"prompt": "\ud800"}', "invalid_json_line"),
    "lone low surrogate": (rb'{"prompt": "\udc00 x"}', "invalid_json_line"),
    "surrogate pair": (rb'{"prompt": "\ud83d\ude00", "max_tokens": 1}', SOUND),
    "raw surrogate": (b'{"prompt": "\xed\xa0\x80"}', "invalid_json_line"),
    "raw NUL": (b'{"prompt": "a\x00b"}', "invalid_json_line"),
    "escaped NUL": (rb'{"prompt": "a\u0000b", "max_tokens": 1}', SOUND),
    "NULs of a torn file": (b"\x00" * 4096, "invalid_json_line"),
    "cut short": (b'{"prompt": "a', "invalid_json_line"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', "invalid_json_line"),
    "a list": (b'["a"]', "invalid_json_line"),
    "null": (b"null", "invalid_json_line"),
    "nothing asked": (b"{}", "invalid_request"),
    "duplicate custom_id": (line(custom_id="first", prompt="again"), "duplicate_custom_id"),
    "custom_id too long": (line(custom_id="x" * 513, prompt="a"), "invalid_request"),
    "temperature too high": (openai(prompt="a", temperature=3), "invalid_request"),
    "max_tokens of zero": (openai(prompt="a", max_tokens=0), "invalid_request"),
    "max_tokens below zero": (openai(prompt="a", max_tokens=-5), "invalid_request"),
    "max_tokens a text": (openai(prompt="a", max_tokens="5"), "invalid_request"),
    "number beyond 64 bits": (openai(prompt="a", seed=2**70), "invalid_request"),
    "messages a text": (openai(CHAT, messages="hello"), "invalid_request"),
    "unknown role": (openai(CHAT, messages=[{"role": "bot", "content": "a"}]), "invalid_request"),
    "url not known": (openai("/v1/embeddings", input="a"), "unsupported_url"),
    "url of another kind": (openai("https://example.com/v1/completions", prompt="a"), "unsupported_url"),
    "stream": (openai(prompt="a", stream=True), "unsupported_field"),
    "tools": (openai(CHAT, messages=[{"role": "user", "content": "a"}], tools=[{"type": "x"}]), "invalid_request"),
    "image": (
        openai(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "unsupported_field",
    ),
    "empty prompt": (openai(prompt=""), "empty_prompt"),
    "empty list of prompts": (line(prompt=[]), "empty_prompt"),
    "no messages": (openai(CHAT, messages=[]), "empty_prompt"),
    "prompt beyond the context": (line(prompt=[7] * 600, max_tokens=1), "context_length_exceeded"),
    "token beyond the vocabulary": (line(prompt=[2**31 - 1], max_tokens=1), "invalid_request"),
}
FIRST = line(custom_id="first", prompt="apple", max_tokens=2)


def behind(name: str) -> bytes:
    """The line behind one of `LINES`."""
    return line(id=f"behind {name}", prompt=f"{name} apple", max_tokens=3, ignore_eos=True)


def outcomes(run_dir: Path) -> dict[int, tuple[str, Any]]:
    """By line of the job its id, and its choices or its error."""
    found: dict[int, tuple[str, Any]] = {}
    for name in ("results.jsonl", "errors.jsonl"):
        for raw in (run_dir / name).read_bytes().splitlines():
            entry = json.loads(raw)
            body, number = entry["response"]["body"], entry["batchrun"]["line"]
            assert number not in found
            found[number] = entry["custom_id"], body.get("choices") or body["error"]
    return found


@pytest.fixture(scope="module")
def ran(model_dir, tmp_path_factory) -> tuple[dict[int, tuple[str, Any]], dict[str, Any]]:
    """What came of the job, by its lines, and of the sound lines alone, by their ids."""
    folder = tmp_path_factory.mktemp("wild")
    lines = [FIRST]
    for name, (raw, _) in LINES.items():
        lines += [raw, behind(name)]
    (folder / "wild.jsonl").write_bytes(b"\n".join(lines))  # without a last newline
    (folder / "tame.jsonl").write_bytes(b"\n".join([FIRST, *map(behind, LINES)]) + b"\n")
    for name, code in (("wild", ExitCode.SOME_FAILED), ("tame", ExitCode.OK)):
        done = CliRunner().invoke(app, ["run", str(folder / f"{name}.jsonl"), "--model", str(model_dir())])
        assert done.exit_code == code, done.stderr
        assert all(letter.isprintable() or letter == "\n" for letter in done.stdout + done.stderr)
    return outcomes(folder / "wild.run"), dict(outcomes(folder / "tame.run").values())


@pytest.mark.parametrize(("name", "wanted"), [(name, wanted) for name, (_, wanted) in LINES.items()])
def test_a_line_gets_what_it_should_and_the_one_behind_it_its_answer(name, wanted, ran):
    found, alone = ran
    number = 2 + 2 * list(LINES).index(name)
    if wanted == BLANK:
        assert number not in found
    elif wanted == SOUND:
        assert found[number][1][0]["finish_reason"] in ("stop", "length")
    else:
        assert found[number][1]["code"] == wanted
        assert 0 < len(found[number][1]["message"]) < 400
    assert found[number + 1] == (f"behind {name}", alone[f"behind {name}"])


def test_every_line_has_one_outcome(ran):
    found, alone = ran
    blank = sum(wanted == BLANK for _, wanted in LINES.values())
    assert len(found) == 1 + 2 * len(LINES) - blank
    assert found[1] == ("first", alone["first"])


def test_every_code_of_a_line_is_met():
    promised = {"invalid_json_line", "invalid_request", "duplicate_custom_id", "unsupported_url", "unsupported_field"}
    promised |= {"context_length_exceeded", "empty_prompt"}
    assert {wanted for _, wanted in LINES.values()} == promised | {SOUND, BLANK}


@pytest.mark.parametrize("text", ["", "\n \r\n\t\n", "\ufeff"])
def test_a_job_of_nothing_is_an_empty_batch(text, model_dir, tmp_path):
    (tmp_path / "jobs.jsonl").write_text(text, encoding="utf-8")
    command = ["run", str(tmp_path / "jobs.jsonl"), "--model", str(model_dir()), "--json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == ExitCode.NOTHING_RUNNABLE
    assert json.loads(done.stdout)["error"]["code"] == "empty_batch"
    assert not (tmp_path / "jobs.run").exists()


def test_a_model_that_is_not_there_is_model_not_found(tmp_path):
    (tmp_path / "jobs.jsonl").write_bytes(FIRST)
    command = ["run", str(tmp_path / "jobs.jsonl"), "--model", str(tmp_path / "none"), "--json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == ExitCode.USAGE
    assert json.loads(done.stdout)["error"]["code"] == "model_not_found"
