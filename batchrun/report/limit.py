"""What limited a run: told from the time that was measured and, within the steps, from their bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchrun.report.records import Report
from batchrun.report.wording import duration, percent, plural

if TYPE_CHECKING:
    from batchrun.formats.plan import PlanFile


_MOST = 0.5  # share of the steps' time from which on their bound says what they spent it on


@dataclass(frozen=True, slots=True)
class Limit:
    """What took most of a run's time.

    Attributes:
        kind: `start`, `host`, `recovery`, `kv_memory`, `tail`, `prefill`, `compute`, `weights`, `kv_reading`, `steps`,
            or `other`.
        share: of the time of the run, 0 to 1.
        words: one sentence.
    """

    kind: str
    share: float
    words: str


def what_limited(report: Report, plan: PlanFile | None) -> Limit | None:
    """What took most of a run's time; None where nothing was run.

    Args:
        report: of the run.
        plan: that it followed, if it is known.
    """
    seconds, steps = report.seconds, report.step_seconds
    if steps is None or not seconds.total or not report.steps:
        return None
    start = sum(spent for spent in (seconds.load, seconds.tokenize, seconds.plan) if spent is not None)
    parts = {
        "start": start,
        "host": steps.host,
        "recovery": steps.recovery,
        "kv_memory": steps.held_back,
        "tail": steps.tail,
        "steps": steps.device - steps.held_back - steps.tail,
    }
    parts["other"] = seconds.total - sum(parts.values())
    kind = max(parts, key=lambda name: parts[name])
    share = min(parts[kind] / seconds.total, 1.0)
    took = f"{duration(parts[kind])} of {duration(seconds.total)} ({percent(share)})"
    match kind:
        case "start":
            words = f"The start limited it: loading, tokenising and planning took {took}."
        case "host":
            words = f"The host limited it: between steps, and on the way to the worker and back, it spent {took}."
        case "recovery":
            words = (
                f"Lost workers limited it: finding out and starting again took {took}, for "
                f"{plural(report.worker_restarts, 'restart')}. run.log says what happened."
            )
        case "kv_memory":
            room = f", of {plural(plan.step_tokens, 'row')} that steps have room for" if plan is not None else ""
            words = (
                f"KV memory limited it: in {took} requests waited for pages while steps were not full{room}. "
                "More --kv-memory would help."
            )
        case "tail":
            words = (
                f"The last answers limited it: {took} went to steps in which nothing waited any more and less than "
                "half of the most requests were under way."
            )
        case "other":
            words = f"What is not measured part by part limited it: starting, reading and writing took {took}."
        case _:
            kind, words = _within_steps(report, steps.device, took)
    return Limit(kind, share, words)


def _within_steps(report: Report, device: float, took: str) -> tuple[str, str]:
    """What full steps spent their time on: by the bound, if it accounts for most of it, the longest part of that."""
    bound = report.bound
    if bound is None:
        return "steps", f"The steps limited it: they took {took}."
    kv = bound.memory - bound.weights
    figures = (
        f"By the bound computing takes {duration(bound.compute)}, reading weights {duration(bound.weights)}, "
        f"reading KV {duration(kv)}."
    )
    if bound.seconds < _MOST * device:
        beyond = f"{percent(1 - bound.seconds / device)} of their time is beyond what the device's peaks ask for"
        return "steps", f"The steps limited it: they took {took}, and {beyond}. {figures}"
    if bound.compute < bound.memory:
        kind, name = ("weights", "Reading weights") if bound.weights >= kv else ("kv_reading", "Reading KV")
        return kind, f"{name} limited it: steps took {took}. {figures}"
    prefill = min(report.tokens.prompt_computed / max(report.rows, 1), 1.0)  # some may have been lost with a worker
    if prefill >= 0.5:
        return "prefill", f"Prefill limited it: steps took {took}, {percent(prefill)} of their rows prompts. {figures}"
    return "compute", f"Computing limited it: steps took {took}, most of their rows answers. {figures}"
