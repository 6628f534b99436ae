"""The CPU kernels are compiled once and kept; what stands in the way is told, and never taken for whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batchrun_kernels import cpu
from batchrun_kernels.cpu import CpuKernels, NotCompiled

# Norms of rows of ones are ones.
USE = """
import torch
from batchrun_kernels.cpu import CpuKernels
print(CpuKernels(torch.float32).norm(torch.ones(2, 8), torch.ones(8), 0.0).sum().item())
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache directory, for a process that has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)
    return tmp_path / "batchrun"


def check_kernels() -> None:
    found = CpuKernels(torch.float32).norm(torch.ones(2, 8), torch.ones(8), 0.0)
    assert torch.equal(found, torch.ones(2, 8))


def test_they_are_compiled_once_and_kept_where_xdg_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels()
    [file] = cache.iterdir()  # nothing half-made stays
    made = file.stat()
    assert file.name.startswith("cpu-")
    monkeypatch.setattr(cpu, "_compile", None)  # not called again
    check_kernels()
    assert file.stat().st_mtime_ns == made.st_mtime_ns


def test_without_xdg_they_are_kept_in_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cpu._cache_directory() == tmp_path / "home" / ".cache" / "batchrun"


def test_another_compiler_other_flags_and_another_processor_are_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {cpu._fingerprint(["gcc", "-O3"]), cpu._fingerprint(["gcc", "-O2"]), cpu._fingerprint(["cc", "-O3"])}
    monkeypatch.setattr(cpu, "_processor", lambda: "flags: none")
    names.add(cpu._fingerprint(["gcc", "-O3"]))
    assert len(names) == 4
    assert cpu._fingerprint(["gcc", "-O3"]) in names


@pytest.mark.parametrize("left", [0, 5000, -1])
def test_a_file_that_was_cut_short_is_compiled_again(cache: Path, left: int) -> None:
    """In a process of its own: loading such a file can end it."""
    check_kernels()
    [file] = cache.iterdir()
    whole = file.read_bytes()
    # Another file of that name: this process has loaded the first.
    file.unlink()
    file.write_bytes(whole[:left])
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=False)
    assert done.stdout == "16.0\n", done.stderr
    assert len(file.read_bytes()) == len(whole)


def test_what_is_no_library_is_compiled_again(cache: Path) -> None:
    check_kernels()
    [file] = cache.iterdir()
    file.unlink()
    file.write_text("no library")
    check_kernels()


def test_two_processes_compile_at_the_same_time(cache: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", USE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["16.0\n"] * 2
    assert len(list(cache.iterdir())) == 1


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotCompiled, match="there is no C compiler: install gcc"):
        CpuKernels(torch.float32)
    assert not cache.exists()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", "gcc --no-such-option"])
def test_a_compiler_that_fails(compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NotCompiled, match="no-such-option" if "option" in compiler else compiler):
        CpuKernels(torch.float32)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_compiler_that_stops_half_way_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The disk may be full: half a library is written, and the compiler fails."""
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\ngcc "$@"\n: > "$(dirname "$0")/ran"\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(NotCompiled, match="failed"):
        CpuKernels(torch.float32)
    assert (tmp_path / "ran").exists()
    assert not list(cache.iterdir())


def test_a_cache_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where the directory would be: permissions do not stop root."""
    (tmp_path / "batchrun").touch()
    with pytest.raises(NotCompiled, match=str(tmp_path)):
        CpuKernels(torch.float32)


def test_a_cache_directory_without_permission(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    try:
        if os.access(cache, os.W_OK):  # root may write anywhere
            check_kernels()
        else:
            with pytest.raises(NotCompiled, match="Permission"):
                CpuKernels(torch.float32)
    finally:
        cache.chmod(0o700)
