"""openvino-genai's continuous batching, prefix caching on. It shares only blocks that exist when a request is added, so
what requests share is primed first, level by level, with one token each; that is part of the time."""

from protocol import Job, serve, shared_runs, waves

BLOCK = 32  # tokens of a KV block on a CPU
STEP_TOKENS = 2048
PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def load(job: Job):
    import openvino_genai as genai

    settings = genai.SchedulerConfig()
    settings.enable_prefix_caching = True
    settings.dynamic_split_fuse = True
    settings.max_num_seqs = 256
    settings.max_num_batched_tokens = STEP_TOKENS
    settings.num_kv_blocks = job.room // BLOCK
    precision = PRECISION[job.dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
    }
    engine = genai.ContinuousBatchingPipeline(job.model, settings, "CPU", properties)
    answer(engine, [[7] * 8], [2])  # its kernels are made when first used
    return engine


def answer(engine, prompts, outputs) -> list[list[int]]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    handles = []
    for i, (prompt, n) in enumerate(zip(prompts, outputs, strict=True)):
        config = genai.GenerationConfig()
        config.max_new_tokens = n
        config.ignore_eos = True
        config.do_sample = False
        handles.append(engine.add_request(i, ov.Tensor(np.array([prompt], dtype=np.int64)), config))
    while engine.has_non_finished_requests():
        engine.step()
    return [list(handle.read_all()[0].generated_ids) for handle in handles]


def generate(engine, job: Job) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in job.prompts]
    everything = range(len(job.prompts))
    # Where memory is small, requests that stand together and fit together are given together.
    for wave in [list(everything)] if job.kv_tokens is None else waves(job, everything, job.kv_tokens, BLOCK):
        prompts = [job.prompts[i] for i in wave]
        runs = shared_runs(prompts)
        for level in sorted({run.level for run in runs}):
            primes = [prompts[run.members[0]][: run.length] for run in runs if run.level == level]
            answer(engine, primes, [1] * len(primes))
        for i, made in zip(wave, answer(engine, prompts, [job.outputs[i] for i in wave]), strict=True):
            outputs[i] = made
    return outputs


if __name__ == "__main__":
    serve(load, generate)
