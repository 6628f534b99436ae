"""Measure steps on this device and write what planning wants to know of it to `~/.config/batchrun/devices/<name>.toml`,
where plans and runs find it.

Random models of a few shapes run jobs through the real scheduler, loop and worker; the jobs are made such that each of
`specs.COST_UNITS` weighs much in some steps and little in others. The seconds of a unit are a least squares fit with no
constant below zero, over the fastest repeat of each step: what else runs on a machine only adds. How well they hold is
measured on what the fit has not seen: whole jobs, of another model.

    python scripts/calibrate_device.py --quick --out /tmp
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from batchrun.config import configs_dir, load_config, user_configs_dir
from batchrun.engine.linear import make_linear
from batchrun.engine.model import load_model
from batchrun.engine.torch_worker import TorchWorker
from batchrun.execution.loop import run_loop
from batchrun.intake import read_requests
from batchrun.models import read_model_spec
from batchrun.planning.cost import CostModel, Work
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.planner import PlanOptions, make_plan
from batchrun.prefix.forest import build_forest
from batchrun.request import Endpoint, JobLine, LineOptions
from batchrun.schedule.scheduler import Scheduler
from batchrun.specs import COST_UNITS, DTYPE_BYTES, DeviceSpec
from batchrun.tokenizer import load_tokenizer
from batchrun.workloads import Ids, make_workload, micro

Float = npt.NDArray[np.float64]

PAGE_SIZE = 16
_KV_SHARE = 0.5
_POOL_TOKENS = 1 << 17
_STEP_SIZES = (128, 256, 512, 1024, 2048)
_SATURATED = 0.97  # of the best rate: fewer rows a step leave more steps to hide prefill in
_OUTLIER = 0.1  # relative errors beyond this weigh by their size, not by its square (Huber)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        shapes: the models that constants are fitted to; the first also finds the rows that saturate a step. They
            differ in width and in the number of layers, for what is paid per operation, per layer and per step to
            come apart.
        held_out: the model that they are tried on.
        repeats: of each job.
        part: of the sizes of all jobs.
    """

    shapes: tuple[Mapping[str, int], ...]
    held_out: Mapping[str, int]
    repeats: int = 3
    part: float = 1.0


def shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    """A model's shape, in the words of its `config.json`."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


# SmolLM2-135M's width with few layers and with fewer, one wider, one narrow with many, one like the demo's; held out:
# SmolLM2-135M. Two depths of one width tell apart what is paid per layer, per weight and per step.
FULL = Effort(
    shapes=(
        shape(576, 1536, 6, 9, 3, 16384),
        shape(576, 1536, 2, 9, 3, 8192),
        shape(1024, 2816, 2, 16, 8, 8192),
        shape(256, 704, 16, 4, 2, 8192),
        shape(128, 256, 4, 4, 2, 812),
    ),
    held_out=shape(576, 1536, 30, 9, 3, 16384),
)
QUICK = Effort(
    shapes=(shape(576, 1536, 3, 9, 3, 8192), shape(128, 256, 12, 4, 2, 812)),
    held_out=shape(576, 1536, 6, 9, 3, 8192),
    repeats=2,
    part=0.5,
)


@dataclass(frozen=True, slots=True)
class Job:
    """A job to measure.

    Attributes:
        requests: prompts and the lengths of their answers.
        step_tokens: rows that a step is filled up to.
        pool_tokens: KV tokens that there is memory for.
    """

    name: str
    requests: list[tuple[list[int], int]]
    step_tokens: int = 1024
    pool_tokens: int = _POOL_TOKENS


@dataclass(frozen=True, slots=True)
class Measured:
    """The steps of a job as they ran, U units, N steps, K repeats.

    Attributes:
        units: `[N, U]`, the work of each step in `COST_UNITS`.
        rows: rows of all steps.
        seconds: `[K, N]`.
    """

    name: str
    units: Float
    rows: int
    seconds: Float

    @property
    def fastest(self) -> Float:
        """Of each step, `[N]`."""
        return self.seconds.min(axis=0)


# --- jobs ---------------------------------------------------------------------------------------------------------


def fitted_jobs(vocab_size: int, part: float) -> Iterator[Job]:
    """The jobs that constants are fitted to. Answers end one after the other, so that a job has steps of many sizes."""
    ids = Ids(2, vocab_size)

    def some(count: int) -> int:
        return max(2, round(part * count))

    def fading(count: int, longest: int) -> list[int]:
        return np.geomspace(2, max(3, longest), some(count)).astype(int).tolist()

    for size in _STEP_SIZES:
        yield Job(f"prefill by {size}", [(ids.take(256), 2) for _ in range(some(8))], size)
    yield Job("long prompts in pieces", [(ids.take(n), 2) for n in (700, 300, 90, 1000, 40, 400)[: some(6)]], 200)
    yield Job("short prompts", [(ids.take(n), 2) for n in range(8, 8 + some(48))], 300)
    yield Job("few rows", [(ids.take(4), some(24)), (ids.take(4), some(12))])
    yield Job("many rows", [(ids.take(24), n) for n in fading(96, 40)], 512)
    yield Job("own context", [(ids.take(60 + 20 * i), n) for i, n in enumerate(fading(16, 24))])
    yield Job("long own context", [(ids.take(560 + 80 * i), n) for i, n in enumerate(fading(6, 24))])
    stem = ids.take(1500)
    yield Job("long prefix", [(stem + ids.take(16), n) for n in fading(48, 32)])
    yield Job("many prefixes", list(micro(ids, some(40), 96, 2, 8, 12)))
    # Every level ends one request, and the last has many: all of their rows merge a partial result of each level.
    stem, chain = [], []
    for _ in range(12):
        stem = stem + ids.take(24)
        chain.append((stem + ids.take(8), 2))
    yield Job("deep prefixes", chain + [(stem + ids.take(8), n) for n in fading(64, 16)])
    mixed = []
    for _ in range(some(4)):
        stem = ids.take(256)
        mixed += [(stem + ids.take(8 + 16 * i), n) for i, n in enumerate(fading(12, 24))]
    yield Job("prefill beside decode", mixed, 128)


def held_out_jobs(vocab_size: int, part: float) -> Iterator[Job]:
    """The jobs that the constants are tried on."""
    for name in ("micro", "pressure", "tree", "none", "mixed"):
        made = make_workload(name, vocab_size=vocab_size)
        requests = made.requests[: round(part * len(made.requests))]
        yield Job(name, requests, pool_tokens=made.kv_tokens or _POOL_TOKENS)


# --- measuring ----------------------------------------------------------------------------------------------------


class Bench:
    """A random model that is loaded, and measures jobs."""

    def __init__(self, path: Path, shape: Mapping[str, int], device: DeviceSpec, dtype: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        config = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None)
        LlamaForCausalLM(config).save_pretrained(path)
        for file in (configs_dir() / "demo" / "model").glob("tokenizer*"):  # prompts are token ids: any will do
            shutil.copy(file, path)
        self.spec, config, _ = read_model_spec(path)
        self.dtype = dtype
        self.cost = CostModel(self.spec, replace(device, fitted={}), dtype)
        self._config = load_config(model=str(path), dtype=dtype)
        self._model = load_model(path, config, dtype, "cpu")
        self._tokenizer = load_tokenizer(path)

    def run(self, job: Job) -> tuple[list[Work], Float]:
        """The work and the seconds of each step of a job; what the host does between two steps counts, since nothing
        else runs meanwhile."""
        lines = [
            JobLine(
                number=i + 1,
                custom_id=f"r{i}",
                endpoint=Endpoint.COMPLETIONS,
                options=LineOptions(temperature=0.0, max_tokens=length, ignore_eos=True),
                prompts=(tuple(prompt),),
            )
            for i, (prompt, length) in enumerate(job.requests)
        ]
        intake = read_requests(lines, self._tokenizer, self.spec, {}, self._config)
        assert not intake.faults, intake.faults[0]
        requests = intake.requests
        page_bytes = PAGE_SIZE * self.spec.kv_bytes_per_token(self.dtype)
        budget = MemoryBudget(PAGE_SIZE, job.pool_tokens // PAGE_SIZE, page_bytes, self.spec.weight_bytes(self.dtype))
        options = PlanOptions(schedule_order="dfs", grouping="tree", step_tokens=job.step_tokens)
        plan = make_plan(requests, build_forest(requests.tokens), self.cost, budget, options)
        worker = TorchWorker(
            self._model, requests, eos_token_ids=frozenset(), page_size=PAGE_SIZE, num_pages=plan.budget.pages
        )
        works: list[Work] = []
        end = run_loop(Scheduler(plan, requests), worker, on_step=lambda step, output: works.append(step.work))
        worker.close()
        columns = end.log.columns
        return works, columns["seconds"] + columns["host_seconds"]


def measure(todo: list[tuple[Bench, Job]], repeats: int) -> list[Measured]:
    """Run jobs on models, after one each to warm up. Each repeat goes over all of them: a slow spell of the machine
    then hits one repeat of many jobs, not all repeats of one, and what is fitted as well as what is held out."""
    for bench, job in dict(todo).items():
        bench.run(job)
    runs = [[bench.run(job) for bench, job in todo] for _ in range(repeats)]
    found = []
    for (bench, job), of_job in zip(todo, zip(*runs, strict=True), strict=True):
        works = of_job[0][0]
        assert all(other == works for other, _ in of_job), f"{job.name}: the steps of two repeats differ"
        units = np.array([bench.cost.units(work) for work in works], dtype=float)
        seconds = np.stack([seconds for _, seconds in of_job])
        found.append(Measured(job.name, units, sum(work.rows for work in works), seconds))
    return found


def best_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of several runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def peak_flops(dtype: str, width: int) -> float:
    """Operations a second of the best of a few large matrix products, the weights packed where the engine packs them.

    Args:
        width: of the largest.
    """
    best = 0.0
    for size in (width // 8, width // 2, width):
        layer = make_linear(torch.randn(size, size).to(getattr(torch, dtype)))
        rows = torch.randn(1024, size).to(getattr(torch, dtype))
        with torch.inference_mode():
            best = max(best, 2 * 1024 * size**2 / best_seconds(lambda: layer(rows)))  # noqa: B023
    return best


def peak_bandwidth(megabytes: int) -> float:
    """Bytes a second from memory: of a large copy or a large sum, whichever is faster."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    size = source.nbytes
    return max(2 * size / best_seconds(lambda: target.copy_(source)), size / best_seconds(source.sum))


