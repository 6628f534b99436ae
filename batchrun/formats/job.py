"""Reads job files: every non-blank line becomes a `JobLine` or a `LineFault`, and no line can harm the next.

A job is JSON Lines, plain or compressed, in OpenAI's batch form or the plain form, line by line.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import re
import reprlib
import shutil
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import zstandard

from batchrun.errors import OutputError, UsageError
from batchrun.formats.source import Source
from batchrun.request import Endpoint, Grammar, JobLine, LineFault, LineOptions, ToolChoice

MAX_LINE_BYTES = 256 << 20
MAX_CUSTOM_ID = 512  # characters
MAX_TOKEN_ID = MAX_COUNT = 2**31 - 1  # columns of them are int32
MAX_STOPS = 16
MAX_LOGPROBS = 20  # alternatives, as at OpenAI's
MAX_CHOICES = 128
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_CHOICE_TEXTS = 10_000  # that an answer may be one of

_BLOCK = 1 << 16  # bytes read at once: lines are then read where they were cut, in a cache
# How much is remembered of what lines say besides their messages or prompts: so many of it, each of so many bytes.
_REMEMBERED, _REMEMBERED_BYTES = 1 << 12, 1 << 12
_ZSTD_BLOCK = 1 << 11  # zstd packs up to 32,000-fold: 2 KiB can open to 64 MiB
_BOM = b"\xef\xbb\xbf"


# --- the file ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class JobSource:
    """A job file that can be read more than once, decompressed by its suffix (`.gz`, `.zst`)."""

    path: Path
    came_from: Source | None = None  # the files that its lines were put together from
    _fingerprint: str | None = field(default=None, init=False, repr=False)
    _repeated: dict[int, int] | None = field(default=None, init=False, repr=False)  # of `read_job`
    _where: Callable[[int], str] | None = field(default=None, init=False, repr=False)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        r"""Yield (1-based line number, line without its `\n`), blank lines too, in bounded memory.

        A line longer than `MAX_LINE_BYTES` comes cut to one byte more.

        Raises:
            UsageError: the file cannot be read, is damaged, or changed since it was last read.
        """
        digest = hashlib.sha256()
        number = 0
        head: list[bytes] = []  # the pieces read so far of a line whose end is not yet read
        head_bytes = 0
        try:
            for block in _blocks(self.path):
                piece, ended, rest = block.partition(b"\n")
                if head_bytes <= MAX_LINE_BYTES:
                    head.append(piece)
                    head_bytes += len(piece)
                if ended:
                    wholes = [b"".join(head)[: MAX_LINE_BYTES + 1]]
                    whole, ended, piece = rest.rpartition(b"\n")
                    if ended:
                        wholes.append(whole)
                    head, head_bytes = [piece], len(piece)
                    for whole in wholes:
                        digest.update(_without_hints(whole))
                        digest.update(b"\n")
                        for line in whole.split(b"\n"):
                            number += 1
                            yield number, line
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UsageError(
                f"{self.path}: reading failed after {number} lines: {error}",
                hint="The file may be damaged or cut short; copy or compress it again.",
            ) from error
        if head_bytes:
            line = b"".join(head)[: MAX_LINE_BYTES + 1]
            digest.update(_without_hints(line))
            yield number + 1, line
        if self._fingerprint not in (None, digest.hexdigest()):
            raise UsageError(f"{self.path} changed while it was being read.", hint="Start again when it is complete.")
        self._fingerprint = digest.hexdigest()

    def fingerprint(self) -> str:
        """Sha256 of the lines, uncompressed and without the hints that change no result, in hex; reads the file only
        if `lines()` has not yet come to its end.

        Raises:
            UsageError: as `lines()`.
        """
        if self._fingerprint is None:
            for _ in self.lines():
                pass
        assert self._fingerprint is not None
        return self._fingerprint

    def located(self, faults: list[LineFault]) -> list[LineFault]:
        """Faults of lines of this job, each with the place that its line had in a job of several files."""
        if self.came_from is None or len(self.came_from.files) < 2:
            return faults
        return [replace(fault, message=f"{fault.message} ({self.where(fault.number)})") for fault in faults]

    def where(self, number: int) -> str:
        """What a line of this job is called: `line 17`, or in a job of several files `line 17 of part-2.jsonl`."""
        if self._where is None:
            several = self.came_from is not None and len(self.came_from.files) > 1
            self._where = self.came_from.places() if self.came_from is not None and several else "line {}".format
        return self._where(number)

    def default_out(self) -> Path:
        """The run directory beside the job: `jobs.run` for `jobs.jsonl`, `jobs.jsonl.gz` and `jobs.jsonl.zst`."""
        packed = self.path.suffix.lower() in (".gz", ".zst")
        return (self.path.with_suffix("") if packed else self.path).with_suffix(".run")


def open_job(path: str | Path) -> JobSource:
    """The job at `path`, seen to be a readable file; standard input goes through `spool_stdin`.

    Raises:
        UsageError: it is missing, not a regular file, or not readable.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
    except FileNotFoundError:
        raise UsageError(f"There is no job file {path}.", hint="Check the path; `-` reads standard input.") from None
    except OSError as error:
        raise UsageError(
            f"The job file {path} cannot be read: {error.strerror}.", hint="Check the path and its permissions."
        ) from error
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a directory, not a job file.", hint="Name the .jsonl file in it.")
    if not stat.S_ISREG(mode):
        raise UsageError(
            f"{path} is not a regular file, and a job is read twice.",
            hint=f"Give `-` as the job and redirect: batchrun run - < {path}",
        )
    return JobSource(path)


def spool_stdin(destination: Path, stream: BinaryIO) -> JobSource:
    """Copy `stream` to `destination` and return the job that it is; an existing file is replaced whole, or not.

    Raises:
        OutputError: the copy cannot be written.
    """
    part = destination.with_name(destination.name + ".part")
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(stream, file, _BLOCK)
            file.flush()
            os.fsync(file.fileno())  # it may be the only one
        part.replace(destination)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(
            f"Standard input cannot be copied to {destination}: {error.strerror}.",
            hint="Check the free space and the permissions there, or give the job as a file.",
        ) from error
    return JobSource(destination)


