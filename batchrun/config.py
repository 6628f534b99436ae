"""What the user asked: `RunConfig`, resolved once from default.toml, a --config file and flags; and the rules for
what a line that does not say gets."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, time, timedelta
from fractions import Fraction
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from batchrun.errors import UsageError
from batchrun.locations import is_url, redact, redact_location
from batchrun.planning.order import AUTO, ORDERS
from batchrun.prefix.groups import GROUPINGS
from batchrun.request import Endpoint, LineOptions, SamplingParams

COMPLETIONS_MAX_TOKENS = 16  # the API's own default for /v1/completions

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b|b|)\s*", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_DURATION = re.compile(r"\s*".join(rf"(?:(\d+(?:\.\d+)?)\s*{unit})?" for unit in "dhms"))
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*(%?)")
_MASK64 = (1 << 64) - 1


def configs_dir() -> Path:
    """The folder of shipped TOML files: inside the package in a wheel, beside it in a source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def user_configs_dir() -> Path:
    """The directory of this user's own configuration, which need not be there; a device file in its `devices` takes the
    place of a shipped one of the same name."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "batchrun"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, or None."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return matches[0] if matches else None


def parse_size(value: str | int) -> int:
    """Bytes of a size such as `4GiB`, `1.5 GB`, `500MB` or a plain number of bytes.

    Raises:
        ValueError: it is no size, less than a byte, or 2**63 bytes and more.
    """
    match = _SIZE.fullmatch(str(value)) if isinstance(value, str | int) else None
    if match is None:
        raise ValueError(f"{value!r} is no size: write 4GiB, 500MB or a number of bytes")
    number, unit = Fraction(match[1]), match[2].lower()
    if unit not in ("", "b"):
        number *= (1024 if "i" in unit else 1000) ** ("kmgt".index(unit[0]) + 1)
    if not 1 <= number < 2**63:
        raise ValueError(f"{value!r} is no size: it must be at least one byte, and less than 8EiB")
    return int(number)


def parse_duration(value: str | float) -> float:
    """Seconds of a duration such as `8h`, `1h30m`, `90 s` or a plain number of seconds.

    Raises:
        ValueError: it is none, or not above zero.
    """
    text = str(value).strip().lower()
    match = _DURATION.fullmatch(text)
    seconds = float(text) if _NUMBER.fullmatch(text) else 0.0
    if match is not None:
        seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    if not 0 < seconds < 1e9:
        raise ValueError(f"{value!r} is no duration: write 8h, 90m, 1h30m or a number of seconds")
    return seconds


def parse_until(value: str, now: datetime | None = None) -> float:
    """Seconds of Unix time at which it is `06:00` next, or of a date and time in ISO 8601; local time unless it says
    otherwise.

    Raises:
        ValueError: it is neither.
    """
    now = now or datetime.now()
    with suppress(ValueError, OverflowError):
        return datetime.fromisoformat(value).timestamp() if len(value) > 8 else _next(time.fromisoformat(value), now)
    raise ValueError(f"{value!r} is no time: write 06:00, or 2026-11-21T06:00")


def _next(at: time, now: datetime) -> float:
    if at.tzinfo is not None:
        now = now.astimezone(at.tzinfo)
    moment = datetime.combine(now.date(), at)
    return (moment if moment > now else moment + timedelta(days=1)).timestamp()


def parse_share(value: str | int, total: int = 0) -> int:
    """How many a number or a share of `total`, such as `5%`, is.

    Raises:
        ValueError: it is neither.
    """
    match = _SHARE.fullmatch(str(value).strip())
    if match is None or (float(match[1]) > 100 if match[2] else not match[1].isdigit() or int(match[1]) >= 2**63):
        raise ValueError(f"{value!r} is no number of lines: write 10 or 5%")
    return int(total * Fraction(match[1]) / 100) if match[2] else int(match[1])


def _one_or_many(value: Any) -> Any:
    """A TOML array as a tuple; one string or number as a tuple of one."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str | int) else value


def _known_order(name: str) -> str:
    if name not in (AUTO, *ORDERS):
        raise ValueError(f"it must be one of {', '.join((AUTO, *ORDERS))}")
    return name


def _known_grouping(name: str) -> str:
    if name not in GROUPINGS:
        raise ValueError(f"it must be one of {', '.join(GROUPINGS)}")
    return name


def _of_home(path: Path) -> Path:
    """A path with the directory that `~` stands for."""
    if "\0" in str(path):
        raise ValueError("no path has a NUL character")
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~somebody
        raise ValueError(str(error)) from error


