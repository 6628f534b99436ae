"""transformers with shared prefixes by hand: each group's prefix is computed once, its cache repeated for the group's
requests, and `generate` goes on from there, padded."""

import copy
import os

from protocol import Job, groups, serve
from with_transformers import MOST_ROWS, load


def generate(model, job: Job) -> list[list[int]]:
    import torch
    from transformers import DynamicCache

    outputs: list[list[int]] = [[] for _ in job.prompts]
    room = job.kv_tokens or MOST_ROWS * job.longest
    for group in groups(job.prompts):
        prefix = job.prompts[group.members[0]][: group.length]
        with torch.inference_mode():
            shared = DynamicCache(config=model.config)
            if prefix:
                model.model(torch.tensor([prefix]), past_key_values=shared, use_cache=True)
            # The repeated prefix takes memory once for each row.
            rows = min(MOST_ROWS, max(room // job.longest, 1))
            for low in range(0, len(group.members), rows):
                some = group.members[low : low + rows]
                cache = copy.deepcopy(shared)
                if prefix:
                    cache.batch_repeat_interleave(len(some))
                own = [job.prompts[i][group.length :] for i in some]
                width, length = max(map(len, own)), max(job.outputs[i] for i in some)
                pads = [width - len(ids) for ids in own]
                made = model.generate(
                    torch.tensor([prefix + [0] * pad + ids for pad, ids in zip(pads, own, strict=True)]),
                    attention_mask=torch.tensor([[1] * len(prefix) + [0] * pad + [1] * (width - pad) for pad in pads]),
                    past_key_values=cache,
                    do_sample=False,
                    max_new_tokens=length,
                    min_new_tokens=length,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                for i, row in zip(some, made[:, len(prefix) + width :].tolist(), strict=True):
                    outputs[i] = row[: job.outputs[i]]
    return outputs


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(load, generate)