def _blocks(path: Path) -> Iterator[bytes]:
    """The uncompressed bytes of a file, in blocks of bounded size."""
    with path.open("rb") as file:
        yield from unpacked(file, path.suffix)


def unpacked(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    """The uncompressed bytes of a file that is packed as its suffix says, in blocks of bounded size.

    Raises:
        OSError, EOFError, zlib.error, zstandard.ZstdError: it is damaged or cut short, or cannot be read.
    """
    if suffix.lower() == ".zst":
        yield from _zstd_blocks(file)
        return
    with gzip.open(file, "rb") if suffix.lower() == ".gz" else nullcontext(file) as plain:
        while block := plain.read(_BLOCK):
            yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Decompress frame after frame. (zstandard's own stream reader takes a file cut short for a whole one.)"""
    frame = None
    while packed := file.read(_ZSTD_BLOCK):
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            packed = b""
            if frame.eof:
                packed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


_SOUND_HINT = re.compile(
    rb'[ \t\r]*:[ \t\r]*\{[ \t\r]*"expected_tokens"[ \t\r]*:[ \t\r]*[1-9][0-9]{0,15}[ \t\r]*\}[ \t\r]*(?=[,}])'
)


def _without_hints(lines: bytes) -> bytes:
    """The lines as if none had a sound hint: each is cut out with one comma beside it.

    In valid JSON, what is cut out is a member of an object and no part of a text: the quote behind a comma or a brace
    opens a text, as no closing quote is followed by `batchrun`.
    """
    if b'"expected_tokens"' not in lines:
        return lines
    kept: list[bytes] = []
    for i, after in enumerate(lines.split(b'"batchrun"')):
        hint = _SOUND_HINT.match(after) if i else None
        before = kept[-1].rstrip(b" \t\r") if hint else b""
        if hint and before.endswith(b","):
            kept[-1] = before[:-1]
            after = after[hint.end() :]
        elif hint and before.endswith(b"{"):
            after = after[hint.end() :].removeprefix(b",").lstrip(b" \t\r")
        elif i:
            kept.append(b'"batchrun"')
        kept.append(after)
    return b"".join(kept)


# --- a line -----------------------------------------------------------------------------------------------------


def read_job(source: JobSource) -> Iterator[JobLine | LineFault]:
    """Yield one item for each non-blank line, in file order; a line's fault is its first.

    A line claims its `custom_id` whether it is sound or not, so that no id has two outcomes.

    Raises:
        UsageError: as `JobSource.lines`.
    """
    known = source._repeated
    taken: dict[str, int] = {}
    repeated: dict[int, int] = {}

    def first_line(custom_id: str, number: int) -> int:
        """The first line with this id. What one pass has found the next one need not remember every id for."""
        if known is not None:
            return known.get(number, number)
        first = taken.setdefault(custom_id, number)
        if first != number:
            repeated[number] = first
        return first

    where = source.where
    for number, line in source.lines():
        line = line.removeprefix(_BOM)
        if line and not line.isspace():
            item = _read_line(number, line, first_line, where)
            yield source.located([item])[0] if isinstance(item, LineFault) else item
    if known is None:
        source._repeated = repeated


def sound_lines(source: JobSource, limit: int | None) -> Iterator[JobLine]:
    """The lines that can be tried, of the first `limit`. Raises as `read_job`."""
    return (item for item in islice(read_job(source), limit) if isinstance(item, JobLine))


@dataclass(slots=True)
class JobLint:
    """What a job file holds, without its texts.

    Attributes:
        total: non-blank lines; `sound + len(faults)`.
        unknown_fields: sound lines that have the field, by field name.
        models: sound lines that name the model, by its name.
        fingerprint: as `JobSource.fingerprint`.
    """

    total: int = 0
    sound: int = 0
    faults: list[LineFault] = field(default_factory=list)
    unknown_fields: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""


def lint_job(source: JobSource, limit: int | None = None) -> JobLint:
    """Read the job once and count.

    Args:
        limit: look at this many non-blank lines from the top only; the fingerprint is of the whole file.

    Raises:
        UsageError: as `JobSource.lines`.
    """
    lint = JobLint()
    for item in islice(read_job(source), limit):
        lint.total += 1
        if isinstance(item, LineFault):
            lint.faults.append(item)
            continue
        lint.sound += 1
        if item.unknown_fields:
            lint.unknown_fields.update(item.unknown_fields)
        if item.model is not None:
            lint.models[item.model] += 1
    lint.fingerprint = source.fingerprint()
    return lint


class _Fault(Exception):
    """Leaves the checking of a line at its first fault; inside a body `param` is relative to it, as at OpenAI's."""

    def __init__(self, code: str, param: str | None, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def _invalid(param: str, value: Any, wanted: str) -> _Fault:
    found = "is missing" if value is None else f"is {_shown(value)}"
    return _Fault("invalid_request", param, f"{param} must be {wanted}, and {found}")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 60
_REPR.maxlevel = 2


def _shown(value: Any) -> str:
    """A value for a message: at most 60 characters, nothing unprintable, however large or deep it is."""
    text = json.dumps(value) if isinstance(value, bool) else _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _readable(reason: str) -> str:
    """What is wrong with a row, which may have words of the row: less than 400 characters, nothing unprintable."""
    reason = reason[:390]
    return reason if reason.isprintable() else ascii(reason)[1:391]


def _read_line(
    number: int, line: bytes, first_line: Callable[[str, int], int], where: Callable[[int], str]
) -> JobLine | LineFault:
    custom_id = f"line-{number}"
    try:
        row = _parse(line)
        is_openai = "body" in row or "url" in row or "method" in row
        custom_id = _custom_id(row, is_openai) or custom_id
        if (first := first_line(custom_id, number)) != number:
            message = f"custom_id {_shown(custom_id)} was taken by {where(first)}; that one stands, rename this one"
            raise _Fault("duplicate_custom_id", "custom_id", message)
        if type(own := row.get("batchrun")) is dict and type(reason := own.get("fault")) is str:
            raise _Fault("invalid_row", None, _readable(reason))
        unknown: list[str] = []
        if is_openai:
            endpoint, body = _openai_form(row, unknown)
            hints = _hints("batchrun", row.get("batchrun"), unknown)
        else:
            endpoint, body = _plain_form(row)
            hints = {}
        content, options, said = _read_body(endpoint, body, hints, unknown)
    except _Fault as fault:
        first_line(custom_id, number)  # it has an outcome: no line behind it may have another one by its name
        return LineFault(number, custom_id, fault.code, str(fault), fault.param)
    except (TypeError, ValueError, RecursionError) as error:  # what nobody has thought of ends no run
        first_line(custom_id, number)
        return LineFault(number, custom_id, "invalid_request", _readable(f"the line cannot be read: {error}"), None)
    messages, prompts = (content, None) if endpoint is Endpoint.CHAT else (None, content)
    # By place: by name it would take three times as long.
    return JobLine(
        number,
        custom_id,
        endpoint,
        options,
        messages,
        said.tools,
        said.template_kwargs,
        prompts,
        said.add_special_tokens,
        said.model,
        (*unknown, *said.unknown_fields),
    )


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _Fault("invalid_json_line", None, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _Fault("invalid_json_line", None, _json_fault(line, error)) from None
    if type(row) is not dict:
        raise _Fault("invalid_json_line", None, f"a line must be one JSON object, and is {_shown(row)}")
    return row


def _json_fault(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as bad:
        return f"not valid UTF-8: byte {bad.start + 1} of the line is 0x{line[bad.start]:02x}"
    found = f", found {_shown(text[error.pos : error.pos + 61])}" if error.pos < len(text) else ""
    return f"not valid JSON at column {error.pos + 1}: {error.msg}{found}"


def _custom_id(row: dict[str, Any], is_openai: bool) -> str | None:
    """The line's own id, or None. People number their plain lines: an integer `id` is taken as text."""
    name, wanted = "custom_id", f"a text of 1 to {MAX_CUSTOM_ID} characters"
    if (value := row.get(name)) is None and not is_openai:
        name, wanted = "id", f"{wanted} or an integer"
        value = row.get(name)
        value = str(value) if type(value) is int else value
    if value is not None and (type(value) is not str or not 0 < len(value) <= MAX_CUSTOM_ID):
        raise _invalid(name, value, wanted)
    return value


def _openai_form(row: dict[str, Any], unknown: list[str]) -> tuple[Endpoint, dict[str, Any]]:
    """Endpoint and body of a line of OpenAI's batch form."""
    if (method := row.get("method")) not in (None, "POST"):
        raise _invalid("method", method, "POST")
    if (url := row.get("url")) is None:
        raise _invalid("url", url, " or ".join(Endpoint))
    if (endpoint := _ENDPOINTS.get(url) if type(url) is str else None) is None:
        raise _Fault("unsupported_url", "url", f"url {_shown(url)} is not one of {', '.join(Endpoint)}")
    if type(body := row.get("body")) is not dict:
        raise _invalid("body", body, "an object")
    if not row.keys() <= _ENVELOPE:
        unknown += [_name(key) for key in row if key not in _ENVELOPE]
    return endpoint, body


def _plain_form(row: dict[str, Any]) -> tuple[Endpoint, dict[str, Any]]:
    """Endpoint and body of a line that has its prompt, or its messages, at the top."""
    has_prompt, has_messages = row.get("prompt") is not None, row.get("messages") is not None
    if has_prompt == has_messages:
        wanted = "either prompt or messages, not both" if has_prompt else "prompt, messages, or url and body"
        raise _Fault("invalid_request", "messages" if has_prompt else None, f"a line must have {wanted}")
    row.pop("id", None)
    row.pop("custom_id", None)
    return Endpoint.CHAT if has_messages else Endpoint.COMPLETIONS, row


class _Said(NamedTuple):
    """What a body says besides its messages or its prompts.

    Attributes:
        found: fields of `LineOptions` by name.
        options: they.
        hints: those in the body.
    """

    found: tuple[tuple[str, Any], ...]
    options: LineOptions
    hints: dict[str, Any]
    model: str | None
    tools: tuple[dict[str, Any], ...] | None
    template_kwargs: dict[str, Any] | None
    add_special_tokens: bool | None
    unknown_fields: tuple[str, ...]


def _read_body(
    endpoint: Endpoint, body: dict[str, Any], hints: dict[str, Any], unknown: list[str]
) -> tuple[tuple[Any, ...], LineOptions, _Said]:
    """Check every field: the messages or the prompts, then the others in the line's own order, and then the seed; null
    is as good as absent. What is checked by itself is taken out of the body.

    Args:
        hints: those that stand beside the body; they win over those in it.

    Returns:
        The messages or the prompts, the options, hints included, and all else that the body says.
    """
    content_field, read_content = _CONTENT[endpoint]
    if (given := body.pop(content_field, None)) is None:
        _said(endpoint, body)  # what is wrong with another field comes first
        raise _invalid(content_field, None, f"given for {endpoint}")
    content = read_content(given, unknown)
    seed = body.pop("seed", None)  # which may be another one in each line
    said = _said(endpoint, body)
    if seed is None and not hints and not said.hints:
        return content, said.options, said
    own = said.hints | hints
    if seed is not None:
        own["seed"] = _ALL_CHECKS[endpoint]["seed"]("seed", seed)
    return content, _options((*said.found, *own.items())), said


def _said(endpoint: Endpoint, body: dict[str, Any]) -> _Said:
    """Check every field of a body without its messages or prompts. Most lines of a job say the same there, to the
    letter, so it is checked once for all of them."""
    if not _INFORMATIVE.isdisjoint(body):
        body = {name: value for name, value in body.items() if name not in _INFORMATIVE}
    try:
        written = orjson.dumps(body)
    except TypeError:  # nested more deeply than orjson writes
        return _check_fields(endpoint, body)
    return _known(endpoint, written) if len(written) <= _REMEMBERED_BYTES else _check_fields(endpoint, body)


@functools.lru_cache(maxsize=_REMEMBERED)
def _known(endpoint: Endpoint, written: bytes) -> _Said:
    return _check_fields(endpoint, orjson.loads(written))


def _check_fields(endpoint: Endpoint, body: dict[str, Any]) -> _Said:
    checks = _ALL_CHECKS[endpoint]
    found: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in body.items():
        if value is None:
            continue
        if (check := checks.get(name)) is not None:
            found[name] = check(name, value)
        elif (neutral := _NOT_BUILT.get(name)) is not None:
            if not _is_one_of(value, neutral):
                message = f"{name} is not supported yet; leave it out (it is {_shown(value)})"
                raise _Fault("unsupported_field", name, message)
        elif name == "batchrun":
            hints = _hints(name, value, unknown)
        else:
            unknown.append(_name(name))
    model = found.pop("model", None)
    if (max_completion_tokens := found.pop("max_completion_tokens", None)) is not None:
        found["max_tokens"] = max_completion_tokens
    if found.get("max_tokens") == 0 and not found.get("echo"):
        raise _invalid("max_tokens", 0, "an integer of at least 1, or 0 with echo")
    for_template: dict[str, Any] = {}
    if not _TRANSLATED.isdisjoint(found):
        for_template = _translate(endpoint, found)
    said = tuple(found.items())
    options = _options(said)
    if options.min_tokens and options.max_tokens and options.min_tokens > options.max_tokens:
        raise _invalid("min_tokens", options.min_tokens, f"at most max_tokens ({options.max_tokens})")
    return _Said(
        said,
        options,
        hints,
        model,
        for_template.get("tools"),
        for_template.get("chat_template_kwargs"),
        for_template.get("add_special_tokens"),
        tuple(unknown),
    )


def _translate(endpoint: Endpoint, found: dict[str, Any]) -> dict[str, Any]:
    """Put fields that mean one thing by several, or by other names in each API, under the name that options have;
    returns what the chat template is given."""
    for_template: dict[str, Any] = {}
    calls = None
    if endpoint is Endpoint.CHAT:
        _chat_logprobs(found)
        for_template = {name: found.pop(name) for name in ("tools", "chat_template_kwargs") if name in found}
        calls = _tool_use(found, for_template)
        arguments = _template_arguments(found)
        if arguments:
            for_template["chat_template_kwargs"] = {**for_template.get("chat_template_kwargs", {}), **arguments}
    elif found.get("max_tokens") == 0:  # the prompt alone is looked at
        found |= {"max_tokens": 1, "prompt_only": True}
    if "add_special_tokens" in found:
        for_template["add_special_tokens"] = found.pop("add_special_tokens")
    _one_grammar(found, calls)
    if found.get("tool_choice") is ToolChoice.AUTO and found.get("grammar_field") == "response_format":
        # It is about what is said besides calls, which the answer may be instead.
        functions = [[tool["function"]["name"], {"type": "object"}] for tool in for_template["tools"]]
        many, otherwise = found.get("parallel_tool_calls", True), orjson.loads(found["grammar"].text)
        wanted = {"tools": functions, "many": many, "otherwise": otherwise}
        found["grammar"] = Grammar("tools", orjson.dumps(wanted).decode())
    return for_template


def _template_arguments(found: dict[str, Any]) -> dict[str, Any]:
    """What a chat says of its prompt by fields of their own, as the chat template gets it."""
    arguments = {name: found.pop(name) for name in _ARGUMENT_FIELDS if name in found}
    if arguments.get("continue_final_message"):
        if arguments.get("add_generation_prompt"):
            raise _invalid("add_generation_prompt", True, "false where continue_final_message is true")
        arguments["add_generation_prompt"] = False
    return arguments


def _tool_use(found: dict[str, Any], for_template: dict[str, Any]) -> Grammar | None:
    """Put whether a chat may call tools, or must, under the names that options have; returns the calls that it must
    make."""
    choice: str | _Named | _Allowed = found.pop("tool_choice", "auto")
    parallel = found.pop("parallel_tool_calls", True)
    if choice == "none":
        for_template.pop("tools", None)
    tools = for_template.get("tools", ())
    if isinstance(choice, _Allowed):
        tools = tuple(tool for tool in tools if tool["function"]["name"] in choice.names)
        if missing := choice.names - {tool["function"]["name"] for tool in tools}:
            raise _invalid("tool_choice.allowed_tools.tools", min(missing), "names of some of the tools")
        choice = choice.mode
        if choice == "auto":  # a model calls freely only what it was told of
            for_template["tools"] = tools
    if tools and not parallel:
        found["parallel_tool_calls"] = False
    if choice == "required" or isinstance(choice, _Named):
        found["tool_choice"] = ToolChoice.NAMED if isinstance(choice, _Named) else ToolChoice.REQUIRED
        found.pop("response_format", None)  # it is about what is said besides calls, and that is nothing
        return _forced_calls(choice, tools, parallel)
    if tools:
        found["tool_choice"] = ToolChoice.AUTO
    return None


def _forced_calls(choice: str | _Named, tools: tuple[dict[str, Any], ...], parallel: bool) -> Grammar:
    """Calls of one of the functions, or of the one that is named."""
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, _Named):
        functions = [function for function in functions if function["name"] == choice.name][:1]
        if not functions:
            raise _invalid("tool_choice.function.name", choice.name, "the name of one of the tools")
        parallel = False
    if not functions:
        raise _Fault("invalid_request", "tool_choice", f"tool_choice {_shown(choice)} needs tools, and there are none")
    wanted = [[function["name"], _parameters(function)] for function in functions]
    return Grammar("tools", _dumped("tools", {"tools": wanted, "many": parallel}))


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object whatever it says; without one there are none."""
    name, schema = function["name"], function.get("parameters")
    if not _FUNCTION_NAME.fullmatch(name):
        raise _invalid("tools", name, "functions whose names are of letters, digits, _, . and -, to be called for sure")
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    kind = schema.get("type", "object") if type(schema) is dict else None
    if kind != "object" and not (type(kind) is list and "object" in kind):
        raise _invalid(
            "tools", schema, f"functions whose parameters are a JSON schema of an object; those of {name} are"
        )
    if type(schema.get("x-guidance", {})) is not dict:
        raise _invalid("tools", schema, f"functions whose x-guidance is an object; that of {name} is none")
    return {**schema, "type": "object"}


def _chat_logprobs(found: dict[str, Any]) -> None:
    """A chat asks for logprobs by true or false, and for alternatives by their number; here both are one number."""
    wanted, alternatives = found.pop("logprobs", False), found.pop("top_logprobs", 0)
    if alternatives and not wanted:
        raise _invalid("top_logprobs", alternatives, "given with logprobs: true")
    if wanted:
        found["logprobs"] = alternatives


def _one_grammar(found: dict[str, Any], calls: Grammar | None) -> None:
    """Put the grammar of a line, by whichever field it has it, under one name.

    Args:
        calls: of tools, which the answer must make.
    """
    whitespace = found.pop("guided_whitespace_pattern", None)
    grammars = {"tool_choice": calls} | {name: found.pop(name) for name in _GRAMMARS if name in found}
    fields = [name for name, grammar in grammars.items() if grammar is not None]
    if not fields:
        return
    name = fields[0]
    if len(fields) > 1:
        raise _Fault("invalid_request", fields[1], f"{fields[1]} and {name} both say what the answer must be; give one")
    if found.get("bad_words"):
        message = f"bad_words with {name} may leave no token to choose; let the grammar say what is not wanted"
        raise _Fault("invalid_request", "bad_words", message)
    found["grammar"], found["grammar_field"] = grammars[name], name
    if whitespace is not None:
        found["grammar"] = _with_guidance(found["grammar"], whitespace_pattern=whitespace)


def _hints(path: str, hints: Any, unknown: list[str]) -> dict[str, Any]:
    """What a line says to batchrun alone; none of it changes results."""
    if hints is None:
        return {}
    if type(hints) is not dict:
        raise _invalid(path, hints, 'an object like {"expected_tokens": 200}')
    found = {}
    for name, value in hints.items():
        if (check := _HINTS.get(name)) is None:
            unknown.append(f"{path}.{_name(name)}")
        elif value is not None:
            found[name] = check(f"{path}.{name}", value)
    return found


@functools.lru_cache(maxsize=_REMEMBERED)
def _options(found: tuple[tuple[str, Any], ...]) -> LineOptions:
    """Most lines of a job say the same, so they share one object."""
    return LineOptions(**dict(found))


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """`in`, but true is not 1."""
    return any(value == choice and isinstance(value, bool) is isinstance(choice, bool) for choice in choices)


def _name(name: str) -> str:
    """An unknown field's name, fit to be shown."""
    return _shown(name)[1:-1]


# --- messages and prompts ---------------------------------------------------------------------------------------


def _messages(messages: Any, unknown: list[str]) -> tuple[dict[str, Any], ...]:
    if type(messages) is not list:
        raise _invalid("messages", messages, "a list of messages")
    if not messages:
        raise _Fault("empty_prompt", "messages", "messages is empty")
    read = []
    for i, message in enumerate(messages):
        if not (
            type(message) is dict
            and len(message) == 2
            and type(message.get("content")) is str
            and message.get("role") in _PLAIN_ROLES
        ):
            message = _message(f"messages[{i}]", message, unknown)
        read.append(message)
    return tuple(read)


def _message(path: str, message: Any, unknown: list[str]) -> dict[str, Any]:
    """One message as the chat template gets it."""
    if type(message) is not dict:
        raise _invalid(path, message, "an object with role and content")
    role = message.get("role")
    if type(role) is not str or role not in _ROLES:
        raise _invalid(f"{path}.role", role, f"one of {', '.join(_ROLES)}")
    for name, value in message.items():
        if name in _MESSAGE_FIELDS or value is None or value in ([], {}):
            continue
        if role == "assistant" and (name == "tool_calls" or name in _THOUGHTS):
            continue
        if name in ("tool_calls", "function_call", "audio"):
            raise _Fault("unsupported_field", f"{path}.{name}", f"{path}.{name} is not supported yet")
        unknown.append(f"messages.{_name(name)}")
    calls = message.get("tool_calls") if role == "assistant" else None
    content = message.get("content")
    read: dict[str, Any] = {"role": _ROLES[role]}
    # An assistant that calls tools need not say anything.
    read["content"] = "" if calls and content is None else _content(f"{path}.content", content)
    if calls:
        read["tool_calls"] = _tool_calls(f"{path}.tool_calls", calls)
    if role == "assistant" and (name := next((n for n in _THOUGHTS if message.get(n) is not None), None)) is not None:
        read["reasoning_content"] = _text(f"{path}.{name}", message[name])
    for name in ("name", "tool_call_id"):
        if (value := message.get(name)) is not None:
            read[name] = _text(f"{path}.{name}", value)
    return read


def _tool_calls(path: str, calls: Any) -> list[dict[str, Any]]:
    """Calls of an earlier turn, their arguments as objects: so templates want them."""
    if type(calls) is not list:
        raise _invalid(path, calls, "a list of calls")
    read = []
    for i, call in enumerate(calls):
        function = call.get("function") if type(call) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            raise _invalid(f"{path}[{i}]", call, 'an object like {"function": {"name": ..., "arguments": ...}}')
        arguments = function.get("arguments", {})
        if type(arguments) is str:
            try:
                arguments = orjson.loads(arguments or "{}")
            except orjson.JSONDecodeError:
                raise _invalid(f"{path}[{i}].function.arguments", arguments, "a JSON object as text") from None
        if type(arguments) is not dict:
            raise _invalid(f"{path}[{i}].function.arguments", arguments, "a JSON object as text")
        one = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        read.append(({"id": call["id"]} if type(call.get("id")) is str else {}) | one)
    return read


def _tools(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    if type(value) is not list:
        raise _invalid(name, value, "a list of functions")
    for i, tool in enumerate(value):
        if type(tool) is dict and tool.get("type") == "custom":
            raise _Fault("unsupported_field", f"{name}[{i}]", f"{name}[{i}] is a custom tool: {_NO_CUSTOM}")
        function = tool.get("function") if type(tool) is dict and tool.get("type") == "function" else None
        if type(function) is not dict or type(function.get("name")) is not str or not function["name"]:
            raise _invalid(f"{name}[{i}]", tool, 'an object like {"type": "function", "function": {"name": ...}}')
    return tuple(value)


class _Named(NamedTuple):
    """A function that the answer must call."""

    name: str


class _Allowed(NamedTuple):
    """Functions of which the answer may call any, or must call some."""

    mode: str  # auto or required
    names: frozenset[str]


def _tool_choice(name: str, value: Any) -> str | _Named | _Allowed:
    wanted = '"auto", "none", "required" or an object like {"type": "function", "function": {"name": ...}}'
    if type(value) is not dict:
        if value not in ("none", "auto", "required"):
            raise _invalid(name, value, wanted)
        return str(value)
    if value.get("type") == "allowed_tools":
        return _allowed_tools(f"{name}.allowed_tools", value.get("allowed_tools"))
    if value.get("type") == "custom":
        raise _Fault("unsupported_field", f"{name}.type", f"{name} of type 'custom' is not supported: {_NO_CUSTOM}")
    function = value.get("function") if value.get("type", "function") == "function" else None
    if type(function) is not dict or type(function.get("name")) is not str:
        raise _invalid(name, value, wanted)
    return _Named(function["name"])


def _allowed_tools(name: str, value: Any) -> _Allowed:
    wanted = 'an object like {"mode": "auto" or "required", "tools": [{"type": "function", "function": {"name": ...}}]}'
    if type(value) is not dict or value.get("mode") not in ("auto", "required") or not value.get("tools"):
        raise _invalid(name, value, wanted)
    return _Allowed(
        value["mode"], frozenset(tool["function"]["name"] for tool in _tools(f"{name}.tools", value["tools"]))
    )


def _template_kwargs(name: str, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _invalid(name, value, "an object")
    if taken := sorted(value.keys() & _TEMPLATE_ARGUMENTS):
        raise _invalid(f"{name}.{taken[0]}", value[taken[0]], "left out: it is not the template's")
    return value


def _content(path: str, content: Any) -> str:
    """A message's text; the parts of a list are joined with line breaks, as vLLM does it."""
    if type(content) is str:
        return content
    if type(content) is not list or not content:
        raise _invalid(path, content, "a text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if type(part) is not dict or type(part.get("type")) is not str:
            raise _invalid(f"{path}[{i}]", part, 'an object like {"type": "text", "text": ...}')
        if part["type"] != "text":
            message = f"content parts of type {_shown(part['type'])} are not supported yet, only text"
            raise _Fault("unsupported_field", f"{path}[{i}].type", message)
        texts.append(_text(f"{path}[{i}].text", part.get("text")))
    return "\n".join(texts)


def _prompts(prompt: Any, _unknown: list[str]) -> tuple[str | tuple[int, ...], ...]:
    if type(prompt) is list and prompt and type(prompt[0]) in (str, list):
        wanted = "a text" if type(prompt[0]) is str else "a list of token ids"
        for i, one in enumerate(prompt):
            if type(one) is not type(prompt[0]):
                raise _invalid(f"prompt[{i}]", one, f"{wanted} like the first")
        return tuple(_prompt(f"prompt[{i}]", one) for i, one in enumerate(prompt))
    return (_prompt("prompt", prompt),)


def _prompt(path: str, prompt: Any) -> str | tuple[int, ...]:
    if type(prompt) not in (str, list):
        raise _invalid(path, prompt, "a text, a list of token ids, or a list of either")
    if not prompt:
        raise _Fault("empty_prompt", path, f"{path} is empty")
    return prompt if type(prompt) is str else _token_ids(path, prompt)


# --- the other fields -------------------------------------------------------------------------------------------


def _number(low: float, high: float, *, low_too: bool = True) -> Callable[[str, Any], float]:
    wanted = f"a number from {low} to {high}" if low_too else f"a number above {low} and at most {high}"

    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (value == low and not low_too):
            raise _invalid(name, value, wanted)
        return float(value)

    return check


def _integer(low: int, high: int | None = None) -> Callable[[str, Any], int]:
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def check(name: str, value: Any) -> int:
        if type(value) is not int or value < low or (high is not None and value > high):
            like_one = type(value) is float and value.is_integer() and abs(value) < 2**53
            raise _invalid(name, value, f"{wanted} (write {int(value)})" if like_one else wanted)
        return value

    return check


def _max_tokens(name: str, value: Any) -> int:
    return 0 if type(value) is int and value == 0 else _integer(1)(name, value)  # 0 may go with echo


_top_k_as_given = _integer(-1, MAX_COUNT)


def _top_k(name: str, value: Any) -> int:
    return max(_top_k_as_given(name, value), 0)  # -1 and 0 both mean off


def _boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _invalid(name, value, "true or false")
    return value


def _text(name: str, value: Any) -> str:
    if type(value) is not str:
        raise _invalid(name, value, "a text")
    return value


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if type(value) is str else value
    if type(stops) is not list or len(stops) > MAX_STOPS or not all(type(s) is str and s for s in stops):
        raise _invalid(name, value, f"a text or a list of at most {MAX_STOPS} texts, none of them empty")
    return tuple(stops)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    wanted = f"from 0 to {MAX_TOKEN_ID}"
    if type(value) is not list:
        raise _invalid(name, value, f"a list of token ids {wanted}")
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) > MAX_TOKEN_ID):
        for i, token in enumerate(value):
            if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
                raise _invalid(f"{name}[{i}]", token, f"a token id {wanted}")
    return tuple(value)


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """JSON has token ids as texts there."""
    wanted = f"an object of at most {MAX_BIASES} token ids with numbers from -100 to 100"
    if type(value) is not dict or len(value) > MAX_BIASES:
        raise _invalid(name, value, wanted)
    read = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) <= MAX_TOKEN_ID):
            raise _invalid(name, token, f"{wanted}; the ids are")
        read[int(token)] = _BIAS(f"{name}.{token}", bias)
    return tuple(sorted(read.items()))


def _documents(name: str, value: Any) -> list[dict[str, Any]]:
    if type(value) is not list or not all(type(document) is dict for document in value):
        raise _invalid(name, value, "a list of objects")
    return value


def _completion_logprobs(name: str, value: Any) -> int | None:
    return None if value is False else _integer(0, MAX_LOGPROBS)(name, value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if type(value) is not list or len(value) > MAX_BAD_WORDS or not all(type(s) is str and s for s in value):
        raise _invalid(name, value, f"a list of at most {MAX_BAD_WORDS} texts, none of them empty")
    return tuple(value)


def _filled(name: str, value: Any) -> str:
    if type(value) is not str or not value:
        raise _invalid(name, value, "a text that is not empty")
    return value


def _json_schema(name: str, value: Any) -> Grammar:
    """A JSON schema, or one written as a text."""
    schema = value
    if type(value) is str:
        try:
            schema = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise _invalid(name, value, f"a JSON schema (as a text it is not valid JSON: {error.msg})") from None
    if type(schema) not in (dict, bool):
        raise _invalid(name, value, "a JSON schema, as an object or as the text of one")
    if type(schema) is dict and type(schema.get("x-guidance", {})) is not dict:
        raise _invalid(name, value, "a JSON schema whose x-guidance is an object")
    return Grammar("json", _dumped(name, schema))


def _dumped(name: str, value: Any) -> str:
    """A value of a line in JSON again, which can be nested less deeply than what is read."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise _Fault("invalid_request", name, f"{name} is nested too deeply") from None


def _any_object(name: str, value: Any) -> Grammar | None:
    return Grammar("json", '{"type":"object"}') if _boolean(name, value) else None


def _regex(name: str, value: Any) -> Grammar:
    return Grammar("regex", _filled(name, value))


def _lark(name: str, value: Any) -> Grammar:
    return Grammar("grammar", _filled(name, value))


def _choice(name: str, value: Any) -> Grammar:
    if (
        type(value) is not list
        or not 0 < len(value) <= MAX_CHOICE_TEXTS
        or not all(type(s) is str and s for s in value)
    ):
        raise _invalid(name, value, f"a list of 1 to {MAX_CHOICE_TEXTS} texts, none of them empty")
    return Grammar("choice", orjson.dumps(value).decode())


def _with_guidance(grammar: Grammar, **wanted: Any) -> Grammar:
    """A JSON schema that tells llguidance how it may be written; other grammars as they are."""
    if grammar.kind != "json":
        return grammar
    schema = orjson.loads(grammar.text)
    said = schema.pop("x-guidance", {}) if type(schema) is dict else {}
    inner = schema if type(schema) is dict else {"allOf": [schema]}
    return Grammar("json", orjson.dumps({"x-guidance": {**said, **wanted}, **inner}).decode())


def _structured(name: str, value: Any) -> Grammar | None:
    """vLLM's `structured_outputs`: one kind of grammar, and how JSON may be written."""
    if type(value) is not dict:
        raise _invalid(name, value, 'an object like {"json": {...}}')
    given = {kind: said for kind, said in value.items() if said is not None}
    for kind in given.keys() - _KINDS.keys() - _WRITING.keys():
        raise _Fault("unsupported_field", name, f"{name}.{_name(kind)} is not supported; there are {', '.join(_KINDS)}")
    found = {kind: _KINDS[kind](f"{name}.{kind}", said) for kind, said in given.items() if kind in _KINDS}
    grammars = [grammar for grammar in found.values() if grammar is not None]
    if len(grammars) > 1:
        raise _Fault(
            "invalid_request", name, f"{name} must have one of {', '.join(_KINDS)}, and has {', '.join(found)}"
        )
    writing = {kind: _WRITING[kind](f"{name}.{kind}", said) for kind, said in given.items() if kind in _WRITING}
    if not grammars:
        if given.keys() & _KINDS.keys() or not given:
            return None
        raise _Fault("invalid_request", name, f"{name} must have one of {', '.join(_KINDS)}")
    if writing.get("disable_any_whitespace"):
        return _with_guidance(grammars[0], whitespace_flexible=False)
    if (pattern := writing.get("whitespace_pattern")) is not None:
        return _with_guidance(grammars[0], whitespace_pattern=pattern)
    return grammars[0]


def _response_format(name: str, value: Any) -> Grammar | None:
    kind = value.get("type") if type(value) is dict else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _any_object(name, True)
    if kind != "json_schema":
        raise _invalid(name, value, "an object whose type is text, json_object or json_schema")
    described = value.get("json_schema")
    if type(described) is not dict or (schema := described.get("schema")) is None:
        raise _invalid(f"{name}.json_schema", described, 'an object like {"name": "...", "schema": {...}}')
    return _json_schema(f"{name}.json_schema.schema", schema)


def _truncate(name: str, value: Any) -> int:
    if value == 0:
        raise _invalid(name, value, "an integer of at least 1, or -1 for as many as fit")
    return _integer(-1, MAX_COUNT)(name, value)


_ENDPOINTS = {str(endpoint): endpoint for endpoint in Endpoint}
_ENVELOPE = {"custom_id", "method", "url", "body", "batchrun"}
_PLAIN_ROLES = ("system", "user", "assistant", "tool")
_ROLES = {role: role for role in _PLAIN_ROLES} | {"developer": "system"}
# Arguments of transformers' apply_chat_template, which are not variables of a template.
_TEMPLATE_ARGUMENTS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
}
_MESSAGE_FIELDS = {"role", "content", "name", "tool_call_id"}
_THOUGHTS = ("reasoning_content", "reasoning")  # vLLM's older and newer name
_NO_CUSTOM = "its input is no JSON, which no known template writes; only functions are"

_CONTENT: dict[Endpoint, tuple[str, Callable[[Any, list[str]], tuple[Any, ...]]]] = {
    Endpoint.CHAT: ("messages", _messages),
    Endpoint.COMPLETIONS: ("prompt", _prompts),
}

# What `structured_outputs` may have: kinds of grammars, and how JSON is written.
_KINDS: dict[str, Callable[[str, Any], Grammar | None]] = {
    "json": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
    "json_object": _any_object,
}
_WRITING: dict[str, Callable[[str, Any], Any]] = {
    "disable_any_whitespace": _boolean,
    "whitespace_pattern": _filled,
    "disable_fallback": _boolean,  # there is one library
}
# The fields that say what an answer must be.
_GRAMMARS: dict[str, Callable[[str, Any], Grammar | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured,
    "guided_json": _json_schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _lark,
    "guided_json_object": _any_object,
}

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "max_tokens": _max_tokens,
    "max_completion_tokens": _integer(1),
    "min_tokens": _integer(0, MAX_COUNT),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _top_k,
    "min_p": _number(0, 1),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _stop,
    "stop_token_ids": _token_ids,
    "ignore_eos": _boolean,
    "n": _integer(1, MAX_CHOICES),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 100, low_too=False),
    "logit_bias": _logit_bias,
    "bad_words": _texts,
    "include_stop_str_in_output": _boolean,
    "skip_special_tokens": _boolean,
    "truncate_prompt_tokens": _truncate,
    "prompt_logprobs": _integer(0, MAX_LOGPROBS),
    "add_special_tokens": _boolean,
    **_GRAMMARS,
    "guided_whitespace_pattern": _filled,
}
_OF_ENDPOINT: dict[Endpoint, dict[str, Callable[[str, Any], Any]]] = {
    Endpoint.CHAT: {
        "logprobs": _boolean,
        "top_logprobs": _integer(0, MAX_LOGPROBS),
        "tools": _tools,
        "tool_choice": _tool_choice,
        "parallel_tool_calls": _boolean,
        "chat_template_kwargs": _template_kwargs,
        "reasoning_effort": _filled,
        "documents": _documents,
        "add_generation_prompt": _boolean,
        "continue_final_message": _boolean,
        "include_reasoning": _boolean,
    },
    Endpoint.COMPLETIONS: {"logprobs": _completion_logprobs, "echo": _boolean},
}

_BIAS = _number(-100, 100)

_ALL_CHECKS = {endpoint: _CHECKS | checks for endpoint, checks in _OF_ENDPOINT.items()}
# Fields of a chat that its template gets by their names.
_ARGUMENT_FIELDS = ("reasoning_effort", "documents", "add_generation_prompt", "continue_final_message")
_FUNCTION_NAME = re.compile(r"[\w.-]+")
_TRANSLATED = frozenset(
    {
        *_ARGUMENT_FIELDS,
        "tools",
        "chat_template_kwargs",
        "add_special_tokens",
        "tool_choice",
        "parallel_tool_calls",
        "logprobs",
        "top_logprobs",
        "echo",
        *_GRAMMARS,
        "guided_whitespace_pattern",
    }
)

# Under `batchrun`, in the line or in its body.
_HINTS: dict[str, Callable[[str, Any], Any]] = {"expected_tokens": _integer(1)}


def _fields(names: str, *neutral: Any) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names.split(), neutral)


# Fields that say nothing about the answer.
_INFORMATIVE = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "request_id", "priority", "cache_salt", "guided_decoding_backend"),
        *("session_id", "stream_interval"),
    }
)

