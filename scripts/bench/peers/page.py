"""A measurement as a page of `docs/benchmarks/`: all figures come from the document that is written beside it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bench.peers.registry import OURS, SORTED

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """What one peer did on one workload in one dtype and order of input.

    Attributes:
        peer, order: who, and how its input stood.
        seconds: of generation, one for each run.
        process_seconds: of the whole process, the same way.
        peak_bytes: most memory of any run.
        equal, requests: answers that are those of transformers, of how many; None where that was not compared.
        failure: why there are no figures.
    """

    peer: str
    order: str
    seconds: tuple[float, ...]
    process_seconds: tuple[float, ...]
    peak_bytes: int
    equal: int | None
    requests: int
    failure: str | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def name(self) -> str:
        return f"{self.peer}, sorted" if self.order == SORTED else self.peer


def rows_of(document: Document, workload: str, dtype: str) -> list[Row]:
    """The rows of one table, fastest first, those that failed last."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in document["runs"]:
        if (run["workload"], run["dtype"]) == (workload, dtype):
            found.setdefault((run["peer"], run["order"]), []).append(run)
    rows = []
    for (peer, order), runs in found.items():
        good = [run for run in runs if run["failure"] is None]
        equal = [run["equal"] for run in good if run["equal"] is not None]
        rows.append(
            Row(
                peer=peer,
                order=order,
                seconds=tuple(run["generation_seconds"] for run in good),
                process_seconds=tuple(run["process_seconds"] for run in good),
                peak_bytes=max((run["peak_bytes"] for run in good), default=0),
                equal=min(equal, default=None),
                requests=document["workloads"][workload]["requests"],
                failure=next((run["failure"] for run in runs if run["failure"] is not None), None),
            )
        )
    return sorted(rows, key=lambda row: (not row.seconds, row.median if row.seconds else 0.0, row.name))


def cells(document: Document) -> list[tuple[str, str]]:
    """The tables that there are: (workload, dtype), in the order in which they were measured."""
    return list(dict.fromkeys((run["workload"], run["dtype"]) for run in document["runs"]))


def best_of(rows: Sequence[Row], order: str | None = None) -> Row | None:
    """The fastest peer, ourselves aside; of those whose input stood in `order`, where it is given."""
    peers = [row for row in rows if row.peer != OURS.name and row.seconds and order in (None, row.order)]
    return min(peers, key=lambda row: row.median, default=None)


def ours_of(rows: Sequence[Row]) -> Row | None:
    """Our own row, if we have figures."""
    return next((row for row in rows if row.peer == OURS.name and row.seconds), None)


def floor_seconds(document: Document, workload: str, dtype: str) -> float | None:
    """The median of the floors measured among the runs of a table: matrix products alone."""
    floors = [f["products"] for f in document["floors"] if (f["workload"], f["dtype"]) == (workload, dtype)]
    return statistics.median(floors) if floors else None


def render(document: Document) -> str:
    """The page, in Markdown."""
    parts = [
        f"# {document['title']}\n",
        f"**Question.** How long do batchrun and its peers take for the same requests on the same "
        f"{document['threads']} cores? **Answer.** {_answer(document)}\n",
        _summary(document),
    ]
    for workload, dtype in cells(document):
        parts.append(f"## {workload}, {dtype}\n\n{_about(document, workload, dtype)}\n")
        parts.append(_table(document, workload, dtype))
    parts += ["## How it was measured\n", listed(facts(document) | _of_workloads())]
    parts += ["## Peers and their settings\n", peers_and_settings(document)]
    parts += ["## What it does not show\n", _limits(document)]
    return "\n".join(parts)


def _answer(document: Document) -> str:
    sentences = []
    for workload, dtype in cells(document):
        rows = rows_of(document, workload, dtype)
        ours, best = ours_of(rows), best_of(rows)
        if ours and best:
            sentences.append(
                f"{workload} in {dtype}: {ours.median:.2f} s, {best.median / ours.median:.2f} times as fast as "
                f"{best.name} ({best.median:.2f} s)."
            )
    return " ".join(sentences) or "No peer and batchrun both came to an end."


def _summary(document: Document) -> str:
    lines = [
        "| workload | dtype | batchrun | best peer | its time / ours | best peer, input shuffled | its time / ours "
        "| share of the floor |",
        "| --- | --- | ---: | --- | ---: | --- | ---: | ---: |",
    ]
    for workload, dtype in cells(document):
        rows = rows_of(document, workload, dtype)
        ours = ours_of(rows)
        row = [workload, dtype, f"{ours.median:.2f} s" if ours else "–"]
        for best in (best_of(rows), best_of([r for r in rows if not _sorts(document, r.peer)], "shuffled")):
            row += [f"{best.name} {best.median:.2f} s", _ratio(best, ours)] if best else ["–", "–"]
        floor = floor_seconds(document, workload, dtype)
        row.append(f"{floor / ours.median:.2f}" if ours and floor else "–")
        lines.append(f"| {' | '.join(row)} |")
    lines.append("\nA peer that sorts its input by itself is not among those whose input is shuffled.\n")
    return "\n".join(lines)


def _sorts(document: Document, peer: str) -> bool:
    return bool(document["peers"][peer]["sorts"])


