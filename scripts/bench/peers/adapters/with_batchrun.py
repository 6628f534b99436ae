"""batchrun, through its command. Generation is planning and running; reading the job and loading the tokenizer count as
loading, since peers are given token ids."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from protocol import Result, read_job, write_result

FIRST_CHARACTER = 0x4E00  # token id i of the benchmark's model is the character of this code plus i


def main() -> None:
    job = read_job()
    scratch = Path(job.scratch)
    with (scratch / "job.jsonl").open("w") as file:
        for i, (prompt, output) in enumerate(zip(job.prompts, job.outputs, strict=True)):
            body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
            line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    command = [
        sys.executable,
        "-c",
        "from batchrun.cli import main; main()",
        "run",
        str(scratch / "job.jsonl"),
        "--model",
        job.model,
    ]
    command += ["--dtype", job.dtype, "--out", str(scratch / "out.run")]
    if job.kv_tokens is not None:
        config = json.loads((Path(job.model) / "config.json").read_text())
        width = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        command += ["--kv-memory", str(job.kv_tokens * width * (4 if job.dtype == "float32" else 2))]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "NO_COLOR": "1"})
    whole = time.perf_counter() - began
    report = json.loads((scratch / "out.run" / "report.json").read_text())
    seconds = report["seconds"]
    generation = seconds["plan"] + seconds["execute"]
    outputs: list[list[int]] = [[] for _ in job.prompts]
    for line in (scratch / "out.run" / "results.jsonl").open():
        answer = json.loads(line)
        text = answer["response"]["body"]["choices"][0]["text"]
        outputs[int(answer["custom_id"])] = [ord(character) - FIRST_CHARACTER for character in text]
    details = {name: report[name] for name in ("seconds", "tokens", "steps", "kv", "warnings")}
    write_result(Result(whole - generation, generation, outputs, details))


main()
