"""Find what `--model` names and read its shape, as plain files: a directory, a short name of configs/models, or a
model on the hub. Nothing is loaded; a model that cannot be used says so before anything else is spent."""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchrun.config import configs_dir, nearest, parse_size, user_configs_dir
from batchrun.devices import device_file
from batchrun.errors import ModelNotFound, ModelRefused, UsageError
from batchrun.specs import DeviceSpec, ModelSpec, text_config
from batchrun.supported import check_supported

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelDir:
    """A model directory that has what a run needs.

    Attributes:
        name: as the user gave it.
        path: the directory.
        source: how it was found: by its path, by a short name of a shipped directory, or on the hub.
        revision: of a hub model, as asked for; None is its main branch.
    """

    name: str
    path: Path
    source: Literal["path", "name", "hub"]
    revision: str | None = None


def resolve_model(
    name_or_path: str, revision: str | None = None, *, weights: bool = True, download: bool = True
) -> ModelDir:
    """Find a model: an existing directory, else a short name, else a hub id (local cache first, then download).

    Args:
        revision: branch, tag or commit of a hub model.
        weights: whether the weights are needed too; planning needs none.
        download: whether a hub model may be downloaded.

    Raises:
        ModelNotFound: it is missing, incomplete, gated or out of reach (code `model_not_found`).
        ModelRefused: its weights are there in a format that is not read.
        UsageError: a revision is given for a directory.
    """
    folder = Path(name_or_path).expanduser()
    known = _shipped("models")
    if folder.is_dir():
        hint = f"It comes before the short name {name_or_path}." if name_or_path in known else None
        return _local(name_or_path, folder, "path", revision=revision, weights=weights, hint=hint)
    if name_or_path in known:
        entry = _read_toml(known[name_or_path])
        if "path" in entry:
            folder = (known[name_or_path].parent / entry["path"]).resolve()
            return _local(name_or_path, folder, "name", revision=revision, weights=weights)
        return _from_hub(name_or_path, entry["hub"], revision, weights, download)
    if folder.exists():
        raise _not_found(f"{name_or_path} is a file, not a model directory.", "Give the directory that holds it.")
    if _HUB_ID.fullmatch(name_or_path) and not name_or_path.startswith("."):
        return _from_hub(name_or_path, name_or_path, revision, weights, download)
    if "/" in name_or_path or "\\" in name_or_path:
        raise _not_found(f"There is no directory {name_or_path}.", "Give the directory that has config.json in it.")
    meant = nearest(name_or_path, known)
    raise _not_found(
        f"There is no directory and no short name {name_or_path!r}"
        + (f"; did you mean {meant!r}?" if meant else ".")
        + f" Short names: {', '.join(known)}.",
        "Give a model directory, a short name, or a hub id such as Qwen/Qwen2.5-7B-Instruct.",
    )


