"""What a step costs: its work in countable units, and the price of that work on a device.

`Work` adds: the work of a job is the sum of the work of its steps, so that the price of a step and the bound of a job
are one formula. Fitted prices add too, also where one might expect the longer of computing and reading weights: on the
CPU a packed matrix product of few rows takes, as measured, the time to read its weights plus a time for each row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import add, attrgetter, mul
from typing import NamedTuple

from batchrun.errors import UsageError
from batchrun.prefix.groups import GroupCosts
from batchrun.specs import COST_UNITS, DTYPE_BYTES, DeviceSpec, ModelSpec

# A device that was not calibrated: shares of its data sheet's peaks that a run is expected to reach.
_EXPECTED_SHARE, _LOW_SHARE = 0.6, 0.35
_MERGE_OPERATIONS = 8  # per element of a head's output: a merge reads and writes it a few times


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one step or of many; all counts are per layer or the same for every layer.

    Attributes:
        steps: forward passes.
        rows: rows (tokens) computed.
        sampled: rows that go through the LM head.
        chunks: sequences that advance, once for each step.
        reads: shared prefixes read, once for each step and each run of neighbouring readers.
        pairs: pairs of a row and a KV token that it attends to.
        prefix_kv: KV tokens of shared prefixes read, once for all their readers of a step.
        suffix_kv: KV tokens of sequences' own read.
        merges: partial results merged into rows, beyond the first of each row.
    """

    steps: int = 0
    rows: int = 0
    sampled: int = 0
    chunks: int = 0
    reads: int = 0
    pairs: int = 0
    prefix_kv: int = 0
    suffix_kv: int = 0
    merges: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, _counts(self), _counts(other)))


_COUNTS = tuple(field.name for field in fields(Work))
_counts = attrgetter(*_COUNTS)


class Bound(NamedTuple):
    """The shortest time that the device's peaks allow: the longer of the two.

    Attributes:
        compute: seconds at the peak of matrix operations.
        memory: seconds at the memory bandwidth.
    """

    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def limit(self) -> str:
        """What limits: `compute` or `memory`."""
        return "compute" if self.compute >= self.memory else "memory"


class CostModel:
    """Prices work on a device: with constants fitted to measured steps (`scripts/calibrate`) where the device's file
    has some for the dtype, else by a roofline at a stated share of its peaks.

    Attributes:
        fitted: whether the constants were measured.
        error: mean absolute error of the fit over steps, as a share; 0 where nothing was fitted.

    Raises:
        UsageError: the device's file has no peak for the dtype, or its constants are not those that are priced here.
    """

    def __init__(self, model: ModelSpec, device: DeviceSpec, dtype: str) -> None:
        self.model = model
        self.device = device
        self._bytes = DTYPE_BYTES[dtype]
        self._kv_bytes = model.kv_bytes_per_token(dtype)
        # A step has rows enough for every expert to be asked by some.
        self._weights = (model.layer_parameters + model.vocab_size * model.hidden_size) * self._bytes
        if dtype not in device.flops:
            raise UsageError(
                f"The file of device {device.name} has no flops for {dtype}.",
                hint=f"Choose one of: {', '.join(device.flops)}; or add the peak of {dtype} to the file.",
            )
        self._flops = device.flops[dtype]
        constants = device.fitted.get(dtype)
        self.fitted = constants is not None
        self.error = 0.0
        if constants is not None:
            if constants.keys() != {*COST_UNITS, "error"}:
                raise UsageError(
                    f"The file of device {device.name} was made for other units of cost.", hint="Run scripts/calibrate."
                )
            self.error = constants["error"]
            prices = [constants[unit] for unit in COST_UNITS]
            # The units are linear in the counts of `Work`, so that each count has a price of its own.
            self._prices = [sum(map(mul, prices, self.units(Work(**{count: 1})))) for count in _COUNTS]

    def units(self, work: Work) -> tuple[float, ...]:
        """The work in the units of the fitted constants, in the order of `specs.COST_UNITS`."""
        model = self.model
        width = model.num_heads * model.head_dim
        layers = model.num_layers
        return (
            work.steps,
            layers * work.steps,
            self._linear(work),
            work.steps * self._weights,
            layers * work.rows * (model.hidden_size + model.mlp_width),
            4 * layers * width * work.pairs,
            (work.prefix_kv + work.suffix_kv + work.rows) * self._kv_bytes,
            layers * work.chunks,
            layers * work.reads,
            layers * width * work.merges,
        )

    def seconds(self, work: Work) -> float:
        """Expected seconds of a step, or of many."""
        if not self.fitted:
            return self.bound(work).seconds / _EXPECTED_SHARE
        return sum(map(mul, self._prices, _counts(work)))

    def spread(self, seconds: float) -> tuple[float, float]:
        """The range in which an expectation stands: twice the error of the fit to either side, or for a device that
        was not calibrated from its peaks to a third of them."""
        if self.fitted:
            return seconds / (1 + 2 * self.error), seconds * (1 + 2 * self.error)
        return seconds * _EXPECTED_SHARE, seconds * _EXPECTED_SHARE / _LOW_SHARE

    def bound(self, work: Work) -> Bound:
        """The least time that the device's peaks allow."""
        attention = 4 * self.model.num_layers * self.model.num_heads * self.model.head_dim * work.pairs
        kv = (work.prefix_kv + work.suffix_kv + work.rows) * self._kv_bytes
        return Bound(
            compute=(self._linear(work) + attention) / self._flops,
            memory=(work.steps * self._weights + kv) / self.device.bandwidth,
        )

    def group_costs(self) -> GroupCosts:
        """What the choice of shared prefixes weighs."""
        one_row, merges = self.seconds(Work(rows=1)), self.seconds(Work(merges=1))
        if not self.fitted:
            width = self.model.num_layers * self.model.num_heads * self.model.head_dim
            merges = _MERGE_OPERATIONS * width / (_EXPECTED_SHARE * self._flops)
            one_row = 2 * self.model.linear_parameters / (_EXPECTED_SHARE * self._flops)
        return GroupCosts(
            row=one_row,
            merge=merges,
            kv_token=self.seconds(Work(prefix_kv=1)),
            read=self.seconds(Work(reads=1)),
        )

    def _linear(self, work: Work) -> float:
        """Operations of the linear layers and the LM head."""
        model = self.model
        return 2 * (model.linear_parameters * work.rows + model.vocab_size * model.hidden_size * work.sampled)
