"""Write the pages of docs/ that follow from the code: cli.md, configuration.md and formats.md.

    python scripts/generate_docs.py          # write them
    python scripts/generate_docs.py --check  # exit with 1 where one is not current
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import orjson
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from batchrun import config
from batchrun.cli import app
from batchrun.errors import ExitCode
from batchrun.formats import job, plan, report, results, rundir
from batchrun.planning.order import ORDERS
from batchrun.prefix.groups import GROUPINGS
from batchrun.report import records
from batchrun.request import Endpoint, FinishReason, LineFault, Result, Usage

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITTEN_BY = "<!-- Written by scripts/docs from the code. Change it there. -->"
COLUMNS = 80

# --- cli.md -------------------------------------------------------------------------------------------------------

EXIT_CODES = {
    ExitCode.OK: "all requests succeeded",
    ExitCode.INTERNAL: "internal failure",
    ExitCode.USAGE: "a flag, a configuration key or an input is wrong, or the model is missing or refused",
    ExitCode.SOME_FAILED: "finished, and some lines failed (bad lines included)",
    ExitCode.NOTHING_RUNNABLE: "nothing to run: an empty job, every line bad, or a bad line under `--strict`",
    ExitCode.OUTPUT: "output cannot be written (disk full, permissions); the same command goes on",
    ExitCode.STOPPED: "stopped early; the same command goes on",
    ExitCode.RUN_DIR: "the run directory is in use, or belongs to another run",
}

CLI = """# Command line

Results and tables go to standard output; progress, bad lines and failures go to standard error. Flags win over the
file given with `--config` ([configuration.md](configuration.md)).

SIGINT and SIGTERM end a run between two steps, with exit code 75; a second signal ends it at once.
"""


def cli_page() -> str:
    sections = [CLI, _help()]
    sections += [f"## batchrun {name}\n\n{_help(name)}" for name in _commands()]
    rows = [(str(int(code)), EXIT_CODES[code]) for code in ExitCode]
    return _page(*sections, "## Exit codes", _table(("code", "meaning"), rows))


def _commands() -> dict[str, Any]:
    return get_command(app).commands  # type: ignore[attr-defined]


def _help(*command: str) -> str:
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="batchrun", terminal_width=COLUMNS)
    return f"```text\n{shown.output.strip()}\n```"


# --- configuration.md ---------------------------------------------------------------------------------------------

CONFIGURATION = """# Configuration

A setting is taken from the first of these that has it: the command line, the file given with `--config`, the defaults
below (`configs/default.toml`). The file is TOML and needs only the keys that it changes. A key that does not exist is
refused with the nearest one that does.

A job is otherwise configured line by line: see [sampling.md](sampling.md) for what a line that does not say gets.
"""

DEFAULTS = "## Defaults\n\n`configs/default.toml`:"


def configuration_page() -> str:
    tables = [_settings(config.RunConfig, "")]
    for name, field in config.RunConfig.model_fields.items():
        if _is_section(field.annotation):
            tables += [f"## [{name}]\n\n{inspect.getdoc(field.annotation)}", _settings(field.annotation, f"{name}.")]
    policies = [
        "## Names of orders and groupings",
        *(f"- {inspect.getdoc(policy)}" for policy in ORDERS.values()),
        *(f"- {inspect.getdoc(policy)}" for policy in GROUPINGS.values()),
    ]
    listed = policies[0] + "\n\n`schedule_order` is one of\n\n" + "\n".join(map(_first_paragraph, policies[1:5]))
    listed += "\n\nand `scheduler.grouping` one of\n\n" + "\n".join(map(_first_paragraph, policies[5:]))
    toml = (config.configs_dir() / "default.toml").read_text(encoding="utf-8").strip()
    return _page(CONFIGURATION, "## Settings", *tables, listed, DEFAULTS, f"```toml\n{toml}\n```")