# Counts become columns of int32.
Count = Annotated[int, Field(ge=1, lt=2**31)]
NaturalNumber = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, BeforeValidator(parse_size)]
# Strict mode would refuse the strings that TOML has.
AnyPath = Annotated[Path, Field(strict=False), AfterValidator(_of_home)]


def _checked(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A validator that keeps what a person wrote, if it can be read."""

    def check(value: Any) -> Any:
        parse(value)
        return value

    return check


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SamplingConfig(_Section):
    """Sampling of lines that do not say, before the model's `generation_config.json`."""

    temperature: float | None = Field(default=None, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Sample from the smallest set of tokens with this total probability."
    )
    top_k: NaturalNumber | None = Field(default=None, description="Sample from the k likeliest tokens; 0 is off.")
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Drop tokens less likely than this fraction of the likeliest; 0 is off.",
    )
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_or_many)] | None = Field(
        default=None, description="Strings that end an answer; they are not part of its text."
    )
    stop_token_ids: Annotated[tuple[NaturalNumber, ...], BeforeValidator(_one_or_many)] | None = Field(
        default=None, description="Token ids that end an answer; they are not part of its text."
    )
    ignore_eos: bool | None = Field(default=None, description="Go on past end-of-text tokens, up to the token limit.")
    min_tokens: NaturalNumber | None = Field(
        default=None, description="Tokens of an answer before it may end by itself."
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Taken from the logit of every token that the answer has already."
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Taken from the logit of a token for each time that the answer has it."
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="Positive logits of tokens that prompt or answer have are divided by it, negative ones multiplied.",
    )
    include_stop_str_in_output: bool | None = Field(
        default=None, description="Leave the stop string that ended an answer in its text."
    )
    skip_special_tokens: bool | None = Field(default=None, description="Leave special tokens out of the text.")


class LimitsConfig(_Section):
    """What ends a run early, or a request; a run that is ended is gone on with by the same command."""

    until: Annotated[str, AfterValidator(_checked(parse_until))] | None = Field(
        default=None,
        description="Time at which a run stops: 06:00 is the next time it is six, 2026-11-21T06:00 is that day.",
    )
    timeout: Annotated[str | int | float, AfterValidator(_checked(parse_duration))] | None = Field(
        default=None, description="Time after which a run stops: 8h, 90m, 1h30m or a number of seconds."
    )
    max_errors: Annotated[str | int, AfterValidator(_checked(parse_share))] | None = Field(
        default=None,
        description="Failed lines of one start after which it stops: more than 10, or more than 5% of the lines.",
    )
    request_timeout: Annotated[str | int | float, AfterValidator(_checked(parse_duration))] | None = Field(
        default=None,
        description="Time that a request may take from its first step; one that takes longer fails with "
        "`request_timeout`.",
    )


class SchedulerConfig(_Section):
    """How work is cut into steps. None of it changes results."""

    grouping: Annotated[str, AfterValidator(_known_grouping)] = Field(
        default="auto",
        description="Which shared prefixes are computed once, by name; it never changes results.",
    )
    deduplicate: bool = Field(
        default=True,
        description="Compute requests that must have the same answer once: the same prompt, limit and sampling, greedy "
        "or with the same seed.",
    )
    step_tokens: Count | None = Field(
        default=None,
        description="Rows of a step at which prefill stops being added; the device's figure if unset.",
    )
    page_size: Count | None = Field(
        default=None,
        description="Tokens of a KV page, the unit of KV allocation, on a GPU 16, 32 or 64; the device's figure "
        "if unset.",
    )
    expected_tokens: Count | None = Field(
        default=None,
        description="Length to plan with for answers whose length is not known; estimated if unset.",
    )
    probe: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the requests of unknown length to run first, so that the rest is ordered by the lengths "
        "that they show.",
    )


def _names(value: Any) -> Any:
    """Names in a list, or in a text with commas between them."""
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else _one_or_many(value)


def _results_file(name: str) -> str:
    """Where answers go besides: `run.json` keeps it, so it has no secrets."""
    if Path(name).suffix.lower() not in (".parquet", ".jsonl"):
        raise ValueError("it must end in .parquet or .jsonl")
    if redact_location(name) != name:
        raise ValueError("no user and no key may stand in it; give them as the store's own library takes them")
    return name if is_url(name) else str(_of_home(Path(name)))


