"""Compare the answers of a run of the bundled job with the right ones.

    python scripts/check_demo.py demo.run

Exits with 1 where less than 98 % of them are right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ANSWERS = Path(__file__).resolve().parents[1] / "configs" / "demo" / "answers.jsonl"
ENOUGH = 0.98


def count_right(results: Path, answers: Path = ANSWERS) -> tuple[int, int]:
    """How many answers of a `results.jsonl` are right word for word, and how many there should be."""
    given = {row["custom_id"]: _text(row) for row in _rows(results)}
    right = [given.get(row["custom_id"]) == row["answer"] for row in _rows(answers)]
    return sum(right), len(right)


def _text(row: dict) -> str:
    return row["response"]["body"]["choices"][0]["message"]["content"]


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    right, total = count_right(Path(sys.argv[1]) / "results.jsonl")
    print(f"{right} of {total} answers right ({100 * right / total:.1f} %)")
    sys.exit(right < ENOUGH * total)


if __name__ == "__main__":
    main()
