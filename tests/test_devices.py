"""Which device and which number type a run uses."""

from __future__ import annotations

import pytest

from batchrun.devices import resolve_device, resolve_dtype
from batchrun.errors import UsageError

X86 = "processor\t: 0\nflags\t\t: fpu sse2 avx512f {}\nbugs\t\t: spectre\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_models_run_on_the_cpu(device):
    assert resolve_device(device) == "cpu"


def test_cuda_is_refused_with_the_next_move():
    with pytest.raises(UsageError, match="CPU only") as caught:
        resolve_device("cuda")
    assert "--device cpu" in (caught.value.hint or "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("checkpoint", ["float32", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_taken(dtype, checkpoint, tmp_path):
    assert resolve_dtype(dtype, checkpoint, cpuinfo=tmp_path / "missing") == dtype


@pytest.mark.parametrize(
    ("checkpoint", "cpuinfo", "expected"),
    [
        ("bfloat16", X86.format("avx512_bf16"), "bfloat16"),
        ("bfloat16", X86.format("amx_bf16"), "bfloat16"),
        ("float16", X86.format("avx512_bf16"), "bfloat16"),
        ("bfloat16", ARM.format("bf16"), "bfloat16"),
        ("bfloat16", X86.format(""), "float32"),
        ("bfloat16", X86.format("notbf16"), "float32"),
        ("bfloat16", "model name\t: bf16 processor\n" + X86.format(""), "float32"),
        ("bfloat16", "", "float32"),
        ("float32", X86.format("avx512_bf16 amx_bf16"), "float32"),
        ("unheard_of", X86.format("avx512_bf16"), "float32"),
    ],
)
def test_auto_is_a_half_type_only_where_checkpoint_and_processor_have_one(checkpoint, cpuinfo, expected, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    assert resolve_dtype("auto", checkpoint, cpuinfo=file) == expected


def test_auto_is_float32_where_the_processor_cannot_be_asked(tmp_path):
    assert resolve_dtype("auto", "bfloat16", cpuinfo=tmp_path / "missing") == "float32"


@pytest.mark.parametrize("checkpoint", ["bfloat16", "float16", "float32"])
def test_a_gpu_computes_in_the_dtype_of_the_checkpoint(checkpoint):
    assert resolve_dtype("auto", checkpoint, "cuda") == checkpoint
