"""Finding a model: the order of places, and what is said where it cannot be used. The hub is a local server that
speaks enough of its protocol for the real client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from factories import ARCHITECTURES, make_config

from batchrun.config import configs_dir
from batchrun.errors import ModelNotFound, ModelRefused, UsageError
from batchrun.models import load_device_spec, read_model_spec, resolve_model
from batchrun.specs import ModelSpec
from batchrun.supported import MODEL_TYPES

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
}
NEEDED = CONFIG.keys() - {"model_type", "eos_token_id"}
FILES = {
    "config.json": json.dumps(CONFIG),
    "tokenizer.json": "{}",
    "model.safetensors": "weights",
    "generation_config.json": '{"eos_token_id": [3, 4]}',
    "README.md": "not asked for",
    "consolidated.safetensors": "the same weights in another layout: not asked for",
}


def model_dir(path: Path, *without: str, **more: str) -> Path:
    path.mkdir(parents=True)
    for name, text in {**FILES, **more}.items():
        if name not in without:
            (path / name).write_text(text)
    return path


# --- directories and short names


def test_a_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    folder = model_dir(tmp_path / "m")
    found = resolve_model(str(folder))
    assert (found.name, found.path, found.source, found.revision) == (str(folder), folder, "path", None)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("m").path.samefile(folder)


def test_a_directory_comes_before_a_short_name(tmp_path, monkeypatch):
    folder = model_dir(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("demo").path.samefile(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"has no config\.json") as caught:
        resolve_model("demo")
    assert "short name" in caught.value.hint


def test_the_bundled_model_is_found_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = resolve_model("demo")
    assert found.source == "name" and found.path.is_absolute()
    spec, config, _ = read_model_spec(found.path)
    assert spec.model_type == config["model_type"] == "llama"


def test_every_shipped_name_has_one_place_and_a_description():
    import tomllib

    files = list((configs_dir() / "models").glob("*.toml"))
    assert {"demo", "llama", "llama-3.2-1b", "qwen", "qwen3", "mistral", "smollm"} <= {file.stem for file in files}
    for file in files:
        entry = tomllib.loads(file.read_text(encoding="utf-8"))
        assert set(entry) in ({"path", "description"}, {"hub", "description"}), file
        assert "path" not in entry or (file.parent / entry["path"]).is_dir(), file


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["config.json"], "has no config.json."),
        (["tokenizer.json"], "has no tokenizer.json."),
        (["model.safetensors"], "has no model.safetensors."),
        (["config.json", "tokenizer.json"], "has no config.json and no tokenizer.json."),
    ],
)
def test_what_a_directory_lacks_is_said(tmp_path, missing, said):
    folder = model_dir(tmp_path / "m", *missing)
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(str(folder))
    assert caught.value.message == f"The model directory {folder} {said}"
    assert caught.value.code == "model_not_found" and caught.value.exit_code == 2 and caught.value.hint


def test_sharded_weights_must_all_be_there(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    folder = model_dir(tmp_path / "m", "model.safetensors", **{"model.safetensors.index.json": json.dumps(index)})
    (folder / "model-1.safetensors").write_text("x")
    with pytest.raises(ModelNotFound, match=r"has no model-2\.safetensors \(1 of the 2 files"):
        resolve_model(str(folder))
    (folder / "model-2.safetensors").write_text("x")
    assert resolve_model(str(folder)).path == folder


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    folder = model_dir(tmp_path / "m", "model.safetensors", **{"pytorch_model.bin": "x"})
    with pytest.raises(ModelRefused, match=r"pytorch_model\.bin.*run any code"):
        resolve_model(str(folder))


def test_planning_needs_no_weights(tmp_path):
    folder = model_dir(tmp_path / "m", "model.safetensors")
    assert resolve_model(str(folder), weights=False).path == folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lama", "no short name 'lama'; did you mean 'llama'? Short names: demo, llama, llama-3.2-1b, "),
        ("zzz", "no short name 'zzz'. Short names: demo, "),
        ("./nowhere", "There is no directory ./nowhere."),
        ("a/b/c", "There is no directory a/b/c."),
        ("../up", "There is no directory ../up."),
        ("a/--b", "is no hub id"),
    ],
)
def test_a_name_that_leads_nowhere(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(name)
    assert said in caught.value.message
    assert caught.value.code == "model_not_found" and caught.value.hint


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "m.gguf").write_text("x")
    with pytest.raises(ModelNotFound, match="is a file"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_a_directory_has_no_revisions(tmp_path):
    with pytest.raises(UsageError, match="--revision main"):
        resolve_model(str(model_dir(tmp_path / "m")), "main")


# --- the hub


class Hub(BaseHTTPRequestHandler):
    """`org/open` can be downloaded, `org/gated` not, `org/broken` fails; nothing else exists."""

    protocol_version = "HTTP/1.1"
    sha = hashlib.sha1(b"commit").hexdigest()
    requests: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(path)
        if "org/gated" in path:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "org/broken" in path:
            return self.send(500, b"{}")
        if "org/open" not in path:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path == "/api/models/org/open/revision/main":
            return self.send(200, json.dumps({"id": "org/open", "sha": self.sha, "siblings": []}).encode())
        if path.startswith("/api/models/org/open/revision/"):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path == f"/api/models/org/open/tree/{self.sha}":
            tree = [{"type": "file", "path": n, "size": len(t), "oid": self.oid(t)} for n, t in FILES.items()]
            return self.send(200, json.dumps(tree).encode())
        text = FILES[path.rpartition("/")[2]]
        return self.send(200, text.encode(), {"ETag": f'"{self.oid(text)}"', "X-Repo-Commit": self.sha})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    @staticmethod
    def oid(text: str) -> str:
        return hashlib.sha1(text.encode()).hexdigest()

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub(tmp_path):
    """Run Python code against a hub of its own; returns what the code printed and the paths that it asked for."""
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def run(code: str, **environment: str) -> tuple[str, list[str]]:
        Hub.requests.clear()
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        env |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
        begin = """
            import sys
            from batchrun.errors import UsageError
            from batchrun.models import resolve_model
            def find(*args, **kwargs):
                try:
                    found = resolve_model(*args, **kwargs)
                    print(found.source, sorted(p.name for p in found.path.iterdir()))
                except UsageError as error:
                    print(error.code, "|", error.message, "|", error.hint)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(code)],
            env=env, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, list(Hub.requests)

    yield run
    server.shutdown()
    thread.join()
    server.server_close()


