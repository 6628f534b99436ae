"""What the kernels are compiled to, without a GPU: `python -m batchrun_kernels.inspect [--json] [--arch sm_90] ...`

Every kernel is compiled for each architecture with the tiles that would be chosen there. Printed are registers, spills,
shared memory, how many programs fit a multiprocessor, and counts of the instructions that say whether matrix units and
asynchronous copies are used.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from batchrun_kernels import kernels
from batchrun_kernels.tiles import TILES, Tile, choose_tile, compile_options, dot_precision, has_tma, power_of_two

# Of a multiprocessor: registers of 32 bits, shared memory and threads. A program takes 1 KiB more than it asks for.
_REGISTERS, _THREADS = 65_536, 2048
_SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel to compile.

    Attributes:
        features: soft-cap, window and sinks, all of them.
    """

    kernel: str
    arch: str
    head_dim: int = 128
    group: int = 4
    page_size: int = 64
    kv_heads: int = 8
    dtype: str = "bf16"
    features: bool = False

    @property
    def tile(self) -> Tile:
        return choose_tile(self.arch, _BYTES[self.dtype], power_of_two(self.head_dim), self.group)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a kernel became.

    Attributes:
        tile: short x tall, warps, stages, for the attention kernel.
        registers: of a thread.
        spills: loads and stores of registers to memory.
        shared: bytes of shared memory of a program.
        programs: how many fit a multiprocessor.
        matrix: instructions of matrix units by name.
        copies: asynchronous copies by name.
        loops: of the attention kernel on NVIDIA, for the short and the tall branch: dots and tensor-descriptor loads
            of its loops, as the compiler's own last but one form (TTGIR) names them.
    """

    case: Case
    tile: str
    registers: int
    spills: int
    shared: int
    programs: int
    matrix: dict[str, int]
    copies: dict[str, int]
    loops: dict[str, dict[str, int]]


def inspect(case: Case, tile: Tile | None = None) -> Inspection:
    """Compile a kernel and read what it became.

    Args:
        tile: another one than would be chosen.
    """
    tile = tile or case.tile
    options = compile_options(case.arch, tile.warps) if case.kernel == "shared_prefix_attention" else {"num_warps": 4}
    warps = options["num_warps"]
    amd = case.arch.startswith("gfx")
    target = GPUTarget("hip", case.arch, 64) if amd else GPUTarget("cuda", int(case.arch[3:]), 32)
    compiled = triton.compile(_source(case, tile), target=target, options=options)
    shape = f"{tile.short}x{tile.tall} {tile.warps}w {tile.stages}s" if "attention" in case.kernel else ""
    if amd:
        text = compiled.asm["amdgcn"]
        registers = int(_found(r"\.vgpr_count:\s+(\d+)", text))
        return Inspection(
            case=case,
            tile=shape,
            registers=registers,
            spills=int(_found(r"\.vgpr_spill_count:\s+(\d+)", text)),
            shared=compiled.metadata.shared,
            # 4 SIMDs of 512 registers a lane; 64 KiB of shared memory.
            programs=min(512 // registers * 4 // warps, (64 << 10) // max(1, compiled.metadata.shared)),
            matrix=_counts(text, ("v_mfma",)),
            copies=_counts(text, ("buffer_load", "global_load")),
            loops={},
        )
    usage, sass = _disassembled(compiled.asm["cubin"])
    registers, shared = int(_found(r"REG:(\d+)", usage)), compiled.metadata.shared
    of_warp = -(-registers * 32 // 256) * 256
    return Inspection(
        case=case,
        tile=shape,
        registers=registers,
        spills=sum(_counts(sass, ("STL", "LDL")).values()),
        shared=shared,
        programs=min(
            _REGISTERS // of_warp // warps,
            _SHARED.get(case.arch, 100 << 10) // (shared + 1024),
            _THREADS // 32 // warps,
        ),
        matrix=_counts(sass, ("HGMMA", "HMMA", "UTCHMMA")),
        copies=_counts(sass, ("UTMALDG", "LDGSTS")),
        loops=_branches(compiled.asm["ttgir"]) if case.kernel == "shared_prefix_attention" else {},
    )


def _source(case: Case, tile: Tile) -> ASTSource:
    """The kernel as it would be called."""
    width, dtype = power_of_two(case.head_dim), case.dtype
    tma = has_tma(case.arch)
    descriptor = f"tensordesc<{dtype}[{case.page_size}, {width}]>"
    pool = descriptor if tma else f"*{dtype}"
    shape = {"D": case.head_dim, "W": width}
    constants: dict[str, Any]
    if case.kernel == "shared_prefix_attention":
        signature = {
            "query": f"*{dtype}", "keys": pool, "values": pool, "out": f"*{dtype}", "partial_out": "*fp32",
            "partial_lse": "*fp32", "sinks": f"*{dtype}", "work": "*i32", "scale": "fp32", "softcap": "fp32",
            "window": "i32",
        }  # fmt: skip
        constants = {
            **shape, "SHORT": tile.short, "TALL": tile.tall, "KV_HEADS": case.kv_heads, "G": case.group,
            "N": case.page_size, "STAGES": tile.stages, "TMA": tma, "SOFTCAP": case.features, "WINDOW": case.features,
            "SINKS": case.features, "UPCAST": False, "PRECISION": dot_precision(case.arch, _BYTES[case.dtype]),
        }  # fmt: skip
    elif case.kernel == "merge_states":
        signature = {
            "partial_out": "*fp32", "partial_lse": "*fp32", "out": f"*{dtype}", "sinks": f"*{dtype}", "work": "*i32",
        }  # fmt: skip
        constants = {**shape, "H": 8, "HEADS": case.group * case.kv_heads, "SINKS": case.features}
    else:
        signature = {
            "key": f"*{dtype}", "value": f"*{dtype}", "keys": f"*{dtype}", "values": f"*{dtype}", "places": "*i64",
            "num_rows": "i32", "key_stride": "i32", "value_stride": "i32",
        }  # fmt: skip
        constants = {**shape, "R": 16, "KV_HEADS": case.kv_heads, "N": case.page_size}
    function = getattr(kernels, case.kernel)
    aligned = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name.endswith("_stride")
    }
    return ASTSource(function, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = triton.knobs.nvidia
        commands = ([tools.cuobjdump.path, "-res-usage", file.name], [tools.nvdisasm.path, "-c", file.name])
        usage, sass = (subprocess.run(command, capture_output=True, text=True, check=True) for command in commands)
        return usage.stdout, sass.stdout


def _branches(ttgir: str) -> dict[str, dict[str, int]]:
    """Dots and tensor-descriptor loads inside the loops of the two branches: the `scf.if` whose branches both hold
    loops, told by its indentation."""
    for found in re.finditer(r"^( *)(?:%\S+ = )?scf\.if .*\{$", ttgir, re.MULTILINE):
        indent = found[1]
        body = ttgir[found.end() :]
        halves = re.split(rf"^{indent}}}(?: else {{| .*)?$", body, maxsplit=2, flags=re.MULTILINE)[:2]
        if len(halves) == 2 and all("scf.for" in half for half in halves):
            return {
                name: {
                    "loops": half.count("scf.for "),
                    "matrix units": len(re.findall(r"ttng\.(?:warp_group_dot|tc_gen5_mma) ", half)),
                    "dots": len(re.findall(r"= tt\.dot ", half)),
                    "descriptor loads": half.count("ttng.async_tma_copy_global_to_local"),
                    "asynchronous loads": half.count("ttg.async_copy_global_to_local"),
                }
                for name, half in zip(("short", "tall"), halves, strict=True)
            }
    raise ValueError("The two branches were not found.")


def _counts(text: str, names: tuple[str, ...]) -> dict[str, int]:
    counts = {name: len(re.findall(rf"\b{name}", text)) for name in names}
    return {name: count for name, count in counts.items() if count}


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} was not found in what the disassembler printed.")
    return found[1]


def cases(
    archs: list[str], head_dims: list[int], groups: list[int], page_sizes: list[int], dtype: str
) -> Iterator[Case]:
    """All that is shipped: every kernel for every architecture, head size, ratio and page size asked for."""
    for arch in archs:
        for head_dim in head_dims:
            for page_size in page_sizes:
                for group in groups:
                    for features in (False, True):
                        yield Case(
                            "shared_prefix_attention", arch, head_dim, group, page_size, dtype=dtype, features=features
                        )
            yield Case("merge_states", arch, head_dim, groups[0], page_sizes[0], dtype=dtype)
            yield Case("store_kv", arch, head_dim, groups[0], page_sizes[0], dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m batchrun_kernels.inspect", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    parser.add_argument("--arch", nargs="+", default=list(TILES), metavar="ARCH", help="default: %(default)s")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 80, 96, 128, 192, 256], metavar="D")
    parser.add_argument("--group", nargs="+", type=int, default=[4], metavar="G", help="query heads per KV head")
    parser.add_argument("--page-size", nargs="+", type=int, default=[64], metavar="N")
    parser.add_argument("--dtype", choices=list(_BYTES), default="bf16", help="default: %(default)s")
    asked = parser.parse_args()
    if not isinstance(kernels.store_kv, JITFunction):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled.")
    if not asked.json:
        print(
            f"{'kernel':24}{'arch':8}{'D':>4}{'G':>3}{'N':>4} {'features':9}{'tile':18}{'registers':>10}{'spills':>7}"
            f"{'shared':>8}{'programs':>9}  matrix and copy instructions"
        )
    for case in cases(asked.arch, asked.head_dim, asked.group, asked.page_size, asked.dtype):
        found = inspect(case)
        if asked.json:
            print(json.dumps(asdict(found)), flush=True)
            continue
        counts = ", ".join(f"{name} {count}" for name, count in {**found.matrix, **found.copies}.items())
        print(
            f"{case.kernel:24}{case.arch:8}{case.head_dim:4}{case.group:3}{case.page_size:4} "
            f"{'all' if case.features else '-':9}{found.tile:18}{found.registers:10}{found.spills:7}{found.shared:8}"
            f"{found.programs:9}  {counts}",
            flush=True,
        )


if __name__ == "__main__":
    main()
