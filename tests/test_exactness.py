"""The promise: whatever a job shares and however it is cut into steps, each answer is the one that
`transformers.generate` gives to its prompt alone. All tests go through `batchrun.run`, from job file to results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import ARCHITECTURES, QUANTISED, load_reference, make_model
from transformers import AutoTokenizer, Mxfp4Config

import batchrun
from batchrun.engine.sampler import uniform
from batchrun.models import read_model_spec
from batchrun.planning.order import ORDERS
from batchrun.report.records import Report

ModelFactory = Callable[..., Path]
NEW_TOKENS = 12
# A tenth of the vocabulary ends an answer, so that answers end by themselves at all lengths.
ENDS = {"eos_token_id": [1, *range(5, 384, 10)]}


@dataclass(frozen=True)
class Answer:
    """What a result line and an answer of transformers have in common."""

    text: str
    tokens: int
    reason: str


# Jobs ---------------------------------------------------------------------------------------------------------------


def make_jobs() -> dict[str, list[list[int]]]:
    """Prompts as token ids, by what they share."""
    random = np.random.default_rng(7)

    def some(count: int) -> list[int]:
        return random.integers(3, 300, count).tolist()

    one, top = some(40), some(33)
    middle = [top + some(count) for count in (18, 7)]
    inner = [middle[i % 2] + some(16) for i in range(4)]
    jobs = {
        "no sharing": [some(count) for count in (1, 2, 15, 16, 17, 50)],
        "one level": [one + some(count) for count in (1, 3, 20, 31)],
        "three levels": [inner[i % 4] + some(1 + 3 * i) for i in range(8)],
        "duplicates": [one, one, one, some(16), [*one, 9], [*one, 9]],
        "a prompt that is another's prefix": [one, one[:17], one[:16], [*one, 4, 5], [*one, 4, 5, 6]],
    }
    jobs["all of these"] = [prompt for job in jobs.values() for prompt in job]
    return jobs


JOBS = make_jobs()
MIXED = JOBS["all of these"]


def completion(prompt: list[int], **fields: Any) -> dict[str, Any]:
    """The body of a greedy line."""
    return {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0} | fields


class Runner:
    """Runs jobs with one model directory and reads what came of them. Duplicates are computed like any others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0

    def __call__(
        self, model: Path, bodies: Iterable[dict[str, Any]], *, url: str = "/v1/completions", **options: Any
    ) -> tuple[list[Answer | None], Report]:
        """The answer to each body, None where its line failed, and the report."""
        self.runs += 1
        job = self.folder / f"{self.runs}.jsonl"
        lines = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
        job.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options["scheduler"] = {"deduplicate": False} | options.get("scheduler", {})
        report = batchrun.run(job, model=str(model), dtype="float32", **options)
        answers: list[Answer | None] = [None] * len(lines)
        for line in (self.folder / f"{self.runs}.run" / "results.jsonl").read_text().splitlines():
            result = json.loads(line)
            body = result["response"]["body"]
            (choice,) = body["choices"]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            answer = Answer(text, body["usage"]["completion_tokens"], choice["finish_reason"])
            answers[int(result["custom_id"])] = answer
        return answers, report


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


# transformers, one prompt at a time --------------------------------------------------------------------------------


@cache
def reference(model: Path) -> tuple[Any, Any]:
    quantization = json.loads((model / "config.json").read_text()).get("quantization_config") or {}
    # transformers does so by itself where there is no kernel, and says that it takes accelerate to find that out.
    options = (
        {"quantization_config": Mxfp4Config(dequantize=True)} if quantization.get("quant_method") == "mxfp4" else {}
    )
    return load_reference(model, **options), AutoTokenizer.from_pretrained(model)


@cache
def generated(model: Path, prompt: tuple[int, ...], ignore_eos: bool, new_tokens: int = NEW_TOKENS) -> Answer:
    module, tokenizer = reference(model)
    ends = [] if ignore_eos else module.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ids = torch.tensor([prompt])
    stated, module.generation_config.eos_token_id = module.generation_config.eos_token_id, ends or None
    try:
        out = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    finally:
        module.generation_config.eos_token_id = stated
    answer = out[0, len(prompt) :].tolist()
    ended = answer[-1] in ends
    text = tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True)
    return Answer(text, len(answer), "stop" if ended else "length")


def expected(model: Path, prompts: list[list[int]], ignore_eos: bool = False) -> list[Answer]:
    return [generated(model, tuple(prompt), ignore_eos) for prompt in prompts]


