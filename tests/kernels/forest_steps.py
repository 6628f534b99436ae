"""Steps over random forests for the tests of the kernels, with what each row of them sees, told row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from batchrun_kernels.work_list import Columns


@dataclass
class Node:
    """A shared prefix or a request of a step.

    Attributes:
        own: own tokens that are computed before the step.
        rows: own tokens that the step computes.
        children: nodes that read this one, and then may not be computed on in this step.
        cut: own tokens at the end of the parent that this node does not read.
    """

    own: int
    rows: int = 0
    children: list[Node] = field(default_factory=list)
    cut: int = 0


@dataclass
class ForestStep:
    """A step, and for each of its rows what it sees: `(position, place in the pool)`, the row itself last."""

    columns: Columns
    sees: list[list[tuple[int, int]]]
    num_pages: int

    @property
    def num_rows(self) -> int:
        return len(self.sees)

    @property
    def places(self) -> torch.Tensor:
        """Where K and V of each row go, int64 `[T]`."""
        return torch.tensor([sees[-1][1] for sees in self.sees], dtype=torch.int64)

    def visible(self, window: int | None) -> list[torch.Tensor]:
        """The places that each row sees."""
        low = [sees[-1][0] - window if window is not None else -1 for sees in self.sees]
        return [
            torch.tensor([place for at, place in sees if at > least], dtype=torch.int64)
            for sees, least in zip(self.sees, low, strict=True)
        ]


def make_step(forest: list[Node], page_size: int, *, seed: int = 0, spare_pages: int = 3) -> ForestStep:
    """The step of a forest. Pages and slots of sequences are drawn at random."""
    rng = np.random.default_rng(seed)
    nodes = list(_walk(forest))
    counts = [-(-(node.own + node.rows) // page_size) for node in nodes]
    num_pages = sum(counts) + spare_pages
    free = rng.permutation(num_pages).astype(np.int32)
    slots = rng.permutation(len(nodes) + 2).tolist()
    pages = rng.integers(0, num_pages, (len(nodes) + 2, max(counts, default=0) + 1)).astype(np.int32)
    slot_of: dict[int, int] = {}
    for node, count in zip(nodes, counts, strict=True):
        slot_of[id(node)] = slots.pop()
        pages[slot_of[id(node)], :count], free = free[:count], free[count:]

    def place(node: Node, token: int) -> int:
        return int(pages[slot_of[id(node)], token // page_size]) * page_size + token % page_size

    chunks: list[tuple[int, int, int, int]] = []  # slot, start, length, depth
    reads_of: list[list[tuple[int, int, int]]] = []  # of each chunk, from the root: slot, tokens, position
    sees: list[list[tuple[int, int]]] = []

    def visit(node: Node, ancestors: list[tuple[Node, int, int]], depth: int) -> None:
        if node.rows:
            assert not node.children
            chunks.append((slot_of[id(node)], node.own, node.rows, depth))
            reads_of.append([(slot_of[id(above)], tokens, position) for above, tokens, position in ancestors])
            shared = [(position + i, place(above, i)) for above, tokens, position in ancestors for i in range(tokens)]
            for row in range(node.rows):
                sees.append(shared + [(depth + i, place(node, i)) for i in range(node.own + row + 1)])
        # Those that read less of a node come first: readers of the same tokens stand next to each other.
        for child in sorted(node.children, key=lambda child: -child.cut):
            tokens = max(0, node.own - child.cut)
            visit(child, [*ancestors, (node, tokens, depth)], depth + tokens)

    for root in forest:
        visit(root, [], 0)
    lengths = [length for _, _, length, _ in chunks]
    firsts = (np.cumsum(lengths) - lengths).astype(int).tolist() if chunks else []
    reads: list[tuple[int, int, int, int, int]] = []  # first row, rows, slot, tokens, position
    for level in range(max(map(len, reads_of), default=0)):
        at_level = [(read[level] if level < len(read) else None, c) for c, read in enumerate(reads_of)]
        for read, run in groupby(at_level, key=lambda entry: entry[0]):
            inside = [c for _, c in run]
            if read is not None and read[1]:
                reads.append((firsts[inside[0]], sum(lengths[c] for c in inside), *read))
    chunk_columns = np.array(chunks, dtype=np.int32).reshape(-1, 4).T
    read_columns = np.array(reads, dtype=np.int32).reshape(-1, 5).T
    return ForestStep(Columns(*chunk_columns, *read_columns, pages=pages), sees, num_pages)


def random_forest(rng: np.random.Generator, *, trees: int, levels: int, most: int) -> list[Node]:
    """Trees of up to `levels` shared prefixes, nodes of up to `most` tokens; decodes and chunks mixed."""

    def grow(level: int) -> Node:
        if level == levels or rng.random() < 0.3:
            rows = 1 if rng.random() < 0.6 else int(rng.integers(1, most))
            return Node(own=int(rng.integers(0, most)), rows=rows, cut=int(rng.random() < 0.2))
        return Node(
            own=int(rng.integers(1, most)),
            children=[grow(level + 1) for _ in range(int(rng.integers(1, 5)))],
            cut=int(rng.random() < 0.1),
        )

    return [grow(0) for _ in range(trees)]


def _walk(forest: list[Node]) -> list[Node]:
    return [node for root in forest for node in (root, *_walk(root.children))]