class InputConfig(_Section):
    """How rows of a table (Parquet, CSV, any JSON lines) become requests, one each. Lines of a job need none of it."""

    prompt_column: str | None = Field(
        default=None,
        description="Column that has the prompts (texts, or lists of token ids or of messages); if unset `messages` or "
        "`prompt`.",
    )
    template: str | None = Field(
        default=None,
        description="Jinja template that makes a row's prompt of its columns, as a text or the name of a file.",
    )
    id_column: str | None = Field(
        default=None, description="Column that has the custom_id of each row; if unset `custom_id` where there is one."
    )
    field_columns: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        default=(),
        description="Columns that have a field of the request each, such as max_tokens; others are no part of it.",
    )
    chat: bool = Field(
        default=False,
        description="A prompt is what a user says in a chat, put through the model's chat template, not a completion.",
    )


class OutputConfig(_Section):
    """How results reach the disk."""

    results: Annotated[str, AfterValidator(_results_file)] | None = Field(
        default=None,
        description="File or URL that gets all answers and errors at the end, in the order of the job: .jsonl has "
        "their lines, .parquet a row for each, with the columns of a table that was the job.",
    )

    flush_seconds: float = Field(
        default=1.0,
        ge=0,
        description="Results are flushed to disk at least this often, in seconds; a crash loses no more.",
    )
    flush_results: Count = Field(default=64, description="Results are flushed to disk after this many at the latest.")
    steps_log: bool = Field(default=True, description="Write steps.jsonl, one line a step.")


class RunConfig(_Section):
    """Everything a run was asked for. Built by `load_config`; never written to afterwards."""

    model: str = Field(description="A model directory, a short name from configs/models, or a hub id (org/name).")
    out: AnyPath | None = Field(
        default=None,
        description="Run directory; if unset it is named after the job: jobs.jsonl is run in jobs.run.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where the model runs; auto is a GPU where there is one and torch was built for it, else the CPU.",
    )
    device_spec: str | None = Field(
        default=None,
        description="Device whose figures the plan is made with, by name (cpu, a100, h100, h200, or one that "
        "scripts/calibrate made); the device of the run if unset.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number type of weights and KV; auto is the checkpoint's on a GPU, and on a CPU bfloat16 where the "
        "checkpoint is a half type and the processor computes in bfloat16, else float32.",
    )
    enforce_eager: bool = Field(
        default=False,
        description="On a GPU, launch every kernel of every step; else steps of decodes are captured once as CUDA "
        "graphs and replayed.",
    )
    in_process: bool = Field(
        default=False,
        description="Run the model in the process of the command: a crash of it then ends the run. For debugging.",
    )
    step_timeout: float = Field(
        default=600.0,
        gt=0,
        description="Seconds that a step may take before its process counts as hung and is started again.",
    )
    deterministic: bool = Field(
        default=False,
        description="On a GPU, attention gives a row the same bits whatever else is in its step; matrix products and "
        "norms, whose kernels torch chooses by the number of rows, may still differ.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**64, description="Seed of the run; a line without a seed gets one derived from it."
    )
    max_tokens: Count | None = Field(
        default=None,
        description="Token limit of answers whose line has none; if unset the API's own default (chat: what is "
        "left of the context, completions: 16).",
    )
    kv_memory: Size | None = Field(
        default=None, description="Memory for KV, such as 4GiB, 500MB or a number of bytes; what is free if unset."
    )
    limit: Count | None = Field(default=None, description="Run only this many lines from the top, as a trial.")
    results_order: Literal["completion", "input"] = Field(
        default="completion",
        description="Order of results.jsonl at the end of the run; while it runs, as answers finish.",
    )
    schedule_order: Annotated[str, AfterValidator(_known_order)] = Field(
        default="auto", description="Order in which prompts start; it never changes results."
    )
    strict: bool = Field(default=False, description="Refuse the whole job if any line of it is bad.")
    fresh: bool = Field(default=False, description="Start again beside what is already in the run directory.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a model on the hub.")
    chat_template: AnyPath | None = Field(
        default=None, description="Jinja file used in place of the model's chat template."
    )
    ignore_generation_config: bool = Field(
        default=False, description="Take no sampling defaults from the model's generation_config.json."
    )
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="Sampling of lines that do not say.")
    input: InputConfig = Field(default=InputConfig(), description="How rows of a table become requests.")
    limits: LimitsConfig = Field(default=LimitsConfig(), description="What ends a run or a request early.")
    scheduler: SchedulerConfig = Field(default=SchedulerConfig(), description="How work is cut into steps.")
    output: OutputConfig = Field(default=OutputConfig(), description="How results reach the disk.")


