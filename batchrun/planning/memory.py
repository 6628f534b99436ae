"""KV memory of a run, in pages."""

from __future__ import annotations

from dataclasses import dataclass

from batchrun.errors import UsageError
from batchrun.specs import DeviceSpec, ModelSpec

GPU_PAGE_SIZES = (16, 32, 64)  # a tile of KV is a page there


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """How the memory of the device is shared out.

    Attributes:
        page_size: KV allocation unit, in tokens.
        pages: pages of the pool.
        page_bytes: bytes of K and V of one page, over all layers.
        weight_bytes: estimate for the weights.
    """

    page_size: int
    pages: int
    page_bytes: int
    weight_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.pages * self.page_bytes

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold the KV of one sequence of `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)


def page_size_on(device: DeviceSpec, page_size: int | None) -> int:
    """The page size that a run has: the one asked for, else the device's.

    Raises:
        UsageError: the kernels of a GPU have none for it.
    """
    size = page_size or device.page_size
    if device.kind != "cpu" and size not in GPU_PAGE_SIZES:
        raise UsageError(
            f"Pages of {size} tokens (scheduler.page_size) are not for a GPU.",
            hint=f"Choose one of: {', '.join(map(str, GPU_PAGE_SIZES))}.",
        )
    return size


def make_budget(
    model: ModelSpec, device: DeviceSpec, dtype: str, *, kv_memory: int | None, page_size: int | None = None
) -> MemoryBudget:
    """Share out the memory of a device.

    Args:
        kv_memory: bytes for KV as the user set them, or None for the device's share of what the weights leave.
        page_size: in tokens; None for the device's.

    Raises:
        UsageError: as `page_size_on`.
    """
    size = page_size_on(device, page_size)
    page_bytes = size * model.kv_bytes_per_token(dtype)
    weights = model.weight_bytes(dtype)
    if kv_memory is None:
        kv_memory = int(device.kv_share * max(device.memory_bytes - weights, 0))
    return MemoryBudget(page_size=size, pages=kv_memory // page_bytes, page_bytes=page_bytes, weight_bytes=weights)
