"""KV memory of a run, in pages."""

from __future__ import annotations

from dataclasses import dataclass

from batchrun.specs import DeviceSpec, ModelSpec


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


def make_budget(
    model: ModelSpec, device: DeviceSpec, dtype: str, *, kv_memory: int | None, page_size: int | None = None
) -> MemoryBudget:
    """Share out the memory of a device.

    Args:
        kv_memory: bytes for KV as the user set them, or None for the device's share of what the weights leave.
        page_size: in tokens; None for the device's.
    """
    size = page_size or device.page_size
    page_bytes = size * model.kv_bytes_per_token(dtype)
    weights = model.weight_bytes(dtype)
    if kv_memory is None:
        kv_memory = int(device.kv_share * max(device.memory_bytes - weights, 0))
    return MemoryBudget(page_size=size, pages=kv_memory // page_bytes, page_bytes=page_bytes, weight_bytes=weights)
