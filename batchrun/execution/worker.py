"""The seam between scheduling and computing."""

from __future__ import annotations

from typing import Protocol

from batchrun.schedule.step import Step, StepOutput


class Worker(Protocol):
    """Runs steps. `SimulatedWorker` does arithmetic; `TorchWorker` runs the model."""

    def submit(self, step: Step) -> None:
        """Start a step; returns at once where the device works beside the host."""

    def collect(self) -> StepOutput:
        """Wait for the oldest submitted step that was not collected yet, and return what it sampled."""

    def close(self) -> None:
        """Give back what the worker holds; it is not used after that."""
