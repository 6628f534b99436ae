"""The table of docs/models.md: what the models that tests run ask of attention and RoPE, noted while they run.

python tests/model_table.py --write writes it anew.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from factories import ARCHITECTURES, make_config

from batchrun.specs import rope_parameters, rope_type, text_config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEAD = ("type", "sliding window", "soft-cap", "sinks", "scaling of its own", "experts", "RoPE")


def table() -> str:
    """A row for each type of model, of all that `factories.ARCHITECTURES` has of it."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for architecture, (model_type, _) in ARCHITECTURES.items():
        for column, values in features_of(architecture).items():
            found[model_type][column] |= values
    rows = [HEAD, tuple("---" for _ in HEAD)]
    for model_type, columns in sorted(found.items()):
        rows.append((f"`{model_type}`", *(", ".join(sorted(columns[name])) for name in HEAD[1:])))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def features_of(architecture: str) -> dict[str, set[str]]:
    """What a model asks for, by column: seen in the calls of its layers, and of experts and RoPE in its
    configuration."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    calls: list[dict[str, Any]] = []

    def noting(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **asked: Any) -> tuple[Any, None]:
        calls.append({**asked, "usual scaling": query.shape[-1] ** -0.5})
        return query.transpose(1, 2), None

    AttentionInterface.register("noting", noting)
    config = make_config(architecture)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="noting")
    with torch.inference_mode():
        model(torch.tensor([[3, 4, 5]]))
    text = text_config(config.to_dict())
    ropes = rope_parameters(text)
    windows = [call.get("sliding_window") is not None for call in calls]
    found = {
        "sliding window": ({"all layers"} if all(windows) else {"some layers"}) if any(windows) else set(),
        "soft-cap": {"yes"} if any(call.get("softcap") is not None for call in calls) else set(),
        "sinks": {"yes"} if any(call.get("s_aux") is not None for call in calls) else set(),
        "scaling of its own": {"yes"} if any(call["scaling"] != call["usual scaling"] for call in calls) else set(),
        "experts": {"yes"} if any("experts" in name for name, _ in model.named_modules()) else set(),
        "RoPE": {rope_type(text["model_type"], rope) for rope in ropes},
    }
    if any(rope.get("partial_rotary_factor", 1) < 1 for rope in ropes):
        found["RoPE"].add("of a part of a head")
    if 0 in text.get("no_rope_layers", ()):
        found["RoPE"].add("none in some layers")
    return found


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if "--write" in sys.argv[1:]:
        lines = page.splitlines(keepends=True)
        first = next(i for i, line in enumerate(lines) if line.startswith(f"| {HEAD[0]} | {HEAD[1]} |"))
        last = next(i for i, line in enumerate(lines[first:], first) if not line.startswith("|"))
        PAGE.write_text("".join([*lines[:first], table(), *lines[last:]]), encoding="utf-8")
        return
    sys.exit(table() not in page)


if __name__ == "__main__":
    main()
