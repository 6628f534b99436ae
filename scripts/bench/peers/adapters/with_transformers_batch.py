"""transformers' `generate_batch`: continuous batching over a paged cache, blocks of equal prompts shared."""

import os

from protocol import Job, serve

PAGE, STEP_TOKENS = 32, 2048


def load(job: Job):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation="paged|sdpa"
    )
    return model.eval()


def generate(model, job: Job) -> list[list[int]]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    made = model.generate_batch(
        job.prompts,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max(job.outputs), eos_token_id=-1, pad_token_id=0, use_cache=True
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=job.room // PAGE, max_batch_tokens=STEP_TOKENS, allow_block_sharing=True
        ),
    )
    for answer in made.values():
        if answer.error:
            raise RuntimeError(answer.error)
    in_order = sorted(made.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
    return [answer.generated_tokens[:n] for (_, answer), n in zip(in_order, job.outputs, strict=True)]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(load, generate)