def _ratio(row: Row, ours: Row | None) -> str:
    return f"{row.median / ours.median:.2f}" if ours else "–"


def _about(document: Document, workload: str, dtype: str) -> str:
    load = document["workloads"][workload]
    text = (
        f"{load['requests']:,} requests; {load['prompt_logical']:,} prompt tokens, {load['prompt_physical']:,} of them "
        f"distinct; {load['output']:,} output tokens"
    )
    if load["kv_tokens"]:
        text += f"; KV memory for {load['kv_tokens']:,} tokens"
    floors = [f for f in document["floors"] if (f["workload"], f["dtype"]) == (workload, dtype)]
    if floors:
        middle = sorted(floors, key=lambda floor: floor["products"])[len(floors) // 2]
        text += (
            f". Floor: {middle['products']:.2f} s of matrix products "
            f"(at best {middle['products_per_second'] / 1e9:.0f} GFLOP/s); reading KV takes {middle['kv']:.2f} s more "
            f"(at {middle['bytes_per_second'] / 1e9:.0f} GB/s)"
        )
    return text + "."


def _table(document: Document, workload: str, dtype: str) -> str:
    rows = rows_of(document, workload, dtype)
    ours, floor = ours_of(rows), floor_seconds(document, workload, dtype)
    output = document["workloads"][workload]["output"]
    lines = [
        "| | generation s | runs | tokens/s | whole process s | peak memory MB | its time / ours | share of the floor "
        "| answers equal |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if not row.seconds:
            lines.append(f"| {row.name} | failed: {row.failure} | | | | | | | |")
            continue
        cells = [
            row.name,
            f"{row.median:.2f}",
            ", ".join(f"{seconds:.2f}" for seconds in row.seconds) if len(row.seconds) > 1 else "1",
            f"{output / row.median:.0f}",
            f"{statistics.median(row.process_seconds):.1f}",
            f"{row.peak_bytes / 1e6:.0f}",
            _ratio(row, ours),
            f"{floor / row.median:.2f}" if floor else "–",
            f"{row.equal}/{row.requests}" if row.equal is not None else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"\n{row.name} failed in a later round: {row.failure}" for row in rows if row.seconds and row.failure]
    return "\n".join([*lines, *failed, ""])


def facts(document: Document) -> dict[str, str]:
    """How anything was measured, by name."""
    hardware, versions = document["hardware"], document["versions"]
    model = document["model"]
    return {
        "Date": document["date"],
        "Command": f"`{document['command']}`",
        "Hardware": f"{hardware['processor']} ({', '.join(hardware['features']) or 'no vector extensions known'}), "
        f"{hardware['cores']} cores, {hardware['memory_gb']:.0f} GB; {document['threads']} threads",
        "Load of the machine": f"{hardware['load']:.1f} processes waiting or running when it began",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Model": f"{document['model_name']} (hidden {model['hidden_size']}, {model['num_hidden_layers']} layers, "
        f"{model['num_attention_heads']} heads, {model['num_key_value_heads']} KV heads), vocabulary "
        f"{model['vocab_size']:,}, tied embeddings, random seeded weights (standard deviation "
        f"{model['initializer_range']})",
        "Order": "one process after another, in turns, a round begins with the second of the last; a figure is the "
        "median of the runs that its row lists, or the one there was",
        "Times": "generation: from the first request given to the last token got; for batchrun, planning and running. "
        "Whole process: with start, imports, load, and for batchrun reading the job and writing results",
        "Memory": "the most that the processes of a run held together, by the kernel's marks",
        "Answers": "compared with those of transformers' `generate` in float32, token for token; in bfloat16 no "
        "two engines agree, so they are not compared",
    }


def _of_workloads() -> dict[str, str]:
    return {
        "Workloads": "`scripts/make_job.py`, seed 0, shuffled; token ids, greedy, every answer to its limit. Where a "
        "row says *sorted*, the peer got the same requests sorted by prompt",
        "Floor": "the products of all linear layers with weights packed for oneDNN, each distinct prompt token once, "
        "then one step for each output token with a row for each request that is not done; measured in every round. "
        "Attention's own products and everything else are not in it",
    }


def listed(told: Mapping[str, str]) -> str:
    """Facts by name as a list, in Markdown."""
    return "\n".join(f"- **{name}**: {fact}." for name, fact in told.items()) + "\n"


def physical_rows(document: Document, workload: str) -> int:
    """Rows that no engine can leave out: distinct prompt tokens, and what each answer has after its first token."""
    load = document["workloads"][workload]
    return int(load["prompt_physical"] + load["output"] - load["requests"])


def peers_and_settings(document: Document) -> str:
    """Everyone who took part, or was to, as a list, in Markdown."""
    lines = []
    for name, peer in document["peers"].items():
        versions = ", ".join(f"{package} {version}" for package, version in peer["versions"].items())
        line = f"- **{name}**{f' ({versions})' if versions else ''}: {peer['settings']}."
        if peer["unavailable"]:
            line += f" **Not measured**: {peer['unavailable']}."
        lines.append(line)
    return "\n".join(lines) + "\n"


def _limits(document: Document) -> str:
    text = "Other processors, GPUs, trained weights, sampling, larger models; peers in settings other than these."
    if document["trial"]:
        text += " This was a trial, which no other page should quote."
    return text + "\n"
