"""What a person asks of a plan: which runs of tokens are shared most, and what one line shares, when it runs and what
its KV costs.

Shape letters: N nodes of the forest, R requests, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from batchrun.prefix.forest import PrefixForest
from batchrun.prefix.groups import PrefixGroups
from batchrun.request import Answers, LineFault, Requests

Int32 = npt.NDArray[np.int32]
Decode = Callable[[Sequence[int]], str]

_PREVIEW = 32  # tokens of a run that are decoded to show how it begins
_NAMED = 3  # other lines that are named as sharing a prefix


@dataclass(frozen=True, slots=True)
class SharedRun:
    """A run of tokens that several prompts share.

    Attributes:
        node: its number in the forest.
        parent: the nearest run above it that is listed too, or -1.
        depth: tokens before it.
        tokens: its own tokens.
        requests: requests that share it.
        spared: prompt tokens that are spared if it is computed once.
        text: how it begins.
    """

    node: int
    parent: int
    depth: int
    tokens: int
    requests: int
    spared: int
    text: str


@dataclass(frozen=True, slots=True)
class SharedRuns:
    """The runs of a forest that spare most.

    Attributes:
        listed: depth first, a run before those below it.
        others: shared runs that are not listed.
        others_spared: prompt tokens that those spare.
    """

    listed: tuple[SharedRun, ...]
    others: int
    others_spared: int

    def largest(self, count: int) -> SharedRuns:
        """The `count` of them that spare most, each below the nearest one that is left above it."""
        if len(self.listed) <= count:
            return self
        ranked = sorted(self.listed, key=lambda run: (-run.spared, run.node))
        kept = {run.node for run in ranked[:count]}
        parent = {run.node: run.parent for run in self.listed}

        def above(node: int) -> int:
            while node >= 0 and node not in kept:
                node = parent[node]
            return node

        return SharedRuns(
            tuple(replace(run, parent=above(run.parent)) for run in self.listed if run.node in kept),
            self.others + len(ranked) - count,
            self.others_spared + sum(run.spared for run in ranked[count:]),
        )


def shared_runs(forest: PrefixForest, ids: Int32, decode: Decode, count: int = 60) -> SharedRuns:
    """The `count` shared runs of a forest that spare most; of equals the first in the forest.

    Args:
        forest: of all prompts.
        ids: int32, the tokens that `forest.start` counts in.
        decode: the text of token ids.
    """
    shared = np.flatnonzero(forest.requests > 1)
    spared = (forest.requests[shared] - 1).astype(np.int64) * forest.length[shared]
    largest = np.lexsort((shared, -spared))[:count]
    nodes = dict(zip(shared[largest].tolist(), spared[largest].tolist(), strict=True))

    def above(node: int) -> int:
        node = int(forest.parent[node])
        while node >= 0 and node not in nodes:
            node = int(forest.parent[node])
        return node

    listed = tuple(
        SharedRun(
            node=node,
            parent=above(node),
            depth=int(forest.depth[node]),
            tokens=int(forest.length[node]),
            requests=int(forest.requests[node]),
            spared=nodes[node],
            text=_begins(ids, int(forest.start[node]), int(forest.length[node]), decode),
        )
        for node in sorted(nodes)
    )
    return SharedRuns(listed, shared.size - len(nodes), int(spared.sum()) - sum(nodes.values()))


@dataclass(frozen=True, slots=True)
class Timetable:
    """When everything runs, as simulated, and in which memory.

    Attributes:
        order: int32 `[R]`, the requests in the order of admission.
        expected_new_tokens: int32 `[R]`.
        first_step, last_step: int32 `[R]`, where each request first and last has rows; -1 where not simulated.
        ends: float64 `[T]`, seconds from the start to the end of each step.
        page_size: tokens of a KV page.
        page_bytes: bytes of a KV page.
    """

    order: Int32
    expected_new_tokens: Int32
    first_step: Int32
    last_step: Int32
    ends: npt.NDArray[np.float64]
    page_size: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class PrefixRead:
    """A prefix-sharing group that a request reads.

    Attributes:
        group: its number.
        depth: tokens before it.
        tokens: its own tokens.
        requests: requests that read it, this one included.
        with_lines: the custom_ids of some other lines that do.
        text: how it begins.
        pages: KV pages it takes.
        page_steps: those pages, times the steps from its first reader's first to its last reader's last.
    """

    group: int
    depth: int
    tokens: int
    requests: int
    with_lines: tuple[str, ...]
    text: str
    pages: int
    page_steps: int


@dataclass(frozen=True, slots=True)
class ExplainedRequest:
    """What is planned for one request.

    Attributes:
        duplicate_of: custom_id of the line that it was made for, where that is another one; else None.
        answers: how many answers it gives.
        prompt_tokens: of its prompt.
        shared_tokens: how many of them some other prompt begins with too.
        cached_tokens: how many of them it reads from groups; it computes the others itself.
        identical: other requests with the very same prompt.
        answer_tokens: expected.
        max_new_tokens: its limit.
        reads: the groups that it reads, the outermost first.
        place: its place in the order of admission, from 1.
        steps: its first and its last step; None where it was not simulated.
        seconds: when those begin and end, from the start.
        pages: KV pages of its own at its end.
        page_steps: pages of its own times the steps that it holds them, as if its prompt were stored at once.
        prefix_page_steps: its share of the page steps of the groups that it reads.
        kv_bytes: of its own pages at its end.
        page_bytes: of a page.
    """

    duplicate_of: str | None
    answers: int
    prompt_tokens: int
    shared_tokens: int
    cached_tokens: int
    identical: int
    answer_tokens: int
    max_new_tokens: int
    reads: tuple[PrefixRead, ...]
    place: int
    steps: tuple[int, int] | None
    seconds: tuple[float, float] | None
    pages: int
    page_steps: int
    prefix_page_steps: float
    kv_bytes: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is planned for one line.

    Attributes:
        custom_id: of the line.
        line: its number in the job file.
        requests: one for each of its prompts; none if the line is bad.
        faults: what is wrong with it, or with other lines of the same `custom_id`.
    """

    custom_id: str
    line: int
    requests: tuple[ExplainedRequest, ...]
    faults: tuple[LineFault, ...]


