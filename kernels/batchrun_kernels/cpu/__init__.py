"""A model's layers on a CPU: products, attention and what stands between them, compiled for the processor at hand.

It wants a C compiler (`CC`, else the first of gcc and cc that is found), as `torch.compile` does; what it makes
is kept in the user's cache directory, where later runs find it. Threads are those of torch's own OpenMP, which is
loaded with torch. What comes out for a row depends on the row and what it sees alone, to the bit, whatever else is in
the step.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_SOURCES = [Path(__file__).with_name(name) for name in ("numbers.h", "kernels.h", "attention.c", "layer.c", "linear.c")]
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=gnu11", "-fopenmp", "-fPIC", "-shared")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_VECTORS = 96  # query vectors of a block at most: their results and a chunk of KV stay in the second cache
_FEWEST_VECTORS = 12  # and at least: keys are turned once a block
_BLOCKS_A_THREAD = 4

Int = npt.NDArray[np.integer[Any]]


class NotCompiled(Exception):
    """There is no compiler, or it failed, or there is nothing for the dtype; the message says which."""


def _structure(name: str, **fields: str) -> type[ctypes.Structure]:
    """A C structure: names of fields by their type, in order."""
    made = [(field, getattr(ctypes, f"c_{kind}")) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": made})


_Work = _structure(
    "_Work",
    void_p="reads of_block begins pages positions",
    int64="pages_stride",
    int32="rows blocks block_rows page_size",
)
_Attention = _structure(
    "_Attention",
    void_p="query out pool sinks",
    int64="row_stride place_stride head_stride",
    int32="group kv_heads dim window",
    float="scale softcap",
)
_Heads = _structure("_Heads", void_p="query key", float="eps", int32="heads kv_heads dim")
_Linear = _structure("_Linear", void_p="weight bias", int64="inner outer")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in ("qkv", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm")),
        ("heads", _Heads),
        *((name, ctypes.c_float) for name in ("attention_eps", "mlp_eps", "scale")),
        ("window", ctypes.c_int32),
        ("hidden", ctypes.c_int64),
    ]


_Rows = _structure(
    "_Rows",
    void_p="hidden normed output qkv query seen inner turn places wanted work",
    int64="rows num_wanted",
)


@dataclass(frozen=True, slots=True)
class Reads:
    """Which rows of a step read whose KV, in columns, int `[N]` each.

    Rows `[first_row, first_row + rows)` see the first `tokens` tokens of slot `sequence`, the first of which is at
    `position`, as far as these are not after the row itself (nor, with a window, too far before it). What a row reads
    is summed in this order.
    """

    sequence: Int
    tokens: Int
    position: Int
    first_row: Int
    rows: Int


class AttentionWork:
    """What the attention of a step consists of, for all of its layers.

    Args:
        reads: which rows read what.
        positions: int64 `[T]`, of the rows.
        pages: int64 `[slots, *]`, the pages of each slot in order.
        group: query heads per KV head.
    """

    def __init__(self, reads: Reads, positions: Int, pages: Int, page_size: int, group: int, kv_heads: int) -> None:
        rows, self.threads = len(positions), torch.get_num_threads()
        wanted = rows * kv_heads // (_BLOCKS_A_THREAD * self.threads)
        height = max(-(-_FEWEST_VECTORS // group), min(_VECTORS // group, wanted), 1)
        blocks = -(-rows // height)
        # As many as can be shared out evenly.
        blocks += next(more for more in range(self.threads) if (blocks + more) * kv_heads % self.threads == 0)
        height = -(-rows // max(blocks, 1)) or 1
        low, high = reads.first_row // height, (reads.first_row + reads.rows - 1) // height
        count = high - low + 1
        entry = np.repeat(np.arange(count.size), count)
        block = low[entry] + np.arange(entry.size) - np.repeat(np.cumsum(count) - count, count)
        blocks = -(-rows // height)
        columns = (reads.sequence, reads.tokens, reads.position, reads.first_row, reads.rows)
        self._arrays = (  # held as long as they are pointed to
            np.stack(columns, axis=1).astype(np.int32),
            entry[np.argsort(block, kind="stable")].astype(np.int32),
            np.concatenate(([0], np.cumsum(np.bincount(block, minlength=blocks)))).astype(np.int32),
            np.array(pages, dtype=np.int64, order="C"),
            np.ascontiguousarray(positions, dtype=np.int64),
        )
        pointers = (array.ctypes.data for array in self._arrays)
        self.struct = _Work(*pointers, pages.shape[1], rows, blocks, height, page_size)


_HUGE = 2 << 20  # bytes of a huge page
_ARENA = 32 << 20


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose memory the system gives in huge pages, where it has any: few of them to take and to look up."""
    if sys.platform == "linux":
        start = -(-tensor.data_ptr() // _HUGE) * _HUGE
        length = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
        if length >= _HUGE:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length // _HUGE * _HUGE), 14)  # MADV_HUGEPAGE
    return tensor


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class _Arena:
    """Room for many weights side by side, in huge pages."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        """So many bytes, from the begin of a line of the cache on."""
        if self._used + size > self._room.numel():
            self._room = in_huge_pages(torch.empty(max(size, _ARENA) + _HUGE, dtype=torch.uint8))
            self._used = -self._room.data_ptr() % _HUGE
        taken = self._room[self._used : self._used + size]
        self._used += -(-size // 64) * 64
        return taken


class PackedWeight:
    """A weight `[outer, inner]` in the order in which it is multiplied, and its bias `[outer]`."""

    def __init__(self, kernels: CpuKernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        outer, inner = weight.shape
        self.outer = outer
        weight = weight.detach().contiguous()
        self._packed = kernels.arena.take(kernels.functions.packed_size(inner, outer))
        kernels.functions.pack(weight.data_ptr(), inner, outer, self._packed.data_ptr(), torch.get_num_threads())
        self._bias = None
        if bias is not None:  # as long as the weight is when its last panel is filled up
            self._bias = torch.zeros(self._packed.numel() // (inner * weight.element_size()), dtype=torch.float32)
            self._bias[:outer] = bias.detach()
        self.struct = _Linear(self._packed.data_ptr(), _pointer(self._bias), inner, outer)
        self.address = ctypes.addressof(self.struct)


class CpuKernels:
    """The kernels for a dtype.

    Raises:
        NotCompiled: there are none.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise NotCompiled(f"there are no compiled kernels for {dtype}")
        self.dtype = dtype
        self.functions = _library(_DTYPES[dtype])
        self.arena = _Arena()

    def can_multiply(self, inner: int) -> bool:
        """Whether products of rows of so many numbers are faster here than oneDNN's."""
        return bool(self.functions.can_multiply()) and inner % 2 == 0

    def multiply(self, x: torch.Tensor, weight: PackedWeight, other: torch.Tensor | None = None) -> torch.Tensor:
        """Rows `[*, inner]` times a weight, `[*, outer]`, and others `[*, outer]` added, if any."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], weight.outer)
        other = None if other is None else other.contiguous()
        rows = x.numel() // x.shape[-1]
        self.functions.multiply(
            weight.address, x.data_ptr(), rows, _pointer(other), out.data_ptr(), torch.get_num_threads()
        )
        return out

    def multiply_gated(self, x: torch.Tensor, gate: PackedWeight, up: PackedWeight) -> torch.Tensor:
        """SiLU of rows `[*, inner]` times a weight, times the rows times another weight, `[*, outer]`."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], gate.outer)
        rows = x.numel() // x.shape[-1]
        self.functions.multiply_gated(
            gate.address, up.address, x.data_ptr(), rows, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Rows `[*, n]` divided by their root mean square, times a weight `[n]`."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self.functions.norm(
            x.data_ptr(),
            weight.data_ptr(),
            x.numel() // x.shape[-1],
            x.shape[-1],
            eps,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def take_in(
        self,
        qkv: torch.Tensor,
        turn: torch.Tensor,
        places: torch.Tensor,
        pool: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        """Normalise and turn queries and keys of new rows, and store keys and values.

        Args:
            qkv: `[T, Hq + 2 * Hkv, D]`, contiguous; what becomes of it is undefined.
            turn: complex `[T, D / 2]`, what pairs of neighbouring numbers are multiplied by (RoPE).
            places: int64 `[T]`, where in the pool rows go.
            pool: `[places, 2, Hkv, D]`, contiguous.
            norms: weights `[D]` of the norms of each query and each key head, and their epsilon, where there are any.

        Returns:
            `[T, Hq, D]`.
        """
        rows, every, dim = qkv.shape
        kv_heads = pool.shape[2]
        query = qkv.new_empty(rows, every - 2 * kv_heads, dim)
        of_query, of_key, eps = norms or (None, None, 0.0)
        heads = _Heads(_pointer(of_query), _pointer(of_key), eps, query.shape[1], kv_heads, dim)
        self.functions.take_in(
            ctypes.addressof(heads),
            qkv.data_ptr(),
            turn.data_ptr(),
            places.data_ptr(),
            rows,
            query.data_ptr(),
            pool.data_ptr(),
            torch.get_num_threads(),
        )
        return query

    def attend(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        work: AttentionWork,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention of a layer; KV of the step's own rows is in the pool already.

        Args:
            query: `[T, G, Hkv, D]`, contiguous.
            pool: `[places, 2, Hkv, D]`, contiguous.
            window: keys that a row sees at most, itself included.
            softcap: scores s become `softcap * tanh(s / softcap)`.
            sinks: float32 `[G, Hkv]`, contiguous: for each query head the score of one more key, whose value is 0.

        Returns:
            `[T, G, Hkv, D]`.
        """
        _, group, kv_heads, dim = query.shape
        out = torch.empty_like(query)
        layer = _Attention(
            query.data_ptr(),
            out.data_ptr(),
            pool.data_ptr(),
            _pointer(sinks),
            group * kv_heads * dim,
            kv_heads * dim,
            dim,
            group,
            kv_heads,
            dim,
            window or 0,
            scale,
            softcap or 0.0,
        )
        self.functions.attend(ctypes.addressof(work.struct), ctypes.addressof(layer), work.threads)
        return out


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What a layer of a decoder consists of: five products, two norms, and attention.

    The query heads of one place in their groups stand together, and the pairs that RoPE turns are neighbours.

    Attributes:
        attention_norm, mlp_norm: weights `[H]`, with their epsilon.
        head_norms: weights `[D]` of the norms of each query and each key head, and their epsilon, where there are any.
        scale: of scores.
        window: keys that a row sees at most, itself included.
    """

    qkv: PackedWeight
    output: PackedWeight
    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    attention_norm: tuple[torch.Tensor, float]
    mlp_norm: tuple[torch.Tensor, float]
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None
    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None


class CompiledLayers:
    """Layers of a decoder, each run by one call."""

    def __init__(self, kernels: CpuKernels, layers: Sequence[LayerWeights]) -> None:
        self._kernels, self._layers = kernels, layers  # the structures point into them
        self._structs = [_layer(layer) for layer in layers]

    def run(
        self,
        hidden: torch.Tensor,
        turn: torch.Tensor,
        places: torch.Tensor,
        wanted: torch.Tensor,
        work: AttentionWork,
        pools: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Run rows through all layers.

        Args:
            hidden: `[T, H]`, contiguous; what becomes of it is undefined.
            turn: complex `[T, D / 2]`, what pairs of neighbouring numbers are multiplied by (RoPE).
            places: int64 `[T]`, where in the pools K and V of rows go.
            wanted: int64 `[S]`, rows that are wanted, in order.
            work: what their attention consists of.
            pools: `[places, 2, Hkv, D]`, contiguous, of each layer.

        Returns:
            `[S, H]`.
        """
        one = self._layers[0]
        rows, width = hidden.shape
        query = one.heads * one.dim
        widths = (width, width, query + 2 * one.kv_heads * one.dim, query, query, one.gate.outer)
        room = [hidden, *(hidden.new_empty(rows, each) for each in widths)]
        turn, places, wanted = turn.contiguous(), places.contiguous(), wanted.contiguous()
        pointers = [tensor.data_ptr() for tensor in (*room, turn, places, wanted)]
        struct = _Rows(*pointers, ctypes.addressof(work.struct), rows, len(wanted))
        for number, (layer, pool) in enumerate(zip(self._structs, pools, strict=True)):
            last = number == len(self._structs) - 1
            self._kernels.functions.run_layer(
                ctypes.addressof(layer), ctypes.addressof(struct), pool.data_ptr(), last, work.threads
            )
        return hidden[: len(wanted)]


def _layer(layer: LayerWeights) -> ctypes.Structure:
    of_query, of_key, eps = layer.head_norms or (None, None, 0.0)
    return _Layer(
        *(part.struct for part in (layer.qkv, layer.output, layer.gate, layer.up, layer.down)),
        layer.attention_norm[0].data_ptr(),
        layer.mlp_norm[0].data_ptr(),
        _Heads(_pointer(of_query), _pointer(of_key), eps, layer.heads, layer.kv_heads, layer.dim),
        layer.attention_norm[1],
        layer.mlp_norm[1],
        layer.scale,
        layer.window or 0,
        layer.attention_norm[0].numel(),
    )


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _library(bfloat16: int) -> ctypes.CDLL:
    found = next(filter(None, map(shutil.which, ("gcc", "cc"))), None)
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ([found] if found else [])
        if not compiler:
            raise NotCompiled("there is no C compiler: install gcc, or set CC")
        command = [*compiler, *_FLAGS, f"-DBFLOAT16={bfloat16}"]
        file = _cache_directory() / f"cpu-{_fingerprint(command)}.so"
        if not _is_whole(file):
            _compile(command, file)
        library = ctypes.CDLL(str(file))
    except (OSError, RuntimeError, ValueError) as error:
        # A compiler or a directory that is not there, a file that cannot be loaded from there; no home; CC half quoted.
        raise NotCompiled(str(error)) from error
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    arguments: dict[str, tuple[list[Any], Any]] = {
        "attend": ([pointer, pointer, int32], None),
        "can_multiply": ([], int32),
        "packed_size": ([int64, int64], int64),
        "pack": ([pointer, int64, int64, pointer, int32], None),
        "multiply": ([pointer, pointer, int64, pointer, pointer, int32], None),
        "multiply_gated": ([pointer, pointer, pointer, int64, pointer, int32], None),
        "norm": ([pointer, pointer, int64, int64, ctypes.c_float, pointer, int32], None),
        "run_layer": ([pointer, pointer, pointer, int32, int32], None),
        "take_in": ([pointer, pointer, pointer, pointer, int64, pointer, pointer, int32], None),
    }
    for name, (types, result) in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, result
    return library


def _compile(command: list[str], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # others may be compiling too
        made = Path(folder) / file.name
        sources = [str(source) for source in _SOURCES if source.suffix == ".c"]
        made_by = [*command, *sources, "-o", str(made), "-lm"]
        done = subprocess.run(made_by, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotCompiled(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
        with made.open("ab") as end:
            end.write(hashlib.sha256(made.read_bytes()).digest())  # which loaders pass over
        made.replace(file)


def _is_whole(file: Path) -> bool:
    """Whether a compiled file is there and as it was made: one that was cut short may end the process when loaded."""
    if not file.exists():
        return False
    content = file.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _fingerprint(command: list[str]) -> str:
    """Of all that the compiled file depends on; home directories are shared by unlike machines."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    sources = [source.read_text() for source in _SOURCES]
    parts = (version, *command, platform.machine(), _processor(), *sources)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("flags", "Features", "model")))


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchrun"