TEXT = ["config.json", "generation_config.json", "tokenizer.json"]
WHOLE = sorted([*TEXT, "model.safetensors"])


def test_a_hub_model_is_downloaded_once_and_then_found_without_the_hub(hub):
    out, _ = hub("find('org/open', weights=False); find('org/open')")
    assert out == f"hub {TEXT}\nhub {WHOLE}\n"
    out, asked = hub("find('org/open'); print({'torch', 'transformers'} & set(sys.modules))")
    assert (out, asked) == (f"hub {WHOLE}\nset()\n", [])
    out, asked = hub("find('org/open')", HF_HUB_OFFLINE="1")
    assert (out, asked) == (f"hub {WHOLE}\n", [])


def test_what_the_hub_refuses_is_said_with_the_next_move(hub):
    out, _ = hub("find('org/gated'); find('org/none'); find('org/open', 'v9'); find('org/broken')")
    gated, missing, revision, broken = out.splitlines()
    assert gated.startswith(
        "model_not_found | There is no directory org/gated, and org/gated is not in the local cache"
    )
    assert "it is gated" in gated and "/org/gated, then log in with `hf auth login` or set HF_TOKEN" in gated
    assert "the hub has no such model, or it is private" in missing
    assert "org/open has no revision v9" in revision
    assert "could not be downloaded" in broken and "500" in broken
    assert all(line.startswith("model_not_found | ") for line in out.splitlines())


def test_offline_says_what_was_tried(hub):
    out, asked = hub("find('org/open'); find('llama')", HF_HUB_OFFLINE="1")
    first, second = out.splitlines()
    assert "HF_HUB_OFFLINE forbids downloading it" in first and "Unset HF_HUB_OFFLINE" in first
    assert second.startswith("model_not_found | meta-llama/Llama-3.1-8B-Instruct is not in the local cache")
    assert asked == []
    out, _ = hub("find('org/open')", HF_ENDPOINT="http://127.0.0.1:9")
    assert "could not be downloaded from http://127.0.0.1:9: " in out and "Check the connection" in out


# --- what is read


def test_the_spec_is_read_from_plain_json(tmp_path):
    spec, config, generation_config = read_model_spec(model_dir(tmp_path / "m"))
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.max_context) == (2, 2, 4, 64)
    assert config == CONFIG
    assert generation_config == {"eos_token_id": [3, 4]}