def read_model_spec(model_dir: Path) -> tuple[ModelSpec, dict[str, Any], dict[str, Any]]:
    """The model's shape, its `config.json` and its `generation_config.json`.

    Where there is no `generation_config.json`, its end-of-text ids are those of `config.json`, as in transformers.

    Raises:
        ModelRefused: a file is not sound, or the model is none that is run exactly.
    """
    config = _read_json(model_dir / "config.json")
    path = model_dir / "generation_config.json"
    try:
        check_supported(config)
        eos = config.get("eos_token_id", text_config(config).get("eos_token_id"))
        generation_config = _read_json(path) if path.exists() else {"eos_token_id": eos}
        return ModelSpec.from_config(config), config, generation_config
    except KeyError as error:
        raise ModelRefused(
            f"{model_dir / 'config.json'} has no {error}, which every decoder-only language model has.",
            hint="batchrun runs decoder-only text models.",
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelRefused(f"{model_dir / 'config.json'} has a field of the wrong type: {error}.") from error


def load_device_spec(name: str) -> DeviceSpec:
    """The description of a device by name, this user's or the shipped one; `cuda` is the GPU that is here. Where it
    names no memory, that of this machine is measured.

    Raises:
        UsageError: there is no such device.
    """
    known = _shipped("devices") | _toml_files(user_configs_dir() / "devices")
    name = device_file(name, known)
    if name not in known:
        meant = nearest(name, known)
        raise UsageError(
            f"There is no device {name!r}" + (f"; did you mean {meant!r}?" if meant else "."),
            hint=f"Known devices: {', '.join(known)}.",
        )
    entry = _read_toml(known[name])
    memory = parse_size(entry["memory"]) if "memory" in entry else _host_memory()
    return DeviceSpec(
        name,
        kind=entry["kind"],
        memory_bytes=memory,
        kv_share=entry["kv_share"],
        page_size=entry["page_size"],
        step_tokens=entry["step_tokens"],
        flops=entry["flops"],
        bandwidth=entry["bandwidth"],
        fitted=entry.get("fitted", {}),
        hardware=entry["hardware"],
    )


def _shipped(kind: str) -> dict[str, Path]:
    """The shipped TOML files of configs/<kind> by name."""
    return _toml_files(configs_dir() / kind)


def _toml_files(folder: Path) -> dict[str, Path]:
    return dict(sorted((path.stem, path) for path in folder.glob("*.toml")))


def _local(
    name: str,
    folder: Path,
    source: Literal["path", "name"],
    *,
    revision: str | None,
    weights: bool,
    hint: str | None = None,
) -> ModelDir:
    if revision is not None:
        raise UsageError(f"--revision {revision} means nothing for {name}, which is a directory.", hint="Leave it out.")
    fault = _fault(folder, weights)
    if fault:
        raise _incomplete(f"The model directory {folder} {fault}", folder, hint)
    return ModelDir(name, folder, source)


def _from_hub(name: str, hub_id: str, revision: str | None, weights: bool, download: bool) -> ModelDir:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_TEXT_FILES, *(["model*.safetensors"] if weights else [])]

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )

    what = hub_id if revision is None else f"{hub_id} at revision {revision}"
    begin = f"There is no directory {name}, and {what}" if name == hub_id else what
    tried = f"{begin} is not in the local cache ({constants.HF_HUB_CACHE})"
    or_a_directory = "or give --model a directory that holds the model."
    try:
        cached = snapshot(local_files_only=True)
        if _fault(cached, weights) is None:
            return ModelDir(name, cached, "hub", revision)
        tried = f"{begin} is in the local cache ({constants.HF_HUB_CACHE}) only in part"
    except HFValidationError as error:
        raise _not_found(f"{hub_id!r} is no hub id: {error}", f"Write org/name, {or_a_directory}") from error
    except LocalEntryNotFoundError:
        pass  # not cached, or in part: download

    if not download:
        raise _not_found(f"{tried}.", "Any run with it downloads it.")
    if constants.HF_HUB_OFFLINE:
        raise _not_found(
            f"{tried}, and HF_HUB_OFFLINE forbids downloading it.",
            f"Unset HF_HUB_OFFLINE, {or_a_directory}",
        )
    try:
        folder = snapshot(local_files_only=False)
    except GatedRepoError as error:
        raise _not_found(
            f"{tried}, and on the hub it is gated: this machine has no access to it.",
            f"Ask for access at {constants.ENDPOINT}/{hub_id}, then log in with `hf auth login` or set HF_TOKEN; "
            f"{or_a_directory}",
        ) from error
    except RevisionNotFoundError as error:
        raise _not_found(
            f"{hub_id} has no revision {revision}.", "Give --revision a branch, tag or commit of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise _not_found(
            f"{tried}, and the hub has no such model, or it is private.",
            f"Check the name; for a private model log in with `hf auth login` or set HF_TOKEN; {or_a_directory}",
        ) from error
    except Exception as error:  # whatever else the client raises, the model could not be fetched
        raise _not_found(
            f"{tried}, and it could not be downloaded from {constants.ENDPOINT}: {_one_line(error.__cause__ or error)}",
            f"Check the connection and try again (what was downloaded stays), {or_a_directory}",
        ) from error
    fault = _fault(folder, weights)
    if fault:
        raise _incomplete(f"The hub model {what} {fault}", folder, None)
    return ModelDir(name, folder, "hub", revision)


def _fault(folder: Path, weights: bool) -> str | None:
    """What the directory lacks, as the end of a sentence that begins with the directory; None if nothing."""
    if not folder.is_dir():
        return "does not exist."
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if weights and not (folder / _WEIGHTS).is_file():
        missing += _missing_shards(folder) if (folder / _INDEX).is_file() else [_WEIGHTS]
    return f"has no {' and no '.join(missing)}." if missing else None


def _missing_shards(folder: Path) -> list[str]:
    shards = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    return [f"{', '.join(absent)} ({len(absent)} of the {len(shards)} files of {_INDEX})"] if absent else []


def _incomplete(message: str, folder: Path, hint: str | None) -> UsageError:
    pickles = sorted(path.name for pattern in ("pytorch_model*.bin", "*.pth") for path in folder.glob(pattern))
    if pickles and not (folder / _WEIGHTS).is_file() and not (folder / _INDEX).is_file():
        return ModelRefused(
            f"{message} Its weights are pickle files ({pickles[0]}), which can run any code when they are loaded.",
            hint="Convert it: load it with transformers where you trust it, then save_pretrained(DIR).",
        )
    return _not_found(
        message, hint or "save_pretrained writes a whole directory: config.json, tokenizer.json, model.safetensors."
    )


def _not_found(message: str, hint: str) -> ModelNotFound:
    return ModelNotFound(message, hint=hint, code="model_not_found")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ModelRefused(f"{path} is not a JSON object.")
    return value


def _read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _host_memory() -> int:
    """Bytes that a new process could use now: what the system calls available, or less under a control group."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
        memory = int(available[1]) * 1024 if available else memory
    return min([memory, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Memory limits in bytes of the control groups that this process is in, its ancestors' included."""
    groups = Path("/proc/self/cgroup")
    limits = []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, file = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(root) and (place / file).is_file():
                text = (place / file).read_text().strip()
                limits += [int(text)] if text != "max" else []
    return limits
