"""The benchmark's model: SmolLM2-135M's shape with random seeded weights, in the form that each peer reads.

A form is made once and kept; its folder is named after all that decides what is in it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.bench.peers.environments import RECIPES, Unavailable, python_of, reason

SHAPE: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
FIRST_CHARACTER = 0x4E00  # of token 0
SECONDS = 900
HF = "hf"  # the form that the others are made from

_ADAPTERS = Path(__file__).resolve().parent / "adapters"
_OPENVINO = ("--task", "text-generation-with-past", "--weight-format", "fp32", "--library", "transformers")
# What makes a form: the environment, a program of it, and arguments.
_CONVERTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gguf": ("llama-cpp", "python", (str(_ADAPTERS / "convert_gguf.py"), "{model}", "{dtype}", "{out}")),
    "openvino": ("openvino-convert", "optimum-cli", ("export", "openvino", "--model", "{model}", *_OPENVINO, "{out}")),
    "ctranslate2": (
        "ctranslate2",
        "python",
        (str(_ADAPTERS / "convert_ctranslate2.py"), "{model}", "{dtype}", "{out}"),
    ),
}
_ONE_FOR_ALL = ("openvino",)  # its precision is chosen when it is loaded


def kv_bytes(dtype: str, shape: Mapping[str, Any] = SHAPE) -> int:
    """Bytes of the keys and values of one token."""
    width = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return width * {"float32": 4, "bfloat16": 2}[dtype]


class Forms:
    """The forms of one model, below a folder."""

    def __init__(self, root: Path, environments: Path, shape: Mapping[str, Any] = SHAPE) -> None:
        tag = hashlib.sha256(json.dumps([shape, FIRST_CHARACTER], sort_keys=True).encode()).hexdigest()[:12]
        self.root, self.environments, self.shape = root / tag, environments, shape

    def path(self, form: str, dtype: str) -> Path:
        """Where a form lies, made if it does not.

        Raises:
            Unavailable: its converter cannot be installed, or fails.
        """
        if form == HF:
            made = self.root / f"{form}-{dtype}"
        else:
            dtype = "float32" if form in _ONE_FOR_ALL else dtype
            environment, program, arguments = _CONVERTERS[form]
            installs = repr(RECIPES[environment].installs)
            made = self.root / f"{form}-{hashlib.sha256(installs.encode()).hexdigest()[:8]}-{dtype}"
        if made.exists():
            return made
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:  # so that what has its name is there in full
            out = str(Path(folder) / "made")
            if form == HF:
                maker = str(_ADAPTERS / "make_model.py")
                command = [sys.executable, maker, json.dumps(self.shape), dtype, str(FIRST_CHARACTER), out]
            else:
                # From float32 weights: a peer that computes in bfloat16 rounds them as torch does.
                names = {"model": str(self.path(HF, "float32")), "dtype": dtype, "out": out}
                python = python_of(environment, self.environments)
                command = [str(python.with_name(program)), *(argument.format(**names) for argument in arguments)]
            _convert(command, self.root / f"{form}.log")
            Path(out).rename(made)
        return made


def _convert(command: list[str], log: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"its model cannot be made: {error}") from error
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise Unavailable(f"its model cannot be made: {reason(done.stderr)}")
