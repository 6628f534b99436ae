"""Small models of several architectures, made on the spot: the engine on the device gives each prompt the tokens that
transformers' `generate` gives to it alone, greedily, in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import load_reference, make_model
from oracles import DEAR_ROWS, make_requests
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from batchrun.models import read_model_spec
from batchrun.planning.cost import CostModel

from .engine import ATTENTION, run_engine
from .setting import Result, Setting

# Of tests/factories.py, with heads that the kernels compute: multiples of 8. --tiny runs the first three.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "qwen3": {},
    "mistral-window": {"head_dim": 16},
    "llama-mha": {"head_dim": 64},
    "llama-odd-heads": {},
    "qwen2-window": {"head_dim": 16},
    "llama-llama3": {"head_dim": 128},
}
_PAGE = 16


def make_prompts(*, tiny: bool) -> list[list[int]]:
    """Two levels of sharing, with ends inside pages and on their edges; twins; a prompt that shares nothing."""
    rng = np.random.default_rng(0)

    def some(count: int) -> list[int]:
        return [int(token) for token in rng.integers(3, 300, count)]

    top = some(2 * _PAGE)
    middle = [top + some(21), top + some(5)]
    readers = [middle[i % 2] + some(1 + 5 * i) for i in range(2 if tiny else 24)]
    return [*readers, top, top, some(19), *([] if tiny else [some(200), middle[0]])]


def check(folder: Path, architecture: str, setting: Setting) -> dict[str, Any]:
    """A row of the table: how many answers there are, and how many differ."""
    path = make_model(folder / architecture, architecture, **ARCHITECTURES[architecture])
    spec, _, generation = read_model_spec(path)
    prompts, new_tokens = make_prompts(tiny=setting.tiny), 3 if setting.tiny else 32
    theirs = load_reference(path).to(setting.device).eval()
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=setting.device)
        with torch.inference_mode():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=ATTENTION)
    ran = run_engine(
        module.to(setting.device).eval(),
        make_requests(prompts, [new_tokens] * len(prompts)),
        CostModel(spec, DEAR_ROWS.device, "float32"),
        page_size=_PAGE,
        pages=4096 if not setting.tiny else 80,
        step_tokens=64,  # so that prefill of one prompt comes in chunks, beside decodes of others
        grouping="tree",
        eos_token_ids=frozenset({generation["eos_token_id"]}),
    )
    differ = [nth for nth, answer in enumerate(expected) if ran.answers[nth] != answer]
    row = {
        "architecture": architecture,
        "answers": len(prompts),
        "different": len({tuple(answer) for answer in expected}),
        "wrong": len(differ),
        "prefix_rows": ran.work.merges,
    }
    examples = [{"prompt": nth, "expected": expected[nth], "given": ran.answers[nth]} for nth in differ[:3]]
    return row | {"examples": examples}


def run(setting: Setting) -> Iterator[Result]:
    """Check as many architectures as time allows."""
    logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rows: list[Result] = []
    examples: Result = {}
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        asked = list(ARCHITECTURES)[: 3 if setting.tiny else None]
        for name, row, failed in setting.try_each(asked, lambda one: check(Path(folder), one, setting)):
            if row is None:
                faults.append(f"{name}: {failed}")
            else:
                examples[name] = row.pop("examples")
                rows.append(row)
            yield {
                "passed": not faults and not any(row["wrong"] for row in rows),
                "cases": len(rows),
                "of": len(asked),
                "note": "; ".join(["float32, greedy, against transformers' generate", *faults]),
                "rows": rows,
                "examples": examples,
            }
