"""vLLM's CPU backend: compiled, prefix caching on, all requests handed over at once, in one process."""

import os

from protocol import Job, serve

BLOCK = 32
MOST_GIB = 4  # must hold what the blocks below take


def load(job: Job):
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(MOST_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM

    return LLM(
        job.model,
        dtype=job.dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        block_size=BLOCK,
        max_model_len=job.longest,
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        disable_log_stats=True,
        num_gpu_blocks_override=job.room // BLOCK,
    )


def generate(engine, job: Job) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in job.outputs]
    made = engine.generate(prompts, params, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in made]


if __name__ == "__main__":
    serve(load, generate)
