"""Shared by all tests: model directories made once a session, no network, quiet libraries."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; commands inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["XDG_CONFIG_HOME"] = str(Path(__file__).parent / "nobody")  # whatever was calibrated here counts for no test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, on models so small that threads only wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ModelFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """`model_dir(architecture, **options)`: a directory of `factories.make_model`, made once a session."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(architecture: str = "llama", **options: Any) -> Path:
        from factories import make_model

        key = (architecture, repr(sorted(options.items())))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(architecture) / architecture, architecture, **options)
        return made[key]

    return get


@pytest.fixture(autouse=True)
def shared_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine lives in the process of the tests, where torch is loaded once. Not so where a test is marked
    `own_process`, and in runs that are processes themselves."""
    if "own_process" not in request.keywords:
        from batchrun import pipeline

        monkeypatch.setattr(pipeline, "RemoteEngine", lambda build, step_timeout: build())
