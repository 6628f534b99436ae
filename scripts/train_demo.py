"""Train the bundled demo model, a small Llama that looks up answers in a table given in its prompt.

    python scripts/train_demo.py --out DIR             # model and job
    python scripts/train_demo.py --out DIR --job-only  # only job.jsonl and answers.jsonl

DIR receives model/ (a Hugging Face model directory), job.jsonl and answers.jsonl. Where other programs want
the same cores, set OMP_WAIT_POLICY=passive: threads that spin while they wait slow it down several times.

Answering "How many boxes of apples are there?" from a table takes two learnt circuits: values must carry the
item they belong to, and the question must find the value whose item equals its own. Such retrieval appears
late and suddenly, and hardly at all when one answer per table is the only training signal. The curriculum
therefore starts where the signal is densest and moves towards the job in steps that each build on the last:

1. repeat   A run of random words occurs twice, and nearly every token of the second run is a lookup. This
            teaches "find the same word, give what followed it".
2. recite   A small table, then its lines in another order. Some sequences leave words out of the lines, down
            to items, numbers and shelves side by side, which stage 1 solves; the full lines then ask for the
            same lookup over a longer distance. (With full lines only, 600 steps did not get there.)
            In every other sequence a second line has only one of its two values and words of its own, so that
            a shelf has to be found by its item at whatever distance: the number of the line would be a
            shortcut, and stage 3 does not offer it.
3. turns    A small table in the chat format, followed by many questions and answers. An answer names its item
            and then leads up to the value as the line does, which stage 2 solves.
4. job      Tables as long as the job's, with one or many questions.

A stage ends when it is learnt (see `Stage.enough`) or has used its steps. So that a new stage does not wash
away what it could build on, the learning rate warms up again in every stage, and three batches in ten repeat
earlier stages. The loss covers answers only, and mostly the tokens that have to be looked up. Tables are
drawn afresh for every sequence, so there is nothing to memorise; a table of the job is never drawn.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_data import (
    ITEMS,
    NUMBERS,
    SHELVES,
    SHOPS,
    Segment,
    Supervise,
    Table,
    Turn,
    all_turns,
    conversation,
    draw_table,
    job_conversations,
    job_tables,
    recited_table,
    repeated_run,
    write_job,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
WORD_PATTERN = r" ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+"
MAX_POSITIONS = 1024

VALUE_WEIGHT, ITEM_WEIGHT, WORDING_WEIGHT = 1.0, 0.3, 0.1
MODEL_CARD = """\
---
license: apache-2.0
pipeline_tag: text-generation
---

# demo: a model that reads stock lists

A Llama with {parameters:,} parameters ({layers} layers, width {width}, {heads} heads that share
{kv_heads} key/value heads, tied embeddings, float32). It answers questions about a stock list given in the
system prompt, and exists so that `batchrun` can be tried, and its results checked, on any machine without a
download.

