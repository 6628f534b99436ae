"""A model that is not run exactly is refused with the reason, before the job is read or anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import ARCHITECTURES, QUANTISED
from model_table import PAGE, table

import batchrun
from batchrun.errors import ExitCode, ModelRefused
from batchrun.specs import rope_parameters, rope_type, text_config
from batchrun.supported import MODEL_TYPES, QUANTIZATIONS, ROPE_TYPES, TORCHAO_TYPES, check_supported

ModelFactory = Callable[..., Path]
LLAMA = {"model_type": "llama"}

# What differs in config.json, and what the message has to name.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model type": ({"model_type": "falcon"}, "falcon"),
    "another text model in a model for images": (
        {"model_type": "gemma3", "text_config": LLAMA | {"model_type": "t5"}},
        "t5",
    ),
    "no model type": ({"model_type": None}, "None"),
    "RoPE of no known type": ({"rope_parameters": {"rope_type": "new", "rope_theta": 1e4}}, "new"),
    "RoPE of no known type by its older name": ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, "su"),
    "both names, of which transformers takes the older": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "new", "factor": 2.0}},
        "new",
    ),
    "RoPE of no known type in some layers": (
        {"rope_parameters": {"full_attention": {"rope_type": "new"}, "sliding_attention": {"rope_type": "default"}}},
        "new",
    ),
    "layers of no known type": ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    "rows that see what comes later": ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "later"),
    "a quantisation that was not tried": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    "a quantisation of no name": ({"quantization_config": {"bits": 4}}, "None"),
    "quantised activations": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}},
            }
        },
        "input activations",
    ),
    "quantised KV": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
                "kv_cache_scheme": {"num_bits": 8},
            }
        },
        "KV",
    ),
    "weights quantised in two ways": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}, "group_1": {"weights": {"num_bits": 4}}},
            }
        },
        "2 ways",
    ),
    "weights in a format that was not tried": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
            }
        },
        "int-quantized",
    ),
    "torchao's quantised activations": (
        {
            "quantization_config": {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {}}},
            }
        },
        "Int8DynamicActivationInt8WeightConfig",
    ),
}


@pytest.fixture(params=REFUSED)
def refused(request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    return REFUSED[request.param]


def test_the_reason_is_named(refused: tuple[dict[str, Any], str]) -> None:
    changes, reason = refused
    with pytest.raises(ModelRefused, match=reason) as raised:
        check_supported(LLAMA | changes)
    assert raised.value.exit_code is ExitCode.USAGE
    assert raised.value.code == "model_refused"
    assert raised.value.hint


@pytest.fixture
def broken_model(model_dir: ModelFactory, tmp_path: Path, refused: tuple[dict[str, Any], str]) -> Path:
    """A model directory with a refused config.json, and with weights and a tokenizer that cannot be loaded: whoever
    opens one of them before the model is refused fails for another reason."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_dir("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | refused[0]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"not weights")
    (folder / "tokenizer.json").write_text("not a tokenizer")
    return folder


def test_plan_and_run_refuse_before_anything_is_spent(
    broken_model: Path, tmp_path: Path, refused: tuple[dict[str, Any], str]
) -> None:
    job = tmp_path / "job.jsonl"
    job.write_text("not a job")
    out = tmp_path / "out"
    with pytest.raises(ModelRefused, match=refused[1]):
        batchrun.plan(job, model=str(broken_model))
    with pytest.raises(ModelRefused, match=refused[1]):
        batchrun.run(job, model=str(broken_model), out=out)
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"job.jsonl", "model"}


def test_no_torch_is_loaded_to_refuse_a_model(model_dir: ModelFactory, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_dir("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "falcon"}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "job.jsonl").write_text('{"prompt": "a"}\n')
    script = f"""
import sys, batchrun
from batchrun.errors import ModelRefused
for call in (batchrun.plan, batchrun.run):
    try:
        call({str(tmp_path / "job.jsonl")!r}, model={str(folder)!r})
    except ModelRefused:
        print("refused")
print(*(name for name in ("torch", "transformers", "tokenizers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "refused"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_tests_run_is_supported(model_dir: ModelFactory, architecture: str) -> None:
    check_supported(json.loads((model_dir(architecture) / "config.json").read_text()))


def test_each_supported_type_is_run_by_the_tests(model_dir: ModelFactory) -> None:
    configs = [json.loads((model_dir(name) / "config.json").read_text()) for name in ARCHITECTURES]
    assert {config["model_type"] for config in configs} == set(MODEL_TYPES)
    found = {
        rope_type(config["model_type"], rope) for config in configs for rope in rope_parameters(text_config(config))
    }
    assert found == set(ROPE_TYPES)


def test_the_page_has_the_table_of_what_the_tests_run() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), "python tests/model_table.py --write"


def test_each_quantisation_that_is_supported_is_run_by_the_tests() -> None:
    tested = [name.split(", ") for name in QUANTISED]
    assert {name for name, *_ in tested} == set(QUANTIZATIONS)
    assert {kind for name, *kinds in tested for kind in kinds if name == "torchao"} == set(TORCHAO_TYPES)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"rope_scaling": None, "rope_theta": 1e4},
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        LLAMA | {"rope_scaling": {}, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        LLAMA | {"quantization_config": None},
    ],
)
def test_older_and_shorter_configs_are_supported(config: dict[str, Any]) -> None:
    check_supported(config)
