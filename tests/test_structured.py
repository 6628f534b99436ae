"""Answers that follow grammars, through whole runs of real models whose logits are nearly flat: what is finished is
what was asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from faulty import build_faulty_engine
from jsonschema import Draft202012Validator
from schemas import Schema, make_schemas

import batchrun
from batchrun import pipeline

QUICK = 36
PROMPTS = ["The quick brown fox", "Numbers: 1 2 3", "apple pear plum"]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(model: Path | str, folder: Path, lines: list[dict[str, Any]], **options: Any) -> dict[str, dict[str, Any]]:
    """The first choice of each result line, and the errors, by custom_id."""
    out = folder / f"{len(list(folder.iterdir()))}.run"
    batchrun.run(write(folder / "jobs.jsonl", lines), model=str(model), out=out, **options)
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    failed = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    results = {line["custom_id"]: line["response"]["body"]["choices"][0] for line in found}
    return results | {line["custom_id"]: line for line in failed}


def schema_lines(schemas: list[Schema]) -> list[dict[str, Any]]:
    """Each of them greedy or drawn, with free and with little whitespace, by one field or another."""
    lines = []
    for i, schema in enumerate(schemas):
        fields = [
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "strict": True, "schema": schema},
                }
            },
            {"structured_outputs": {"json": schema, "disable_any_whitespace": True}},
            {"guided_json": json.dumps(schema)},
        ]
        how = {"temperature": [1.0, 0.7, 0][i % 3], "max_tokens": 300, "seed": i}
        lines.append({"id": f"s{i}", "prompt": PROMPTS[i % 3], **how, **fields[(i // 3) % 3]})
    return lines


def check_schemas(model: Path | str, folder: Path, schemas: list[Schema], least: float) -> None:
    found = run(model, folder, schema_lines(schemas))
    assert len(found) == len(schemas)
    finished = 0
    for i, schema in enumerate(schemas):
        choice = found[f"s{i}"]
        assert choice["finish_reason"] in ("stop", "length"), schema
        if choice["finish_reason"] == "stop":
            finished += 1
            Draft202012Validator(schema).validate(json.loads(choice["text"]))
    assert finished >= least * len(schemas)


def test_finished_answers_follow_their_schemas(model_dir, tmp_path):
    check_schemas(model_dir(), tmp_path, make_schemas(QUICK), 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "demo"])
@pytest.mark.parametrize("seed", [1, 2])
def test_finished_answers_follow_many_schemas(model_dir, tmp_path, model, seed):
    check_schemas(model_dir() if model == "tiny" else "demo", tmp_path, make_schemas(200, seed), 0.6)


OTHERS: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2,4}"}},
    {"guided_regex": "(ü|é)+ ?!"},
    {"guided_regex": "[^a-z\n]{1,8}"},
    {"structured_outputs": {"choice": ["yes", "no", "maybe so", "日本"]}},
    {"guided_choice": ["a", "ab", "abc"]},
    {"guided_grammar": 'root ::= "<" [0-9]+ ">" | "(" root ")"'},
    {"structured_outputs": {"grammar": 'start: "<" /[0-9]+/ ">" | "(" start ")"'}},
    {"response_format": {"type": "json_object"}},
]


def is_right(how: dict[str, Any], text: str) -> bool:
    said = {**how, **how.get("structured_outputs", {})}
    if regex := said.get("regex") or said.get("guided_regex"):
        return re.fullmatch(regex, text) is not None
    if choices := said.get("choice") or said.get("guided_choice"):
        return text in choices
    if "response_format" in said:
        return isinstance(json.loads(text), dict)
    depth = len(text) - len(text.lstrip("("))
    inner = text[depth : len(text) - depth]
    return text.endswith(")" * depth) and re.fullmatch("<[0-9]+>", inner) is not None


@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_other_grammars_are_followed(model_dir, tmp_path, model):
    lines = [
        {"id": f"{i}-{k}", "prompt": PROMPTS[k], "max_tokens": 120, "temperature": k % 2, **how}
        for i, how in enumerate(OTHERS)
        for k in range(3)
    ]
    found = run(model_dir() if model == "tiny" else "demo", tmp_path, lines)
    finished = {name: choice["text"] for name, choice in found.items() if choice["finish_reason"] == "stop"}
    for name, text in finished.items():
        assert is_right(OTHERS[int(name.split("-")[0])], text), (name, text)
    assert len({name.split("-")[0] for name in finished}) >= len(OTHERS) - 1


def mixed_lines() -> list[dict[str, Any]]:
    lines = schema_lines(make_schemas(12))
    lines += [{"id": f"o{i}", "prompt": PROMPTS[i % 3], "max_tokens": 60, **how} for i, how in enumerate(OTHERS)]
    lines += [{"id": f"f{i}", "prompt": PROMPTS[i % 3], "max_tokens": 20, "seed": i} for i in range(6)]
    return [{**line, "max_tokens": min(line["max_tokens"], 60), "temperature": 0} for line in lines]


def test_answers_are_the_same_whatever_is_shared_and_preempted(model_dir, tmp_path):
    lines = [{**line, "prompt": "The quick brown fox jumps over " + line["prompt"]} for line in mixed_lines()]
    model = model_dir()
    alone = run(model, tmp_path, lines, scheduler={"grouping": "none", "step_tokens": 8})
    shared = run(model, tmp_path, lines, scheduler={"grouping": "tree", "page_size": 4})
    assert shared == alone
    # 90 tokens at most for prompt and answer, 384 bytes a token and layer: memory for some two requests.
    little = run(
        model,
        tmp_path,
        lines,
        kv_memory=200 * 2 * 2 * 2 * 12 * 4,
        scheduler={"grouping": "tree", "page_size": 4, "expected_tokens": 1},
    )
    assert little == alone
    report = json.loads(
        max(tmp_path.glob("*.run"), key=lambda path: int(path.stem)).joinpath("report.json").read_text()
    )
    assert report["preemptions"] > 0


@pytest.mark.own_process
def test_answers_are_the_same_after_the_worker_was_lost(model_dir, tmp_path, monkeypatch):
    kills = {"id": "kills", "prompt": "Numbers: 7", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    lines = [kills, *mixed_lines()[::5]]
    sound = run(model_dir(), tmp_path, lines, in_process=True)
    monkeypatch.setenv("FAULTS", json.dumps({0: ["segfault", 5]}))
    monkeypatch.setattr(pipeline, "build_engine", build_faulty_engine)
    found = run(model_dir(), tmp_path, lines, step_timeout=30)
    assert found.pop("kills")["error"]["code"] == "engine_quarantined"
    del sound["kills"]
    assert found == sound


def test_bad_grammars_are_errors_of_their_lines_before_the_run(model_dir, tmp_path):
    def line(name: str, **how: Any) -> dict[str, Any]:
        return {"id": name, "prompt": PROMPTS[0], "max_tokens": 5, **how}

    lines = [
        line("schema", response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "x"}}}),
        line("regex", guided_regex="(a"),
        line("endless", guided_choice=["a"], ignore_eos=True),
        line("stopped", guided_choice=["a"], ignore_eos=True, stop_token_ids=[5]),
        line("sound", guided_choice=["a"]),
    ]
    found = run(model_dir(), tmp_path, lines)
    for name, field, reason in [
        ("schema", "response_format", "Invalid type: x"),
        ("regex", "guided_regex", "unclosed group"),
        ("endless", "guided_choice", "ignore_eos"),
    ]:
        error = found[name]["response"]["body"]["error"]
        assert (error["code"], error["param"]) == ("invalid_request", field)
        assert reason in error["message"]
    for name in ("stopped", "sound"):
        assert (found[name]["text"], found[name]["finish_reason"]) == ("a", "stop")

    from batchrun.check import check_job
    from batchrun.config import load_config

    config = load_config(model=str(model_dir()))
    checked = check_job(str(tmp_path / "jobs.jsonl"), config)
    assert [fault.custom_id for fault in checked.faults] == ["schema", "regex", "endless"]
    planned = pipeline.plan_job(str(tmp_path / "jobs.jsonl"), config)
    assert [fault.custom_id for fault in planned.faults] == ["schema", "regex", "endless"]


def test_limits_stops_and_least_lengths_of_answers_with_grammars(model_dir, tmp_path):
    common = {"prompt": PROMPTS[0], "temperature": 0}
    lines = [
        {"id": "cut", **common, "guided_regex": "[ab]{200}", "max_tokens": 7},
        {"id": "short", **common, "guided_choice": ["ab"], "min_tokens": 20, "max_tokens": 30},
        {"id": "long", **common, "guided_regex": "(a|b| )*", "min_tokens": 20, "max_tokens": 30},
        {"id": "stop", **common, "guided_regex": "[ab]{3}c[ab]{3}", "stop": "c", "max_tokens": 30},
    ]
    found = run(model_dir(), tmp_path, lines)
    assert found["cut"]["finish_reason"] == "length"
    assert re.fullmatch("[ab]{7,}", found["cut"]["text"])
    assert (found["short"]["text"], found["short"]["finish_reason"]) == ("ab", "stop")  # nothing else can follow
    assert len(found["long"]["text"]) >= 20
    assert re.fullmatch("[ab]{3}", found["stop"]["text"])  # a stop string ends an answer in the middle


def test_logprobs_are_those_of_the_model_without_its_mask(model_dir, tmp_path):
    line = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 8, "logprobs": 1}
    found = run(
        model_dir(),
        tmp_path,
        [{"id": "free", **line}, {"id": "masked", **line, "guided_regex": "[0-9]{4}"}],
    )
    free, masked = found["free"]["logprobs"], found["masked"]["logprobs"]
    assert found["masked"]["text"].isdigit()
    # The likeliest token of the first place is the same, and the one that was taken is named beside it.
    likeliest = max(free["top_logprobs"][0].items(), key=lambda item: item[1])
    assert dict([likeliest]).items() <= masked["top_logprobs"][0].items()
    assert masked["token_logprobs"][0] < likeliest[1]
