"""Where tensors live: copies to it and back, its clock, its memory. All that says `torch.cuda` is here."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Hashable, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batchrun.errors import UsageError

Arrays = Mapping[str, npt.NDArray[Any]]
Tensors = dict[str, torch.Tensor]

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc refuses more

# Words for too little memory, in errors that have no type of their own: of torch's allocator on the CPU; of CUDA, where
# it makes room for a kernel or a graph; of cuBLAS.
_FULL = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

_ALIGNMENT = 16  # bytes; what any load of a kernel wants
_FIRST_BUFFER = 1 << 20  # bytes


def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc, whose malloc is the one that torch takes memory of the CPU from."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


_LIBC = _glibc()


class Device:
    """The processor: there is nothing to copy and nothing to wait for.

    Attributes:
        name: as torch names it.
        graphs: whether what is launched again and again is captured once and replayed.
    """

    name = "cpu"
    graphs = False

    def upload(self, arrays: Arrays) -> Tensors:
        """The arrays of a step as tensors, in one copy. They are overwritten by the next upload, in the order of what
        was submitted to the device."""
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """An array as a tensor, besides those of a step: for what is known only once the step is under way."""
        return torch.from_numpy(array)

    def download(self, tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
        """Begin to copy a tensor to the host; the function returned waits for it."""
        return tensor.numpy

    def start_clock(self) -> Callable[[], Callable[[], float]]:
        """Note the time on the device; calling what is returned notes it again, and calling what that returns waits
        and gives the seconds between the two."""
        began = perf_counter()

        def stop() -> Callable[[], float]:
            seconds = perf_counter() - began
            return lambda: seconds

        return stop

    def is_full(self, error: BaseException) -> bool:
        """Whether an error says that there was not enough memory."""
        return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)
        )

    def keep_memory(self) -> None:
        """Have memory that a step frees kept for the next one, rather than given back to the system and taken anew,
        page by page."""
        if _LIBC is not None:
            _LIBC.malloc_trim(0)  # what loading has freed
            _LIBC.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            _LIBC.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

    def give_back(self) -> None:
        """Return memory that is kept for later."""
        if _LIBC is not None:
            _LIBC.malloc_trim(0)

    def kv_memory(self, share: float, largest_step: Callable[[], None]) -> int | None:
        """Bytes that are left for KV beside the largest step, or None: as it was planned.

        Args:
            share: of the device's memory that may be used in all.
            largest_step: runs one.
        """
        return None

    def waits_for_experts(self, dtype: torch.dtype) -> bool:
        """Whether the products of experts wait until the host knows how many rows each has: no graph can hold that."""
        return False

    def graphed(self, key: Hashable, places: Hashable, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of a call that, whenever it has the same key, launches the same kernels over what lies in the same
        places; it is good until the next such call.

        Args:
            places: changes when what any call reads lies elsewhere.
        """
        return call()


class CudaDevice(Device):
    """An NVIDIA GPU, or an AMD one: torch calls both cuda."""

    name = "cuda"

    def __init__(self, *, graphs: bool = True) -> None:
        self._pinned = self.name == "cuda"
        self._buffer = torch.empty(_FIRST_BUFFER, dtype=torch.uint8, device=self.name)
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor] | None] = {}
        self._places: Hashable = None
        self.graphs = graphs
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    def upload(self, arrays: Arrays) -> Tensors:
        begins, size = [], 0
        for array in arrays.values():
            begins.append(size)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > self._buffer.numel():
            self._buffer = torch.empty(2 * size, dtype=torch.uint8, device=self.name)
            self._forget_graphs()  # they read the buffer that is gone
        # Pinned memory from torch's cache: it is not given out again before the copy from it has been made.
        staged = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        host = staged.numpy()
        for begin, array in zip(begins, arrays.values(), strict=True):
            host[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._buffer[:size].copy_(staged, non_blocking=True)
        return {
            name: self._buffer[begin : begin + array.nbytes].view(_TORCH_DTYPE[array.dtype.name]).view(array.shape)
            for begin, (name, array) in zip(begins, arrays.items(), strict=True)
        }

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        host = torch.from_numpy(array)
        return (host.pin_memory() if self._pinned else host).to(self.name, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> npt.NDArray[Any]:
            done.synchronize()
            return host.numpy()

        return wait

    def start_clock(self) -> Callable[[], Callable[[], float]]:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()

        def seconds() -> float:
            ended.synchronize()
            return began.elapsed_time(ended) / 1000

        def stop() -> Callable[[], float]:
            ended.record()
            return seconds

        return stop

    def keep_memory(self) -> None:
        """torch does."""

    def give_back(self) -> None:
        self._forget_graphs()
        torch.cuda.empty_cache()

    def _forget_graphs(self) -> None:
        """Their memory goes with the last of them, and what may be left of it is not to be captured into again."""
        self._captured.clear()
        if self.graphs:
            self._pool = torch.cuda.graph_pool_handle()

    def kv_memory(self, share: float, largest_step: Callable[[], None]) -> int | None:
        gc.collect()  # what a run before has left, if anything of it held itself
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        largest_step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return max(int(free - (1 - share) * total - peak), 0)

    def waits_for_experts(self, dtype: torch.dtype) -> bool:
        # Else torch's `grouped_mm` falls back to a product for each expert (`_grouped_mm_cuda` of its source).
        return (
            bool(torch.version.hip) or dtype != torch.bfloat16 or torch.cuda.get_device_capability()[0] not in (9, 10)
        )

    def graphed(self, key: Hashable, places: Hashable, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        if not self.graphs:
            return call()
        if places != self._places:  # no graph that there is will be replayed again
            self._forget_graphs()
            self._places = places
        if key not in self._captured:  # the first time kernels are compiled and loaded, which cannot be captured
            self._captured[key] = None
            return call()
        captured = self._captured[key]
        if captured is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = call()
            captured = self._captured[key] = (graph, result)
        graph, result = captured
        graph.replay()
        return result


_TORCH_DTYPE = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32, "float64": torch.float64}


def make_device(name: str, *, graphs: bool = True) -> Device:
    """The device of a name that `devices.resolve_device` gives.

    Args:
        graphs: whether steps of decodes are captured once and replayed.

    Raises:
        UsageError: torch sees no such device.
    """
    if name == "cpu":
        return Device()
    if not torch.cuda.is_available():
        raise UsageError(
            f"torch {torch.__version__} sees no GPU.",
            hint="Give --device cpu; or look at nvidia-smi, and at whether this torch was built for CUDA.",
        )
    return CudaDevice(graphs=graphs)
