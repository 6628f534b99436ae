"""Whatever a configuration file says, it is a configuration or a fault of the user's that is told in sentences."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import pytest
from fuzz.cases import edited, parts, repeatable
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from batchrun.config import RunConfig, configs_dir, load_config, parse_until
from batchrun.errors import UsageError

SHIPPED = (configs_dir() / "default.toml").read_bytes().replace(b"\n# ", b"\n")
LUMPS = [
    *(b"=", b"[", b"]", b"[[", b"{", b"}", b".", b",", b'"', b"'", b'"""', b"'''", b"\\", b"#", b"\n", b"\r"),
    *(b"nan", b"-inf", b"1e999", b"0x" + b"f" * 5000, b"9" * 5000, b"1_0", b"true", b"1979-05-27T07:32:00Z"),
    *(b"\0", b"\xff", rb"\u0000", rb"\ud800", b"[" * 2000, b"{a=" * 2000, b"a." * 2000, b"sampling", b"stop"),
]  # fmt: skip


def keys(section: type[BaseModel] = RunConfig, before: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        found.append(before + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{before}{name}.")
    return found


def toml(value: Any) -> str:
    """A value in TOML."""
    match value:
        case bool():
            return str(value).lower()
        case float() if not math.isfinite(value):
            return str(value)
        case str():
            letters = (c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value)
            return f'"{"".join(letters)}"'
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return f"{{{', '.join(f'{toml(key)} = {toml(item)}' for key, item in value.items())}}}"
        case _:
            return repr(value)


NUMBERS = st.integers() | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**63, 2**64, 2**70, 10**4000]) | st.floats()
SIZES = ["4GiB", "0.5", "5e3TiB", "9" * 400 + "TiB", "9" * 5000, "a\0b", "auto", "cpu", "tree"]
TIMES = [
    "8h",
    "1h30m",
    "9" * 400 + "d",
    "06:00",
    "06:00Z",
    "24:00",
    "0001-01-01T00:00",
    "9999-12-31T23:59",
    "5%",
    "101%",
]
TEXTS = st.text(max_size=6) | st.sampled_from(SIZES + TIMES)
VALUES = st.recursive(
    st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
KEYS = (
    st.sampled_from([key for key in keys() if key != "model"])
    | st.text(max_size=6).map(toml)
    | st.sampled_from(["max-tokens", "sampling.top-k", "'a b'"])
)


def check(path, content: bytes) -> RunConfig | None:
    path.write_bytes(content)
    try:
        return load_config(path, model="demo")
    except UsageError as refusal:
        assert refusal.message
        for line in refusal.message.splitlines():
            assert str(path) in line or "is missing" in line, line
        return None


@parts(slow=2)
def test_a_mutated_file_is_a_configuration_or_a_usage_error(tmp_path, part):
    @repeatable(part, 2500)
    @given(st.sampled_from([SHIPPED, b"seed = 1\n[sampling]\nstop = ['a']\ntop_k = 3\n"]).flatmap(
        lambda content: edited(content, LUMPS, most=4)
    ))  # fmt: skip
    def law(content):
        check(tmp_path / "c.toml", content)

    law()


@parts(slow=4)
def test_any_values_are_a_configuration_or_a_usage_error(tmp_path, part):
    @repeatable(part, 2000)
    @given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
    def law(settings):
        config = check(tmp_path / "c.toml", "".join(f"{k} = {toml(v)}\n" for k, v in settings.items()).encode())
        if config is not None:  # what it has is what was said
            for key, value in settings.items():
                found: Any = config
                for name in key.replace('"', "").split("."):
                    found = getattr(found, name)
                if found not in ("demo", config.kv_memory) and not isinstance(found, tuple | BaseModel):
                    assert found == value or str(found) == value
                assert not isinstance(found, int) or abs(found) < 2**64

    law()


# --- found by the above ---


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("max-tokens", "; did you mean 'max_tokens'?"),
        ('"a b"', "."),
        ('""', "."),
        ("sampling.top-k", "; did you mean 'sampling.top_k'?"),
    ],
)
def test_an_unknown_key_that_is_no_identifier_is_named(tmp_path, key, meant):
    (tmp_path / "c.toml").write_text(f"{key} = 1")
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path / "c.toml", model="demo")
    named = key.strip('"')
    assert caught.value.message == f"{tmp_path / 'c.toml'}: there is no setting {named!r}{meant}"


@pytest.mark.parametrize(
    "text",
    ["seed = " + "9" * 5000, "seed = " + "[" * 5000, "seed = " + "{a=" * 3000, "seed = 0x" + "f" * 5000],
    ids=["long integer", "deep list", "deep table", "long hexadecimal integer"],
)
def test_bombs_are_usage_errors(tmp_path, text):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path / "c.toml", model="demo")
    assert len(caught.value.message) < 400


def test_a_deep_table_in_place_of_a_value_is_a_usage_error(tmp_path):
    (tmp_path / "c.toml").write_text("seed" + ".a" * 3000 + " = 1")
    with pytest.raises(UsageError, match=r"seed = .* is wrong"):
        load_config(tmp_path / "c.toml", model="demo")


@pytest.mark.parametrize("key", [key for key in keys() if key.rpartition(".")[2] in (
    "limit", "max_tokens", "top_k", "min_tokens", "stop_token_ids", "step_tokens", "page_size", "expected_tokens",
    "flush_results", "kv_memory", "seed",
)])  # fmt: skip
def test_a_number_that_no_column_holds_is_refused(tmp_path, key):
    """Each of them ended a run, or a plan, as an internal failure."""
    (tmp_path / "c.toml").write_text(f"{key} = {2**70}")
    with pytest.raises(UsageError, match=rf"{key} = {2**70} is wrong"):
        load_config(tmp_path / "c.toml", model="demo")


@pytest.mark.parametrize("until", ["06:00Z", "06+01"])
def test_a_time_of_another_zone_is_a_time(tmp_path, until):
    (tmp_path / "c.toml").write_text(f'limits.until = "{until}"')
    assert load_config(tmp_path / "c.toml", model="demo").limits.until == until
    assert 0 < parse_until(until) - datetime.now().timestamp() <= 24 * 3600


@pytest.mark.parametrize("key", ["out", "chat_template"])
def test_a_path_with_a_nul_is_refused(tmp_path, key):
    (tmp_path / "c.toml").write_text(rf'{key} = "a\u0000b"')
    with pytest.raises(UsageError, match="no path has a NUL character"):
        load_config(tmp_path / "c.toml", model="demo")
