"""The KV pool and who holds which of its pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from batchrun_kernels.cpu import in_huge_pages

from batchrun.schedule.step import Step

Int64 = npt.NDArray[np.int64]


class KVCache:
    """K and V of all layers, for `num_pages` pages.

    Token-major on the CPU, `[num_pages * page_size, 2, kv_heads, head_dim]`: K and V of a row are stored by one copy,
    and the KV of neighbouring pages is one view, read without a gather. By pages on a GPU, K and V by themselves,
    `[num_pages, kv_heads, page_size, head_dim]`: the KV of a page and a head is one block, loaded at once.

    Attributes:
        tokens: K and V, token-major, a tensor a layer; none where they are by pages.
        keys, values: a tensor a layer, views of `tokens` where there are any. Memory that is never written is never
            taken from the system.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        by_pages: bool = False,
    ) -> None:
        def made(*shape: int) -> list[torch.Tensor]:
            return [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]

        self.tokens: list[torch.Tensor] = []
        if by_pages:
            self.keys = made(num_pages, num_kv_heads, page_size, head_dim)
            self.values = made(num_pages, num_kv_heads, page_size, head_dim)
        else:
            self.tokens = [in_huge_pages(kv) for kv in made(num_pages * page_size, 2, num_kv_heads, head_dim)]
            self.keys = [kv[:, 0] for kv in self.tokens]
            self.values = [kv[:, 1] for kv in self.tokens]


class PageTables:
    """The pages of every slot, followed through the releases and grants of the steps."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._pages = np.zeros((64, 16), dtype=np.int64)  # [slots, pages]
        self._count = np.zeros(64, dtype=np.int64)  # [slots]

    def apply(self, step: Step) -> None:
        """Take in what a step releases and grants."""
        self._count[step.releases] = 0
        slots = step.grant_sequence
        if not slots.size:
            return
        # The place of each grant among those of its slot; a slot's grants need not be neighbours.
        by_slot = np.argsort(slots, kind="stable")
        ordered = slots[by_slot]
        first = np.flatnonzero(np.diff(ordered, prepend=-1))
        place = np.arange(ordered.size) - np.repeat(first, np.diff(np.append(first, ordered.size)))
        self._make_room(int(ordered[-1]) + 1)
        place += self._count[ordered]
        while int(place.max()) >= self._pages.shape[1]:
            self._pages = np.concatenate((self._pages, np.zeros_like(self._pages)), axis=1)
        self._pages[ordered, place] = step.grant_page[by_slot]
        np.add.at(self._count, ordered, 1)

    @property
    def pages(self) -> Int64:
        """The pages of each slot in order, int64 `[slots, *]`; beyond those that a slot holds, anything."""
        return self._pages

    def index(self, slots: npt.NDArray[np.int32] | int, own: npt.NDArray[np.integer[Any]]) -> Int64:
        """Where own tokens of sequences lie in the pool; `slots` and `own` broadcast."""
        return self._pages[slots, own // self.page_size] * self.page_size + own % self.page_size

    def run(self, slot: int, start: int, stop: int) -> int | None:
        """Where own tokens `[start, stop)` begin in the pool if they lie in one run there, else None."""
        pages = self._pages[slot, start // self.page_size : -(-stop // self.page_size)]
        if (np.diff(pages) != 1).any():
            return None
        return int(pages[0]) * self.page_size + start % self.page_size

    def _make_room(self, slots: int) -> None:
        while slots > self._count.size:
            self._pages = np.concatenate((self._pages, np.zeros_like(self._pages)))
            self._count = np.concatenate((self._count, np.zeros_like(self._count)))
