"""The standard workloads: the same whenever they are made, cut to fit a model, and sound jobs."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest

from batchrun.errors import UsageError
from batchrun.formats.job import lint_job, open_job, sound_lines
from batchrun.workloads import MICRO, SIZES, WORKLOADS, make_workload, write_job
from scripts import make_job

SMALL = [name for name in WORKLOADS if name != "many"]
# Of the requests at scale 1 for a CPU, with a vocabulary of 16,384: what docs/benchmarks has measured.
MEASURED = {
    "micro": "9d078b5a48875210",
    "pressure": "226726d434493e4a",
    "tree": "fd7174eb33faf82c",
    "none": "20854f20fbfe80df",
    "mixed": "ecd749073e9a2108",
    "skew": "cd8464f8ba130119",
}


def prefixes(requests: list[tuple[list[int], int]], length: int) -> int:
    """How many different beginnings there are."""
    return len({tuple(prompt[:length]) for prompt, _ in requests})


@pytest.mark.parametrize("name", SMALL)
def test_a_workload_is_the_one_that_was_measured(name):
    made = make_workload(name, vocab_size=16384, max_context=8192)
    assert hashlib.sha256(json.dumps(made.requests).encode()).hexdigest()[:16] == MEASURED[name]
    assert made.part == 1
    assert made.kv_tokens == (3072 if name == "pressure" else None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_fits_the_context_and_the_vocabulary(name, size):
    scale = 0.004 if size == "gpu" else 0.02
    made = make_workload(name, vocab_size=100, max_context=200, size=size, scale=scale)
    uncut = make_workload(name, vocab_size=100, size=size, scale=scale)
    assert made.requests
    assert max(len(prompt) + output for prompt, output in made.requests) <= 200
    assert min(min(len(prompt), output) for prompt, output in made.requests) >= 1
    assert {token for prompt, _ in made.requests for token in prompt} <= set(range(16, 100))
    assert (made.part < 1) == (max(len(prompt) + output for prompt, output in uncut.requests) > 200)
    assert len(made.requests) == len(uncut.requests)


def test_scale_is_that_of_the_groups():
    whole, fourfold = (make_workload("micro", vocab_size=500, scale=scale).requests for scale in (1, 4))
    groups, prefix, requests, own, output = MICRO["cpu"]
    assert (len(whole), prefixes(whole, prefix)) == (groups * requests, groups)
    assert (len(fourfold), prefixes(fourfold, prefix)) == (4 * groups * requests, 4 * groups)
    assert all(len(prompt) == prefix + own and length == output for prompt, length in fourfold)


def test_micro_for_a_gpu_is_that_of_the_literature():
    assert tuple(MICRO["gpu"]) == (400, 2000, 16, 200, 100)
    made = make_workload("micro", vocab_size=500, size="gpu", scale=2 / 400).requests
    assert (len(made), prefixes(made, 2000)) == (32, 2)
    assert all(len(prompt) == 2200 and output == 100 for prompt, output in made)


def test_what_is_cut_is_shared_as_before():
    made = make_workload("micro", vocab_size=500, max_context=144)
    assert made.part == 144 / 576
    assert prefixes(made.requests, 128) == MICRO["cpu"].groups
    assert prefixes(made.requests, 136) == len(made.requests)


@pytest.mark.parametrize(("size", "scale", "context"), [("cpu", 1, 8192), ("cpu", 0.25, 512), ("gpu", 0.05, 4096)])
def test_pressure_has_memory_for_some_groups_and_not_for_all(size, scale, context):
    made = make_workload("pressure", vocab_size=500, max_context=context, size=size, scale=scale)
    assert made.kv_tokens is not None
    prefix = int(made.part * (512 if size == "cpu" else 2000))
    groups = prefixes(made.requests, prefix)
    own = sum(len(prompt) - prefix + output for prompt, output in made.requests)
    assert groups > 2
    assert max(len(prompt) + output for prompt, output in made.requests) < made.kv_tokens
    assert made.kv_tokens <= (groups * prefix + own) / 3


def test_seeds_make_other_requests_and_equal_arguments_the_same():
    one, same, other = (make_workload("skew", vocab_size=500, seed=seed).requests for seed in (0, 0, 1))
    assert one == same != other


def test_a_model_that_is_too_small_is_refused():
    with pytest.raises(UsageError, match="tree does not fit into a context of 4 tokens"):
        make_workload("tree", vocab_size=500, max_context=4)
    with pytest.raises(UsageError, match="vocabulary of at least 64"):
        make_workload("tree", vocab_size=63)


@pytest.mark.parametrize("name", ["none", "skew"])
def test_a_job_is_sound_and_has_what_was_made(name, tmp_path):
    made = make_workload(name, vocab_size=500, scale=0.5)
    write_job(tmp_path / "job.jsonl", made)
    source = open_job(str(tmp_path / "job.jsonl"))
    assert not lint_job(source).faults
    read = [(list(line.prompts[0]), line.options.max_tokens) for line in sound_lines(source, None)]
    assert read == made.requests
    assert {line.options.ignore_eos for line in sound_lines(source, None)} == {name != "skew"}


def test_the_script_writes_the_same_job(tmp_path, monkeypatch):
    write_job(tmp_path / "ours.jsonl", make_workload("mixed", vocab_size=300, max_context=100, scale=0.5, seed=3))
    options = ["mixed", "--vocab-size", "300", "--max-context", "100", "--scale", "0.5", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["make_job", *options, "-o", str(tmp_path / "script.jsonl")])
    make_job.main()
    assert (tmp_path / "script.jsonl").read_bytes() == (tmp_path / "ours.jsonl").read_bytes()
