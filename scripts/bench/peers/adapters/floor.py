"""No peer: what matrix products and reading memory take here, which no engine can go below.

Products are those of all linear layers of the model, with weights packed for oneDNN, Q, K and V in one and the two
halves of the MLP's entry in one; for some numbers of rows, from which the others follow.
"""

import json
import time
from pathlib import Path

from protocol import Result, read_job, write_result

ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
READ_BYTES = 1 << 29


def main() -> None:
    import torch

    job = read_job()
    began = time.perf_counter()
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, job.dtype)
    config = json.loads((Path(job.model) / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    shapes = [(hidden, (heads + 2 * kv_heads) * head), (heads * head, hidden), (hidden, 2 * wide), (wide, hidden)]

    def packed(inputs: int, outputs: int) -> tuple[int, torch.Tensor]:
        return inputs, torch.ops.mkldnn._reorder_linear_weight(torch.randn(outputs, inputs, dtype=dtype))

    body = [packed(*shape) for _ in range(config["num_hidden_layers"]) for shape in shapes]
    top = [packed(hidden, config["vocab_size"])]
    loaded = time.perf_counter()

    def seconds(weights: list[tuple[int, torch.Tensor]], rows: int) -> float:
        inputs = {width: torch.randn(rows, width, dtype=dtype) for width, _ in weights}
        times = []
        for _ in range(4 if rows < 512 else 3):
            start = time.perf_counter()
            for width, weight in weights:
                torch.ops.mkldnn._linear_pointwise(inputs[width], weight, None, "none", [], "")
            times.append(time.perf_counter() - start)
        return min(times)

    memory = torch.ones(READ_BYTES // 4)
    reads = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            memory.sum()
            reads.append(time.perf_counter() - start)
        details = {
            "rows": list(ROWS),
            "layers_seconds": [seconds(body, rows) for rows in ROWS],
            "head_seconds": [seconds(top, rows) for rows in ROWS],
            "read_bytes_per_second": READ_BYTES / min(reads),
            "layers_flop_per_row": 2 * config["num_hidden_layers"] * sum(a * b for a, b in shapes),
        }
    write_result(Result(loaded - began, time.perf_counter() - loaded, [], details))


main()
