"""A model directory and a job are data: nothing in them is executed, and nothing in them names a file."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from batchrun.cli import app
from batchrun.errors import ExitCode

# Code that would give itself away.
CODE = """
from pathlib import Path
Path({mark!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig): pass
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
LINES = [
    {"id": "chat", "messages": [{"role": "user", "content": "plum"}], "max_tokens": 2},
    {"id": "plain", "prompt": "apple", "max_tokens": 2},
]


@pytest.fixture
def here(tmp_path, monkeypatch, model_dir) -> Path:
    """The working directory, with a job and a model directory of its own."""
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path / "jobs.jsonl", LINES)
    shutil.copytree(model_dir(), tmp_path / "model")
    return tmp_path


@pytest.fixture
def command(here) -> Callable[..., Result]:
    def call(name: str, *args: str) -> Result:
        return CliRunner().invoke(app, [name, "jobs.jsonl", "--model", "model", *args], catch_exceptions=False)

    return call


def write_job(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))


def outcomes(run_dir: Path) -> dict[str, Any]:
    """By id the texts of a line, or its error."""
    found: dict[str, Any] = {}
    for name in ("results.jsonl", "errors.jsonl"):
        for raw in (run_dir / name).read_text(encoding="utf-8").splitlines():
            line = json.loads(raw)
            body = line["response"]["body"]
            found[line["custom_id"]] = body.get("choices") or body["error"]
    return found


# --- weights


class Executed:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "executed")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread_with_the_way_to_convert_them(name, command, here):
    mark = here / "mark"
    (here / "model" / "model.safetensors").unlink()
    torch.save({"weights": Executed(mark)}, here / "model" / name)
    done = command("run")
    assert done.exit_code == ExitCode.USAGE
    told = " ".join(done.stderr.split())
    assert f"pickle files ({name})" in told
    assert "Convert it: load it with transformers where you trust it, then save_pretrained(DIR)." in told
    assert not mark.exists()
    assert not (here / "jobs.run").exists()


def test_pickled_weights_beside_safetensors_are_not_read(command, here):
    mark = here / "mark"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Executed(mark), here / "model" / name)
    assert command("run").exit_code == ExitCode.OK
    assert not mark.exists()
    # The files are what they are taken for: whoever unpickles one runs it.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(here / "model" / "optimizer.pt", weights_only=True)
    torch.load(here / "model" / "optimizer.pt", weights_only=False)
    assert mark.exists()


# --- code in a model directory


CONFIGS = ["config.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize(
    "where",
    [
        *(pytest.param([name], id=name) for name in CONFIGS),
        pytest.param(CONFIGS, marks=[pytest.mark.own_process, pytest.mark.slow], id="in the worker"),
    ],
)
def test_code_in_a_model_directory_is_not_executed(where, command, here):
    plain = command("run", "-o", "plain.run")
    assert plain.exit_code == ExitCode.OK
    mark = here / "mark"
    (here / "model" / "own.py").write_text(CODE.format(mark=str(mark)))
    (here / "model" / "custom_generate").mkdir()
    (here / "model" / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    names = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnModel",
        "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"],
    }
    for name in where:
        change(here / "model" / name, auto_map=names, tokenizer_class="OwnTokenizer", architectures=["OwnModel"])
    assert command("plan").exit_code == ExitCode.OK
    done = command("run")
    assert done.exit_code == ExitCode.OK, done.stderr
    assert outcomes(here / "jobs.run") == outcomes(here / "plain.run")
    assert not mark.exists()
    exec((here / "model" / "own.py").read_text(), {})  # the code is what it is taken for
    assert mark.exists()


def test_a_model_type_that_only_its_own_code_knows_is_refused(command, here):
    mark = here / "mark"
    (here / "model" / "own.py").write_text(CODE.format(mark=str(mark)))
    change(here / "model" / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    for name in ("plan", "run"):
        done = command(name)
        assert done.exit_code == ExitCode.USAGE
        assert "Models of type 'own'" in done.stderr
        assert "Supported: " in done.stderr
    assert not mark.exists()


def test_nothing_can_ask_for_remote_code(command, here):
    assert command("run", "--trust-remote-code").exit_code == ExitCode.USAGE
    (here / "settings.toml").write_text("trust_remote_code = true\n")
    assert command("run", "--config", "settings.toml").exit_code == ExitCode.USAGE
    assert not (here / "jobs.run").exists()


# --- chat templates

HOSTILE_TEMPLATES = {
    "globals": "{{ lipsum.__globals__['os'].system('touch mark') }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.popen('touch mark').read() }}",
    "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}{% endfor %}",
    "by attr": "{{ ''|attr('__class__')|attr('__mro__')|first }}",
    "by map": "{{ [messages]|map(attribute='__class__.__mro__')|list }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "another file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch mark') }}",
    "a change of the messages": "{% set _ = messages.append(1) %}",
    "a range without end": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an exception of its own": "{{ raise_exception('\x1b[2J no') }}",
}


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES.keys())
def test_a_hostile_template_is_the_error_of_its_lines(template, command, here):
    change(here / "model" / "tokenizer_config.json", chat_template=template)
    done = command("run")
    assert done.exit_code == ExitCode.SOME_FAILED, done.stderr
    found = outcomes(here / "jobs.run")
    # What is out of reach is an error, or nothing at all.
    refused = ("invalid_request", "the chat template refuses these messages:")
    assert (found["chat"]["code"], found["chat"]["message"][:41]) in (
        refused,
        ("empty_prompt", "the prompt has no tokens"),
    )
    assert found["plain"][0]["finish_reason"] in ("stop", "length")
    assert not (here / "mark").exists()
    assert all(letter.isprintable() or letter == "\n" for letter in done.stdout + done.stderr)


def test_what_a_chat_says_is_no_template(command, here, model_dir):
    said = "{{ 7 * 7 }} {% raw %} {# x #} {{ lipsum.__globals__['os'].system('touch mark') }}"
    write_job(here / "jobs.jsonl", [{"id": "a", "messages": [{"role": "user", "content": said}], "max_tokens": 1}])
    change(here / "model" / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert command("run").exit_code == ExitCode.OK
    [line] = (here / "jobs.run" / "results.jsonl").read_text().splitlines()
    from batchrun.tokenizer import load_tokenizer

    [ids] = load_tokenizer(here / "model").encode_batch([said])
    assert json.loads(line)["response"]["body"]["usage"]["prompt_tokens"] == len(ids)
    assert not (here / "mark").exists()
