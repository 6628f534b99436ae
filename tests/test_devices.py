"""Which device and which number type a run uses."""

from __future__ import annotations

import pytest

from batchrun.devices import check_device, device_file, resolve_device, resolve_dtype, torch_runs_on_gpus
from batchrun.errors import UsageError

X86 = "processor\t: 0\nflags\t\t: fpu sse2 avx512f {}\nbugs\t\t: spectre\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU part\t: 0xd40\n"


CUDA = "__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
ROCM = "__version__ = '2.13.0'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.1'\n"
CPU = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"


@pytest.mark.parametrize(("build", "gpu", "expected"), [(CUDA, True, "cuda"), (CUDA, False, "cpu"), (CPU, True, "cpu")])
def test_auto_is_a_gpu_where_there_is_one_that_torch_was_built_for(build, gpu, expected, tmp_path):
    version = tmp_path / "version.py"
    version.write_text(build)
    if gpu:
        (tmp_path / "nvidia0").touch()
    assert resolve_device("auto", nodes=tmp_path, torch_version=version) == expected
    assert resolve_device("cpu", nodes=tmp_path, torch_version=version) == "cpu"


def test_what_torch_was_built_for_is_told_without_loading_it():
    import torch

    assert torch_runs_on_gpus() == (torch.version.cuda is not None or torch.version.hip is not None)


def test_cuda_is_refused_with_the_next_move_where_torch_was_not_built_for_it(tmp_path):
    version = tmp_path / "version.py"
    for build in (CUDA, ROCM):
        version.write_text(build)
        check_device("cuda", torch_version=version)
    version.write_text(CPU)
    check_device("cpu", torch_version=version)
    with pytest.raises(UsageError, match="CPU only") as caught:
        check_device("cuda", torch_version=version)
    assert "--device cpu" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("model", "expected"), [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "cuda"), (None, "cuda")]
)
def test_a_gpu_is_planned_for_with_its_own_figures_where_there_are_some(model, expected, tmp_path):
    if model is not None:
        (tmp_path / "0000:01:00.0").mkdir()
        (tmp_path / "0000:01:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 20\n")
    assert device_file("cuda", ["a100", "cpu", "h100", "h200"], gpus=tmp_path) == expected
    assert device_file("h100", ["a100", "cpu", "h100", "h200"], gpus=tmp_path) == "h100"


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
