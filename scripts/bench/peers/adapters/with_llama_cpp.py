"""llama.cpp through llama-cpp-python's binding of its C interface: flash attention, KV in float16, one KV cache for all
sequences. Waves of requests; what the requests of a group share is computed once and given to each by `seq_cp`."""

from protocol import Job, Shared, groups, serve, waves

WAVE_TOKENS = 3072  # attention looks at all cells of the cache, so waves are small even where memory is not
STEP_TOKENS, SEQUENCES = 2048, 128


def load(job: Job):
    import llama_cpp as llama

    llama.llama_backend_init()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    model = llama.llama_model_load_from_file(job.model.encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    room = job.kv_tokens or WAVE_TOKENS
    settings.n_ctx = -(-max(room, job.longest) // 256) * 256
    settings.n_batch = STEP_TOKENS
    settings.n_ubatch = 512
    settings.n_seq_max = SEQUENCES
    settings.kv_unified = True
    settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    settings.n_threads = settings.n_threads_batch = job.threads
    context = llama.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")
    return Engine(llama, model, context, quiet)


class Engine:
    """A context and its cache."""

    def __init__(self, llama, model, context, quiet) -> None:
        self.llama, self.model, self.context, self.quiet = llama, model, context, quiet
        self.memory = llama.llama_get_memory(context)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.batch = llama.llama_batch_init(STEP_TOKENS, 0, 1)

    def run(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token, position, sequence, whether to sample); the tokens sampled, in order."""
        import numpy as np

        sampled: list[int] = []
        for low in range(0, len(rows), STEP_TOKENS):
            some = rows[low : low + STEP_TOKENS]
            batch = self.batch
            batch.n_tokens = len(some)
            for k, (token, position, sequence, wanted) in enumerate(some):
                batch.token[k] = token
                batch.pos[k] = position
                batch.n_seq_id[k] = 1
                batch.seq_id[k][0] = sequence
                batch.logits[k] = wanted
            code = self.llama.llama_decode(self.context, batch)
            if code:
                raise RuntimeError(f"llama_decode gave {code}")
            wanted_rows = sum(row[3] for row in some)
            if wanted_rows:
                logits = np.ctypeslib.as_array(
                    self.llama.llama_get_logits(self.context), shape=(wanted_rows, self.vocabulary)
                )
                sampled += logits.argmax(axis=1).tolist()
        return sampled

    def wave(self, job: Job, indices: list[int], outputs: list[list[int]]) -> None:
        """Answer some requests together."""
        self.llama.llama_memory_clear(self.memory, False)
        prompts = [job.prompts[i] for i in indices]
        units: list[Shared] = groups(prompts)
        rows = []
        for unit in units:
            leader = unit.members[0]
            rows += [(token, at, leader, False) for at, token in enumerate(prompts[leader][: unit.length])]
        self.run(rows)
        for unit in units:
            for member in unit.members:
                if unit.length and member != unit.members[0]:
                    self.llama.llama_memory_seq_cp(self.memory, unit.members[0], member, 0, unit.length)
        live = [member for unit in units for member in unit.members]
        rows = []
        for unit in units:
            for member in unit.members:
                last = len(prompts[member]) - 1
                rows += [
                    (token, unit.length + at, member, unit.length + at == last)
                    for at, token in enumerate(prompts[member][unit.length :])
                ]
        while live:
            for member, token in zip(live, self.run(rows), strict=True):
                outputs[indices[member]].append(token)
            live = [m for m in live if len(outputs[indices[m]]) < job.outputs[indices[m]]]
            rows = []
            for member in live:
                answer = outputs[indices[member]]
                rows.append((answer[-1], len(prompts[member]) + len(answer) - 1, member, True))


def generate(engine: Engine, job: Job) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in job.prompts]
    order = sorted(range(len(job.prompts)), key=job.prompts.__getitem__)
    for wave in waves(job, order, job.kv_tokens or WAVE_TOKENS):
        for low in range(0, len(wave), SEQUENCES):
            engine.wave(job, wave[low : low + SEQUENCES], outputs)
    return outputs


if __name__ == "__main__":
    serve(load, generate)
