"""What the compiler makes of the kernels, without a GPU. In processes of their own: where the interpreter was chosen
before triton was loaded there would be nothing to compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def inspect(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, "-m", "batchrun_kernels.inspect", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def attention(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in found if one["case"]["kernel"] == "shared_prefix_attention"]


def assert_sound(found: list[dict[str, Any]], spills: int = 0) -> None:
    """No spill (or no more than so many) and a program that fits, for every kernel; matrix units and asynchronous
    copies in attention."""
    assert {one["case"]["kernel"] for one in found} == {"shared_prefix_attention", "merge_states", "store_kv"}
    for one in found:
        assert one["spills"] <= spills, one
        assert one["programs"] >= 1, one
    for one in attention(found):
        arch, loops = one["case"]["arch"], one["loops"]
        assert sum(one["matrix"].values()) > 0
        if arch.startswith("gfx"):
            continue
        tma = arch != "sm_80"
        for branch in ("short", "tall"):
            # Two loops, without and with masks, and in each the two dots; K and V of each are copied asynchronously.
            assert loops[branch]["loops"] == 2, one
            assert loops[branch]["matrix units"] + loops[branch]["dots"] >= 4, one
            copied = loops[branch]["descriptor loads" if tma else "asynchronous loads"]
            alone = one["tile"].endswith(" 1s")  # one tile of K and V at a time: none is copied while another is used
            assert copied >= 4 or (alone and not tma), one
            assert bool(loops[branch]["descriptor loads"]) == tma, one
        assert bool(one["copies"].get("UTMALDG")) == tma
        wide = arch in ("sm_90", "sm_100") and int(one["tile"].split()[0].partition("x")[2]) >= 64
        assert not loops["short"]["matrix units"]  # 16 rows are below what those of sm_90 and later take
        assert bool(loops["tall"]["matrix units"]) == bool(not loops["tall"]["dots"]) == wide, one
        assert bool(one["matrix"].get("HGMMA")) == (arch == "sm_90" and wide)
        assert bool(one["matrix"].get("UTCHMMA")) == (arch == "sm_100" and wide)
        assert one["matrix"]["HMMA"] > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_what_most_models_run(arch: str) -> None:
    assert_sound(inspect("--arch", arch, "--head-dim", "128"))


def test_float32_with_the_widest_heads() -> None:
    """Rows of 1,024 bytes: what asks for most registers and shared memory."""
    assert_sound(inspect("--arch", "sm_90", "--head-dim", "256", "--dtype", "fp32"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_all_that_is_shipped_in_float32(arch: str) -> None:
    assert_sound(inspect("--arch", arch, "--dtype", "fp32", "--head-dim", "64", "80", "96", "128"))
    if arch != "sm_120":
        wide = inspect("--arch", arch, "--dtype", "fp32", "--head-dim", "192", "256")
        assert_sound(wide, spills={"sm_80": 32, "sm_100": 32, "gfx942": 64}.get(arch, 0))
    for page_size in ("16", "32"):
        found = inspect("--arch", arch, "--dtype", "fp32", "--head-dim", "64", "128", "--page-size", page_size)
        assert_sound(found)
    assert_sound(inspect("--arch", arch, "--dtype", "fp32", "--head-dim", "128", "--group", "1", "7", "8"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_all_that_is_shipped(arch: str) -> None:
    dims = ("64", "80", "96", "128", "192", "256")
    assert_sound(inspect("--arch", arch, "--head-dim", *dims))
    assert_sound(inspect("--arch", arch, "--head-dim", "64", "128", "256", "--page-size", "16", "32"))
    # 7 query heads per KV head do not fill a tile; 1 and 8 are the ends of the usual range.
    assert_sound(inspect("--arch", arch, "--head-dim", "64", "128", "--group", "1", "7", "8"))


def test_programs_of_a_tile_are_those_that_fit() -> None:
    """The grid is as large as the device takes at a time."""
    from batchrun_kernels.tiles import choose_tile

    [plain, _] = attention(inspect("--arch", "sm_90", "--head-dim", "128"))
    assert plain["programs"] == choose_tile("sm_90", 2, 128, 4).programs


def test_a_later_architecture_runs_what_an_earlier_one_of_its_family_does() -> None:
    from batchrun_kernels.tiles import choose_tile

    assert choose_tile("sm_89", 2, 128, 4) == choose_tile("sm_80", 2, 128, 4)
    assert choose_tile("sm_103", 2, 128, 4) == choose_tile("sm_100", 2, 128, 4)
    assert choose_tile("sm_121", 2, 128, 4) == choose_tile("sm_120", 2, 128, 4)
    with pytest.raises(ValueError, match="sm_75"):
        choose_tile("sm_75", 2, 128, 4)
    with pytest.raises(ValueError, match="shared memory"):
        choose_tile("sm_120", 4, 256, 4)
