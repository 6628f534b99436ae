"""Tile heights, warps and stages of the attention kernel: data, chosen from what `inspect` prints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Tile:
    """How the attention kernel is compiled.

    Attributes:
        short, tall: heights of the two kinds of row tiles, in rows times query heads per KV head.
        warps: warps of a program.
        stages: KV tiles under way at a time.
        programs: programs that fit a multiprocessor, by registers and shared memory.
    """

    short: int
    tall: int
    warps: int
    stages: int
    programs: int


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


# By architecture and bytes of a number: the widest head (padded to a power of two) that a choice is for.
TILES: dict[str, dict[int, dict[int, Tile]]] = {
    "sm_80": {
        2: {64: Tile(16, 64, 4, 3, 2), 128: Tile(16, 64, 8, 3, 1), 256: Tile(16, 32, 8, 2, 1)},
        4: {64: Tile(16, 32, 8, 2, 1), 128: Tile(16, 16, 8, 1, 1), 256: Tile(16, 16, 8, 1, 1)},
    },
    "sm_90": {
        2: {64: Tile(16, 128, 8, 3, 1), 128: Tile(16, 128, 8, 2, 1), 256: Tile(16, 32, 8, 2, 1)},
        4: {64: Tile(16, 32, 8, 2, 1), 128: Tile(16, 16, 8, 2, 1), 256: Tile(16, 16, 8, 1, 1)},
    },
    "sm_100": {
        2: {64: Tile(16, 128, 8, 3, 1), 128: Tile(16, 64, 8, 3, 1), 256: Tile(16, 32, 8, 2, 1)},
        4: {64: Tile(16, 16, 8, 2, 1), 128: Tile(16, 16, 8, 2, 1), 256: Tile(16, 16, 8, 1, 1)},
    },
    # 99 KiB of shared memory a block, where sm_100 has 227: no float32 heads wider than 128.
    "sm_120": {
        2: {64: Tile(16, 64, 4, 3, 2), 128: Tile(16, 64, 8, 2, 1), 256: Tile(16, 32, 8, 1, 1)},
        4: {64: Tile(16, 16, 8, 2, 1), 128: Tile(16, 16, 8, 1, 1)},
    },
    "gfx942": {
        2: {64: Tile(16, 64, 4, 2, 1), 128: Tile(16, 64, 4, 2, 1), 256: Tile(16, 32, 4, 1, 1)},
        4: {64: Tile(16, 64, 4, 1, 2), 128: Tile(16, 32, 4, 1, 1), 256: Tile(16, 16, 4, 1, 1)},
    },
}


def choose_tile(arch: str, itemsize: int, width: int, group: int) -> Tile:
    """The tile for a head of `width` numbers (padded to a power of two) of `itemsize` bytes and `group` query heads per
    KV head.

    Raises:
        ValueError: an architecture that has no entry, or none for heads so wide.
    """
    if arch not in TILES:
        # A later one of the same family runs what was chosen for an earlier one.
        family = [name for name in TILES if arch.startswith("sm_") and name.startswith("sm_")]
        family = [name for name in family if int(name[3:]) <= int(arch[3:])]
        if not family:
            raise ValueError(f"No tiles for {arch}; there are some for {', '.join(TILES)}.")
        arch = max(family, key=lambda name: int(name[3:]))
    tile = next((tile for widest, tile in sorted(TILES[arch][itemsize].items()) if widest >= width), None)
    if tile is None:
        raise ValueError(f"A block of {arch} has not enough shared memory for heads of {width} x {itemsize} bytes.")
    height = power_of_two(group)
    return replace(tile, short=max(tile.short, height), tall=max(tile.tall, height))


def compile_options(arch: str, warps: int, *, deterministic: bool = False) -> dict[str, Any]:
    """What triton is asked for when it compiles the attention kernel for programs of `warps` warps.

    Whether a KV tile is masked is up to the other rows of its item. Without a mask the product with the scale and the
    difference from the peak can become one operation, which rounds once, and with one they cannot: `deterministic`
    rounds both ways alike.
    """
    options = {"num_warps": warps, "enable_fp_fusion": not deterministic}
    # All registers that a thread can have: on its own, ptxas spills some so that more programs fit.
    return options | {"maxnreg": 255} if arch.startswith("sm_") else options


def dot_precision(arch: str, itemsize: int) -> str:
    """How products of float32 are computed, as triton names it. NVIDIA's matrix units compute them as three products of
    numbers of 11 bits, which err less than a sum in float32 does; without these units a thread would hold whole rows of
    Q and K, more than it has registers for."""
    return "tf32x3" if itemsize == 4 and arch.startswith("sm_") else "ieee"


def has_tma(arch: str) -> bool:
    """Whether tensor descriptors are loaded by the copy engine there."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90
