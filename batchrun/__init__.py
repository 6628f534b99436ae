"""batchrun: offline batch inference for LLMs that plans before it runs.

import batchrun

report = batchrun.run("jobs.jsonl", model="demo")
plan = batchrun.plan("jobs.jsonl", model="demo")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "plan", "run"]

if TYPE_CHECKING:
    from batchrun.pipeline import plan, run


def __getattr__(name: str) -> Any:
    # On first use: `batchrun --help` and `import batchrun` stay light.
    if name in ("plan", "run"):
        from batchrun import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'batchrun' has no attribute {name!r}")
