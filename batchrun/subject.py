"""The model a job is run with, and how: what can be known before the job is read, and what of it decides results."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from batchrun.config import RunConfig
from batchrun.devices import check_device, resolve_device, resolve_dtype
from batchrun.errors import UsageError
from batchrun.models import ModelDir, load_device_spec, read_model_spec, resolve_model
from batchrun.specs import ModelSpec

Fingerprint = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True)
class Subject:
    """The model a job is run with, and how: all that can be known before the job is read."""

    name: str
    model: ModelDir
    spec: ModelSpec
    config: dict[str, Any]
    generation_config: dict[str, Any]
    device: str
    dtype: str
    environment: dict[str, Any]

    @classmethod
    def resolve(cls, config: RunConfig, *, weights: bool, name: str | None = None) -> Subject:
        """Find the model and see that it can be run.

        Args:
            weights: whether it is to be run, and not only planned for.
            name: that results give the model; if None, the one that it was found by.

        Raises:
            UsageError: the model or the device is missing or refused.
        """
        model = resolve_model(config.model, config.revision, weights=weights)
        spec, model_config, generation_config = read_model_spec(model.path)
        device = resolve_device(config.device)
        if weights:
            check_device(device)
        if config.device_spec is not None:
            kind = load_device_spec(config.device_spec).kind
            if weights and kind != device:
                raise UsageError(
                    f"A run on the {device} cannot be planned with the figures of {config.device_spec}.",
                    hint="device_spec = ... is for batchrun plan; leave it out here.",
                )
            device = kind
        return cls(
            name=name or config.model,
            model=model,
            spec=spec,
            config=model_config,
            generation_config=generation_config,
            device=device,
            dtype=resolve_dtype(config.dtype, spec.checkpoint_dtype, device),
            environment=_environment(),
        )


def fingerprint_of(subject: Subject, job: str, config: RunConfig) -> Fingerprint:
    """All that decides the results, by name.

    Raises:
        UsageError: the chat template cannot be read.
    """
    return {
        "job": job,
        "model": _model_digest(subject.model.path),
        "chat_template": _template_digest(config.chat_template) if config.chat_template is not None else None,
        "dtype": subject.dtype,
        "seed": config.seed,
        "max_tokens": config.max_tokens,
        "limit": config.limit,
        "ignore_generation_config": config.ignore_generation_config,
        "sampling": orjson.dumps(config.sampling.model_dump()).decode(),
    }


def _template_digest(template: Path) -> str:
    try:
        return hashlib.sha256(template.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"The chat template {template} cannot be read: {error.strerror}.") from error


def _model_digest(path: Path) -> str:
    """Sha256 of the model's small files and of the names, sizes and headers of its weights."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        elif file.suffix == ".safetensors":
            size = file.stat().st_size
            with file.open("rb") as weights:
                head = weights.read(1 << 16)
                weights.seek(max(0, size - (1 << 16)))
                digest.update(f"{file.name}\0{size}\0".encode() + head + weights.read())
    return digest.hexdigest()


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("batchrun", "torch", "transformers", "tokenizers", "llguidance", "numpy", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