def bytes_for(model: Path, tokens: int) -> int:
    """KV memory that holds so many tokens."""
    spec, _, _ = read_model_spec(model)
    return tokens * spec.kv_bytes_per_token("float32")


# Greedy answers -----------------------------------------------------------------------------------------------------


def test_the_reference_says_different_things_and_stops_at_different_lengths(model_dir: ModelFactory) -> None:
    """Else the comparisons below would show little."""
    model = model_dir("llama", generation_config=ENDS)
    answers = expected(model, MIXED)
    assert len({answer.text for answer in answers}) > len({tuple(prompt) for prompt in MIXED}) * 0.8
    assert {answer.reason for answer in answers} == {"stop", "length"}
    assert len({answer.tokens for answer in answers}) >= 5
    assert {answer.tokens for answer in expected(model, MIXED, ignore_eos=True)} == {NEW_TOKENS}


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("job", JOBS)
def test_every_kind_of_sharing(model_dir: ModelFactory, run: Runner, job: str, ignore_eos: bool) -> None:
    model = model_dir("llama", generation_config=ENDS)
    answers, report = run(model, [completion(prompt, ignore_eos=ignore_eos) for prompt in JOBS[job]])
    assert answers == expected(model, JOBS[job], ignore_eos)
    assert (report.tokens.prompt_computed < report.tokens.prompt_logical) == (job != "no sharing")


SETTINGS: dict[str, dict[str, Any]] = {
    "chunks of 7": {"scheduler": {"step_tokens": 7}},
    "chunks of 64, pages of 3": {"scheduler": {"step_tokens": 64, "page_size": 3}},
    "pages of 1": {"scheduler": {"page_size": 1}},
    "pages of 64": {"scheduler": {"page_size": 64}},
    "nothing shared": {"scheduler": {"grouping": "none"}},
    "nothing shared, chunks of 7": {"scheduler": {"grouping": "none", "step_tokens": 7}},
    "answers expected too short": {"scheduler": {"expected_tokens": 1, "step_tokens": 20}},
    **{f"order {order}": {"schedule_order": order, "scheduler": {"step_tokens": 50}} for order in ORDERS},
}


# One of each that has something of its own; with every schedule and in every memory they take long.
NEWER = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("gemma2-window", "gemma3_text", "gpt_oss-window", "phi3-longrope", "qwen3_moe", "smollm3-window")
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2-window", "qwen3", *NEWER])
def test_every_schedule(model_dir: ModelFactory, run: Runner, architecture: str, setting: str) -> None:
    model = model_dir(architecture, generation_config=ENDS)
    answers, report = run(model, map(completion, MIXED), **SETTINGS[setting])
    assert answers == expected(model, MIXED)
    shared = report.tokens.prompt_computed < report.tokens.prompt_logical
    assert shared == (SETTINGS[setting].get("scheduler", {}).get("grouping") != "none")


def test_one_token_a_step(model_dir: ModelFactory, run: Runner) -> None:
    model = model_dir("llama", generation_config=ENDS)
    prompts = JOBS["a prompt that is another's prefix"]
    answers, report = run(model, map(completion, prompts), scheduler={"step_tokens": 1})
    assert answers == expected(model, prompts)
    assert report.steps > max(map(len, prompts))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("architecture", ["llama", "mistral-window", *NEWER])
def test_memory_that_is_just_enough(model_dir: ModelFactory, run: Runner, architecture: str, order: str) -> None:
    """The pool holds the largest request alone, to the token: others wait, are put off, and lose their prefixes."""
    model = model_dir(architecture, generation_config=ENDS)
    tokens = max(map(len, MIXED)) + NEW_TOKENS - 1
    options: dict[str, Any] = {"schedule_order": order, "scheduler": {"page_size": 1, "expected_tokens": 1}}
    answers, report = run(model, map(completion, MIXED), kv_memory=bytes_for(model, tokens), **options)
    assert answers == expected(model, MIXED)
    assert tokens - NEW_TOKENS <= report.kv.peak_pages <= tokens
    # Where readers of a prefix are far apart it goes first; whether a request is put off too, its answers decide.
    assert (report.prefix_evictions if order in ("input", "shuffle") else report.preemptions) > 0


