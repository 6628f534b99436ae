"""CTranslate2's Generator: one call for each group, what the group shares as its static prompt, which is cached."""

from protocol import Job, groups, serve

MOST_ROWS = 64


def load(job: Job):
    import ctranslate2

    return ctranslate2.Generator(
        job.model, device="cpu", compute_type=job.dtype, inter_threads=1, intra_threads=job.threads
    )


def generate(engine, job: Job) -> list[list[int]]:
    import json
    from pathlib import Path

    vocabulary = json.loads((Path(job.model) / "vocabulary.json").read_text())
    outputs: list[list[int]] = [[] for _ in job.prompts]
    for group in groups(job.prompts):
        prefix = [vocabulary[id] for id in job.prompts[group.members[0]][: group.length]]
        rows = MOST_ROWS if job.kv_tokens is None else max(job.kv_tokens // job.longest, 1)
        for length in sorted({job.outputs[i] for i in group.members}):
            some = [i for i in group.members if job.outputs[i] == length]
            made = engine.generate_batch(
                [[vocabulary[id] for id in job.prompts[i][group.length :]] for i in some],
                static_prompt=prefix or None,
                cache_static_prompt=True,
                include_prompt_in_result=False,
                max_batch_size=rows,
                max_length=length,
                min_length=length,
                sampling_topk=1,
            )
            for i, answer in zip(some, made, strict=True):
                outputs[i] = list(answer.sequences_ids[0])
    return outputs


if __name__ == "__main__":
    serve(load, generate)
