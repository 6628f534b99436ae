"""The engine as a whole: a model where it runs, and the worker that runs steps with it. It lives in this process or, so
that nothing it does can take a run down, in one of its own (`execution.process`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchrun.request import Requests
from batchrun.schedule.step import Step, StepOutput

if TYPE_CHECKING:  # torch is loaded where the model is, and nowhere else
    from batchrun.engine.torch_worker import TorchWorker


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which model, where and how.

    Attributes:
        path: the model's directory.
        config: its parsed `config.json`.
        dtype: of weights and KV, a name in `specs.DTYPE_BYTES`.
        device: `cpu` or `cuda`.
        enforce_eager: whether to capture no graphs.
        deterministic: as for `TorchWorker`.
    """

    path: Path
    config: dict[str, Any]
    dtype: str
    device: str
    enforce_eager: bool = False
    deterministic: bool = False


class Engine:
    """`load`, then `start`; then it is a worker. Started again, it is one for other requests."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._loaded = False
        self._worker: TorchWorker | None = None

    def load(self) -> None:
        """Load the model, if it is not. Raises as `load_model` and `make_device`."""
        if self._loaded:
            return
        from batchrun.engine.device import make_device
        from batchrun.engine.model import load_model

        wanted = self._settings
        self._device = make_device(wanted.device, graphs=not wanted.enforce_eager)
        self._model = load_model(wanted.path, wanted.config, wanted.dtype, wanted.device)
        self._loaded = True

    def kv_memory(self, share: float, rows: int, page_size: int) -> int | None:
        """As `torch_worker.kv_memory`."""
        from batchrun.engine.torch_worker import kv_memory

        self.close()
        return kv_memory(self._model, self._device, share=share, rows=rows, page_size=page_size)

    def start(
        self,
        requests: Requests,
        eos_token_ids: frozenset[int],
        page_size: int,
        num_pages: int,
        vocabulary: Sequence[bytes] | None = None,
    ) -> None:
        """Take in what steps will speak of; arguments as for `TorchWorker`."""
        from batchrun.engine.torch_worker import TorchWorker

        self.close()
        self._started = requests, eos_token_ids, page_size, num_pages, vocabulary
        self._worker = TorchWorker(
            self._model,
            requests,
            eos_token_ids=eos_token_ids,
            page_size=page_size,
            num_pages=num_pages,
            device=self._device,
            deterministic=self._settings.deterministic,
            vocabulary=vocabulary,
        )

    @property
    def worker(self) -> TorchWorker:
        """What runs steps."""
        if self._worker is None:
            raise RuntimeError("the engine is not started")
        return self._worker

    def submit(self, step: Step) -> None:
        self.worker.submit(step)

    def collect(self) -> StepOutput:
        return self.worker.collect()

    def restart(self) -> None:
        self.start(*self._started)

    def close(self) -> None:
        """Let go of the memory of the worker; the model stays."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