def test_memory_that_is_one_token_short_refuses_that_request_only(model_dir: ModelFactory, run: Runner) -> None:
    model = model_dir("llama", generation_config=ENDS)
    lengths = [len(prompt) for prompt in MIXED]
    memory = bytes_for(model, max(lengths) + NEW_TOKENS - 2)
    answers, report = run(model, map(completion, MIXED), kv_memory=memory, scheduler={"page_size": 1})
    assert report.errors == {"context_length_exceeded": lengths.count(max(lengths))}
    for answer, alone, length in zip(answers, expected(model, MIXED), lengths, strict=True):
        assert answer == (alone if length < max(lengths) else None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("step_tokens", [None, 23])
def test_every_architecture(model_dir: ModelFactory, run: Runner, architecture: str, step_tokens: int | None) -> None:
    model = model_dir(architecture, generation_config=ENDS)
    tight = {} if step_tokens is None else {"kv_memory": bytes_for(model, 16 * 12)}
    answers, report = run(model, map(completion, MIXED), scheduler={"step_tokens": step_tokens}, **tight)
    assert answers == expected(model, MIXED)
    assert report.tokens.prompt_computed < report.tokens.prompt_logical


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights(tmp_path: Path, run: Runner, name: str) -> None:
    """As transformers runs them."""
    architecture, options, quantise, library = QUANTISED[name]
    if library is not None:
        pytest.importorskip(library)
    model = make_model(tmp_path / "model", architecture, generation_config=ENDS, **options)
    plain = expected(model, MIXED)
    reference.cache_clear()
    generated.cache_clear()
    quantise(model)
    answers, report = run(model, map(completion, MIXED), scheduler={"step_tokens": 23})
    assert answers == expected(model, MIXED)
    assert report.tokens.prompt_computed < report.tokens.prompt_logical
    assert answers != plain, "the weights are meant to be rounded"


_SHORT: dict[str, dict[str, Any]] = {"llama-dynamic": {"max_position_embeddings": 60}, "phi3-longrope": {}}


def test_sharded_weights(model_dir: ModelFactory, run: Runner) -> None:
    model = model_dir("llama", generation_config=ENDS, max_shard_size="50KB")
    assert len(list(model.glob("*.safetensors"))) > 3
    answers, _ = run(model, map(completion, MIXED))
    assert answers == expected(model, MIXED) == expected(model_dir("llama", generation_config=ENDS), MIXED)


@pytest.mark.parametrize("architecture", ["llama-dynamic", "phi3-longrope"])
def test_rope_that_depends_on_length_is_exact_as_far_as_it_goes(
    model_dir: ModelFactory, run: Runner, architecture: str
) -> None:
    """Beyond, transformers would turn all of a sequence in another way: prompts that share nothing else with it are not
    run, and answers end."""
    model = model_dir(architecture, generation_config=ENDS, original_max_position_embeddings=60, **_SHORT[architecture])
    context = read_model_spec(model)[0].max_context
    assert context == 60 < max(map(len, MIXED)), "some prompts are to be too long"
    answers, report = run(model, [completion(prompt, max_tokens=100, ignore_eos=True) for prompt in MIXED])
    for prompt, answer in zip(MIXED, answers, strict=True):
        if len(prompt) >= context:
            assert answer is None
        else:
            assert answer == generated(model, tuple(prompt), True, context - len(prompt))
    assert report.errors == {"context_length_exceeded": sum(len(prompt) >= context for prompt in MIXED)}


def test_limits_that_differ_from_line_to_line(model_dir: ModelFactory, run: Runner) -> None:
    model = model_dir("llama", generation_config=ENDS)
    limits = [1 + 5 * i % 23 for i in range(len(MIXED))]
    bodies = [completion(prompt, max_tokens=limit) for prompt, limit in zip(MIXED, limits, strict=True)]
    answers, _ = run(model, bodies, scheduler={"step_tokens": 40})
    for answer, prompt, limit in zip(answers, MIXED, limits, strict=True):
        assert answer == generated(model, tuple(prompt), False, limit)


def test_chats(model_dir: ModelFactory, run: Runner) -> None:
    """Equal to transformers' chat template and `generate`, with the answer going on to its own end."""
    model = model_dir("llama", generation_config=ENDS)
    tokenizer = reference(model)[1]
    system = {"role": "system", "content": "The shelf has apple 3, pear 4 and plum 5. Answer with a number, Zwölf?"}
    chats = [
        [*([system] if i % 3 else []), {"role": "user", "content": f"The price of {fruit} {i}?\n日本 🙂"}]
        for i, fruit in enumerate(["apple", "pear", "plum", "apple", "pear", "apple"])
    ]
    chats.append([*chats[1], {"role": "assistant", "content": "42"}, {"role": "user", "content": "Why?"}])
    answers, report = run(model, [{"messages": chat, "temperature": 0} for chat in chats], url="/v1/chat/completions")
    for answer, chat in zip(answers, chats, strict=True):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert answer == generated(model, tuple(prompt), False, 512 - len(prompt))
    assert report.tokens.prompt_computed < report.tokens.prompt_logical


# Seeded answers -----------------------------------------------------------------------------------------------------

SAMPLING = [
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 0},
]


