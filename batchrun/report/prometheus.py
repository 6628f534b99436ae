"""A run in Prometheus' text format, for the textfile collector of node_exporter.

Every series has the label `run`, so that the files of several runs lie side by side in one directory. There are no
timestamps: the collector refuses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from batchrun.report.records import Report
from batchrun.report.wording import STEP_KINDS, stages

if TYPE_CHECKING:
    from batchrun.status import RunProgress

_STATES = ("running", "finished", "stopped", "died", "unknown")

Samples = Iterable[tuple[Mapping[str, str], float | int | None]]


def render_metrics(run: str, progress: RunProgress, report: Report | None) -> str:
    """The metrics of a run.

    Args:
        run: its directory, the label of every series.
        progress: how it stands.
        report: of its latest start, if it has one.
    """
    families = _of_progress(progress)
    if report is not None:
        families += _of_report(report)
    return "".join(_family(run, *family) for family in families)


def _of_progress(progress: RunProgress) -> list[tuple[str, str, str, Samples]]:
    counts = progress.request_counts
    lines = {"completed": counts.completed, "failed": counts.failed, "remaining": counts.remaining}
    return [
        (
            "batchrun_run_state",
            "gauge",
            "1 for what has become of the run, 0 for what has not.",
            [({"state": state}, int(progress.state == state)) for state in _STATES],
        ),
        ("batchrun_exit_code", "gauge", "What the run ended with.", [({}, progress.exit_code)]),
        (
            "batchrun_start_timestamp_seconds",
            "gauge",
            "Unix time of the latest start.",
            [({}, progress.started_at)],
        ),
        (
            "batchrun_last_result_timestamp_seconds",
            "gauge",
            "Unix time of the latest result.",
            [({}, progress.last_result_at)],
        ),
        (
            "batchrun_lines",
            "gauge",
            "Lines of the job by what became of them.",
            [({"state": state}, count) for state, count in lines.items()],
        ),
        (
            "batchrun_line_errors",
            "gauge",
            "Failed lines by error code.",
            [({"code": code}, count) for code, count in sorted(progress.errors.items())],
        ),
    ]


def _of_report(report: Report) -> list[tuple[str, str, str, Samples]]:
    tokens, kv, throughput, steps = report.tokens, report.kv, report.throughput, report.step_seconds
    expected = report.expected
    prompts = {
        "logical": tokens.prompt_logical,
        "physical": tokens.prompt_physical,
        "computed": tokens.prompt_computed,
    }
    lost = {
        "idle_row": report.idle_rows,
        "padded_row": report.padded_rows,
        "preemption": report.preemptions,
        "prefix_eviction": report.prefix_evictions,
        "memory_retry": report.memory_retries,
        "worker_restart": report.worker_restarts,
    }
    kinds = [({"kind": kind}, getattr(steps, kind)) for kind in STEP_KINDS] if steps is not None else []
    return [
        (
            "batchrun_run_info",
            "gauge",
            "What ran the job, as labels.",
            [
                (
                    {
                        "model": report.model,
                        "device": report.device,
                        "dtype": report.dtype,
                        "order": report.schedule_order,
                    },
                    1,
                )
            ],
        ),
        (
            "batchrun_stage_seconds",
            "gauge",
            "Time of the stages of the latest start.",
            [({"stage": name}, spent) for name, spent in stages(report.seconds)],
        ),
        ("batchrun_duration_seconds", "gauge", "Time of the latest start in all.", [({}, report.seconds.total)]),
        ("batchrun_step_seconds", "gauge", "What the time of the steps went to.", kinds),
        (
            "batchrun_expected_seconds",
            "gauge",
            "What the plan expected of the steps.",
            [({}, expected.seconds if expected is not None else None)],
        ),
        (
            "batchrun_bound_ratio",
            "gauge",
            "The least time that the device's peaks allow for what was run, of the time that it took.",
            [({}, report.bound_share)],
        ),
        (
            "batchrun_prompt_tokens_total",
            "counter",
            "Prompt tokens of the latest start.",
            [({"kind": kind}, count) for kind, count in prompts.items()],
        ),
        ("batchrun_output_tokens_total", "counter", "Tokens sampled by the latest start.", [({}, tokens.output)]),
        ("batchrun_saving_ratio", "gauge", "Share of the prompt tokens that sharing spares.", [({}, report.saving)]),
        ("batchrun_steps_total", "counter", "Forward passes of the latest start.", [({}, report.steps)]),
        ("batchrun_rows_total", "counter", "Tokens that they computed.", [({}, report.rows)]),
        (
            "batchrun_lost_total",
            "counter",
            "Work lost, by kind.",
            [({"kind": kind}, count) for kind, count in lost.items()],
        ),
        ("batchrun_kv_pages", "gauge", "KV pages of the pool.", [({}, kv.pages)]),
        ("batchrun_kv_pages_peak", "gauge", "KV pages taken at once, at most.", [({}, kv.peak_pages)]),
        (
            "batchrun_requests_per_second",
            "gauge",
            "Requests answered per second of execution.",
            [({}, throughput.requests_per_second)],
        ),
        (
            "batchrun_input_tokens_per_second",
            "gauge",
            "Prompt tokens of answered requests per second of execution.",
            [({}, throughput.input_tokens_per_second)],
        ),
        (
            "batchrun_output_tokens_per_second",
            "gauge",
            "Tokens sampled per second of execution.",
            [({}, throughput.output_tokens_per_second)],
        ),
        (
            "batchrun_answers_total",
            "counter",
            "Answers of the latest start by finish reason.",
            [({"reason": reason}, count) for reason, count in sorted(report.finish_reasons.items())],
        ),
    ]


def _family(run: str, name: str, kind: str, words: str, samples: Samples) -> str:
    """The lines of a metric; none if nothing of it is known."""
    lines = []
    for labels, value in samples:
        if value is not None:
            pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in {"run": run, **labels}.items())
            lines.append(f"{name}{{{pairs}}} {value!r}")
    return "\n".join([f"# HELP {name} {words}", f"# TYPE {name} {kind}", *lines, ""]) if lines else ""


def _escaped(value: str) -> str:
    """A label's value; what UTF-8 cannot hold is escaped."""
    value = value.encode("utf-8", "backslashreplace").decode()
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