# --- fitting ------------------------------------------------------------------------------------------------------


def nnls(a: Float, b: Float) -> Float:
    """The x >= 0 that minimises |a x - b|, by the active set method (Lawson and Hanson, Solving Least Squares
    Problems, 1974, chapter 23).

    Args:
        a: `[N, U]`.
        b: `[N]`.
    """
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1
    a = a / scale
    x = np.zeros(a.shape[1])
    free = np.zeros(x.size, dtype=bool)
    for _ in range(10 * x.size):
        gradient = np.where(free, -np.inf, a.T @ (b - a @ x))
        if gradient.max() <= 1e-10 * np.linalg.norm(b):
            break
        free[gradient.argmax()] = True
        while True:
            wanted = np.zeros_like(x)
            wanted[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            below = free & (wanted <= 0)
            if not below.any():
                break
            # As far towards it as no constant falls below zero; the first to reach zero stays there.
            share = x[below] / (x[below] - wanted[below])
            x = x + share.min() * (wanted - x)
            free[np.flatnonzero(below)[share == share.min()]] = False
            x[~free] = 0
        x = wanted
    return x / scale


def fit(units: Float, seconds: Float, least: Float) -> Float:
    """Seconds of each unit, `[U]`: least squares of relative errors, in which long steps weigh more, as they make the
    time of a run, and outliers less (Huber's weights, by iteration).

    Args:
        units: `[N, U]`.
        seconds: `[N]`, of each step.
        least: `[U]`, what a unit takes at the device's peak. Where units come together in all models measured, this
            keeps the fit from giving one the time of another, which larger models have in other proportions.
    """
    relative = units / seconds[:, None]
    beyond = 1 - relative @ least
    size = np.sqrt(seconds / seconds.mean())
    weight = size
    for _ in range(20):
        constants = least + nnls(relative * weight[:, None], beyond * weight)
        weight = size * np.sqrt(_OUTLIER / np.maximum(np.abs(relative @ constants - 1), _OUTLIER))
    return constants


# --- telling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Errors:
    """Shares of the seconds measured: how far expectations are off in the mean, over steps and over whole jobs, and
    how far two repeats of the same are from each other."""

    steps: float
    runs: float
    steps_noise: float
    runs_noise: float


def errors_of(measured: list[Measured], constants: Float) -> Errors:
    """How well constants foretell what was measured."""
    steps = [np.abs(job.units @ constants / job.fastest - 1) for job in measured]
    runs = [abs((job.units @ constants).sum() / job.seconds.sum(axis=1).min() - 1) for job in measured]
    pairs = [
        (np.abs(first - second) / job.fastest, abs(first.sum() - second.sum()) / job.fastest.sum())
        for job in measured
        for first, second in combinations(job.seconds, 2)
    ]
    return Errors(
        steps=float(np.concatenate(steps).mean()),
        runs=statistics.mean(runs),
        steps_noise=float(np.concatenate([steps for steps, _ in pairs]).mean()) if pairs else 0.0,
        runs_noise=statistics.mean(run for _, run in pairs) if pairs else 0.0,
    )


def table(measured: list[Measured], constants: Float) -> str:
    """A line a job: what was measured, what is expected, and how far off that is."""
    head = f"{'job':24}{'steps':>6}{'measured':>10}{'expected':>10}{'off':>8}{'noise':>8}{'steps off':>11}{'noise':>8}"
    lines = [head]
    for job in measured:
        errors = errors_of([job], constants)
        expected, took = float((job.units @ constants).sum()), float(job.seconds.sum(axis=1).min())
        lines.append(
            f"{job.name:24}{job.seconds.shape[1]:6}{took:8.2f} s{expected:8.2f} s{100 * (expected / took - 1):+6.1f} %"
            f"{100 * errors.runs_noise:6.1f} %{100 * errors.steps:9.1f} %{100 * errors.steps_noise:6.1f} %"
        )
    return "\n".join(lines)


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def device_toml(device: DeviceSpec, comments: list[str]) -> str:
    """A device file, as `models.load_device_spec` reads it; no memory: that is measured when a run starts.

    Args:
        comments: lines to begin with.
    """
    flops = ", ".join(f"{dtype} = {rate:.3e}" for dtype, rate in device.flops.items())
    lines = [
        *(f"# {comment}" for comment in comments),
        f"hardware = {json.dumps(device.hardware)}",
        f'kind = "{device.kind}"',
        f"kv_share = {device.kv_share}              # of the memory that weights leave",
        f"page_size = {device.page_size}",
        f"step_tokens = {device.step_tokens}",
        f"bandwidth = {device.bandwidth:.3e}            # bytes/s",
        f"flops = {{ {flops} }}",
    ]
    for dtype, constants in device.fitted.items():
        lines += ["", f"[fitted.{dtype}]  # seconds of each unit that batchrun/specs.py names"]
        lines += [f"{name} = {value:.4e}" for name, value in constants.items()]
    return "\n".join(lines) + "\n"


def calibrate(name: str, dtypes: list[str], effort: Effort, folder: Path, tell: Callable[[str], None]) -> str:
    """Measure the device; returns its file.

    Args:
        folder: for the models.
        tell: is told what was found, as it is found.
    """
    flops = {dtype: peak_flops(dtype, round(effort.part * 2048)) for dtype in DTYPE_BYTES}
    device = DeviceSpec(
        name,
        kind="cpu",
        memory_bytes=0,
        kv_share=_KV_SHARE,
        page_size=PAGE_SIZE,
        step_tokens=_STEP_SIZES[-1],
        flops=flops,
        bandwidth=peak_bandwidth(round(effort.part * 256)),
        hardware=f"{torch.get_num_threads()} cores of {processor()} ({torch.backends.cpu.get_cpu_capability()})",
    )
    rates = ", ".join(f"{rate / 1e9:.0f} ({dtype})" for dtype, rate in flops.items())
    tell(f"{device.hardware}: {rates} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s")

    comments = [
        f"Measured by scripts/calibrate on {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}.",
        "Memory is measured when a run starts.",
    ]
    for dtype in dtypes:
        benches = [
            Bench(folder / f"{dtype}-{i}", shape, device, dtype)
            for i, shape in enumerate((*effort.shapes, effort.held_out))
        ]
        jobs = [(bench, job) for bench in benches[:-1] for job in fitted_jobs(bench.spec.vocab_size, effort.part)]
        held_out = [(benches[-1], job) for job in held_out_jobs(benches[-1].spec.vocab_size, effort.part)]
        measured = measure(jobs + held_out, effort.repeats)
        seen, unseen = measured[: len(jobs)], measured[len(jobs) :]
        operation = 1 / flops[dtype]
        least = np.array([operation if unit.endswith("_operation") else 0.0 for unit in COST_UNITS])
        units, seconds = (np.concatenate(c) for c in zip(*((job.units, job.fastest) for job in seen), strict=True))
        constants = fit(units, seconds, least)
        tell(f"\n{dtype}, fitted:\n{table(seen, constants)}\n\n{dtype}, held out:\n{table(unseen, constants)}")
        errors = errors_of(unseen, constants)
        comments += [
            f"{dtype}, {len(unseen)} jobs that the fit has not seen: steps are off by {errors.steps:.1%} in the mean "
            f"(two repeats of one",
            f"differ by {errors.steps_noise:.1%}), whole runs by {errors.runs:.1%} ({errors.runs_noise:.1%}).",
        ]
        named = dict(zip(COST_UNITS, constants.tolist(), strict=True)) | {"error": errors.steps}
        device = replace(device, fitted={**device.fitted, dtype: named})
        if dtype == dtypes[0]:
            rate = {size: job.rows / job.fastest.sum() for size, job in zip(_STEP_SIZES, seen, strict=False)}
            saturated = min(size for size in _STEP_SIZES if rate[size] >= _SATURATED * max(rate.values()))
            device = replace(device, step_tokens=saturated)
            rates = ", ".join(f"{rate[size]:.0f} ({size})" for size in _STEP_SIZES)
            tell(f"\nprefill, rows a second by rows a step: {rates}; saturated at {saturated}")
    return device_toml(device, comments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cpu", help="of the device, for --device-spec (default: cpu)")
    parser.add_argument("--out", type=Path, default=user_configs_dir() / "devices", help="folder of the file")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--quick", action="store_true", help="a minute in place of ten: a rough fit, to try it out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        effort = QUICK if args.quick else FULL
        text = calibrate(args.name, args.dtypes, effort, Path(folder), lambda line: print(line, flush=True))
    path = args.out / f"{args.name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"\n{path}:\n{text}", end="")


if __name__ == "__main__":
    main()
