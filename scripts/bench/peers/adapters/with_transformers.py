"""transformers' padded `generate`: batches of requests alike in length, as large as memory for KV allows."""

import os

from protocol import Job, serve

MOST_ROWS = 64


def load(job: Job):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype)).eval()


def generate(model, job: Job) -> list[list[int]]:
    import torch

    outputs: list[list[int]] = [[] for _ in job.prompts]
    order = sorted(range(len(job.prompts)), key=lambda i: (job.outputs[i], len(job.prompts[i])))
    while order:
        rows = MOST_ROWS if job.kv_tokens is None else max(job.kv_tokens // job.longest, 1)
        batch, order = order[:rows], order[rows:]
        width, length = max(len(job.prompts[i]) for i in batch), max(job.outputs[i] for i in batch)
        pads = [width - len(job.prompts[i]) for i in batch]
        with torch.inference_mode():
            made = model.generate(
                torch.tensor([[0] * pad + job.prompts[i] for i, pad in zip(batch, pads, strict=True)]),
                attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
                do_sample=False,
                max_new_tokens=length,
                min_new_tokens=length,
                eos_token_id=None,
                pad_token_id=0,
            )
        for i, row in zip(batch, made[:, width:].tolist(), strict=True):
            outputs[i] = row[: job.outputs[i]]
    return outputs


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(load, generate)
