"""Write the pages of docs/ that follow from the code.

python scripts/generate_docs.py          # write them
python scripts/generate_docs.py --check  # exit with 1 where one is not current
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import orjson
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from batchrun import bench, check, config, diff, review, status
from batchrun.cli import app
from batchrun.errors import ExitCode
from batchrun.formats import job, plan, results, rundir, source, watch
from batchrun.planning.order import ORDERS
from batchrun.prefix.groups import GROUPINGS
from batchrun.report import limit, records
from batchrun.request import Endpoint, FinishReason, LineFault, Result, Usage
from batchrun.schedule.step import Step

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTE = "<!-- Written by scripts/docs from the code: change it there. -->"


def pages() -> dict[str, str]:
    """Every generated page by its file name."""
    return {"cli.md": _cli(), "configuration.md": _configuration(), "formats.md": _formats()}


# --- cli.md -------------------------------------------------------------------------------------------------------

CLI = """# Command line

Results and tables go to standard output, as do the bad lines that `check` finds; progress, bad lines of other commands
and failures go to standard error. Flags win over the file given with `--config`
([configuration.md](configuration.md)).

SIGINT and SIGTERM end a run between two steps, with exit code 75; a second signal ends it at once.
"""

EXIT_CODES = {
    ExitCode.OK: "all requests succeeded",
    ExitCode.INTERNAL: "internal failure",
    ExitCode.USAGE: "a flag, a setting or an input is wrong, or the model is missing or refused",
    ExitCode.SOME_FAILED: "finished, and some lines failed, bad lines included; `diff`: some lines differ",
    ExitCode.NOTHING_RUNNABLE: "no line has an answer: an empty job, every line bad or failed, or a bad line under "
    "`--strict`",
    ExitCode.OUTPUT: "output cannot be written (disk full, permissions); the same command goes on",
    ExitCode.STOPPED: "stopped early; the same command goes on",
    ExitCode.RUN_DIR: "the run directory is in use, or it belongs to another run",
}


def _cli() -> str:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    helps = [_help(), *(f"## batchrun {name}\n\n{_help(name)}" for name in commands)]
    codes = _table(("code", "meaning"), [(str(code.value), EXIT_CODES[code]) for code in ExitCode])
    return _page(CLI, *helps, "## Exit codes", codes)


def _help(*command: str) -> str:
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="batchrun", terminal_width=80)
    return _code("text", shown.output)


# --- configuration.md ---------------------------------------------------------------------------------------------

CONFIGURATION = """# Configuration

A setting is taken from the first of these that has it: the command line, the file given with `--config`, the defaults
below. The file is TOML and needs only the keys that it changes; a key that does not exist is refused, with the nearest
one that does.

What a line of the job says itself wins over all of them ([sampling.md](sampling.md)).
"""


def _configuration() -> str:
    sections = ["## Settings", _settings(config.RunConfig)]
    for name, field in config.RunConfig.model_fields.items():
        if _is_section(field.annotation):
            sections += [f"## [{name}]", inspect.getdoc(field.annotation) or "", _settings(field.annotation)]
    toml = (config.configs_dir() / "default.toml").read_text(encoding="utf-8")
    return _page(
        CONFIGURATION,
        *sections,
        "## Schedule orders",
        _policies(ORDERS),
        "## Groupings",
        _policies(GROUPINGS),
        "## Defaults",
        "`configs/default.toml`:",
        _code("toml", toml),
    )


def _settings(section: type[BaseModel]) -> str:
    schema = section.model_json_schema()["properties"]
    rows = []
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            continue
        values = "size" if config.Size in get_args(field.annotation) else _values(schema[name])
        default = schema[name].get("default")
        shown = "" if default is None else f"`{orjson.dumps(default).decode()}`"
        rows.append((f"`{name}`", values, shown, field.description or ""))
    return _table(("key", "value", "default", "meaning"), rows)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _values(schema: dict[str, Any]) -> str:
    """What a setting may be, from its JSON schema."""
    chosen = next((part for part in schema.get("anyOf", ()) if part["type"] != "null"), schema)
    if "enum" in chosen:
        return ", ".join(f"`{value}`" for value in chosen["enum"])
    if chosen["type"] == "array":
        return f"list of {chosen['items']['type']}s"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_number(chosen[key])}" for key, sign in bounds.items() if key in chosen]
    return " ".join([chosen.get("format", chosen["type"]), ", ".join(limits)]).strip()


def _number(value: float) -> str:
    return {2**31: "2³¹", 2**64: "2⁶⁴"}.get(value, str(value))


def _policies(named: dict[str, Any]) -> str:
    return "\n".join(f"- {_first_paragraph(policy)}" for policy in named.values())


# --- formats.md ---------------------------------------------------------------------------------------------------

FORMATS = """# Files

