"""Which device and which number type a run uses, told without loading torch, so that a plan can tell it too."""

from __future__ import annotations

from pathlib import Path

from batchrun.errors import UsageError
from batchrun.specs import DTYPE_BYTES

_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # as /proc/cpuinfo names them on x86-64 and Arm


def resolve_device(device: str) -> str:
    """The device that `--device` stands for.

    Raises:
        UsageError: it cannot be used.
    """
    if device == "cuda":
        raise UsageError(
            "This version of batchrun runs models on the CPU only.", hint="Leave --device out, or give --device cpu."
        )
    return "cpu"


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