class _Layer(NamedTuple):
    """One source of settings, and how a fault in it is named."""

    values: Mapping[str, Any]
    source: Path | None  # None: the command line


def load_config(config_file: Path | None = None, **flags: Any) -> RunConfig:
    """Resolve the configuration: default.toml, then `config_file`, then the flags that are not None.

    Args:
        config_file: a TOML file with the keys of default.toml, or None.
        flags: fields of `RunConfig` by name; a section may be given as a mapping.

    Raises:
        UsageError: a file cannot be read, or a key is unknown, missing or of the wrong type; one sentence a fault.
    """
    layers = [_read_layer(configs_dir() / "default.toml")]
    if config_file is not None:
        layers.append(_read_layer(config_file))
    return _resolve([*layers, _flags(flags)])


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as a mapping for JSON, its paths and a model's directory absolute, so that it means the same
    from any place."""
    settings = config.model_dump()
    for name, value in settings.items():
        if isinstance(value, Path):
            settings[name] = str(value.absolute())
    if config.output.results is not None and not is_url(config.output.results):
        settings["output"]["results"] = str(Path(config.output.results).absolute())
    model = Path(config.model).expanduser()
    return settings | ({"model": str(model.absolute())} if model.is_dir() else {})


def load_dumped(settings: Mapping[str, Any], source: Path, **flags: Any) -> RunConfig:
    """Resolve a configuration from what `dump_config` gave, then the flags that are not None.

    Args:
        source: the file that it was read from.
        flags: as for `load_config`.

    Raises:
        UsageError: as `load_config`.
    """
    return _resolve([_Layer(settings, source), _flags(flags)])


def names_model(config_file: Path) -> bool:
    """Whether a configuration file has a model. Raises as `load_config`."""
    return "model" in _read_layer(config_file).values


def _flags(flags: Mapping[str, Any]) -> _Layer:
    return _Layer({name: value for name, value in flags.items() if value is not None}, None)


def _resolve(layers: list[_Layer]) -> RunConfig:
    """The configuration that layers make, each winning over those before it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.values.items():
            below = merged.get(key)
            merged[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, Mapping) else value
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        faults = [_fault(dict(detail), layers) for detail in error.errors()]
        raise UsageError("\n".join(faults), hint="docs/configuration.md describes every key.") from None


def _read_layer(path: Path) -> _Layer:
    try:
        return _Layer(tomllib.loads(path.read_text(encoding="utf-8")), path)
    except OSError as error:
        raise UsageError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # of tomllib also for an integer of thousands of digits, or deep lists
        raise UsageError(f"The configuration file {path} is not valid TOML: {error}.") from error


def _fault(detail: dict[str, Any], layers: list[_Layer]) -> str:
    """One sentence for one of pydantic's error details."""
    unknown = detail["type"] == "extra_forbidden"
    # A key that is known is an identifier; what else stands in pydantic's path is its own.
    path = [part for part in detail["loc"] if isinstance(part, str) and (unknown or part.isidentifier())][:2]
    key = ".".join(path)
    if detail["type"] == "missing":
        return f"{key} is missing: give --{_dashes(key)} or set it in a --config file."
    source = _where(path, layers)
    if unknown:
        meant = _nearest_key(path[-1])
        return f"{source}: there is no setting {_shown(key)}" + (f"; did you mean {meant!r}?" if meant else ".")
    reason = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{source}: {key} = {_shown(detail['input'])} is wrong: {reason[0].lower() + reason[1:]}."


