"""The harness that measures peers: what it gives them, what it takes from them, what it makes of that. The peers
themselves are not here: `python scripts/bench/peers --tiny` tries them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.prefix.forest import build_forest
from batchrun.tokens import TokenTable
from batchrun.workloads import make_workload
from scripts.bench.peers import environments, growth
from scripts.bench.peers.adapters.protocol import Job, groups, in_common, shared_runs, waves
from scripts.bench.peers.environments import Recipe, Unavailable, python_of
from scripts.bench.peers.floor import floor_of, physical_tokens
from scripts.bench.peers.forms import Forms
from scripts.bench.peers.measure import RunFailed, measure
from scripts.bench.peers.page import render, rows_of
from scripts.bench.peers.registry import FLOOR, OURS, PEERS, SHUFFLED, SORTED
from scripts.bench.peers.schedule import turns

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.25,
}

# Few different tokens and short prompts, so that they share much on many levels.
prompt_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)


def job_of(prompts: list[list[int]], outputs: list[int] | None = None, **more: Any) -> Job:
    fields: dict[str, Any] = {"model": "", "dtype": "float32", "threads": 1, "kv_tokens": None, "scratch": ""}
    return Job(prompts=prompts, outputs=outputs or [1] * len(prompts), **fields | more)


# --- what an adapter does by hand -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(prompt_lists, st.integers(1, 3))
def test_shared_runs_are_shared_and_groups_have_everyone_once(prompts, least):
    for run in shared_runs(prompts, least):
        first = prompts[run.members[0]][: run.length]
        assert len(run.members) > 1
        assert all(prompts[i][: run.length] == first and len(prompts[i]) > run.length for i in run.members)
    made = groups(prompts)
    assert sorted(i for group in made for i in group.members) == list(range(len(prompts)))
    for group in made:
        first = prompts[group.members[0]][: group.length]
        assert all(prompts[i][: group.length] == first and len(prompts[i]) > group.length for i in group.members)


def test_shared_runs_of_a_tree_have_its_levels():
    requests = make_workload("tree", vocab_size=16384).requests
    runs = shared_runs([prompt for prompt, _ in requests])
    assert [(run.level, run.length) for run in runs] == [(0, 256)] * 4 + [(1, 1024)] * 16
    assert {len(run.members) for run in runs if run.level == 1} == {8}
    assert sorted(len(group.members) for group in groups([prompt for prompt, _ in requests])) == [8] * 16


@settings(max_examples=200, deadline=None)
@given(prompt_lists, st.integers(1, 40), st.integers(0, 3))
def test_waves_keep_the_order_and_fit(prompts, room, slack):
    job = job_of(prompts)
    made = list(waves(job, range(len(prompts)), room, slack))
    assert [i for wave in made for i in wave] == list(range(len(prompts)))
    for wave in made:
        alone = len(wave) == 1
        assert alone or physical_tokens([prompts[i] for i in wave]) + len(wave) * (1 + slack) <= room


@settings(max_examples=200, deadline=None)
@given(prompt_lists)
def test_physical_tokens_are_those_of_the_forest(prompts):
    assert physical_tokens(prompts) == build_forest(TokenTable.from_rows(prompts)).prompt_physical


def test_in_common():
    assert [in_common([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [2], [1, 2, 3])] == [2, 2, 0, 3]


# --- the floor ------------------------------------------------------------------------------------------------------


def test_floor_counts_every_row_once():
    """At rates in proportion to rows, a row costs the same wherever it is."""
    rates = {
        "rows": [1, 8, 64],
        "layers_seconds": [0.01, 0.08, 0.64],
        "head_seconds": [0.001, 0.008, 0.064],
        "read_bytes_per_second": 1000.0,
        "layers_flop_per_row": 50,
    }
    prompts, outputs = [[1, 2, 3], [1, 2, 4], [5]], [1, 3, 2]
    floor = floor_of(prompts, outputs, kv_bytes=10, rates=rates)
    prompt_rows, decode_rows, sampled = 5, 0 + 2 + 1, 6
    assert floor.products == pytest.approx(0.01 * (prompt_rows + decode_rows) + 0.001 * sampled)
    # The second step has requests 1 and 2, with a token of their own each; the third request 1, with two.
    assert floor.kv == pytest.approx(((3 + 1 + 2) + (3 + 2)) * 10 / 1000)
    assert floor.products_per_second == pytest.approx(5000)


# --- who runs when --------------------------------------------------------------------------------------------------


def test_turns_go_round():
    made = list(turns(PEERS, workloads=["micro"], dtypes=["float32"], repeats=3))
    by_round = [[turn.peer for turn in made if turn.round == number] for number in range(3)]
    assert [peers[0] for peers in by_round] == [FLOOR] * 3
    assert set(by_round[0]) == {FLOOR, OURS, *PEERS}
    strongest = {peer for peer in PEERS if peer.rank <= 2}
    assert len(strongest) == 3
    assert all(set(peers) == {FLOOR, OURS, *strongest} for peers in by_round[1:])
    assert len({peers[1] for peers in by_round}) == 3  # each round another begins


def test_the_slow_ones_run_once():
    made = [turn for turn in turns(PEERS) if turn.peer.rank == 3]
    assert len(made) == sum(len(peer.dtypes) for peer in PEERS if peer.rank == 3)
    assert {(turn.workload, turn.round) for turn in made} == {("micro", 0)}


def test_turns_give_both_orders_where_the_order_counts():
    for workload_name, both in (("pressure", True), ("tree", True), ("mixed", False)):
        for peer in PEERS:
            orders = {t.order for t in turns([peer], workloads=[workload_name], everywhere=True) if t.peer is peer}
            assert orders == ({SHUFFLED, SORTED} if both and not peer.sorts else {SHUFFLED})


def test_a_dtype_that_a_peer_lacks_is_not_asked_of_it():
    assert all(turn.dtype in turn.peer.dtypes for turn in turns(PEERS, everywhere=True))
    assert any(peer.dtypes == ("float32",) for peer in PEERS)


# --- adapters -------------------------------------------------------------------------------------------------------


def adapter(folder: Path, body: str) -> Path:
    path = folder / "adapter.py"
    path.write_text(f"import json, os, subprocess, sys, time\n{body}\n")
    return path


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("print('noise'); raise ValueError('no such layer')", r"ValueError: no such layer \(exit code 1\)"),
        ("os.kill(os.getpid(), 9)", r"exit code -9"),
        ("pass", "no result"),
        ("open(sys.argv[2], 'w').write('{')", "no result"),
        (
            "json.dump({'load_seconds': 0, 'generation_seconds': 1, 'outputs': [[1], [1]]}, open(sys.argv[2], 'w'))",
            "1 of 2 answers have another length than asked for",
        ),
        ("subprocess.run(['sleep', '60'])", "no end after 1 s"),
    ],
)
def test_an_adapter_that_fails_says_why(tmp_path, body, why):
    with pytest.raises(RunFailed, match=why):
        measure(Path(sys.executable), adapter(tmp_path, body), job_of([[1], [2]], [1, 2]), 1.0, {})


def test_memory_of_all_processes_of_a_run_is_counted(tmp_path):
    hold = "x = bytearray(100 << 20); time.sleep(0.7)"
    result = "json.dump({'load_seconds': 0, 'generation_seconds': 1, 'outputs': []}, open(sys.argv[2], 'w'))"
    body = f"child = subprocess.Popen([sys.executable, '-c', 'import time; {hold}'])\n{hold}\nchild.wait()\n{result}"
    got = measure(Path(sys.executable), adapter(tmp_path, body), job_of([]), 60.0, {})
    assert 200 << 20 < got.peak_bytes < 400 << 20
    assert got.process_seconds > 0.7


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    return Forms(root, root / "environments", SMALL)


def one_by_one(model: Path, job: Job) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    made = []
    for prompt, output in zip(job.prompts, job.outputs, strict=True):
        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": output, "min_new_tokens": output, "eos_token_id": None}
        made.append(loaded.generate(ids, do_sample=False, **limits)[0, len(prompt) :].tolist())
    return made


@pytest.mark.parametrize("name", ["with_transformers_prefix.py", "with_batchrun.py"])
def test_adapters_answer_as_transformers_does(forms, name):
    """On two levels of sharing, prompts and answers of several lengths, in memory for some of them at a time."""
    model = forms.path("hf", "float32")
    shared = list(range(16, 60))
    prompts = [shared[:20] + [100 + i] * (1 + i % 3) for i in range(3)] + [[*shared, 7, i] for i in range(3)] + [[5]]
    job = job_of(prompts, [4, 6, 4, 6, 5, 4, 3], model=str(model), kv_tokens=192)
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    got = measure(Path(sys.executable), name, job, 100.0, paths)
    assert got.result.outputs == one_by_one(model, job)
    assert len({tuple(answer) for answer in got.result.outputs}) > 3  # else equal answers would say little
    assert 0 < got.result.generation_seconds < got.process_seconds


# --- environments ---------------------------------------------------------------------------------------------------


def test_an_environment_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    recipe = Recipe((("--no-index", "--no-cache-dir", "no-such-package-of-anyone==1"),), reports=())
    monkeypatch.setitem(environments.RECIPES, "nobody", recipe)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(Unavailable, match="no-such-package-of-anyone"):
        python_of("nobody", tmp_path)
    assert "no-such-package-of-anyone" in (tmp_path / "nobody.log").read_text()
    assert not (tmp_path / "nobody" / environments.STAMP).exists()  # the next time it is tried again


# --- the page -------------------------------------------------------------------------------------------------------


def run_of(peer: str, seconds: float | None, order: str = SHUFFLED, failure: str | None = None, **more: Any) -> Any:
    where = {"workload": "micro", "dtype": "float32", "peer": peer, "order": order, "failure": failure, "equal": 64}
    figures = {"generation_seconds": seconds, "process_seconds": 2 * (seconds or 0), "peak_bytes": 5e8}
    return {**where, **figures, **more}


def document(runs: list[Any]) -> dict[str, Any]:
    floor = {"workload": "micro", "dtype": "float32", "kv": 0.2, "products_per_second": 2e11, "bytes_per_second": 4e10}
    peers = {
        name: {"settings": f"settings of {name}", "sorts": name == OURS.name, "versions": {name: "1.2"}}
        | {"unavailable": "no wheel for this Python" if name == "gone" else None}
        for name in (OURS.name, "fast", "slow", "gone")
    }
    return {
        "title": "A measurement",
        "date": "2026-11-21",
        "command": "python scripts/bench/peers",
        "trial": False,
        "threads": 2,
        "hardware": {"processor": "Z80", "features": ["avx2"], "cores": 2, "memory_gb": 16.0, "load": 0.1},
        "versions": {"torch": "2.13.0"},
        "model_name": "a tiny Llama",
        "model": SMALL,
        "workloads": {
            "micro": {
                "requests": 64,
                "prompt_logical": 34816,
                "prompt_physical": 4096,
                "output": 2048,
                "kv_tokens": None,
            }
        },
        "peers": peers,
        "floors": [{**floor, "products": seconds} for seconds in (3.0, 9.0, 4.0)],
        "runs": runs,
    }


def test_the_page_has_medians_ratios_shares_and_what_failed():
    runs = [run_of(OURS.name, seconds) for seconds in (5.0, 99.0, 4.0)]
    runs += [run_of("fast", seconds, SORTED, equal=equal) for seconds, equal in ((6.0, 64), (7.0, 63), (8.0, 64))]
    runs += [run_of("fast", 10.0), run_of("slow", None, failure="no end after 900 s", equal=None)]
    made = document(runs)
    rows = rows_of(made, "micro", "float32")
    assert [row.name for row in rows] == [OURS.name, "fast, sorted", "fast", "slow"]
    page = render(made)
    line = next(line for line in page.splitlines() if line.startswith("| fast, sorted |"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "fast, sorted",
        "7.00",
        "6.00, 7.00, 8.00",
        f"{2048 / 7:.0f}",
        "14.0",
        "500",
        "1.40",  # 7 s against our median of 5 s
        "0.57",  # of the middle floor, 4 s
        "63/64",  # the worst of the three
    ]
    summary = next(line for line in page.splitlines() if line.startswith("| micro | float32 |"))
    assert [cell.strip() for cell in summary.strip("|").split("|")][2:] == [
        "5.00 s",
        "fast, sorted 7.00 s",
        "1.40",
        "fast 10.00 s",
        "2.00",
        "0.80",
    ]
    assert "| slow | failed: no end after 900 s |" in page
    assert "**Not measured**: no wheel for this Python." in page
    assert "1.40 times as fast as fast, sorted (7.00 s)" in page


def test_the_page_stands_without_us_and_without_peers():
    alone = render(document([run_of(OURS.name, 5.0)]))
    assert "| micro | float32 | 5.00 s | – | – | – | – | 0.80 |" in alone
    without = render(document([run_of("fast", 6.0), run_of(OURS.name, None, failure="MemoryError", equal=None)]))
    assert "| micro | float32 | – | fast 6.00 s | – | fast 6.00 s | – | – |" in without
    assert f"| {OURS.name} | failed: MemoryError |" in without


# --- growth ---------------------------------------------------------------------------------------------------------


def test_each_axis_of_growth_changes_one_thing():
    for axis, rows in (
        ("requests", (1024, 4096, 16384)),
        ("prefix", (1024, 2560, 8704)),
        ("degree", (1024, 2560, 8704)),
    ):
        made = [growth.make(growth.point(axis, factor), 16384).requests for factor in growth.FACTORS]
        prompts = [[prompt for prompt, _ in requests] for requests in made]
        assert {output for requests in made for _, output in requests} == {32}
        assert [physical_tokens(p) for p in prompts] == list(rows)
        groups_of = [shared_runs(p, 64) for p in prompts]
        assert [len(runs) for runs in groups_of] == ([4, 16, 64] if axis == "requests" else [4] * 3)
        assert [runs[0].length for runs in groups_of] == ([128, 512, 2048] if axis == "prefix" else [128] * 3)
        assert [len(runs[0].members) for runs in groups_of] == ([4, 16, 64] if axis == "degree" else [4] * 3)


def test_everyone_begins_a_point_of_growth_in_turn():
    peers = PEERS[:2]
    made = list(growth.turns(peers, dtypes=["float32"], repeats=3))
    assert len(made) == 3 * len(growth.POINTS) * 3
    first = {(turn.round, turn.workload): turn.peer for turn in reversed(made)}
    assert {peer for (_, name), peer in first.items() if name == "base"} == {OURS, *peers}
    assert {turn.workload for turn in made} == set(growth.POINTS)


def test_the_page_of_growth_has_medians_and_exponents():
    runs = []
    for factor in growth.FACTORS:
        for axis, power in (("requests", 1.0), ("prefix", 0.5), ("degree", 2.0)):
            for engine, base in ((OURS.name, 1.0), ("fast", 3.0)):
                name, off = growth.point(axis, factor), (0.5, 1.0, 9.0)
                if factor > 1 or axis == "requests":  # the base is measured once for all axes
                    runs += [run_of(engine, base * factor**power * part, workload=name) for part in off]
    runs += [run_of("slow", 1.0, workload="base"), run_of("slow", None, workload="requests x4", failure="killed")]
    made = document(runs)
    made["workloads"] = {
        name: {"requests": 0, "prompt_logical": 0, "prompt_physical": 100 * (i + 1), "output": 0, "kv_tokens": None}
        for i, name in enumerate(growth.POINTS)
    }
    page = growth.render(made)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    ours = [line[2:6] for line in lines if line[1] == OURS.name]
    assert ours == [
        ["1.00", "4.00", "16.00", "1.00"],
        ["1.00", "2.00", "4.00", "0.50"],
        ["1.00", "16.00", "256.00", "2.00"],
    ]
    assert all(len(line) == len(lines[0]) for line in lines)
    assert [line[2] for line in lines if line[1] == "slow"] == ["failed"] * 3
    assert "With the number of requests in float32, time grows with exponent 1.00 (batchrun), 1.00 (fast)." in page


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_measures_growth(tmp_path):
    command = [sys.executable, "scripts/bench/peers", "--growth", "--tiny", "--peers", "transformers"]
    command += ["--dtypes", "float32", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path), "--threads", "2"]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (page,) = tmp_path.glob("*-growth-cpu.md")
    runs = json.loads(page.with_suffix(".json").read_text())["runs"]
    assert len(runs) == 2 * len(growth.POINTS)
    assert all(run["failure"] is None and run["equal"] for run in runs)
    assert "failed" not in page.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_writes_a_page_and_its_document(tmp_path):
    command = [sys.executable, "scripts/bench/peers", "--tiny", "--peers", "transformers", "--dtypes", "float32"]
    command += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (page,) = (tmp_path / "out").glob("*-peers-cpu.md")
    written = json.loads(page.with_suffix(".json").read_text())
    assert [(run["peer"], run["equal"], run["failure"]) for run in written["runs"]] == [
        ("batchrun", 12, None),
        ("transformers", 12, None),
    ]
    assert len(written["floors"]) == 1
    assert str(tmp_path) not in page.read_text()
    assert page.read_text() in done.stdout