def test_without_a_generation_config_the_end_of_text_is_that_of_the_config(tmp_path):
    assert read_model_spec(model_dir(tmp_path / "m", "generation_config.json"))[2] == {"eos_token_id": 3}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_spec_counts_the_weights_that_the_model_has(architecture):
    import torch
    from transformers import AutoModelForCausalLM

    config = make_config(architecture)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    weights = {name: part for name, part in module.named_parameters() if part.dim() > 1 and "bias" not in name}
    layers = [part.numel() for name, part in weights.items() if ".layers." in name and "vision" not in name]
    spec = ModelSpec.from_config(config.to_dict())
    assert spec.layer_parameters == sum(layers)
    assert spec.weight_bytes("float32") == 4 * (sum(layers) + 2 * text.vocab_size * text.hidden_size)
    unused = spec.num_experts - spec.experts_per_token
    experts = [part.numel() // part.shape[0] for name, part in weights.items() if "experts" in name]
    assert spec.linear_parameters == spec.layer_parameters - unused * sum(experts)
    assert spec.num_layers == text.num_hidden_layers


@pytest.mark.parametrize("model_type", [each for each in MODEL_TYPES if each != "gemma3"])
def test_what_a_config_leaves_out_is_what_transformers_puts_there(model_type):
    from transformers import AutoConfig

    given = {} if model_type == "gemma3_text" else {key: CONFIG[key] for key in NEEDED} | {"hidden_size": 96}
    theirs = AutoConfig.for_model(model_type, **given)
    spec = ModelSpec.from_config({"model_type": model_type, **given})
    assert spec.hidden_size == theirs.hidden_size
    assert spec.num_kv_heads == theirs.num_key_value_heads
    heads = spec.num_heads
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert (spec.vocab_size, spec.max_context) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert spec.num_experts == getattr(theirs, "num_experts", 0)
    assert spec.experts_per_token == getattr(theirs, "num_experts_per_tok", 0)
    if spec.num_experts:
        assert spec.expert_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)


def test_a_model_that_takes_images_has_the_spec_of_its_text_part(tmp_path):
    """As the hub has it: what transformers' configuration class says by itself is left out."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"model_type": "gemma3", "torch_dtype": "bfloat16", "eos_token_id": [1, 106], "text_config": text}
    folder = model_dir(tmp_path / "m", "generation_config.json", **{"config.json": json.dumps(config)})
    spec, _, generation_config = read_model_spec(folder)
    assert spec == ModelSpec("gemma3", 262_208, 2560, 10240, 34, 8, 4, 256, 131_072, 1024, "bfloat16")
    assert generation_config == {"eos_token_id": [1, 106]}


@pytest.mark.parametrize("place", ["of the model", "of RoPE"])
def test_longrope_limits_the_context(place):
    rope = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    config = CONFIG | {"model_type": "phi3", "rope_scaling": rope}
    if place == "of RoPE":
        config = {**config, "model_type": "llama", "rope_scaling": {**rope, "original_max_position_embeddings": 48}}
    else:
        config["original_max_position_embeddings"] = 48
    spec = ModelSpec.from_config(config)
    assert (spec.max_context, spec.longrope_limit) == (48, True)
    assert ModelSpec.from_config(config | {"rope_scaling": None}).max_context == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "llama"}', "has no 'num_attention_heads'"),
        ('{"model_type": "t5"}', "Models of type 't5'"),
        ('{"model_type": "llama", "rope_scaling": "linear"}', "wrong type"),
        (json.dumps({**CONFIG, "hidden_size": "wide"}), "wrong type"),
        (json.dumps({**CONFIG, "hidden_size": None}), "wrong type"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, said):
    with pytest.raises(ModelRefused, match=said):
        read_model_spec(model_dir(tmp_path / "m", **{"config.json": text}))


def test_the_cpu_is_measured():
    spec = load_device_spec("cpu")
    assert (spec.name, spec.page_size, spec.step_tokens) == ("cpu", 16, 1024)
    assert 0 < spec.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with pytest.raises(UsageError, match="no device 'cpuu'; did you mean 'cpu'"):
        load_device_spec("cpuu")


def test_a_device_file_of_the_user_takes_the_place_of_a_shipped_one(tmp_path, monkeypatch):
    shipped = load_device_spec("cpu")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load_device_spec("cpu").step_tokens == shipped.step_tokens
    text = (configs_dir() / "devices" / "cpu.toml").read_text()
    folder = tmp_path / "batchrun" / "devices"
    folder.mkdir(parents=True)
    (folder / "cpu.toml").write_text(text.replace(f"step_tokens = {shipped.step_tokens}", "step_tokens = 77"))
    (folder / "mine.toml").write_text(text)
    assert load_device_spec("cpu").step_tokens == 77
    assert load_device_spec("mine").name == "mine"
    assert load_device_spec("h200").name == "h200"
