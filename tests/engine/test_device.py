"""Copies to the device: what arrives, and where it lies. Here on the CPU, through the code that a GPU uses."""

from __future__ import annotations

import platform
import resource

import numpy as np
import pytest
import torch

from batchrun.engine.device import CudaDevice, Device, make_device
from batchrun.errors import UsageError


class Pretended(CudaDevice):
    """Memory of the CPU in the place of a GPU's."""

    name = "cpu"


def arrays(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "ids": rng.integers(0, 1000, rows),
        "list": rng.integers(0, 1000, 3 * rows + 1).astype(np.int32),
        "none": np.zeros(0, dtype=np.int64),
        "point": rng.random(rows),
        "table": rng.integers(0, 9, (rows, 2)).astype(np.int32),
    }


@pytest.mark.parametrize("device", [Device(), Pretended(graphs=False)])
@pytest.mark.parametrize("rows", [1, 7, 200_000])
def test_arrays_arrive_as_they_are(device: Device, rows: int) -> None:
    sent = arrays(rows)
    found = device.upload(sent)
    assert found.keys() == sent.keys()
    for name, array in sent.items():
        assert np.array_equal(found[name].numpy(), array), name
        assert found[name].numpy().dtype == array.dtype


def test_steps_of_the_same_sizes_lie_in_the_same_places() -> None:
    """So that a captured graph finds its inputs; each place fits any load of a kernel."""
    device = Pretended(graphs=False)
    places = []
    for seed in range(2):
        found = device.upload({**arrays(50, seed), f"more {seed}": np.arange(seed + 1)})
        places.append([found[name].data_ptr() for name in arrays(50)])
    assert places[0] == places[1]
    assert all(place % 16 == 0 for place in places[0])


def test_what_has_no_memory_is_told_from_what_is_wrong() -> None:
    device = Device()
    assert device.is_full(torch.OutOfMemoryError("CUDA out of memory"))
    assert device.is_full(MemoryError())
    assert device.is_full(RuntimeError("CUDA error: out of memory"))
    assert device.is_full(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert device.is_full(caught.value)
    assert not device.is_full(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(UsageError, match="sees no GPU") as caught:
        make_device("cuda")
    assert "--device cpu" in (caught.value.hint or "")


def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    """Pages that were given back to the system would have to be taken anew, each with a fault."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc is told to")
    Device().keep_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            torch.empty(16 << 20, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < (16 << 20) // resource.getpagesize()
