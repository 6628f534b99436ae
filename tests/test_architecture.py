"""The floors of the house: who may import whom, and which library is known where."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "batchrun", ROOT / "kernels" / "batchrun_kernels")

# Who may import whom when it is loaded, and for its types. A room may import its own modules; a name stands for
# itself and all below it. Read from the ground up: no line names a room that stands below itself.
MAY_IMPORT: dict[str, set[str]] = {
    "columns": set(),
    "tokens": {"columns"},
    "locations": set(),
    "specs": set(),
    "errors": set(),
    "request": {"columns", "tokens"},
    "supported": {"errors", "specs"},
    "devices": {"errors", "specs"},
    "prefix": {"columns", "request", "tokens"},
    "planning": {"errors", "request", "specs", "prefix"},
    "schedule": {"columns", "request", "prefix", "planning"},
    "report": {"request"},
    "formats": {"errors", "request", "report.records", "schedule.step"},
    "tokenizer": {"errors", "request", "tokens"},
    "chat": {"request"},
    "grammar": {"request"},
    "execution": {
        "chat",
        "errors",
        "request",
        "prefix",
        "planning",
        "schedule",
        "tokenizer",
        "report.records",
        "formats.results",
        "formats.rundir",
    },
    "engine": {
        "columns",
        "errors",
        "grammar",
        "request",
        "tokens",
        "specs",
        "supported",
        "schedule.step",
        "planning.memory",
    },
    "config": {"errors", "specs", "request", "locations", "planning.order", "prefix.groups"},
    "sources": {"config", "errors", "formats", "locations", "report.records"},
    "models": {"config", "devices", "errors", "specs", "supported"},
    "subject": {"config", "devices", "errors", "models", "specs"},
    "intake": {"chat", "columns", "config", "grammar", "request", "specs", "tokenizer", "tokens"},
    "prepare": {
        "config",
        "execution",
        "formats",
        "intake",
        "models",
        "planning",
        "prefix",
        "report.records",
        "request",
        "schedule",
        "specs",
        "subject",
        "tokenizer",
    },
    "pipeline": {
        "config",
        "devices",
        "errors",
        "execution",
        "formats",
        "models",
        "planning",
        "prefix",
        "prepare",
        "report",
        "request",
        "schedule",
        "sources",
        "subject",
    },
    "origin": {"config", "errors", "formats"},
    "retry": {"config", "errors", "formats", "origin", "pipeline", "request", "subject"},
    "close": {"config", "devices", "errors", "formats", "origin", "pipeline", "report", "request", "sources"},
    "check": {
        "config",
        "errors",
        "formats",
        "intake",
        "prepare",
        "report.records",
        "request",
        "sources",
        "subject",
        "tokenizer",
    },
    "status": {"errors", "formats", "report.records"},
    "review": {"errors", "formats", "report.limit", "report.records", "status"},
    "diff": {"errors", "formats", "models", "report.records", "status", "tokenizer"},
    "workloads": {"errors"},
    "bench": {
        "config",
        "errors",
        "formats.plan",
        "formats.rundir",
        "pipeline",
        "planning.order",
        "report.records",
        "report.wording",
        "subject",
        "workloads",
    },
    "cli": {"errors"},
    "__main__": {"cli"},
}
# What may be imported besides inside functions (to keep the start light), and for type checking alone.
LATER: dict[str, set[str]] = {
    "": {"pipeline"},  # batchrun/__init__.py
    "cli": {
        "bench",
        "check",
        "close",
        "config",
        "diff",
        "formats",
        "pipeline",
        "report",
        "retry",
        "review",
        "status",
    },
    "pipeline": {"engine"},
}
FOR_TYPES: dict[str, set[str]] = {
    "pipeline": {"engine"},
    "": {"pipeline"},
    "cli": {"pipeline"},
    "report": {"bench", "check", "diff", "formats.plan", "pipeline", "prefix", "review", "status"},
}

# Who may use which library: when loaded, or only inside functions.
LIBRARIES: dict[str, set[str]] = {
    "numpy": {""},  # everywhere
    "torch": {"engine", "batchrun_kernels"},
    "transformers": {"engine"},
    "triton": {"batchrun_kernels"},
    "pydantic": {"config", "formats"},
    "orjson": {"formats", "sources", "subject"},
    "zstandard": {"formats.job"},
    "rich": {"cli", "report.tables", "report.progress"},
    "typer": {"cli"},
}
LIBRARIES_LATER: dict[str, set[str]] = {
    "transformers": {"tokenizer"},
    "jinja2": {"sources", "tokenizer"},
    "fsspec": {"sources"},
    "pyarrow": {"sources"},
    "llguidance": {"grammar"},
    "huggingface_hub": {"models"},
}


@dataclass(frozen=True)
class Import:
    module: str  # of ours: dotted, without `batchrun.`; of the kernels: with `batchrun_kernels`
    name: str  # what is imported, in full
    when: str  # "loaded", "later" (inside a function) or "types" (under TYPE_CHECKING)
    place: str

    @property
    def ours(self) -> str | None:
        """The imported module of batchrun, named as `module` is; None for libraries."""
        package, _, rest = self.name.partition(".")
        return rest if package == "batchrun" else None


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("batchrun", "kernels") else parts
    return ".".join(part for part in parts if part != "__init__")


def imports_in(file: Path) -> Iterator[Import]:
    module = module_name(file)

    def visit(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = when
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = "later"
            elif isinstance(node, ast.If) and child in node.body and ast.unparse(node.test) == "TYPE_CHECKING":
                inner = "types"
            place = f"{file.relative_to(ROOT)}:{getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, inner, place)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{place}: a relative import hides which room it is of"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield Import(module, whole if is_module(whole) else str(child.module), inner, place)
            yield from visit(child, inner)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), "loaded")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


FILES = sorted(file for package in PACKAGES for file in package.rglob("*.py"))
IMPORTS = [found for file in FILES for found in imports_in(file)]


def within(module: str, places: set[str]) -> bool:
    return any(place in ("", module) or module.startswith(place + ".") for place in places)


def room(module: str) -> str:
    return module.partition(".")[0]


def listed(table: dict[str, set[str]], module: str) -> set[str]:
    """What the table says of a module: of the module itself and of its room."""
    return table.get(room(module), set()) | table.get(module, set())


def may(found: Import) -> bool:
    """Whether an import of ours is in the tables."""
    assert found.ours is not None
    allowed = set(listed(MAY_IMPORT, found.module))
    if room(found.module):
        allowed.add(room(found.module))
    if found.when == "later":
        allowed |= listed(LATER, found.module)
    elif found.when == "types":
        allowed |= listed(FOR_TYPES, found.module)
    return within(found.ours, allowed)


def test_the_walk_sees_the_house():
    assert len(FILES) > 40
    assert {room(module_name(file)) for file in FILES} - {"", "batchrun_kernels"} == set(MAY_IMPORT)
    assert any(found.when == "later" and found.ours == "engine.model" for found in IMPORTS)
    assert any(found.when == "types" and found.ours == "formats.plan" for found in IMPORTS)


def test_nobody_imports_from_a_room_it_may_not_know():
    wrong = [
        f"{found.place}: {found.module or 'batchrun'} imports {found.ours or 'batchrun'} ({found.when})"
        for found in IMPORTS
        if found.ours and room(found.module) != "batchrun_kernels" and not may(found)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_permits_nothing_that_nobody_needs_where_that_would_open_a_floor():
    """The rooms that hold the plan know neither those that run it nor those that write it."""
    for lower, upper in (
        ("planning", {"schedule", "execution", "engine", "formats", "report", "config", "tokenizer"}),
        ("prefix", {"planning", "schedule", "execution", "engine", "formats", "report", "config"}),
        ("schedule", {"execution", "engine", "formats", "report", "config", "tokenizer"}),
        ("engine", {"execution", "formats", "report", "config", "pipeline", "prepare", "tokenizer"}),
        ("report", {"formats", "schedule", "execution", "engine", "config"}),
    ):
        assert not {room(name) for name in MAY_IMPORT[lower]} & upper


def test_rooms_do_not_import_in_a_circle():
    done: set[str] = set()
    while left := set(MAY_IMPORT) - done:
        ready = {name for name in left if {room(other) for other in MAY_IMPORT[name]} <= done}
        assert ready, f"a circle among {sorted(left)}"
        done |= ready


def test_the_kernels_know_nothing_of_batchrun():
    wrong = [
        found.place
        for found in IMPORTS
        if room(found.module) == "batchrun_kernels" and found.name.partition(".")[0] == "batchrun"
    ]
    assert not wrong


def test_kernels_are_reached_from_the_engine_only():
    wrong = [
        found.place
        for found in IMPORTS
        if room(found.name) == "batchrun_kernels" and room(found.module) not in ("batchrun_kernels", "engine")
    ]
    assert not wrong


def test_every_library_is_known_in_its_own_rooms_only():
    wrong = []
    for found in IMPORTS:
        library = room(found.name)
        if library in sys.stdlib_module_names or library in ("batchrun", "batchrun_kernels"):
            continue
        places = LIBRARIES.get(library, set())
        if found.when != "loaded":
            places = places | LIBRARIES_LATER.get(library, set())
        if not within(found.module, places):
            wrong.append(f"{found.place}: {found.module} imports {library} ({found.when})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_planning_reading_and_reporting_never_load_the_heavy_libraries(library):
    users = {room(found.module) for found in IMPORTS if room(found.name) == library and found.when == "loaded"}
    assert users
    assert users <= {"engine", "batchrun_kernels"}


def test_the_kernel_package_loads_no_triton_by_itself():
    package = ROOT / "kernels" / "batchrun_kernels" / "__init__.py"
    assert not [found for found in imports_in(package) if room(found.name) == "triton"]


@pytest.mark.parametrize(
    ("source", "when"),
    [
        ("from batchrun.engine import model", "loaded"),
        ("import batchrun.engine.model", "loaded"),
        ("class A:\n    from batchrun.engine.model import load_model", "loaded"),
        ("try:\n    import batchrun.engine\nexcept ImportError:\n    pass", "loaded"),
        ("def f():\n    from batchrun.engine.model import load_model", "later"),
        ("if TYPE_CHECKING:\n    from batchrun.engine.model import LoadedModel", "types"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import batchrun.engine", "loaded"),
    ],
)
def test_the_check_itself_sees_every_way_to_import(source, when, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for package in ("batchrun/engine", "batchrun/planning"):
        (tmp_path / package).mkdir(parents=True)
    (tmp_path / "batchrun" / "engine" / "model.py").touch()
    file = tmp_path / "batchrun" / "planning" / "order.py"
    file.write_text(source)
    [found] = imports_in(file)
    assert (found.module, found.when) == ("planning.order", when)
    assert found.ours is not None
    assert room(found.ours) == "engine"
    assert not may(found)
