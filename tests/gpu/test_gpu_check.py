"""scripts/gpu_check as it is run, each section very small on the CPU, and that it tells what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu import sanitizer, sections
from scripts.gpu.idle import idle_share
from scripts.gpu.setting import Setting
from scripts.gpu.table import WIDTH, table
from scripts.gpu.versions import bring, requirements

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")

# What is wrong on purpose, in the processes of the sections.
IN_SECTIONS = "import os, sys\nif '--only' not in sys.orig_argv:\n    "
WRONG = IN_SECTIONS + (
    "from batchrun_kernels.attention import SharedPrefixAttention as A; run = A.run; "
    "A.run = lambda *a, **k: run(*a, **k).mul_(1.05)"
)
DEADLY = (
    IN_SECTIONS
    + "from batchrun_kernels.attention import SharedPrefixAttention as A; A.run = lambda *a, **k: os._exit(9)"
)
NO_PYDANTIC = "import sys; sys.modules['pydantic'] = None"

FLASHINFER = '''
import torch

class MultiLevelCascadeAttentionWrapper:
    """Row by row what FlashInfer's documentation says."""

    def __init__(self, levels, workspace, layout):
        assert layout == "HND"

    def plan(self, rows, indptr, indices, last, heads, kv_heads, head_dim, page_size, *, causal, sm_scale, q_data_type):
        self.levels, self.page_size, self.scale = list(zip(rows, indptr, indices, last)), page_size, sm_scale
        assert causal and all(part.dtype == torch.int32 for level in self.levels for part in level)

    def run(self, query, pools):
        out = []
        for row in range(query.shape[0]):
            seen = [[], []]
            for nth, (rows, indptr, indices, last) in enumerate(self.levels):
                entry = int((rows <= row).sum()) - 1
                pages = indices[indptr[entry] : indptr[entry + 1]].long()
                tokens = (len(pages) - 1) * self.page_size + int(last[entry])
                if nth == len(self.levels) - 1:
                    tokens -= int(rows[entry + 1]) - 1 - row
                for pool, kv in zip(pools, seen):
                    kv.append(pool[pages].transpose(1, 2).flatten(0, 1)[:tokens])
            keys, values = (torch.cat(kv).repeat_interleave(query.shape[1] // kv[0].shape[1], 1) for kv in seen)
            weights = (torch.einsum("hd,thd->ht", query[row], keys) * self.scale).softmax(1)
            out.append(torch.einsum("ht,thd->hd", weights, values))
        return torch.stack(out) * FACTOR
'''


@dataclass
class Done:
    """A run of the command."""

    code: int
    sections: dict[str, Any]
    table: str
    said: str


@pytest.fixture
def gpu_check(tmp_path: Path):
    """Runs the command; `site` is run first in each of its processes, `modules` are found before others."""

    def run(*arguments: str, site: str = "", modules: dict[str, str] | None = None, path: Path | None = None) -> Done:
        for name, text in {"sitecustomize": site, **(modules or {})}.items():
            (tmp_path / f"{name}.py").write_text(text)
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'kernels'}"}
        environment["PATH"] = os.pathsep.join([*([str(path)] if path else []), os.environ["PATH"]])
        out = tmp_path / "out.json"
        command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--tiny", "--out", str(out), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert out.exists(), done.stderr
        return Done(done.returncode, json.loads(out.read_text())["sections"], done.stdout, done.stderr)

    return run


@pytest.mark.parametrize("section", ["versions", "kernels", "timings", "exactness", "micro"])
def test_a_section(gpu_check, section: str) -> None:
    done = gpu_check("--only", section, "--scale", "0.5")
    assert done.code == 0, done.said
    [(name, result)] = done.sections.items()
    assert name == section
    assert result.get("cases") == result.get("of")
    assert done.table.startswith(f"{section:<10} passed")
    assert max(map(len, done.table.splitlines())) <= WIDTH
    for row in result.get("rows", []):
        if section == "kernels":
            assert 0 < row["largest_error"] < row["limit"]
        elif section == "timings":
            assert min(row[f"{name}_us"] for name in ("ours", "off", "sdpa", "floor")) > 0
            assert row["cascade_us"] is None
        elif section == "exactness":
            assert row["different"] > 2, "the model says the same to everything"
            assert row["prefix_rows"] > 0
        elif section == "micro":
            assert row["done"] == row["requests"] == 3
            assert min(row["out_tok/s"], row["rows/s"], row["of_bound"]) > 0
    if section in ("kernels", "exactness"):
        assert len(result["rows"]) == 3


@pytest.mark.parametrize("section", ["kernels", "timings", "exactness"])
def test_a_wrong_kernel_fails_the_section_and_the_others_run(gpu_check, section: str) -> None:
    done = gpu_check("--only", section, "versions", site=WRONG)
    assert done.code == 1
    assert done.sections["versions"]["passed"]
    assert not done.sections[section]["passed"]
    assert f"{section:<10} FAILED" in done.table
    if section == "kernels":
        errors = [float(fault.rpartition("relative error ")[2]) for fault in done.sections[section]["faults"]]
        assert errors == pytest.approx([0.05] * 3, rel=0.2)
    elif section == "timings":
        assert "sdpa differs by 0.05" in " ".join(done.table.split())
        assert done.sections[section]["rows"][0]["sdpa_us"] is None
    else:
        assert sum(row["wrong"] for row in done.sections[section]["rows"]) > 0


def test_kernels_in_processes_side_by_side(gpu_check) -> None:
    done = gpu_check("--only", "kernels", "--workers", "1")
    assert (done.code, done.sections["kernels"]["cases"]) == (0, 3), done.said


def test_a_process_beside_others_that_dies(gpu_check) -> None:
    done = gpu_check("--only", "kernels", "--workers", "1", site=DEADLY)
    assert done.code == 1
    assert len(done.sections["kernels"]["faults"]) == 3
    assert "BrokenProcessPool" in done.sections["kernels"]["faults"][0]


def test_a_package_that_is_missing_is_told_with_the_wheels_to_bring(gpu_check) -> None:
    done = gpu_check("--only", "versions", "micro", site=NO_PYDANTIC)
    assert done.code == 1
    line = (
        f"pip download --dest wheels --only-binary=:all: --python-version {sys.version_info[0]}.{sys.version_info[1]} "
    )
    for name in ("versions", "micro"):
        error = done.sections[name]["error"]
        assert line in error
        assert "'pydantic>=2.9,<3'" in error
        assert "orjson" not in error
        assert line in done.table
    assert "Traceback" not in done.said


def test_the_line_names_what_is_asked_for() -> None:
    asked = requirements()
    assert asked["triton"] == "triton>=3.6,<4"
    assert "'orjson>=3.10,<4' 'pydantic>=2.9,<3'" in bring({name: asked[name] for name in ("orjson", "pydantic")})


def test_a_section_over_its_time_is_cut_and_says_so(gpu_check) -> None:
    done = gpu_check("--only", "kernels", "micro", "--minutes", "0.001")
    assert done.sections["kernels"]["cases"] == 1
    assert "1 of 3 cases: time was up" in done.table
    [row] = done.sections["micro"]["rows"]
    assert row["done"] < row["requests"]
    assert "0 of 1 cases: time was up" in done.table


@pytest.mark.parametrize(("script", "error"), [("time.sleep(60)", "was ended"), ("os.abort()", "ended with -6")])
def test_a_section_that_hangs_or_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: str) -> None:
    (tmp_path / "command.py").write_text(f"import os, time\n{script}")
    monkeypatch.setattr(sections, "COMMAND", tmp_path / "command.py")
    monkeypatch.setattr(sections, "_GRACE", 1.0)
    began = time.monotonic()
    result = sections.run_section("kernels", seconds=0.5, tiny=True)
    assert not result["passed"]
    assert error in result["error"]
    assert time.monotonic() - began < 20


def test_time_that_a_section_leaves_goes_to_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(
        sections, "run_section", lambda name, *, seconds, **rest: given.append(seconds) or {"passed": True}
    )
    sections.run_all(["versions", "kernels", "micro"], minutes=10, tiny=True, scale=1.0, workers=None)
    assert given == pytest.approx([580 * 0.4 / 6.4, 290, 580], rel=1e-2)


@pytest.mark.parametrize(("factor", "passed"), [("1.0", True), ("1.05", False)])
def test_flashinfer_is_given_the_same_step(gpu_check, factor: str, passed: bool) -> None:
    done = gpu_check("--only", "timings", modules={"flashinfer": FLASHINFER.replace("FACTOR", factor)})
    assert done.code == (0 if passed else 1), done.said
    rows = done.sections["timings"]["rows"]
    assert len(rows) == 2
    assert all((row["cascade_us"] is not None) == passed for row in rows), done.table


def test_a_peer_that_does_not_run_is_told_and_fails_nothing(gpu_check) -> None:
    done = gpu_check("--only", "timings", modules={"flashinfer": "def MultiLevelCascadeAttentionWrapper(*a): 1 / 0"})
    assert done.code == 0
    assert "cascade did not run: ZeroDivisionError" in " ".join(done.table.split())


@pytest.mark.parametrize(("last", "passed"), [('exec "$@"', True), ("exit 1", False)])
def test_the_sanitizer(gpu_check, tmp_path: Path, last: str, passed: bool) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3 $4" = "--tool memcheck --error-exitcode 1" ] || exit 5\n'
        f'echo what is wrong > "$6"\nshift 6\n{last}\n'
    )
    tool.chmod(0o755)
    done = gpu_check("--only", "sanitizer", path=tool.parent)
    assert done.sections["sanitizer"]["passed"] == passed
    assert done.code == (0 if passed else 1), done.said
    assert done.sections["sanitizer"].get("cases") == (3 if passed else None)
    assert done.sections["sanitizer"]["memcheck"] == "what is wrong\n"


def test_without_the_sanitizer_its_section_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    [result] = sanitizer.run(Setting(tiny=True, end=0.0, scale=1.0, workers=0))
    assert result["passed"]
    assert "not installed" in result["note"]


def test_idle_is_the_time_in_which_nothing_runs() -> None:
    assert idle_share([(0, 2), (1, 4), (1, 3), (6, 8), (8, 10)]) == pytest.approx(0.2)
    assert idle_share([(5, 7), (0, 1)]) == pytest.approx(4 / 7)
    assert idle_share([]) is None


def test_a_table_is_no_wider_than_a_terminal() -> None:
    rows = [{"step": "x" * 60, "us": 1234.5678, "share": None}, {"step": "y", "us": 2.0, "share": 0.25}]
    result = {"passed": True, "seconds": 1.0, "note": "word " * 40, "rows": rows}
    text = table({"sections": {"timings": result}}).splitlines()
    assert max(map(len, text)) <= WIDTH
    assert text[-2].split()[1:] == ["1235", "-"]
    assert text[-1].split() == ["y", "2", "0.25"]