## Job

Tables, URLs and directories are made into such a file first ([sources.md](sources.md)).

A job is a JSON Lines file, plain or compressed (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`), in UTF-8. Blank lines are skipped
and still counted, so that line numbers are those of an editor. A line has OpenAI's batch form

```json
{"custom_id": "r1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello", "max_tokens": 64}}
```

or the plain form, with the fields of the body beside an optional `id` (or `custom_id`):

```json
{"id": "r2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, "temperature": 0.7}
```

A line without an id is `line-<number>`. `url` is {endpoints}, line by line; in the plain form
`messages` stands for the first and `prompt` for the second.

- `messages`: roles are {roles} (`developer` is read as `system`); `content` is a text or a list of
  `{"type": "text"}` parts, which are joined with line breaks, as in vLLM; `name`, `tool_call_id` and an assistant's
  `tool_calls` are passed on (their arguments as objects). The model's chat template makes the prompt.
- `prompt`: a text, a list of texts, a list of token ids, or a list of such lists. A line with several prompts gives one
  result line with as many choices. Token ids are taken as they are.
- A field that is `null` is as good as absent.
- `batchrun`: `expected_tokens` is a guess of the answer's length, for the plan alone; `fault` is why a row of a table
  could not be made into this line, which is an error then.
- `model` is informative: the model is the one given with `--model`; another name is a warning in the report.

### Fields that say how to answer
"""

# What the fields mean that are no settings of [sampling].
MEANINGS = {
    "model": "Informative; another name than that of `--model` is a warning.",
    "max_tokens": "Tokens of the answer at most; 0 with `echo` alone.",
    "max_completion_tokens": "The same under its newer name; it wins over `max_tokens`.",
    "seed": "Seed of the answer; choice i uses seed + i.",
    "n": "Answers to each prompt; the choices of the first prompt come first.",
    "logit_bias": "Added to the logits of tokens.",
    "bad_words": "Texts that the answer must not have, as tokens at the start of a text and behind a space.",
    "truncate_prompt_tokens": "Only the last so many tokens of the prompt count; -1: as many as leave room for one of "
    "the answer, which is cut then.",
    "logprobs": "In a chat true or false, in a completion the number of alternatives: log-probabilities of the "
    "answer's tokens by the model's own distribution, before penalties, temperature and whatever cuts it.",
    "tools": "Functions that the model may call: the chat template gets them, and calls in the answer become "
    "`message.tool_calls`; an error where the template does nothing with them.",
    "tool_choice": "`none` is as if there were no `tools`. `required`: the answer is calls of them, one at least; "
    "with a function's name it is one call of that; `allowed_tools` is about some of them ([calls of "
    "tools](sampling.md#calls-of-tools)).",
    "parallel_tool_calls": "Whether an answer may call more than one function.",
    "chat_template_kwargs": "Further variables of the chat template.",
    "reasoning_effort": "The chat template's variable of this name; an error where the template does not have it.",
    "documents": "As `reasoning_effort`.",
    "add_generation_prompt": "Of a chat: whether the prompt ends where the assistant begins to speak; it does.",
    "continue_final_message": "Of a chat: the answer goes on with the last message, and `add_generation_prompt` is "
    "false.",
    "include_reasoning": "Whether the result has what the model thought; it does.",
    "add_special_tokens": "Whether the tokenizer puts its own (BOS, for one) around a text; around a completion's "
    "it does, as the template of a chat has written them.",
    "top_logprobs": "Of a chat with `logprobs`: likeliest tokens to name at each place.",
    "echo": "Of a completion: its text begins with the prompt, and `logprobs` with those of the prompt; with "
    "`max_tokens` 0 there is nothing else.",
    "prompt_logprobs": "Likeliest tokens to name at each place of the prompt, beside its own ([logprobs]"
    "(sampling.md#logprobs)).",
    "response_format": "What the answer must be: with `json_schema` JSON by its `schema`, with `json_object` any "
    "object ([structured outputs](sampling.md#structured-outputs)).",
    "structured_outputs": "vLLM's name for it, with one of `json` (a schema), `regex`, `choice` (a list of texts), "
    "`grammar` (Lark or GBNF) and `json_object`; `disable_any_whitespace` and `whitespace_pattern` say how JSON is "
    "written.",
    "guided_json": "The older name of `structured_outputs.json`.",
    "guided_regex": "The older name of `structured_outputs.regex`.",
    "guided_choice": "The older name of `structured_outputs.choice`.",
    "guided_grammar": "The older name of `structured_outputs.grammar`.",
    "guided_json_object": "The older name of `structured_outputs.json_object`.",
    "guided_whitespace_pattern": "The older name of `structured_outputs.whitespace_pattern`.",
}

NOT_BUILT = """### Fields that are accepted only where they change nothing

They are OpenAI's and vLLM's, and not supported yet. Any other value than these is that line's error,
`unsupported_field`, and never silently ignored.
"""

INFORMATIVE = """### Fields that say nothing about the answer

They are accepted and have no effect: {names}.

Any other field is not known: it is ignored, and a warning counts the lines that have it.
"""

FAULTS = """## Bad lines

Every line is checked before the model is loaded. A bad line becomes one line of `errors.jsonl` and the rest of the job
runs; with `--strict` nothing runs (exit code 4).
"""

CODES = {
    "invalid_json_line": "not a JSON object, not UTF-8, or longer than {limit} MiB",
    "invalid_row": "a row of a table has no prompt, or the template refuses it",
    "invalid_request": "a field is missing or has a wrong value, or the chat template refuses the messages",
    "duplicate_custom_id": "an earlier line has this `custom_id`; the earlier one runs",
    "unsupported_url": "another endpoint",
    "unsupported_field": "a field that is known and not supported yet",
    "context_length_exceeded": "the prompt leaves no room for an answer in the model's context or in the KV memory",
    "empty_prompt": "the prompt has no tokens",
}

RUN_DIRECTORY = """## Run directory

`batchrun run jobs.jsonl` writes `jobs.run/`, or the directory given with `-o`:

| file | holds |
| --- | --- |
| `results.jsonl` | one line for each line of the job that succeeded |
| `errors.jsonl` | one line for each line of the job that failed |
| `replaced.jsonl` | lines of these two that were run again, as they were before; there after a retry |
| `run.json` | status, counts, fingerprint, job and settings |
| `plan.json` | what was planned |
| `steps.jsonl` | one line for each step, unless `output.steps_log` is false |
| `report.json`, `report.html` | what happened, for programs and for people |
| `run.log` | the log |
| `job.jsonl` | the job itself, where it came from standard input, a URL, a table or several files |
| `columns.parquet` | the columns of a table, where `--results` wants them beside the answers |
| `lock` | held while a process writes here; the lock of a dead process is no lock |

Every JSON document of ours begins with `schema_version` ({version}). Documents are written beside their place and then
renamed, so a reader sees the old one or the new one.

**The same command again** goes on where the last one stopped, or says that the run is finished. What is finished is
read from the result and error lines themselves; a torn last line is cut off. Lines that failed are not run again; that
is what a retry is for. If the job, the model, its template, the dtype or a default of sampling has changed, the
directory is refused (exit code 76) with the difference named; `--fresh` moves the old run to `<directory>.1` (`.2`,
...) and starts anew.

**A retry** (`batchrun retry jobs.run`) runs lines again and puts what they get in the place of what they had. It takes

- without a choice, every failed line but those that the job file itself shows to be bad: the file is the same, so they
  would fail in the same way (a line that is too long for the context or the KV memory is taken);
- with `--code CODE`, the failed lines with this code, bad ones excepted as before;
- with `--finish-reason length`, the lines with an answer that its token limit cut short. `--max-tokens` must give a
  larger one; lines that it would not make longer, and those that fill the model's context, stay as they are.

Both choices together take the lines of both. Settings are those of the run, from `run.json`, but for the ones that are
given to the retry; what ends a run early (`--until`, `--timeout`, `--max-errors`) holds for one start only.
`--max-tokens` is the limit of the lines that are taken, whatever limit they have themselves. Seeds are the same. Lines
of the run that remain are run too, with their own limits.

The lines are written to `replaced.jsonl` and noted in `run.json` before they are taken out of the two files; from then
on they remain, and the run is unfinished. Where a retry was stopped or killed, the same command goes on with it: what
it has run already is not chosen again. `batchrun run` goes on too, with the settings of the run.

**Closing a run** (`batchrun close jobs.run`) ends an unfinished one for good: each line that remains becomes an error
line, `batch_cancelled` or with `--expired` `batch_expired` (a bad line its own error), and the status is `cancelled`.
The run is finished then; a retry can run its lines again. A line that an unfinished retry had taken out is closed as
well, and what it was stays in `replaced.jsonl`.
"""

RESULTS = """## results.jsonl

Lines in OpenAI's batch output form, in the order in which requests finish (`--results-order input` sorts them at the
end). `finish_reason` is `stop`, `length` or `tool_calls` (of an answer that ended by itself and calls functions of its
own choice); `cached_tokens` are the prompt tokens whose KV a shared prefix computed. Our own fields are under
`batchrun`: the `line` of the job, its prefix-sharing `group` or null, the `seed` used for the first choice, `attempts`,
how often it was tried, retries included, and `dedup_of`: the custom_id of the line whose answer this one got, since it
must be the same, or null. One line, spread out:
"""

ERRORS = """## errors.jsonl

A line that was rejected has the same form, with status code 400 and OpenAI's error object as the body:
"""

UNRUN = """A line that got no answer has no response, and says why under `error`:
"""

UNRUN_CODES = {
    "engine_quarantined": "it brought the worker down again and again, or its logits were no numbers",
    "request_timeout": "it took longer than `--request-timeout`",
    "batch_cancelled": "`batchrun close` ended the run",
    "batch_expired": "`batchrun close --expired` ended the run",
}


STEPS = """One line for each forward pass, in columns. All but `record` follows from the plan and from which
answers ended when. After a resume `index` counts from 0 again.

- `chunks`: some tokens of one sequence each, in the order of the step's rows; their columns are below.
- `prefix_reads`: rows `[first_row, first_row + rows)` attend to the first `length` tokens of `sequence`, a shared
  prefix; `position` is where those begin in the prompt, and `level` how many shared prefixes lie above it.
- `releases`: sequences whose pages return to the pool, before anything else of the step.
- `grants`: which `page` is then given to which `sequence`.
- `record`: how the step ran, below.
"""


def _formats() -> str:
    intro = FORMATS.replace("{endpoints}", " or ".join(f"`{endpoint}`" for endpoint in Endpoint))
    intro = intro.replace("{roles}", ", ".join(f"`{role}`" for role in job._PLAIN_ROLES))
    informative = INFORMATIVE.format(names=_names(sorted(job._INFORMATIVE)))
    codes = [(f"`{code}`", text.format(limit=job.MAX_LINE_BYTES >> 20)) for code, text in CODES.items()]
    return _page(
        intro,
        _answer_fields(),
        NOT_BUILT,
        _neutral_fields(),
        informative,
        FAULTS,
        _table(("code", "the line"), codes),
        RUN_DIRECTORY.format(version=rundir.SCHEMA_VERSION),
        *_examples(),
        *_document("run.json", rundir.RunFile, records.RequestCounts, rundir.Retry, source.Source, source.Shard),
        *_document(
            "plan.json",
            plan.PlanFile,
            records.TokenCounts,
            records.KvUse,
            records.GroupSummary,
            records.Estimate,
            records.OrderTried,
        ),
        *_document(
            "report.json",
            records.Report,
            records.Seconds,
            records.BoundSeconds,
            records.StepSeconds,
            records.Throughput,
            records.Warned,
            records.SlowRequest,
        ),
        "## steps.jsonl",
        STEPS,
        _columns(Step, ("sequence", "request", "start", "length", "samples")),
        *_document("Record of a step", records.StepRecord),
        *_document("batchrun check --json", check.Checked, LineFault, check.Lengths),
        *_document("batchrun status --json", status.RunProgress, watch.Holder),
        *_document("batchrun report --json", review.Review, limit.Limit, records.StartSummary),
        *_document("batchrun diff --json", diff.RunDiff, diff.DiffSide, diff.Difference),
        *_document("batchrun bench --json", bench.Bench, bench.Benched, bench.Timed),
    )


def _answer_fields() -> str:
    meanings = {name: field.description for name, field in config.SamplingConfig.model_fields.items()} | MEANINGS
    checks = job._ALL_CHECKS[Endpoint.COMPLETIONS] | job._ALL_CHECKS[Endpoint.CHAT]
    rows = [(f"`{name}`", _wanted(name, check), meanings[name] or "") for name, check in checks.items()]
    return _table(("field", "value", "meaning"), rows)


def _wanted(name: str, check: Callable[[str, Any], Any]) -> str:
    """What a field must be, in the words of its own error message."""
    if name == "logprobs":
        return f"true or false; an integer from 0 to {job.MAX_LOGPROBS}"
    try:
        check(name, object())
    except job._Fault as fault:
        found = re.search(r"must be (.*), and is", str(fault))
        assert found is not None
        return (
            found[1]
            .replace(str(-(2**63)), "-2⁶³")
            .replace(str(2**63 - 1), "2⁶³ - 1")
            .replace(str(2**31 - 1), "2³¹ - 1")
        )
    raise AssertionError(f"{name} accepts anything")


def _neutral_fields() -> str:
    by_value: dict[str, list[str]] = {}
    for name, neutral in job._NOT_BUILT.items():
        by_value.setdefault(", ".join(f"`{orjson.dumps(value).decode()}`" for value in neutral), []).append(name)
    return _table(("value", "fields"), [(values, _names(names)) for values, names in by_value.items()])


def _examples() -> tuple[str, ...]:
    answer = Result(0, "Hello!", np.zeros(3, dtype=np.int32), FinishReason.STOP, Usage(24, 16, 3))
    result = results.result_line(
        [answer], custom_id="r1", line=1, endpoint=Endpoint.CHAT, model="demo", created=0, seed=7, group=2
    )
    fault = LineFault(3, "r3", "invalid_request", "temperature must be a number from 0 to 2, and is 9", "temperature")
    unrun = results.unrun_line("r4", 4, "request_timeout", "it took longer than 60 s (--request-timeout)", attempts=1)
    codes = _table(("code", "the line"), [(f"`{code}`", text) for code, text in UNRUN_CODES.items()])
    return RESULTS, _json(result), ERRORS, _json(results.error_line(fault)), UNRUN, _json(unrun), codes


def _document(name: str, kind: type, *inner: type) -> list[str]:
    """The sections of a JSON document: its dataclass, and those of its fields."""
    sections = [f"## {name}"]
    for each in (kind, *inner):
        title = [] if each is kind else [f"### {each.__name__}"]
        sections += [*title, _paragraphs(inspect.getdoc(each)), _fields(each)]
    return sections


def _fields(kind: type) -> str:
    """A table of the fields of a dataclass, with the words of its `Attributes` or of the comments beside them."""
    words = _attributes(kind) | dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", inspect.getsource(kind), re.MULTILINE))
    rows: dict[str, tuple[list[str], list[str]]] = {}
    for field in dataclasses.fields(kind):
        # Fields of one entry are one row.
        names, types = rows.setdefault(words.get(field.name, field.name), ([], []))
        names.append(field.name)
        types.append(_json_type(str(field.type)))
    if not words:
        return _table(("field", "value"), [(_names(names), types[0]) for names, types in rows.values()])
    return _table(
        ("field", "value", "meaning"),
        [
            (_names(names), ", ".join(dict.fromkeys(types)), text.replace("None", "null") if text != names[0] else "")
            for text, (names, types) in rows.items()
        ],
    )


def _json_type(annotation: str) -> str:
    """A field's type, in the words of JSON."""
    name = annotation.removesuffix(" | None")
    if name.startswith("tuple["):
        shown = f"list of {name[6:-6]}"
    elif name.startswith("list["):
        shown = f"list of {name[5:-1].replace('str', 'strings')}"
    elif name.startswith("dict["):
        shown = "object"
    else:
        words = {"str": "string", "int": "integer", "float": "number", "RunStatus": "string", "State": "string"}
        shown = words.get(name, name)
    return shown if name == annotation else f"{shown} or null"


def _attributes(kind: type) -> dict[str, str]:
    """The entries of a docstring's `Attributes` section by name."""
    section = re.search(r"^Attributes:\n((?:    .*\n?)+)", inspect.getdoc(kind) or "", re.MULTILINE)
    found = {}
    for entry in re.split(r"\n(?=    \w)", section[1].rstrip() if section else ""):
        names, _, text = entry.strip().partition(": ")
        found |= dict.fromkeys(names.split(", "), " ".join(text.split())) if text else {}
    return found


def _columns(kind: type, names: Iterable[str]) -> str:
    words = _attributes(kind)
    return _table(("column", "holds"), [(f"`{name}`", words[name].partition(", ")[2]) for name in names])


# --- Markdown -----------------------------------------------------------------------------------------------------


def _page(*sections: str) -> str:
    return "\n\n".join([NOTE, *(section.strip() for section in sections)]) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
        for row in (head, ("---",) * len(head), *rows)
    )


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _json(line: bytes) -> str:
    return _code("json", orjson.dumps(orjson.loads(line), option=orjson.OPT_INDENT_2).decode())


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _first_paragraph(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n", 1)[0].split())


def _paragraphs(doc: str | None) -> str:
    """The prose of a docstring: what stands before its sections."""
    return re.split(r"\n\n(?:Attributes|Args|Raises|Returns):", doc or "", maxsplit=1)[0]


def main() -> None:
    check = "--check" in sys.argv[1:]
    old = []
    for name, text in pages().items():
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            old.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if old:
        print(f"not current, run scripts/docs: {', '.join(old)}" if check else f"written: {', '.join(old)}")
    sys.exit(check and bool(old))


if __name__ == "__main__":
    main()
