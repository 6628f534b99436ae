"""What is installed: every package, the shipped files, and nothing that only the repository has."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import batchrun

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def shipped(folder: str) -> list[PurePosixPath]:
    """The files that git keeps of a folder, or would keep."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [PurePosixPath(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def packages_in_tree() -> set[str]:
    found = {"batchrun.configs"}  # has no module: it is data
    for source in (ROOT / "batchrun", ROOT / "kernels" / "batchrun_kernels"):
        for init in source.rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(source.parent).parts))
    return found


def test_the_package_list_is_the_tree():
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_in_tree())


def test_every_folder_with_modules_is_a_package():
    for source in (ROOT / "batchrun", ROOT / "kernels" / "batchrun_kernels"):
        for module in source.rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


@pytest.mark.parametrize("folder", ["configs", "batchrun"])
def test_every_shipped_file_is_a_module_or_matches_a_pattern_of_package_data(folder):
    package_of = {"configs": "batchrun.configs"}
    missed = []
    for file in shipped(folder):
        if file.suffix == ".py":
            continue
        inner = next((place for place in file.parents if (ROOT / place / "__init__.py").exists()), file.parent)
        package = package_of.get(folder) or ".".join(inner.parts)
        inside = file.relative_to(folder) if folder in package_of else file.relative_to(inner)
        patterns = SETUPTOOLS["package-data"].get(package, [])
        if not any(inside.match(pattern.removeprefix("**/")) for pattern in patterns):
            missed.append(str(file))
    assert not missed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names in a wheel that is built from what git keeps of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for file in shipped("."):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.whl")
    assert built.name.startswith(f"batchrun-{batchrun.__version__}-py3-none-")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_a_wheel_has_every_module_and_every_shipped_file(wheel):
    expected = {str(file) for file in shipped("batchrun")}
    expected |= {f"batchrun/{file}" for file in shipped("configs")}
    expected |= {str(file.relative_to("kernels")) for file in shipped("kernels/batchrun_kernels")}
    assert {"batchrun/configs/default.toml", "batchrun/report/page.html", "batchrun_kernels/__init__.py"} <= expected
    assert {"batchrun_kernels/cpu/numbers.h", "batchrun_kernels/cpu/attention.c"} <= expected  # compiled where it runs
    assert {"batchrun/configs/models/demo.toml", "batchrun/configs/demo/model/model.safetensors"} <= expected
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_a_wheel_brings_the_licence_and_the_command(wheel):
    [licence] = [name for name in wheel if name.endswith("licenses/LICENSE")]
    assert licence
    assert any(name.endswith("entry_points.txt") for name in wheel)
