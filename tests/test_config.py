"""Configuration: the order of trust, faults that name key, place and remedy, and the defaults of silent lines."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from batchrun.config import (
    RunConfig,
    SamplingConfig,
    configs_dir,
    derive_seed,
    dump_config,
    load_config,
    load_dumped,
    parse_size,
    resolve_max_tokens,
    resolve_sampling,
)
from batchrun.errors import UsageError
from batchrun.request import Endpoint, LineOptions, SamplingParams

SILENT = SamplingConfig()


def toml(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- kept for later


def test_what_was_dumped_means_the_same_from_another_place(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    given = load_config(
        model="tiny",
        out="a.run",
        chat_template="own.jinja",
        kv_memory="4GiB",
        seed=2**64 - 1,
        sampling={"stop": ["\n", "é"], "stop_token_ids": [2], "temperature": 1},
        limits={"until": "06:00", "max_errors": "5%", "request_timeout": 1.5},
    )
    dumped = orjson.loads(orjson.dumps(dump_config(given)))
    monkeypatch.chdir("/")
    read = load_dumped(dumped, tmp_path / "run.json")
    places = {"model": str(tmp_path / "tiny"), "out": tmp_path / "a.run", "chat_template": tmp_path / "own.jinja"}
    assert read == given.model_copy(update=places)
    changed = load_dumped(dumped, tmp_path / "run.json", kv_memory="1MB", limits={"request_timeout": "1h"})
    assert changed.kv_memory == 10**6
    assert (changed.limits.request_timeout, changed.limits.until) == ("1h", "06:00")
    with pytest.raises(UsageError, match=r"run\.json: there is no setting 'colour'"):
        load_dumped(dumped | {"colour": 1}, tmp_path / "run.json")
    assert dump_config(load_config(model="org/name"))["model"] == "org/name"


def test_the_home_directory_may_be_written_as_everywhere(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = load_config(model="m", out="~/a.run", chat_template="~/t.jinja", output={"results": "~/all.jsonl"})
    home = Path("/home/me")
    assert (given.out, given.chat_template, given.output.results) == (
        home / "a.run",
        home / "t.jinja",
        str(home / "all.jsonl"),
    )
    assert load_config(model="m", output={"results": "s3://b/~/a.jsonl"}).output.results == "s3://b/~/a.jsonl"


# --- layers


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = toml(
        tmp_path / "c.toml", "seed = 5\nmax_tokens = 9\n[scheduler]\npage_size = 8\n[output]\nsteps_log = false\n"
    )
    config = load_config(file, model="demo", seed=7, max_tokens=None)
    assert (config.seed, config.max_tokens, config.device) == (7, 9, "auto")
    assert (config.scheduler.page_size, config.scheduler.grouping) == (8, "auto")
    assert (config.output.steps_log, config.output.flush_results) == (False, 64)


def test_a_section_given_as_a_flag_is_laid_over_that_of_the_file(tmp_path):
    file = toml(tmp_path / "c.toml", "[sampling]\ntemperature = 1\ntop_k = 4\n")
    sampling = load_config(file, model="demo", sampling={"temperature": 0.5}).sampling
    assert (sampling.temperature, sampling.top_k) == (0.5, 4)


def test_the_shipped_defaults_are_those_of_the_types():
    """default.toml is what users copy: it names every key, and changes none."""
    assert load_config(model="demo") == RunConfig(model="demo")
    shown = (configs_dir() / "default.toml").read_text(encoding="utf-8")
    uncommented = tomllib.loads(
        "\n".join(line.removeprefix("# ") if " = " in line else line for line in shown.splitlines())
    )
    sections = {name for name, value in uncommented.items() if isinstance(value, dict)}
    assert set(uncommented) == set(RunConfig.model_fields)
    for name in sections:
        assert set(uncommented[name]) == set(type(getattr(RunConfig(model="x"), name)).model_fields)
    RunConfig.model_validate(uncommented)


def test_every_setting_is_described():
    def check(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            assert field.description and field.description.endswith("."), name
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    check(RunConfig)


def test_the_configuration_cannot_be_written_to():
    config = load_config(model="demo")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.sampling.top_k = 1  # type: ignore[misc]


def test_toml_has_its_own_types_and_ours(tmp_path):
    file = toml(
        tmp_path / "c.toml",
        'out = "a/b"\nkv_memory = "1.5GiB"\n[sampling]\ntemperature = 1\nstop = ["a", "b"]\nstop_token_ids = 3\n',
    )
    config = load_config(file, model="demo", kv_memory=4096)
    assert (config.out, config.kv_memory) == (Path("a/b"), 4096)
    assert (config.sampling.stop, config.sampling.stop_token_ids) == (("a", "b"), (3,))


# --- faults


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle = 'x'", "there is no setting 'modle'; did you mean 'model'?"),
        ("temperature = 0", "there is no setting 'temperature'; did you mean 'sampling.temperature'?"),
        (
            "[scheduler]\npagesize = 4",
            "there is no setting 'scheduler.pagesize'; did you mean 'scheduler.page_size'?",
        ),
        ("[qqq]\na = 1", "there is no setting 'qqq'."),
        ("seed = '3'", "seed = '3' is wrong: should be a valid integer."),
        ("seed = true", "seed = True is wrong: should be a valid integer."),
        ("strict = 1", "strict = 1 is wrong: should be a valid boolean."),
        ("device = 'tpu'", "device = 'tpu' is wrong: should be 'auto', 'cpu' or 'cuda'."),
        ("kv_memory = '4 parsecs'", "kv_memory = '4 parsecs' is wrong"),
        ("chat_template = 4", "chat_template = 4 is wrong"),
        ("sampling = 3", "sampling = 3 is wrong"),
        ("[sampling]\ntop_p = 2.0", "sampling.top_p = 2.0 is wrong: should be less than or equal to 1."),
        ("[sampling]\ntemperature = nan", "sampling.temperature = nan is wrong: should be a finite number."),
        ("[sampling]\nstop = ['']", "sampling.stop = '' is wrong: string should have at least 1 character."),
        ("[sampling]\nstop = [1]", "sampling.stop = 1 is wrong: should be a valid string."),
    ],
)
def test_a_fault_of_the_file_names_file_key_and_remedy(tmp_path, text, expected):
    file = toml(tmp_path / "c.toml", text)
    with pytest.raises(UsageError) as caught:
        load_config(file, model="demo")
    assert caught.value.message.startswith(f"{file}: {expected}")
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


def test_all_faults_are_told_at_once_each_with_its_place(tmp_path):
    file = toml(tmp_path / "c.toml", "seed = 'x'\nlimitt = 3\nmax_tokens = 'many'\n")
    with pytest.raises(UsageError) as caught:
        load_config(file, model="demo", max_tokens=0)
    lines = caught.value.message.splitlines()
    assert len(lines) == 3
    assert sum(line.startswith(f"{file}: ") for line in lines) == 2
    assert "--max-tokens: max_tokens = 0 is wrong: should be greater than or equal to 1." in lines


def test_an_unknown_option_and_a_missing_model_are_told():
    with pytest.raises(UsageError, match="--max-token: there is no setting 'max_token'; did you mean 'max_tokens'"):
        load_config(model="demo", max_token=3)
    with pytest.raises(UsageError, match="model is missing: give --model"):
        load_config()


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml cannot be read: No such file"):
        load_config(tmp_path / "none.toml", model="demo")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config(toml(tmp_path / "c.toml", "seed = ="), model="demo")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config(tmp_path / "latin.toml", model="demo")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("7", 7),
        (7, 7),
        ("1kB", 1000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "0", "0.5B", "4Gi", "4 G B", "1e9", "1,5GB", True, 1.5, "inf", -3, 0]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


# --- sampling


def test_order_of_trust_line_then_config_then_model_then_api():
    model = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    config = SamplingConfig(temperature=0.7, top_p=0.8)
    resolved = resolve_sampling(LineOptions(temperature=0.5), config, model, False)
    assert resolved == SamplingParams(temperature=0.5, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert resolve_sampling(LineOptions(), config, model, True) == SamplingParams(temperature=0.7, top_p=0.8)
    assert resolve_sampling(LineOptions(), SILENT, model, True) == SamplingParams(temperature=1.0, top_p=1.0)
    assert resolve_sampling(LineOptions(), SILENT, {"temperature": None}, False) == SamplingParams()


def test_everything_a_line_says_arrives():
    options = LineOptions(
        temperature=1,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        stop=("a",),
        stop_token_ids=(4,),
        ignore_eos=True,
        min_tokens=2,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
        logit_bias=((3, 1.0),),
        logprobs=4,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        prompt_logprobs=3,
        echo=True,
        prompt_only=True,
        n=2,
    )
    assert resolve_sampling(options, SILENT, {}, False) == SamplingParams(
        1.0, 0.5, 3, 0.1, ("a",), (4,), True, 2, 1.0, -1.5, 1.2, ((3, 1.0),), (), 4, True, False, 3, True, True, 2
    )


def test_a_line_can_undo_what_the_config_says():
    config = SamplingConfig(stop=("x",), ignore_eos=True, top_k=5)
    options = LineOptions(stop=(), ignore_eos=False, top_k=0)
    assert resolve_sampling(options, config, {}, False) == SamplingParams()


def test_a_model_that_does_not_sample_is_greedy_unless_a_temperature_is_given():
    model = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    greedy = resolve_sampling(LineOptions(), SILENT, model, False)
    assert greedy.greedy and greedy == SamplingParams(temperature=0.0)
    assert resolve_sampling(LineOptions(temperature=0.3), SILENT, model, False) == SamplingParams(0.3, 0.9)
    assert resolve_sampling(LineOptions(), SamplingConfig(temperature=0.4), model, False).temperature == 0.4
    assert resolve_sampling(LineOptions(), SILENT, model, True).temperature == 1.0


def test_equal_settings_are_one_object_however_they_came_about():
    a = resolve_sampling(LineOptions(temperature=0.5, max_tokens=3, seed=1), SILENT, {}, False)
    b = resolve_sampling(LineOptions(max_tokens=4, seed=2), SamplingConfig(temperature=0.5), {"top_k": 7}, True)
    c = resolve_sampling(LineOptions(), SILENT, {"temperature": 0.5}, False)
    assert a is b is c
    assert isinstance(resolve_sampling(LineOptions(temperature=1), SILENT, {}, False).temperature, float)
    greedy = resolve_sampling(LineOptions(temperature=0), SILENT, {}, False)
    assert resolve_sampling(LineOptions(temperature=0.0, top_p=0.2, top_k=9), SILENT, {}, False) is greedy


@pytest.mark.parametrize("model", [{"repetition_penalty": "1.05"}, {"temperature": "hot"}, {"do_sample": 1}])
def test_a_generation_config_that_cannot_be_followed_is_refused_with_the_way_out(model):
    with pytest.raises(UsageError, match=next(iter(model))) as caught:
        resolve_sampling(LineOptions(temperature=0), SILENT, model, False)
    assert "--ignore-generation-config" in caught.value.hint
    assert resolve_sampling(LineOptions(), SILENT, model, True) == SamplingParams()


# --- token limits and seeds


@pytest.mark.parametrize(
    ("line", "flag", "endpoint", "expected"),
    [
        (5, 9, Endpoint.CHAT, (5, False, False)),
        (None, 9, Endpoint.CHAT, (9, False, False)),
        (None, None, Endpoint.CHAT, (40, True, False)),
        (None, None, Endpoint.COMPLETIONS, (16, True, False)),
        (41, None, Endpoint.COMPLETIONS, (40, False, True)),
        (40, None, Endpoint.COMPLETIONS, (40, False, False)),
        (None, 100, Endpoint.CHAT, (40, False, True)),
    ],
)
def test_token_limit(line, flag, endpoint, expected):
    assert resolve_max_tokens(LineOptions(max_tokens=line), endpoint, 60, flag, 100) == expected


def test_the_default_of_completions_is_clipped_too_and_a_full_context_is_no_request():
    assert resolve_max_tokens(LineOptions(), Endpoint.COMPLETIONS, 90, None, 100) == (10, True, True)
    assert resolve_max_tokens(LineOptions(), Endpoint.CHAT, 99, None, 100) == (1, True, False)
    with pytest.raises(ValueError, match="no room"):
        resolve_max_tokens(LineOptions(), Endpoint.CHAT, 100, None, 100)


def test_seeds_are_those_of_splitmix64():
    """The reference generator started at 1234567 gives this first output; changing it would change every answer."""
    from batchrun.config import _splitmix64

    assert _splitmix64(1234567) == 6457827717110365317
    assert derive_seed(0, 0, 0, None) == _splitmix64(_splitmix64(0))


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**9), st.integers(0, 100), st.integers(-(2**63), 2**64 - 1))
def test_a_seed_is_a_uint64_and_choices_count_up(run_seed, line, choice, line_seed):
    for given_seed in (None, line_seed):
        seed = derive_seed(run_seed, line, choice, given_seed)
        assert 0 <= seed < 2**64
        assert seed == (derive_seed(run_seed, line, 0, given_seed) + choice) % 2**64
    assert derive_seed(run_seed, line, 0, line_seed) == line_seed % 2**64


def test_lines_without_a_seed_get_distinct_ones_that_depend_on_the_run():
    seeds = {derive_seed(run, line, 0, None) for run in (0, 1) for line in range(5000)}
    assert len(seeds) == 10_000


def test_reading_the_configuration_loads_neither_torch_nor_transformers():
    code = "import sys, batchrun.config, batchrun.models; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