def explain(
    custom_id: str,
    faults: Iterable[LineFault],
    answers: Answers,
    requests: Requests,
    forest: PrefixForest,
    groups: PrefixGroups,
    timetable: Timetable,
    decode: Decode,
) -> Explanation | None:
    """What is planned for the line with this `custom_id`; None if there is none.

    Args:
        faults: the bad lines of the job.
        answers: that the others ask for.
        requests: that give them.
        forest, groups: of these requests.
        timetable: when they run.
        decode: the text of token ids.
    """
    own_faults = tuple(fault for fault in faults if fault.custom_id == custom_id)
    try:
        line = answers.custom_ids.index(custom_id)
    except ValueError:
        return Explanation(custom_id, own_faults[0].number, (), own_faults) if own_faults else None
    # A group is read by many of a line's requests, and its readers are looked for once.
    found: dict[int, PrefixRead] = {}

    def read(group: int) -> PrefixRead:
        if group not in found:
            found[group] = _read(group, custom_id, requests, groups, timetable, decode)
        return found[group]

    explained = []
    for request in answers.request[answers.line == line].tolist():
        reads = [read(group) for group in _path(groups, request)]
        made_for = requests.custom_ids[requests.line[request]]
        explained.append(
            replace(
                _explain(request, reads, requests, forest, groups, timetable),
                duplicate_of=made_for if made_for != custom_id else None,
                answers=int((answers.request == request).sum()),
            )
        )
    return Explanation(custom_id, int(answers.line_numbers[line]), tuple(explained), own_faults)


def _explain(
    request: int,
    reads: list[PrefixRead],
    requests: Requests,
    forest: PrefixForest,
    groups: PrefixGroups,
    timetable: Timetable,
) -> ExplainedRequest:
    prompt = requests.tokens.span(request).length
    node = int(forest.node[request])
    alike = int(forest.requests[node]) > 1
    cached = int(groups.request_depth[request])
    answer = int(timetable.expected_new_tokens[request])
    first, last = int(timetable.first_step[request]), int(timetable.last_step[request])
    own = prompt - cached
    # The last token of an answer is sampled and never computed; each of the others takes a step after the prompt.
    pages = -(-(own + np.arange(answer)) // timetable.page_size)
    waits = last - first + 1 - answer
    ends = timetable.ends
    return ExplainedRequest(
        duplicate_of=None,
        answers=1,
        prompt_tokens=prompt,
        shared_tokens=int(forest.depth[node] + (forest.length[node] if alike else 0)),
        cached_tokens=cached,
        identical=int((forest.node == node).sum()) - 1,
        answer_tokens=answer,
        max_new_tokens=int(requests.max_new_tokens[request]),
        reads=tuple(reads),
        place=int(np.flatnonzero(timetable.order == request)[0]) + 1,
        steps=(first, last) if first >= 0 else None,
        seconds=(float(ends[first - 1]) if first else 0.0, float(ends[last])) if first >= 0 else None,
        pages=int(pages[-1]),
        page_steps=int(pages.sum() + max(waits, 0) * pages[0]) if first >= 0 else 0,
        prefix_page_steps=sum(prefix.page_steps / prefix.requests for prefix in reads),
        kv_bytes=int(pages[-1]) * timetable.page_bytes,
        page_bytes=timetable.page_bytes,
    )


def _path(groups: PrefixGroups, request: int) -> list[int]:
    """The groups that a request reads, the outermost first."""
    group = int(groups.request_group[request])
    return [above for above in groups.path[group].tolist() if above >= 0] if group >= 0 else []


def _read(
    group: int, custom_id: str, requests: Requests, groups: PrefixGroups, timetable: Timetable, decode: Decode
) -> PrefixRead:
    level = groups.path[group].tolist().index(group)
    readers = np.flatnonzero((groups.request_group >= 0) & (groups.path[groups.request_group, level] == group))
    lines = (requests.custom_ids[line] for line in np.unique(requests.line[readers]))
    others = islice((other for other in lines if other != custom_id), _NAMED)
    simulated = readers[timetable.first_step[readers] >= 0]
    steps = 0
    if simulated.size:
        steps = int(timetable.last_step[simulated].max() - timetable.first_step[simulated].min()) + 1
    pages = -(-int(groups.length[group]) // timetable.page_size)
    return PrefixRead(
        group=group,
        depth=int(groups.depth[group]),
        tokens=int(groups.length[group]),
        requests=readers.size,
        with_lines=tuple(others),
        text=_begins(requests.tokens.ids, int(groups.start[group]), int(groups.length[group]), decode),
        pages=pages,
        page_steps=pages * steps,
    )


def _begins(ids: Int32, start: int, length: int, decode: Decode) -> str:
    return decode(ids[start : start + min(length, _PREVIEW)].tolist())
