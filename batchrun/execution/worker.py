"""The seam between scheduling and computing."""

from __future__ import annotations

from typing import Protocol

from batchrun.schedule.step import Step, StepOutput


class WorkerLost(Exception):
    """A worker is gone, with all that it has computed: it crashed, was killed, or hung. Its message is the cause.

    Attributes:
        killed: whether it was killed, which is what the system does when memory runs out.
    """

    def __init__(self, cause: str, *, killed: bool = False) -> None:
        super().__init__(cause)
        self.killed = killed


class Worker(Protocol):
    """Runs steps. `SimulatedWorker` does arithmetic; `TorchWorker` runs the model."""

    def submit(self, step: Step) -> None:
        """Start a step; returns at once where the device works beside the host.

        Raises:
            WorkerLost: as `collect`.
        """

    def collect(self) -> StepOutput:
        """Wait for the oldest submitted step that was not collected yet, and return what it sampled.

        Raises:
            WorkerLost: the worker is gone; `restart` makes a new one.
        """

    def restart(self) -> None:
        """Begin anew, with nothing computed and no step under way."""

    def close(self) -> None:
        """Give back what the worker holds; it is not used after that."""