def sampled(seeds: bool = True) -> list[dict[str, Any]]:
    """Lines that differ in their sampling, with seeds of their own or with those of their places in the file."""
    return [
        completion(prompt, **SAMPLING[i % len(SAMPLING)], **({"seed": 1000 + i} if seeds else {}))
        for i, prompt in enumerate(MIXED)
    ]


def drawn(model: Path, body: dict[str, Any]) -> Answer:
    """The answer by the definition: a row of transformers' logits for each token, and of the tokens in order of their
    ids the one at which the probability of all up to it exceeds the request's next random number."""
    module, tokenizer = reference(model)
    ends = module.generation_config.eos_token_id
    answer: list[int] = []
    while len(answer) < NEW_TOKENS and not (answer and answer[-1] in ends):
        with torch.no_grad():
            logits = module(torch.tensor([body["prompt"] + answer])).logits[0, -1].double()
        if body["temperature"] == 0:
            answer.append(int(logits.argmax()))
            continue
        weight = torch.softmax(logits / body["temperature"], dim=0).numpy()
        weight[weight < body.get("min_p", 0) * weight.max()] = 0
        likeliest = np.argsort(-weight)
        weight[likeliest[body.get("top_k", weight.size) :]] = 0
        before = weight[likeliest].cumsum() - weight[likeliest]
        weight[likeliest[before >= body.get("top_p", 1) * weight.sum()]] = 0
        number = uniform(np.array([body["seed"]], dtype=np.uint64), np.array([len(answer)], dtype=np.int32))[0]
        answer.append(int(np.searchsorted(weight.cumsum(), number * weight.sum(), side="right")))
    ended = answer[-1] in ends
    text = tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True)
    return Answer(text, len(answer), "stop" if ended else "length")


@pytest.mark.parametrize("step_tokens", [None, 19])
def test_seeded_answers_are_drawn_from_transformers_logits(
    model_dir: ModelFactory, run: Runner, step_tokens: int | None
) -> None:
    model = model_dir("llama", generation_config=ENDS)
    answers, _ = run(model, sampled(), scheduler={"step_tokens": step_tokens})
    assert answers == [drawn(model, body) for body in sampled()]


@pytest.mark.parametrize("seeds", [True, False])
def test_sampled_answers_do_not_depend_on_the_schedule(model_dir: ModelFactory, run: Runner, seeds: bool) -> None:
    model = model_dir("llama", generation_config=ENDS)
    first, _ = run(model, sampled(seeds))
    greedy = expected(model, MIXED)
    differ = [answer != alone for answer, alone in zip(first, greedy, strict=True)]
    assert not any(differ[3::4])
    assert sum(differ) > len(differ) / 2
    tight = bytes_for(model, max(map(len, MIXED)) + NEW_TOKENS - 1)
    for options in (
        {"schedule_order": "shuffle", "scheduler": {"step_tokens": 30}},
        {"schedule_order": "input", "scheduler": {"step_tokens": 7, "grouping": "none"}},
        {"kv_memory": tight, "scheduler": {"page_size": 1, "expected_tokens": 1, "step_tokens": 64}},
    ):
        again, _ = run(model, sampled(seeds), **options)
        assert again == first


def test_a_seeded_line_says_the_same_alone(model_dir: ModelFactory, run: Runner) -> None:
    model = model_dir("llama", generation_config=ENDS)
    together, _ = run(model, sampled())
    for i in range(0, len(MIXED), 5):
        (alone,), _ = run(model, [sampled()[i]])
        assert alone == together[i]


def test_the_seed_of_the_run_counts_for_lines_without_one(model_dir: ModelFactory, run: Runner) -> None:
    model = model_dir("llama", generation_config=ENDS)
    bodies = [completion(JOBS["duplicates"][0], temperature=1.5)] * 6 + [completion([5, 6, 7], temperature=1, seed=4)]
    first, _ = run(model, bodies)
    assert len({answer.text for answer in first[:6] if answer}) == 6, "duplicates without a seed are to differ"
    other, _ = run(model, bodies, seed=1)
    assert all(one != two for one, two in zip(first[:6], other[:6], strict=True))
    assert first[6] == other[6]
