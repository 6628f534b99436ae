"""Attention over shared prefixes and own KV on a GPU: one launch for all rows of a step, and one that merges.

    T   rows of the step           Hq, Hkv  query heads, KV heads
    N   page_size                  D        head_dim

`TRITON_INTERPRET=1`, set before triton is first loaded, runs the same on CPU tensors, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from batchrun_kernels import kernels
from batchrun_kernels.tiles import Tile, choose_tile, compile_options, dot_precision, has_tma, power_of_two
from batchrun_kernels.work_list import Columns, Rules, WorkList, make_work_list

_LOG2E = 1.4426950408889634
_STORE_ROWS = 16  # rows of a program of store_kv
_MERGE_HEADS = 8  # query heads of a program of merge_states


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's work list where the kernels read it, for the layers of one window.

    Attributes:
        host: the list as it was made.
        work: int32, on the device; the next plan for this window is written to the same place.
        window: keys a row sees at most, itself included, or None.
    """

    host: WorkList
    work: torch.Tensor
    window: int | None


class SharedPrefixAttention:
    """Attention of the layers of a model, which share their shape, over pools `[pages, Hkv, N, D]`.

    `plan` once a step for each window that layers have, then `run` for each layer. All of it goes to the current
    stream. The work list and the room for partial results stay where they are until a step needs more than they hold
    (`room`), so that a captured graph can be replayed.
    """

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        deterministic: bool = False,
        ints: int = 1 << 16,
        slots: int = 0,
        tile: Tile | None = None,
        rules: dict[str, Any] | None = None,
        tma: bool | None = None,
    ) -> None:
        """
        Args:
            heads, kv_heads, head_dim: Hq, Hkv, D; Hq is a multiple of Hkv, D of 8.
            page_size: N, a power of two from 16 on.
            dtype: of queries, pools and results: float16, bfloat16 or float32.
            deterministic: the bits of a row do not depend on the other rows of its step.
            ints: room for work lists at first, in int32.
            slots: room for partial results at first, in rows.
            tile, rules, tma: other than those that are chosen for the device, to test and to tune; `rules` are
                attributes of `Rules`.

        Raises:
            ValueError: a shape or dtype that the kernels do not compute, or a device that triton does not run on.
        """
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads equally.")
        if head_dim % 8 or not 16 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}; it has to be a multiple of 8 from 16 to 256.")
        if page_size < 16 or page_size != power_of_two(page_size):
            raise ValueError(f"page_size is {page_size}; it has to be a power of two from 16 on.")
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"{dtype} is not computed; float16, bfloat16 and float32 are.")
        self._device = torch.device(device)
        interpreted = not isinstance(kernels.shared_prefix_attention, JITFunction)
        if (self._device.type == "cpu") != interpreted:
            raise ValueError(
                "Triton runs on CPU tensors if TRITON_INTERPRET=1 is set before it is loaded, and then on those alone."
            )
        self._heads, self._kv_heads, self._head_dim, self._page_size = heads, kv_heads, head_dim, page_size
        self._dtype = dtype
        group, width = heads // kv_heads, power_of_two(head_dim)
        if interpreted:
            multiprocessors, arch = 2, "sm_90"
        else:
            found = torch.cuda.get_device_properties(self._device)
            multiprocessors = found.multi_processor_count
            arch = found.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
        tile = tile or choose_tile(arch, dtype.itemsize, width, group)
        self._programs = multiprocessors * tile.programs
        self.rules = replace(
            Rules(
                group=group,
                kv_heads=kv_heads,
                page_size=page_size,
                short=tile.short,
                tall=tile.tall,
                programs=self._programs,
                deterministic=deterministic,
            ),
            **(rules or {}),
        )
        self._tma = has_tma(arch) if tma is None else tma
        self._constants = {
            "SHORT": self.rules.short,
            "TALL": self.rules.tall,
            "KV_HEADS": kv_heads,
            "G": group,
            "N": page_size,
            "D": head_dim,
            "W": width,
            "STAGES": tile.stages,
            "TMA": self._tma,
            "UPCAST": interpreted and dtype == torch.bfloat16,
            "PRECISION": dot_precision(arch, dtype.itemsize),
        }
        self._launch = {} if interpreted else compile_options(arch, tile.warps, deterministic=deterministic)
        self._ints = ints
        self._work: dict[int | None, torch.Tensor] = {}
        self._merge_loaded = False
        self._descriptors: dict[int, TensorDescriptor] = {}
        self._partial_out = torch.empty(0, heads, head_dim, dtype=torch.float32, device=self._device)
        self._partial_lse = torch.empty(0, heads, dtype=torch.float32, device=self._device)
        self._reserve_slots(max(1, slots))  # there has to be something to point to

    def plan(self, step: Columns, *, window: int | None = None) -> Plan:
        """Make the work list of a step and bring it to the device, without waiting.

        Args:
            window: keys that a row of these layers sees at most, itself included; None for all.
        """
        host = self.make(step, window=window)
        # Pinned memory from torch's cache: it is not given out again before the copy from it has been made.
        staged = torch.empty(self._ints, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        size = host.data.size
        staged.numpy()[:size] = host.data
        work = self._work.get(window)
        if work is None or work.numel() < self._ints:
            work = self._work[window] = torch.empty(self._ints, dtype=torch.int32, device=self._device)
        work[:size].copy_(staged[:size], non_blocking=True)
        return Plan(host, work, window)

    def make(self, step: Columns, *, window: int | None = None) -> WorkList:
        """Make the work list of a step, for who brings it to the device together with other things: `Plan(host, work,
        window)` is then what `run` takes. Makes room for its partial results."""
        host = make_work_list(step, self.rules, window=window)
        self._ints = max(self._ints, power_of_two(host.data.size))
        self._reserve_slots(host.num_slots)
        return host

    @property
    def room(self) -> tuple[int, int]:
        """Room for a work list, in int32, and for partial results, in rows: where either grows, so does a place that a
        captured graph knows."""
        return self._ints, self._partial_lse.shape[0]

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: Plan,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention of a layer. K and V of the step's own rows have to be in the pools (`store_kv`).

        Args:
            query: `[T, Hq, D]`; may have more rows than the plan, which are left as they are in `out`.
            keys, values: the pools, `[pages, Hkv, N, D]`.
            scale: what scores are multiplied by.
            softcap: scores s become `softcap * tanh(s / softcap)`.
            sinks: `[Hq]`, for each query head the score of one more key, whose value is 0.
            out: where to write, `[T, Hq, D]`.

        Returns:
            `[T, Hq, D]`.

        Raises:
            ValueError: a shape, dtype or layout that is not as above.
        """
        rows = (max(plan.host.num_rows, query.shape[0]), self._heads, self._head_dim)
        pool = (keys.shape[0], self._kv_heads, self._page_size, self._head_dim)
        out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
        for name, tensor, shape in (
            ("query", query, rows),
            ("out", out, rows),
            ("keys", keys, pool),
            ("values", values, pool),
        ):
            self._check(name, tensor, shape)
        if sinks is not None and (sinks.shape != (self._heads,) or not sinks.is_contiguous()):
            raise ValueError(f"sinks are {tuple(sinks.shape)}; they have to be ({self._heads},), contiguous.")
        any_pointer = self._partial_lse if sinks is None else sinks
        kernels.shared_prefix_attention[(self._programs,)](
            query,
            self._pool(keys),
            self._pool(values),
            out,
            self._partial_out,
            self._partial_lse,
            any_pointer,
            plan.work,
            scale * _LOG2E if softcap is None else scale / softcap,
            1.0 if softcap is None else float(softcap),
            plan.window or 0,
            SOFTCAP=softcap is not None,
            WINDOW=plan.window is not None,
            SINKS=sinks is not None,
            **self._constants,
            **self._launch,
        )
        # A graph that is captured now is replayed with other work lists; and what is not loaded by then cannot be.
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if plan.host.num_merged or capturing or not self._merge_loaded:
            self._merge_loaded = True
            kernels.merge_states[(self._programs,)](
                self._partial_out,
                self._partial_lse,
                out,
                any_pointer,
                plan.work,
                H=min(_MERGE_HEADS, power_of_two(self._heads)),
                HEADS=self._heads,
                D=self._head_dim,
                W=power_of_two(self._head_dim),
                SINKS=sinks is not None,
            )
        return out

    def _reserve_slots(self, slots: int) -> None:
        if self._partial_lse.shape[0] < slots:
            shape = (power_of_two(slots), self._heads)
            self._partial_out = torch.empty((*shape, self._head_dim), dtype=torch.float32, device=self._device)
            self._partial_lse = torch.empty(shape, dtype=torch.float32, device=self._device)

    def _pool(self, pool: torch.Tensor) -> torch.Tensor | TensorDescriptor:
        """What the kernel takes for a pool; descriptors are made once a pool."""
        if not self._tma:
            return pool
        descriptor = self._descriptors.get(pool.data_ptr())
        if descriptor is None or descriptor.shape[0] * self._head_dim != pool.numel():
            block = [self._page_size, power_of_two(self._head_dim)]
            descriptor = TensorDescriptor.from_tensor(pool.view(-1, self._head_dim), block)
            self._descriptors[pool.data_ptr()] = descriptor
        return descriptor

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape or tensor.dtype != self._dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}; it has to be "
                f"{self._dtype} {shape}, contiguous."
            )


def store_kv(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor
) -> None:
    """Write new K and V to their pages.

    Args:
        key, value: `[T, Hkv, D]`; a row's elements lie next to each other, rows may be apart (a view of packed QKV).
        keys, values: the pools, `[pages, Hkv, N, D]`, contiguous.
        places: int64 `[T]`, `page * N + place in the page`; rows with a negative one are not stored.

    Raises:
        ValueError: shapes or layouts that are not as above.
    """
    _, kv_heads, page_size, head_dim = keys.shape
    rows = key.shape[0]
    for new in (key, value):
        if new.shape != (rows, kv_heads, head_dim) or new.stride()[1:] != (head_dim, 1):
            raise ValueError(f"New KV is {tuple(new.shape)}, strides {new.stride()}; the pool is {tuple(keys.shape)}.")
    if values.shape != keys.shape or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("The pools of K and V have to be contiguous and of one shape.")
    if places.shape != (rows,) or places.dtype != torch.int64:
        raise ValueError(f"places is {places.dtype} {tuple(places.shape)}; it has to be int64 ({rows},).")
    if not rows:
        return
    kernels.store_kv[(-(-rows // _STORE_ROWS), kv_heads)](
        key,
        value,
        keys,
        values,
        places,
        rows,
        key.stride(0),
        value.stride(0),
        R=_STORE_ROWS,
        KV_HEADS=kv_heads,
        N=page_size,
        D=head_dim,
        W=power_of_two(head_dim),
    )
