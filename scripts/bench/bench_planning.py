"""What the host does before and beside the model, against the targets of the design, and how it grows with the job.

Each measurement runs in a process of its own, so that its memory is its own, at 1x, 4x and 16x the work; figures are
medians. Seconds are those of the clock; exponents are fitted to processor time (log against log), which others on the
machine disturb less.

    python scripts/bench/bench_planning.py
    python scripts/bench/bench_planning.py --quick --only forest lint
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 32_000
Figures = dict[str, float]


@contextmanager
def timed(figures: Figures, name: str = "") -> Iterator[None]:
    """Note the seconds on the clock and of the processor (all threads) as `<name>_s` and `<name>_cpu_s`."""
    prefix = f"{name}_" if name else ""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    figures[prefix + "s"] = time.perf_counter() - wall
    figures[prefix + "cpu_s"] = time.process_time() - cpu


def peak_memory() -> float:
    """Most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- jobs ---------------------------------------------------------------------------------------------------------


def shared_prompts(count: int, seed: int = 0) -> Any:
    """A `TokenTable` of prompts of about 500 tokens: one of some system prompts (100 tokens), of ten times as many
    instructions (200), of many documents (100), each as often as Zipf's law has it, and 50 to 150 tokens of its own."""
    from batchrun.tokens import TokenTable

    rng = np.random.default_rng(seed)

    def zipf(choices: int, size: int) -> np.ndarray:
        share = 1 / np.arange(1, choices + 1)
        return rng.choice(choices, size, p=share / share.sum())

    systems, documents = max(count // 10_000, 4), max(count // 20, 16)
    levels = [
        rng.integers(0, VOCABULARY, shape, dtype=np.int32)
        for shape in ((systems, 100), (10 * systems, 200), (documents, 100))
    ]
    document = zipf(documents, count)
    instruction = zipf(10 * systems, documents)[document]
    system = zipf(systems, 10 * systems)[instruction]
    lengths = 400 + rng.integers(50, 151, count)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.empty(int(offsets[-1]), dtype=np.int32)
    for low in range(0, count, 1 << 11):
        rows = slice(low, low + (1 << 11))
        begin = offsets[:-1][rows]
        some = ids[begin[0] : begin[-1] + lengths[rows][-1]]
        some[:] = rng.integers(0, VOCABULARY, some.size, dtype=np.int32)
        parts = [level[of[rows]] for level, of in zip(levels, (system, instruction, document), strict=True)]
        some[(begin - begin[0])[:, None] + np.arange(400)] = np.concatenate(parts, axis=1)
    return TokenTable(ids, offsets)


def requests_of(tokens: Any, seed: int = 1) -> Any:
    """`Requests` of these prompts, with answers of 1 to 200 tokens of known length."""
    from batchrun.request import ENDPOINTS, Endpoint, Requests, SamplingParams, TextColumn

    count = len(tokens)
    return Requests(
        tokens=tokens,
        line=np.arange(count, dtype=np.int32),
        sampling_id=np.zeros(count, dtype=np.int32),
        sampling=[SamplingParams(temperature=0.0, ignore_eos=True)],
        max_new_tokens=np.random.default_rng(seed).integers(1, 201, count).astype(np.int32),
        seed=np.zeros(count, dtype=np.uint64),
        expected_tokens=np.zeros(count, dtype=np.int32),
        line_numbers=np.arange(1, count + 1, dtype=np.int32),
        custom_ids=TextColumn.of([""] * count),
        endpoints=np.full(count, ENDPOINTS.index(Endpoint.COMPLETIONS), dtype=np.uint8),
    )


def cost_model() -> Any:
    """Llama 3.1 8B in bfloat16 on an H200."""
    from batchrun.models import load_device_spec
    from batchrun.planning.cost import CostModel
    from batchrun.specs import ModelSpec

    spec = ModelSpec("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 131_072, None, "bfloat16")
    return CostModel(spec, load_device_spec("h200"), "bfloat16")


def plan_of(requests: Any, forest: Any) -> Any:
    from batchrun.planning.memory import MemoryBudget
    from batchrun.planning.planner import PlanOptions, make_plan

    options = PlanOptions(schedule_order="dfs", grouping="auto", step_tokens=1024)
    return make_plan(requests, forest, cost_model(), MemoryBudget(16, 50_000, 1, 1), options)


def sentences(count: int, words: int, seed: int = 0) -> list[str]:
    """Texts of so many words each, at random from the documentation."""
    found = sorted({word for page in (ROOT / "docs").glob("*.md") for word in page.read_text("utf-8").split()})
    rng = random.Random(seed)
    return [" ".join(rng.choices(found, k=words)) for _ in range(count)]


# --- measurements: size -> figures ----------------------------------------------------------------------------------


def measure_forest(size: int) -> Figures:
    """Forest, groups and order of `size` requests that are tokenised."""
    from batchrun.planning.planner import order_requests
    from batchrun.prefix.forest import build_forest
    from batchrun.prefix.groups import choose_groups

    few = requests_of(shared_prompts(100))
    plan_of(few, build_forest(few.tokens))  # so that all there is to load is loaded
    before = peak_memory()
    requests = requests_of(shared_prompts(size))
    figures: Figures = {}
    with timed(figures, "forest"):
        forest = build_forest(requests.tokens)
    with timed(figures, "plan"):  # groups and order, expected lengths and memory
        plan = plan_of(requests, forest)
    with timed(figures, "groups"):
        choose_groups(
            forest,
            requests.tokens,
            grouping="auto",
            expected_new_tokens=plan.expected_new_tokens,
            costs=plan.costs,
        )
    with timed(figures, "order"):
        order_requests(plan, requests, plan.expected_new_tokens)
    table = requests.tokens.ids.nbytes
    return figures | {
        "s": figures["forest_s"] + figures["plan_s"],
        "cpu_s": figures["forest_cpu_s"] + figures["plan_cpu_s"],
        "peak_gb": peak_memory() / 1e9,
        "peak_without_table_gb": (peak_memory() - table) / 1e9,
        "bytes_a_request": (peak_memory() - before - table) / size,
        "saving": plan.saving,
        "nodes": len(forest),
        "groups": len(plan.groups),
    }


def measure_simulate(size: int) -> Figures:
    """Forest, plan and all steps of `size` tokenised requests, by arithmetic."""
    from batchrun.execution.loop import run_loop
    from batchrun.execution.simulate import SimulatedWorker
    from batchrun.prefix.forest import build_forest
    from batchrun.schedule.scheduler import Scheduler

    requests = requests_of(shared_prompts(size))
    cost = cost_model()
    figures: Figures = {}
    with timed(figures):
        plan = plan_of(requests, build_forest(requests.tokens))
        scheduler = Scheduler(plan, requests)
        log = run_loop(scheduler, SimulatedWorker(plan.expected_new_tokens, cost.seconds)).log
    full = log.columns["rows"] >= 1000
    return figures | {
        "steps": len(log),
        "full_steps": int(full.sum()),
        "ms_a_full_step": 1e3 * float(log.columns["host_seconds"][full].mean()),
        "cpu_ms_a_step": 1e3 * figures["cpu_s"] / len(log),
    }


def measure_lint(size: int) -> Figures:
    """Reading and checking a job of `size` chat lines of about 2 kB."""
    from batchrun.formats.job import lint_job, open_job

    texts = sentences(min(size, 2000), 250)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for i in range(size):
                messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": texts[i % 2000]}]
                body = {"model": "m", "messages": messages, "max_tokens": 100, "temperature": 0}
                line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        figures: Figures = {"mb": path.stat().st_size / 1e6}
        before = peak_memory()
        with timed(figures):
            lint = lint_job(open_job(path))
    assert lint.sound == size
    return figures | {
        "mb_a_cpu_s": figures["mb"] / figures["cpu_s"],
        "memory_mb": (peak_memory() - before) / 1e6,
    }


def measure_tokenize(size: int) -> Figures:
    """`size` completions of 300 words, as the library tokenises them in one batch, and as intake does."""
    return _tokenize([[text] for text in sentences(size, 300)])


def measure_tokenize_chats(size: int) -> Figures:
    """`size` chats over one system prompt of about 2,000 tokens."""
    (system,) = sentences(1, 650)
    return _tokenize([[system, text] for text in sentences(size, 30)])


def _tokenize(jobs: list[list[str]]) -> Figures:
    """Tokenise prompts of one text, or chats of two (system and user): with the `tokenizers` library alone, the same
    characters in one batch, and by intake, turn about."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from batchrun.config import load_config
    from batchrun.intake import read_requests
    from batchrun.request import Endpoint, JobLine, LineOptions
    from batchrun.specs import ModelSpec
    from batchrun.tokenizer import load_tokenizer

    chat = len(jobs[0]) > 1
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train([str(page) for page in (ROOT / "docs").glob("*.md")], trainer)
        bpe.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
        )
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        tokenizer = load_tokenizer(path)
        library = Tokenizer.from_file(str(path / "tokenizer.json"))
    if chat:
        texts = [
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
            for system, user in jobs
        ]
    else:
        texts = [text for (text,) in jobs]
    lines = [
        JobLine(
            number=i + 1,
            custom_id=str(i),
            endpoint=Endpoint.CHAT if chat else Endpoint.COMPLETIONS,
            options=LineOptions(max_tokens=10),
            messages=tuple(
                {"role": role, "content": content} for role, content in zip(("system", "user"), job, strict=True)
            )
            if chat
            else None,
            prompts=None if chat else tuple(job),
        )
        for i, job in enumerate(jobs)
    ]
    config = load_config(model="none")
    spec = ModelSpec("llama", len(library.get_vocab()), 64, 64, 1, 1, 1, 64, 1 << 20, None, "float32")
    theirs, ours, processor = [], [], []
    for _ in range(3):
        figures: Figures = {}
        with timed(figures, "library"):
            encoded = library.encode_batch(texts, add_special_tokens=not chat)
        with timed(figures, "intake"):
            requests = read_requests(lines, tokenizer, spec, {}, config).requests
        theirs.append(figures["library_s"])
        ours.append(figures["intake_s"])
        processor.append(figures["intake_cpu_s"])
    assert all(requests.tokens[i].tolist() == encoded[i].ids for i in (0, len(jobs) - 1))
    return {
        "s": statistics.median(ours),
        "cpu_s": statistics.median(processor),
        "library_s": statistics.median(theirs),
        "tokens_a_s": requests.tokens.ids.size / statistics.median(ours),
        "rate_of_library": statistics.median(theirs) / statistics.median(ours),
    }


def measure_help(size: int) -> Figures:
    """The command line's start."""
    figures: Figures = {}
    with timed(figures):
        subprocess.run([sys.executable, "-m", "batchrun.cli", "--help"], check=True, capture_output=True)
    return figures


# --- targets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A row of the table: a figure of a measurement, and where it has to be.

    Attributes:
        what: what it is.
        measurement: of `MEASUREMENTS`.
        figure: its name there; `growth` is the exponent of its processor time over the sizes.
        least, most: where the figure of the largest size has to be; neither where it is told only.
    """

    what: str
    measurement: str
    figure: str
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Measurement:
    """How something is measured: at three sizes, 1x, 4x and 16x, or at one."""

    measure: Callable[[int], Figures]
    sizes: tuple[int, ...]
    quick: tuple[int, ...]


MEASUREMENTS = {
    "forest": Measurement(measure_forest, (62_500, 250_000, 1_000_000), (5_000, 20_000, 80_000)),
    "simulate": Measurement(measure_simulate, (6_250, 25_000, 100_000), (500, 2_000, 8_000)),
    "lint": Measurement(measure_lint, (12_500, 50_000, 200_000), (1_000, 4_000, 16_000)),
    "tokenize": Measurement(measure_tokenize, (500, 2_000, 8_000), (125, 500, 2_000)),
    "tokenize_chats": Measurement(measure_tokenize_chats, (250, 1_000, 4_000), (60, 240, 960)),
    "help": Measurement(measure_help, (1,), (1,)),
}

TARGETS = (
    Target("forest, groups and order of requests x 500 tokens (s)", "forest", "s", most=15),
    Target("  of the processor (s)", "forest", "cpu_s"),
    Target("  of which the forest (s)", "forest", "forest_s"),
    Target("  groups (s)", "forest", "groups_s"),
    Target("  order (s)", "forest", "order_s"),
    Target("  growth: exponent", "forest", "growth", most=1.15),
    Target("  peak memory of the process (GB)", "forest", "peak_gb", most=4),
    Target("  without the table of tokens (GB)", "forest", "peak_without_table_gb"),
    Target("  beyond 4 bytes a prompt token (bytes a request)", "forest", "bytes_a_request"),
    Target("lint and parse (MB a second of a core)", "lint", "mb_a_cpu_s", least=200),
    Target("  growth: exponent", "lint", "growth"),
    Target("  memory (MB)", "lint", "memory_mb"),
    Target("tokenising texts (share of the library's rate)", "tokenize", "rate_of_library", least=0.95),
    Target("  growth: exponent", "tokenize", "growth"),
    Target("tokenising chats, one system prompt (same)", "tokenize_chats", "rate_of_library", least=0.95),
    Target("  growth: exponent", "tokenize_chats", "growth"),
    Target("scheduling a step of 1,000 rows (ms)", "simulate", "ms_a_full_step", most=1),
    Target("  a step on average, with its pricing, of the processor (ms)", "simulate", "cpu_ms_a_step"),
    Target("plan and simulate (s)", "simulate", "s", most=30),
    Target("  of the processor (s)", "simulate", "cpu_s"),
    Target("  growth: exponent", "simulate", "growth"),
    Target("batchrun --help (s)", "help", "s", most=0.3),
)


def run_measurement(name: str, sizes: tuple[int, ...], repeats: int) -> list[Figures]:
    """Medians of the figures at each size, of `repeats` processes each, turn about."""
    # One thread each; only the tokenizers library takes all cores by itself.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    runs: list[list[Figures]] = [[] for _ in sizes]
    for _ in range(repeats):
        for size, figures in zip(sizes, runs, strict=True):
            command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, str(size)]
            shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            figures.append(json.loads(shown.splitlines()[-1]))
    return [{name: statistics.median(run[name] for run in figures) for name in figures[0]} for figures in runs]


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def table(measured: dict[str, list[Figures]], sizes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """The targets, with what was measured at each size."""
    yield f"{'':60}{'1x':>10}{'4x':>10}{'16x':>10}  target"
    shown = ""
    for target in TARGETS:
        if target.measurement not in measured:
            continue
        if target.measurement != shown:
            shown = target.measurement
            if len(sizes[shown]) > 1:
                yield f"{shown + ', size':60}" + "".join(f"{size:>10,}" for size in sizes[shown])
        figures = [run[target.figure] for run in measured[shown]]
        cells = ["", "", f"{figures[-1]:.3g}"] if len(figures) == 1 else [f"{figure:.3g}" for figure in figures]
        if target.figure == "growth":
            cells[:-1] = ["", ""]
        verdict = ""
        if target.most is not None:
            verdict = f"under {target.most:g}: " + ("met" if figures[-1] < target.most else "MISSED")
        elif target.least is not None:
            verdict = f"over {target.least:g}: " + ("met" if figures[-1] > target.least else "MISSED")
        yield f"{target.what:60}" + "".join(f"{cell:>10}" for cell in cells) + (f"  {verdict}" if verdict else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; targets are for the large ones")
    parser.add_argument("--repeats", type=int, help="processes for each figure (default 3, quick 1)")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, size = args.measure
        print(json.dumps(MEASUREMENTS[name].measure(int(size))))
        return

    repeats = args.repeats or (1 if args.quick else 3)
    load = os.getloadavg()[0]
    measured: dict[str, list[Figures]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for name in args.only:
        sizes[name] = MEASUREMENTS[name].quick if args.quick else MEASUREMENTS[name].sizes
        measured[name] = run_measurement(name, sizes[name], repeats)
        if len(sizes[name]) > 1:
            growth = exponent(sizes[name], [figures["cpu_s"] for figures in measured[name]])
            measured[name] = [figures | {"growth": growth} for figures in measured[name]]
    print("\n".join(table(measured, sizes)))
    print(f"load of the machine before and after: {load:.1f}, {os.getloadavg()[0]:.1f}; {os.cpu_count()} cores")
    if args.json:
        document = {
            "sizes": sizes,
            "figures": measured,
            "repeats": repeats,
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": [load, os.getloadavg()[0]],
            "versions": {name: version(name) for name in ("batchrun", "numpy", "orjson", "tokenizers")},
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
