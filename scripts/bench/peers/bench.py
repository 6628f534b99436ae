"""A measurement: what everyone runs, what has come out so far, and the document of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from batchrun.workloads import Ids, Workload, make_workload, micro
from scripts.bench.peers import growth
from scripts.bench.peers.adapters.protocol import Job
from scripts.bench.peers.environments import RECIPES, Unavailable, python_of
from scripts.bench.peers.floor import floor_of, physical_tokens
from scripts.bench.peers.forms import SHAPE, Forms, kv_bytes
from scripts.bench.peers.measure import RunFailed, measure
from scripts.bench.peers.registry import FLOOR, ON_PREFIXES, OURS, PADDED, SORTED, Peer
from scripts.bench.peers.schedule import Turn

ROOT = Path(__file__).resolve().parents[3]
TINY = SHAPE | {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")
VERSIONS = (
    "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
)


class Bench:
    """A measurement: what everyone runs, and what has come out so far."""

    def __init__(self, cache: Path, shape: dict[str, Any], threads: int) -> None:
        self.cache, self.shape, self.threads = cache, shape, threads
        self.environments = cache / "environments"
        self.forms = Forms(cache / "models", self.environments, shape)
        self.runs: list[dict[str, Any]] = []
        self.floors: list[dict[str, Any]] = []
        self.unavailable: dict[str, str] = {}
        self.unanswered: set[str] = set()  # workloads for which transformers failed to give answers to compare with
        self._workloads: dict[str, Workload] = {}

    def requests(self, name: str) -> list[tuple[list[int], int]]:
        """Prompts and answer lengths of a workload."""
        return self._workload(name).requests

    def kv_tokens(self, name: str) -> int | None:
        """What a workload's KV memory may hold."""
        return self._workload(name).kv_tokens

    def _workload(self, name: str) -> Workload:
        if name not in self._workloads:
            vocabulary = self.shape["vocab_size"]
            if name in growth.POINTS:
                self._workloads[name] = growth.make(name, vocabulary, 1.0 if self.shape is SHAPE else 1 / 8)
            elif self.shape is SHAPE:
                self._workloads[name] = make_workload(name, vocab_size=vocabulary)
            else:
                tiny = list(micro(Ids(0, vocabulary), 3, 64, 4, 16, 8))
                self._workloads[name] = Workload(name, tiny, kv_tokens=None, ignore_eos=True, part=1.0)
        return self._workloads[name]

    def python(self, peer: Peer) -> Path:
        """The interpreter of a peer's environment."""
        return Path(sys.executable) if peer.environment is None else python_of(peer.environment, self.environments)

    def prepare(self, peers: Sequence[Peer], dtypes: Sequence[str]) -> list[Peer]:
        """Make environments and models; the peers for which that worked. Why others did not is noted and told."""
        ready = []
        for peer in peers:
            print(f"{peer.name}: environment and model", flush=True)
            try:
                self.python(peer)
                for dtype in dtypes:
                    if dtype in peer.dtypes:
                        self.forms.path(peer.form, dtype)
                ready.append(peer)
            except Unavailable as error:
                self.unavailable[peer.name] = str(error)
                print(f"{peer.name} is left out: {error}", flush=True)
        return ready

    def job(self, turn: Turn) -> tuple[Job, list[int]]:
        """The job of a turn, and which request stands where in it."""
        requests = self.requests(turn.workload)
        order = list(range(len(requests)))
        if turn.order == SORTED:
            order.sort(key=lambda i: requests[i][0])
        job = Job(
            model=str(self.forms.path(turn.peer.form, turn.dtype)),
            dtype=turn.dtype,
            threads=self.threads,
            prompts=[] if turn.peer is FLOOR else [requests[i][0] for i in order],
            outputs=[] if turn.peer is FLOOR else [requests[i][1] for i in order],
            kv_tokens=self.kv_tokens(turn.workload),
            scratch="",
        )
        return job, order

    def take(self, turn: Turn) -> None:
        """Run one peer once and note what came out."""
        peer, where = turn.peer, {"workload": turn.workload, "dtype": turn.dtype, "round": turn.round}
        run: dict[str, Any] = {"peer": peer.name, "order": turn.order, **where, "equal": None, "failure": None}
        if any(r["failure"] and all(r[k] == run[k] for k in ("peer", "order", "workload", "dtype")) for r in self.runs):
            return  # once is enough
        print(f"{turn.workload:13}{turn.dtype:10}{peer.name:20}{turn.order:9}", end="", flush=True)
        try:
            job, order = self.job(turn)
            got = measure(self.python(peer), peer.adapter, job, peer.timeout, self.variables(peer))
        except (RunFailed, Unavailable) as error:
            print(f"failed: {error}", flush=True)
            if peer is not FLOOR:
                self.runs.append(run | {"failure": str(error)})
            return
        result = got.result
        if peer is FLOOR:
            prompts, outputs = zip(*self.requests(turn.workload), strict=True)
            floor = floor_of(prompts, outputs, kv_bytes(turn.dtype, self.shape), result.details)
            self.floors.append({**where, **asdict(floor), "rates": result.details})
            print(f"{floor.products:8.2f} s of products, {floor.kv:.2f} s of reading KV", flush=True)
            return
        run |= {
            "load_seconds": result.load_seconds,
            "generation_seconds": result.generation_seconds,
            "process_seconds": got.process_seconds,
            "processor_seconds": got.processor_seconds,
            "peak_bytes": got.peak_bytes,
            "details": result.details,
        }
        if turn.dtype == "float32":
            answers, rights = dict(zip(order, result.outputs, strict=True)), self.reference(turn.workload)
            run["equal"] = sum(answers[i] == right for i, right in enumerate(rights)) if rights is not None else None
        self.runs.append(run)
        equal = f", {run['equal']}/{len(order)} answers equal" if run["equal"] is not None else ""
        whole = f"{got.process_seconds:.1f} s in all, {got.peak_bytes / 1e6:.0f} MB"
        print(f"{result.generation_seconds:8.2f} s, {whole}{equal}", flush=True)

    def reference(self, name: str) -> list[list[int]] | None:
        """transformers' answers in float32, computed once, not timed, and kept; None where it fails to give them."""
        requests = self.requests(name)
        model = self.forms.path(PADDED.form, "float32")
        tag = hashlib.sha256(json.dumps(requests).encode()).hexdigest()[:12]
        file = self.cache / "references" / f"{model.parent.name}-{name}-{tag}.json"
        if not file.exists():
            prompts, outputs = map(list, zip(*requests, strict=True))
            # Whichever takes less time: padded, all prompts are computed whole; else few answers at a time.
            shared = 4 * physical_tokens(prompts) <= sum(map(len, prompts))
            peer = ON_PREFIXES if shared else PADDED
            job = Job(str(model), "float32", self.threads, prompts, outputs, None, "")
            if name in self.unanswered:
                return None
            try:
                made = measure(self.python(peer), peer.adapter, job, 3600, self.variables(peer))
            except RunFailed as error:  # once is enough, and the times of the others count without it
                self.unanswered.add(name)
                print(f"\nno answers to compare with: {error}", flush=True)
                return None
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(made.result.outputs))
        return json.loads(file.read_text())

    def variables(self, peer: Peer) -> dict[str, str]:
        """Environment variables of a peer's process: what it keeps is kept in the cache; only our own environment may
        see our code."""
        kept = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "HF_HOME": "huggingface"}
        paths = [str(ROOT), str(ROOT / "kernels")] if peer.environment is None else []
        return {name: str(self.cache / folder) for name, folder in kept.items()} | {
            "PYTHONPATH": os.pathsep.join(paths)
        }

    def document(self, peers: Sequence[Peer], command: str, *, trial: bool) -> dict[str, Any]:
        """All of it, as it is written.

        Args:
            peers: those asked for, whether or not they could be run.
            command: how this was started, for the page.
            trial: whether it is none that counts.
        """
        names = dict.fromkeys(run["workload"] for run in self.runs)
        told = {}
        for peer in (OURS, *peers):
            recipe = RECIPES[peer.environment] if peer.environment else None
            told[peer.name] = {
                "settings": peer.settings,
                "sorts": peer.sorts,
                "versions": self.versions(self.python(peer), recipe.reports)
                if recipe and peer.name not in self.unavailable
                else {},
                "unavailable": self.unavailable.get(peer.name),
            }
        return {
            "title": "batchrun and its peers on a CPU" + (" (a trial)" if trial else ""),
            "date": date.today().isoformat(),
            "command": command,
            "trial": trial,
            "threads": self.threads,
            "hardware": hardware(),
            "versions": {"batchrun": commit()}
            | self.versions(Path(sys.executable), ("torch", "transformers"))
            | {"Python": platform.python_version()},
            "model_name": "SmolLM2-135M's shape" if self.shape is SHAPE else "a tiny Llama",
            "model": self.shape,
            "workloads": {name: self.shape_of(name) for name in names},
            "peers": told,
            "floors": self.floors,
            "runs": self.runs,
        }

    def shape_of(self, name: str) -> dict[str, int | None]:
        """The numbers that a page tells of a workload."""
        prompts, outputs = zip(*self.requests(name), strict=True)
        return {
            "requests": len(prompts),
            "prompt_logical": sum(map(len, prompts)),
            "prompt_physical": physical_tokens(prompts),
            "output": sum(outputs),
            "kv_tokens": self.kv_tokens(name),
        }

    def versions(self, python: Path, packages: Sequence[str]) -> dict[str, str]:
        """Versions of packages in an environment."""
        return json.loads(subprocess.check_output([str(python), "-c", VERSIONS, *packages], text=True))


def hardware() -> dict[str, Any]:
    """The processor, what it can do, memory, and how busy it was."""
    described, features = platform.processor() or platform.machine(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        described = fields.get("model name", described)
        flags = (fields.get("flags") or fields.get("Features") or "").split()
        features = [name for name in FEATURES if name in flags]
    return {
        "processor": described,
        "features": features,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "load": os.getloadavg()[0],
    }


def commit() -> str:
    """The commit that is measured, and whether the tree differs from it."""
    try:
        name = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True).strip()
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=ROOT, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "of an unknown commit"
    return f"commit {name}{' with changes' if changed else ''}"