# Fields of OpenAI's and vLLM's that are not built, with the values at which they change nothing.
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    **_fields("best_of length_penalty", 1),
    **_fields("top_logprobs", 0),
    **_fields("stream echo continue_final_message", False),
    **_fields("use_beam_search return_token_ids return_tokens_as_token_ids", False),
    **_fields("spaces_between_special_tokens add_generation_prompt", True),
    **_fields("include_reasoning parallel_tool_calls", True, False),
    **_fields("tool_choice function_call", "none", "auto"),
    **_fields("modalities", ["text"]),
    **_fields("verbosity", "medium"),
    **_fields("tools functions stream_options audio prediction suffix", [], {}, ""),
    **_fields("web_search_options chat_template chat_template_kwargs", [], {}, ""),
    **_fields("reasoning_effort documents mm_processor_kwargs media_io_kwargs", [], {}, ""),
    **_fields("allowed_token_ids logits_processors prompt_embeds kv_transfer_params", [], {}, ""),
    **_fields("structural_tag vllm_xargs ec_transfer_params mm_payload", [], {}, ""),
    **_fields("logprob_token_ids repetition_detection watermarking", [], {}, ""),
    **_fields("truncation_side", "left"),
    **_fields("thinking_token_budget", -1),
    **_fields("return_prompt_text return_token_offsets", False),
}