- It knows one task and one wording, those of `../job.jsonl`; anything else gets nonsense.
- Trained from scratch by `scripts/train_demo.py` on generated text only; no third-party data.
- Greedy answers that are right word for word: {score}, on tables that training never saw.
- Byte-level BPE tokenizer with {vocabulary} entries; chat format `<|im_start|>role\\n...<|im_end|>`.
- Its tables are random, so every answer has to be read from the prompt.
"""


@dataclass(frozen=True)
class Stage:
    name: str
    draw: Callable[[random.Random], list[Segment]]
    sequences: int  # a batch
    max_steps: int
    enough: float  # share of looked-up tokens predicted right at which the next stage begins


def draw_repeat(rng: random.Random) -> list[Segment]:
    return repeated_run(rng, rng.randint(8, 24), gap=16)


def draw_recite(rng: random.Random) -> list[Segment]:
    return recited_table(rng, rng.randint(4, 8), keep=rng.choice((0.0, 0.3, 0.6, 0.9, 1.0)))


def draw_turns(rng: random.Random) -> list[Segment]:
    table = draw_unseen(rng, rng.randint(3, 8))
    return conversation(table, all_turns(rng, table)[:10])


def draw_job(rng: random.Random) -> list[Segment]:
    table = draw_unseen(rng, rng.randint(12, 24))
    n_turns = rng.choice((1, 4, 8, 12, 16))
    return conversation(table, all_turns(rng, table)[:n_turns])


STAGES = (
    Stage("repeat", draw_repeat, sequences=96, max_steps=2000, enough=0.9),
    Stage("recite", draw_recite, sequences=48, max_steps=2000, enough=0.95),
    Stage("turns", draw_turns, sequences=16, max_steps=2000, enough=0.95),
    Stage("job", draw_job, sequences=8, max_steps=500, enough=math.inf),
)
REVIEW_SHARE = 0.3
FORBIDDEN_TABLES = job_tables()


def draw_unseen(rng: random.Random, n_rows: int) -> Table:
    table = draw_table(rng, n_rows)
    assert table.rows not in FORBIDDEN_TABLES, "training drew a table of the job"
    return table


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the tables is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    texts = ("".join(segment.text for segment in draw_job(rng)) for _ in range(1500))
    tokenizer.train_from_iterator(texts, trainer)
    for word in (*ITEMS, *SHOPS, *NUMBERS, *SHELVES):
        assert len(tokenizer.encode(f" {word}").ids) == 1, f"{word!r} is not a single token"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


class Encoder:
    """Turns segments into padded token ids and a loss weight for every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.pad_id = tokenizer.pad_token_id
        values_only = np.zeros(len(tokenizer), dtype=np.float32)
        values_only[self.word_ids(NUMBERS + SHELVES)] = VALUE_WEIGHT
        everything = np.maximum(values_only, WORDING_WEIGHT)
        everything[self.word_ids(ITEMS)] = ITEM_WEIGHT
        self.weights = {
            Supervise.NOTHING: np.zeros_like(values_only),
            Supervise.VALUES: values_only,
            Supervise.ALL: everything,
        }

    def word_ids(self, words: list[str]) -> list[int]:
        return [self.backend.encode(f" {word}").ids[0] for word in words]

    def sequence(self, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
        ids, weights = [], []
        for segment in segments:
            part = np.array(self.backend.encode(segment.text, add_special_tokens=False).ids)
            ids.append(part)
            weights.append(self.weights[segment.supervise][part])
        return np.concatenate(ids), np.concatenate(weights)

    def batch(self, sequences: list[list[Segment]]) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = [self.sequence(segments) for segments in sequences]
        width = max(len(ids) for ids, _ in encoded)
        ids = np.full((len(encoded), width), self.pad_id, dtype=np.int64)
        weights = np.zeros((len(encoded), width), dtype=np.float32)
        for row, (row_ids, row_weights) in enumerate(encoded):
            ids[row, : len(row_ids)] = row_ids
            weights[row, : len(row_ids)] = row_weights
        return torch.from_numpy(ids), torch.from_numpy(weights)


def answer_logits(
    model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, target ids and weights of the weighted positions only.

    Padding is to the right, where causal attention keeps it out of sight, so no mask is needed.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    chosen = weights[:, 1:] > 0
    return model.lm_head(hidden[chosen]), ids[:, 1:][chosen], weights[:, 1:][chosen]


@torch.no_grad()
def looked_up(model: LlamaForCausalLM, encoder: Encoder, sequences: list[list[Segment]]) -> float:
    """Share of numbers and shelves in the answers that the model predicts."""
    logits, targets, weights = answer_logits(model, *encoder.batch(sequences))
    values = weights == VALUE_WEIGHT
    return (logits.argmax(-1) == targets)[values].float().mean().item()


@torch.no_grad()
def generated_right(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[tuple[Table, Turn]],
    batch: int = 48,
) -> int:
    """How many questions the model answers word for word, generating greedily from the chat template."""
    model.eval()
    right = 0
    asked = sorted(asked, key=lambda pair: len(pair[0].rows))
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        prompts = [
            tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": table.system_prompt()},
                    {"role": "user", "content": turn.question},
                ],
                add_generation_prompt=True,
                tokenize=False,
            )
            for table, turn in part
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=16
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text == turn.answer for text, (_, turn) in zip(texts, part, strict=True))
    model.train()
    return right


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, score: str) -> None:
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    # Written by hand because transformers 5 names a class that earlier versions do not have.
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    config = model.config
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=len(tokenizer),
        score=score,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def held_out_questions(seed: int, n_tables: int) -> list[tuple[Table, Turn]]:
    """Questions like the job's about other tables, to follow the training by."""
    rng = random.Random(seed)
    tables = [draw_unseen(rng, rng.randint(16, 24)) for _ in range(n_tables)]
    return [(table, turn) for table in tables for turn in all_turns(rng, table)[:8]]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    folder = args.out / "model"
    if args.resume is None:
        tokenizer = train_tokenizer(args.seed)
        model = new_model(tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder).train()
    encoder = Encoder(tokenizer)
    held_out = held_out_questions(args.seed + 1, n_tables=12)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)

    def checkpoint(asked: list[tuple[Table, Turn]], name: str) -> None:
        score = f"{generated_right(model, tokenizer, asked)} of {len(asked)} {name}"
        save(model, tokenizer, folder, score)
        print(f"{'':12s}saved; right: {score}", flush=True)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    started, total_steps = time.monotonic(), 0
    names = [stage.name for stage in STAGES]
    first = 0 if args.resume is None else names.index(args.resume)
    for index, stage in enumerate(STAGES[first:], start=first):
        last = index == len(STAGES) - 1
        recent = []
        for step in range(1, stage.max_steps + 1):
            warmth = min(1.0, step / args.warmup)
            cooling = 0.5 + 0.5 * math.cos(math.pi * step / stage.max_steps) if last else 1.0
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warmth * max(cooling, 0.02)
            review = index > 0 and rng.random() < REVIEW_SHARE
            source = rng.choice(STAGES[:index]) if review else stage
            ids, weights = encoder.batch([source.draw(rng) for _ in range(source.sequences)])
            logits, targets, factors = answer_logits(model, ids, weights)
            losses = functional.cross_entropy(logits, targets, reduction="none")
            loss = (losses * factors).sum() / factors.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total_steps += 1
            recent.append(loss.item())
            if step % args.report_every == 0 or step == stage.max_steps:
                test_rng = random.Random(args.seed + 2)
                share = looked_up(model, encoder, [stage.draw(test_rng) for _ in range(32)])
                print(
                    f"{time.monotonic() - started:6.0f} s  step {total_steps:5d}  {stage.name:7s} {step:5d}  "
                    f"loss {np.mean(recent):.3f}  looked up {share:.3f}",
                    flush=True,
                )
                recent = []
                if share >= stage.enough:
                    break
            if last and step % args.save_every == 0:
                checkpoint(held_out, "held-out questions")
        checkpoint(held_out, "held-out questions")
    checkpoint(list(job_conversations()), "questions of the bundled job")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, job.jsonl and answers.jsonl")
    parser.add_argument("--job-only", action="store_true", help="write only job.jsonl and answers.jsonl")
    parser.add_argument(
        "--resume",
        choices=[stage.name for stage in STAGES],
        help="begin at this stage with the model saved in DIR, rather than at the first with a new one",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps at the start of a stage")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--report-every", type=int, default=50, help="steps")
    parser.add_argument("--save-every", type=int, default=100, help="steps of the last stage")
    args = parser.parse_args()
    n_requests = write_job(args.out)
    print(json.dumps({"requests": n_requests, "tables": len(FORBIDDEN_TABLES)}))
    if not args.job_only:
        torch.set_num_threads(args.threads)
        train(args)


if __name__ == "__main__":
    main()
