"""An engine with faults that some requests bring about, for the worker's process: which ones says the environment.

FAULTS='{"17": ["segfault", 0], "250": ["hang", 2]}'     request: kind, from its so-manieth token on
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import numpy as np
import torch

from batchrun.engine.batch import StepTensors
from batchrun.engine.engine import Engine, EngineSettings
from batchrun.engine.kv_cache import KVCache
from batchrun.request import Requests
from batchrun.schedule.step import Step


class FaultyEngine(Engine):
    """The real engine, but for some requests."""

    def start(self, requests: Requests, *args: Any) -> None:
        super().start(requests, *args)
        self.faults = {int(request): fault for request, fault in json.loads(os.environ["FAULTS"]).items()}
        self.forward = self.worker._forward
        self.worker._forward = self.faulty_forward  # type: ignore[method-assign]
        self.logits = self.worker._logits
        self.worker._logits = self.faulty_logits  # type: ignore[method-assign]

    def faulty_forward(self, step: Step) -> object:
        self.nan = np.zeros(0, dtype=np.int64)
        for request, (kind, sampled) in self.faults.items():
            if not ((step.request == request) & (step.num_sampled >= sampled)).any():
                continue
            if kind == "segfault":
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGSEGV)
            elif kind == "slow":
                time.sleep(0.2)
            elif kind == "hang":
                time.sleep(1000)
            elif kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            elif kind == "device":
                raise RuntimeError("CUDA error: device-side assert triggered")
            elif kind == "nan":
                self.nan = np.append(self.nan, np.flatnonzero(step.request[step.samples] == request))
        return self.forward(step)

    def faulty_logits(self, batch: StepTensors, kv_cache: KVCache) -> torch.Tensor:
        logits = self.logits(batch, kv_cache)
        logits[torch.from_numpy(self.nan)] = float("nan")
        return logits


def build_faulty_engine(settings: EngineSettings) -> Engine:
    return FaultyEngine(settings)