def _shown(value: Any) -> str:
    """A value for a message, at most 100 characters of it."""
    try:
        text = redact(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, or tables that deep
        return "..."
    return text if len(text) <= 100 else text[:97] + "..."


def _where(path: list[str], layers: list[_Layer]) -> str:
    """The topmost source that sets the key."""
    for layer in reversed(layers):
        value: Any = layer.values
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return f"--{_dashes(path[-1])}" if layer.source is None else str(layer.source)
    return "configuration"


def _nearest_key(unknown: str) -> str | None:
    """The key in any section whose own name is nearest to that of an unknown one."""
    known: dict[str, str] = {}
    for name, field in RunConfig.model_fields.items():
        known[name] = name
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            known |= {inner: f"{name}.{inner}" for inner in field.annotation.model_fields}
    meant = nearest(unknown, known)
    return known[meant] if meant else None


def _dashes(name: str) -> str:
    return name.replace("_", "-")


_SAMPLING_FIELDS = tuple(SamplingConfig.model_fields)
# Which only a line can ask for.
_LINE_FIELDS = (
    *("logit_bias", "logprobs", "prompt_logprobs", "echo", "prompt_only", "n"),
    *("tool_choice", "parallel_tool_calls", "include_reasoning", "grammar"),
)
_said = attrgetter(*_SAMPLING_FIELDS)
_said_by_line = attrgetter(*_SAMPLING_FIELDS, *_LINE_FIELDS)
_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample")


def resolve_sampling(
    options: LineOptions,
    config_sampling: SamplingConfig,
    generation_config: Mapping[str, Any],
    ignore_generation_config: bool,
) -> SamplingParams:
    """Sampling of a line: what it says; else the configuration's `[sampling]`; else the model's
    `generation_config.json`; else the API's default (temperature 1, nothing cut off).

    `do_sample: false` in `generation_config.json` means temperature 0. Equal results are one object.

    Raises:
        UsageError: `generation_config.json` asks for what cannot be done.
    """
    model: tuple[Any, ...] = ()
    if not ignore_generation_config:
        model = tuple(map(generation_config.get, _GENERATION_FIELDS))
    return _resolve_sampling(_said_by_line(options), _said(config_sampling), model)


@cache  # a job of millions of lines has a handful of distinct settings
def _resolve_sampling(line: tuple[Any, ...], config: tuple[Any, ...], model: tuple[Any, ...]) -> SamplingParams:
    chosen = {name: value for name, value in _model_sampling(model).items() if value is not None}
    for names, source in ((_SAMPLING_FIELDS, config), ((*_SAMPLING_FIELDS, *_LINE_FIELDS), line)):
        chosen |= {name: value for name, value in zip(names, source, strict=True) if value is not None}
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        if name in chosen:
            chosen[name] = float(chosen[name])
    if chosen.get("temperature") == 0:
        # Greedy: what would be cut off makes no difference, and one object does for all.
        for name in ("top_p", "top_k", "min_p"):
            chosen.pop(name, None)
    return _shared(SamplingParams(**chosen))


@cache
def _shared(params: SamplingParams) -> SamplingParams:
    """The one object for equal settings."""
    return params


def _model_sampling(values: tuple[Any, ...]) -> dict[str, Any]:
    """The sampling fields among `values`, which stand in the order of `_GENERATION_FIELDS` (or are none)."""
    if not values:
        return {}
    model = dict(zip(_GENERATION_FIELDS, values, strict=True))
    hint = "Give --ignore-generation-config to run without the model's own sampling defaults."
    for name, value in model.items():
        if value is not None and not isinstance(value, bool if name == "do_sample" else int | float):
            raise UsageError(f"The model's generation_config.json has {name} = {value!r}.", hint=hint)
    if model.pop("do_sample") is False:
        model["temperature"] = 0.0
    return model


def resolve_max_tokens(
    options: LineOptions, endpoint: Endpoint, prompt_tokens: int, max_tokens: int | None, max_context: int
) -> tuple[int, bool, bool]:
    """Token limit of an answer: the line's; else `max_tokens` (--max-tokens); else the API's own default (chat:
    what is left of the context, completions: 16); never more than what is left of the context.

    Args:
        prompt_tokens: length of the prompt, less than `max_context`.
        max_context: longest prompt and answer together, in tokens.

    Returns:
        The limit (at least 1), whether it is the API's default, and whether the context clipped it.

    Raises:
        ValueError: the prompt leaves no room for a token.
    """
    left = max_context - prompt_tokens
    if left < 1:
        raise ValueError(f"a prompt of {prompt_tokens} tokens leaves no room in a context of {max_context}")
    asked = options.max_tokens if options.max_tokens is not None else max_tokens
    if asked is None:
        asked = left if endpoint is Endpoint.CHAT else COMPLETIONS_MAX_TOKENS
        return min(asked, left), True, asked > left
    return min(asked, left), False, asked > left


def derive_seed(run_seed: int, line_index: int, choice: int, line_seed: int | None) -> int:
    """Seed of one request, a uint64.

    The seed of choice 0 is the line's own or, without one, `splitmix64(splitmix64(run_seed) + line_index)`, which
    is distinct for each line of a run and does not depend on order; choice i adds i. Arithmetic is modulo 2**64.

    Args:
        line_index: position of the line in the job, from 0.
        choice: position of the request among those of its line, from 0.
    """
    first = line_seed if line_seed is not None else _splitmix64(_splitmix64(run_seed) + line_index)
    return (first + choice) & _MASK64


def _splitmix64(x: int) -> int:
    """One output of the SplitMix64 generator from state `x`: a bijection of uint64 that mixes every bit."""
    z = (x + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
