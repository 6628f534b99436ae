"""The documentation is what the program does: its commands run, its generated pages are current, its links lead
somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from test_architecture import MAY_IMPORT

from batchrun.errors import ExitCode
from scripts import generate_docs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each command of a page's console blocks with the lines that it shows: `$` begins a command, `>` goes on."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks(page, "console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.startswith("> "):
            command, shown = found.pop()
            found.append((f"{command}\n{line[2:]}", shown))
        else:
            found[-1][1].append(line)
    yield from found


def shell(script: str, cwd: Path) -> str:
    """What a script prints, on both streams, with `batchrun` and `python` those of this environment."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80"}
    return subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    ).stdout


def matches(printed: list[str], shown: list[str]) -> bool:
    """Whether the lines printed are those shown, in which a line `...` stands for any lines, and `...` at the end of a
    line for any words."""
    if not shown:
        return not printed
    if shown[0] == "...":
        return any(matches(printed[i:], shown[1:]) for i in range(len(printed) + 1))
    pattern = re.sub(r"[*?[]", r"[\g<0>]", shown[0])
    pattern = pattern.removesuffix("...") + "*" if pattern.endswith("...") else pattern
    return bool(printed) and fnmatchcase(printed[0].rstrip(), pattern) and matches(printed[1:], shown[1:])


@pytest.mark.timeout(300)
def test_the_quickstart_does_what_it_shows(tmp_path):
    page = ROOT / "docs" / "quickstart.md"
    told = list(commands(page))
    assert len(told) > 5
    # One shell for all commands, so that `echo $?` means what it says; a mark ends the output of each.
    script = "".join(f'{command}\nstatus=$?; echo "=== $status"; (exit $status)\n' for command, _ in told)
    outputs = re.split(r"=== (\d+)\n", shell(script, tmp_path))
    for i, (command, shown) in enumerate(told):
        printed, status = outputs[2 * i], outputs[2 * i + 1]
        assert matches(printed.splitlines(), shown), f"{command}\n{printed}"
        status_is_shown = i + 1 < len(told) and told[i + 1][0] == "echo $?"
        assert status_is_shown or status == "0", f"{command}\n{printed}"

    for code in blocks(page, "python") + blocks(ROOT / "README.md", "python"):
        (tmp_path / "example.py").write_text(code, encoding="utf-8")
        printed = shell("python example.py; echo status $?", tmp_path)
        assert printed.endswith("status 0\n"), printed


def test_matching_is_strict_except_for_dots():
    printed = ["one", "two 2", "three", ""]
    assert matches(printed, ["one", "...", "three", ""])
    assert matches(printed, ["one", "two ...", "three", ""])
    assert not matches(printed, ["one", "three", ""])
    assert not matches(printed, ["one", "two 3", "three", ""])
    assert not matches(printed, ["...", "four"])


@pytest.mark.parametrize("name", generate_docs.pages())
def test_generated_pages_are_current(name):
    written = (generate_docs.DOCS / name).read_text(encoding="utf-8")
    assert written == generate_docs.pages()[name], "run scripts/docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_page_is_reached_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name not in index and page.name != "index.md"
    ] == []


def test_the_page_on_architecture_has_the_rules_that_are_checked():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rules = page.partition("## Who may import whom")[2].partition("\n## ")[0]
    table = {
        room: set(re.findall(r"`([\w.]+)`", names))
        for room, names in re.findall(r"^\| `(\w+)` \| (.+) \|$", rules, re.MULTILINE)
    }
    assert table == MAY_IMPORT


def test_the_readme_has_every_exit_code():
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(row) for row in rows] == [code.value for code in ExitCode]
