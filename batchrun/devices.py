"""Which device and which number type a run uses, told without loading torch, so that a plan can tell it too."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from batchrun.errors import UsageError
from batchrun.specs import DTYPE_BYTES

_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # as /proc/cpuinfo names them on x86-64 and Arm

# Steps in flight at a time: where the device computes beside the host, one is made while another is computed.
DEPTH = {"cpu": 1, "cuda": 2}


def resolve_device(device: str, *, nodes: Path = Path("/dev"), torch_version: Path | None = None) -> str:
    """The device that `--device` stands for: `auto` is a GPU where there is one that the installed torch runs on.

    Args:
        nodes: where the system shows its devices.
        torch_version: the file in which a build of torch says what it was made for; that of the installed one if None.
    """
    if device != "auto":
        return device
    return "cuda" if (nodes / "nvidia0").exists() and torch_runs_on_gpus(torch_version) else "cpu"


def check_device(device: str, *, torch_version: Path | None = None) -> None:
    """Raises:
    UsageError: the installed torch was not made for the device.
    """
    if device == "cuda" and not torch_runs_on_gpus(torch_version):
        raise UsageError(
            "The installed torch was built for the CPU only.",
            hint="Give --device cpu, or install a torch that was built for CUDA.",
        )


def torch_runs_on_gpus(version: Path | None = None) -> bool:
    """Whether torch was built for GPUs, NVIDIA's or AMD's.

    Args:
        version: as for `resolve_device`.
    """
    if version is None:
        found = find_spec("torch")
        if found is None or found.origin is None:
            return False
        version = Path(found.origin).with_name("version.py")
    try:
        text = version.read_text()
    except OSError:
        return False
    return re.search(r"^(cuda|hip)\b.*=\s*['\"]", text, re.MULTILINE) is not None


def device_file(device: str, known: Collection[str], *, gpus: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """The name of the device file for `cpu` or `cuda`: of the first GPU's own file, if its name has that of one of
    those known in it, else `cuda`."""
    if device != "cuda":
        return device
    for information in sorted(gpus.glob("*/information")):
        words = information.read_text().lower().split()
        return next((name for name in known if name in words), device)
    return device


def resolve_dtype(
    dtype: str, checkpoint_dtype: str, device: str = "cpu", *, cpuinfo: Path = Path("/proc/cpuinfo")
) -> str:
    """The dtype that `--dtype` stands for: `auto` is the checkpoint's on a GPU; on a CPU it is bfloat16 where the
    checkpoint is a half type and the processor computes in bfloat16, else float32."""
    if dtype != "auto":
        return dtype
    if device == "cuda":
        return checkpoint_dtype
    half = DTYPE_BYTES.get(checkpoint_dtype, 4) == 2
    return "bfloat16" if half and _has_bfloat16(cpuinfo) else "float32"


def _has_bfloat16(cpuinfo: Path) -> bool:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not set(_NATIVE_BFLOAT16).isdisjoint(value.split())
    return False
