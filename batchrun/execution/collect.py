"""Puts the answers of a line together, and writes the line when it has them all."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from batchrun.formats.results import result_line, unrun_line
from batchrun.formats.rundir import ResultSink
from batchrun.prefix.groups import PrefixGroups
from batchrun.request import FinishReason, Requests, Result, Usage
from batchrun.schedule.scheduler import Finished


class LineCollector:
    """Puts the answers of a line together, and writes the line when it has them all."""

    def __init__(
        self,
        requests: Requests,
        groups: PrefixGroups,
        model: str,
        sink: ResultSink,
        attempts: npt.NDArray[np.int64],
    ) -> None:
        """`attempts`: int64 `[N]`, how often each line was tried before."""
        self._attempts = attempts
        self._requests = requests
        self._groups = groups
        self._model = model
        self._sink = sink
        self._missing = np.bincount(requests.line, minlength=len(requests.custom_ids))
        self._partial: dict[int, list[Result]] = {}
        self._failed: set[int] = set()

    def add(self, finished: Finished, text: str, reason: FinishReason) -> None:
        requests, index = self._requests, finished.request
        usage = Usage(requests.tokens.span(index).length, finished.cached_tokens, finished.token_ids.size)
        line = int(requests.line[index])
        if line in self._failed:
            return
        results = self._partial.setdefault(line, [])
        results.append(Result(index, text, finished.token_ids, reason, usage))
        if len(results) < self._missing[line]:
            return
        results = sorted(self._partial.pop(line), key=lambda result: result.index)
        first = results[0].index
        group = int(self._groups.request_group[first])
        self._sink.write_result(
            result_line(
                results,
                custom_id=requests.custom_ids[line],
                line=int(requests.line_numbers[line]),
                endpoint=requests.endpoints[line],
                model=self._model,
                created=int(time.time()),
                seed=int(requests.seed[first]),
                group=group if group >= 0 else None,
                attempts=int(self._attempts[line]) + 1,
            )
        )

    def fail(self, request: int, code: str, message: str, *, attempts: int) -> bool:
        """A request gets no answer, and so its line none; whether that is new."""
        requests, line = self._requests, int(self._requests.line[request])
        if line in self._failed:
            return False
        self._failed.add(line)
        self._partial.pop(line, None)
        number = int(requests.line_numbers[line])
        attempts += int(self._attempts[line])
        self._sink.write_error(unrun_line(requests.custom_ids[line], number, code, message, attempts=attempts))
        return True
