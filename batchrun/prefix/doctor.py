"""Why prompts that look alike do not share: a difference in front of text that is the same again.

A prefix is shared up to the first token that differs, whatever follows. Two such faults are looked for below the
branch points of the forest, and no prompt is changed:

- **A field in front.** The prompts below a branch point differ for a few tokens (a date, a number, an id, a name, white
  space) and then go on alike. Where a prompt goes on alike is found by its windows of 16 or 48 tokens: it is the first
  one that also stands behind another difference. Moved behind what is then shared, the field costs nothing.
- **The same lines in another order.** From a line on, the prompts have the same lines, shuffled.

What mending would save is not estimated: the prompts are rewritten in a copy, the forest of the copy is built, and its
tokens are counted. All prompts below a branch point begin alike and no others do, so that the rest of the job need not
be looked at. Of a large job, branch points are chosen on a part of its prompts, drawn evenly in forest order; what is
found there is then computed on all.

Shape letters: M prompts below a branch point, P tokens of all of them, S lines of text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.columns import gather
from batchrun.prefix.explain import Decode
from batchrun.prefix.forest import PrefixForest, build_forest
from batchrun.request import Requests
from batchrun.tokens import TokenTable

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]

_FIELD = 64  # tokens of a field at most
# Tokens that must be the same behind it (few find more, many find no chance likeness), and the share of the prompts
# that must have them, of those that have any such. All are tried.
_ANCHORS = ((16, 1.0), (16, 0.5), (48, 0.5))
_WORTH = 0.01  # share of the prompt tokens below which a fault is not worth mentioning
_FINDINGS = 5
_EXAMINED = 1 << 14  # prompts among which branch points are chosen
_BRANCHES = 200  # branch points looked at
_COMPARED = 1 << 12  # prompts whose windows are compared with each other, while branch points are chosen
_COMPARED_AGAIN = 1 << 17  # and for what is found
_PROBED = 256  # prompts that are looked at for shuffled lines before all are
_SHOWN = 64  # prompts whose difference is decoded, to see what it is
_CONTEXT = 16  # tokens around it that the words are taken from that it begins and ends in
_BLOCK = 1 << 15  # prompts whose windows are in memory at once

_MIX, _POWER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)  # odd, for hashing

_MONTH = r"(?i:\b(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\b)"
# What a difference may be; tried in this order.
_KINDS = {
    "date": re.compile(rf"\d{{4}}-\d\d?-\d|\d{{1,4}}[./]\d{{1,2}}[./]\d|{_MONTH}"),
    "time": re.compile(r"\d{1,2}:\d\d"),
    "uuid": re.compile(r"(?i)[0-9a-f]{8}-[0-9a-f]{4}-|[0-9a-f]{4}-[0-9a-f]{12}"),
    "email": re.compile(r"\S@\S+\.\S"),
    "number": re.compile(r"^\W*\d[\d.,_]*\W*$"),
    "id": re.compile(r"^(?=.*\d)\W*[\w./:#-]+\W*$"),
    "name": re.compile(r"^\W*[^\W\d_a-z][\w'-]*( [^\W\d_a-z][\w'-]*){0,2}\W*$"),
}
_MOST = 0.9  # share of the differences that must be of a kind
CAUSES = ("order", "white space", *_KINDS, "text")


@dataclass(frozen=True, slots=True)
class Finding:
    """Prompts that look alike and do not share.

    Attributes:
        cause: one of `CAUSES`: what they differ in, or that they have the same lines in another order.
        requests: how many there are.
        shared_tokens: tokens that all of them begin with.
        alike_tokens: tokens that are the same again after the difference, in half of them or more; the tokens of the
            lines, where those are shuffled.
        lines: the custom_ids of two of them.
        texts: how those two differ.
        spared_tokens: prompt tokens that would be spared, beyond those that are.
        saving: the same as a share of the job's prompt tokens.
    """

    cause: str
    requests: int
    shared_tokens: int
    alike_tokens: int
    lines: tuple[str, str]
    texts: tuple[str, str]
    spared_tokens: int
    saving: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found.

    Attributes:
        findings: the gravest first. No prompt is in two of them, so that their savings add up.
        examined: prompts among which branch points were chosen.
        branches: branch points looked at.
    """

    findings: tuple[Finding, ...]
    examined: int
    branches: int


class _Branch(NamedTuple):
    """Prompts that begin with the same `depth` tokens, as no other prompts do.

    Attributes:
        first, requests: they are `forest.order[first : first + requests]`.
        depth: tokens that they have in common.
        below: tokens of the forest after these.
    """

    first: int
    requests: int
    depth: int
    below: int


class _Mended(NamedTuple):
    """What follows the common tokens of a branch point's prompts, rewritten.

    Attributes:
        tails: the tokens.
        changed: bool `[M]`, prompts that have the fault.
        differing: int64 `[M]`, tokens at the front of each tail as it was that differ.
        alike: int64 `[M]`, tokens that are the same again.
    """

    tails: TokenTable
    changed: Bool
    differing: Int64
    alike: Int64


class _Mend(NamedTuple):
    """A way to mend a fault.

    Attributes:
        sorts: whether it sorts lines; else it moves fields.
        rewrite: gives the rewritten tails, comparing at most so many with each other; None where they have no fault.
    """

    sorts: bool
    rewrite: Callable[[TokenTable, int], _Mended | None]


class _Fault(NamedTuple):
    """A fault below a branch point; `spared` are the tokens of the forest that mending spares."""

    branch: _Branch
    mend: _Mend
    spared: int


def diagnose(requests: Requests, forest: PrefixForest, decode: Decode) -> Diagnosis:
    """Find why prompts that look alike do not share.

    Args:
        requests: of the job.
        forest: of their prompts.
        decode: the text of token ids.
    """
    tokens = requests.tokens
    part, part_forest, drawn = tokens, forest, np.arange(len(tokens), dtype=np.int32)
    if len(tokens) > _EXAMINED:
        drawn = forest.order[_evenly(len(tokens), _EXAMINED)]
        part = _tails(tokens, drawn, 0)
        part_forest = build_forest(part)
    line_ends = _line_ends(tokens.ids, decode)
    nodes = _branching_nodes(part_forest)
    fields = [_branch(part_forest, node) for node in nodes]
    lines = [_line_start(part, part_forest, node, line_ends) for node in nodes]
    places = [*((_field_mend(*anchor), fields) for anchor in _ANCHORS), (_line_mend(line_ends), lines)]
    faults = [
        _Fault(branch, mend, spared)
        for mend, branches in places
        for branch in dict.fromkeys(branches)
        if (spared := _mend(part, part_forest, branch, mend, _COMPARED)[0]) > 0
    ]
    findings = []
    for fault in _disjoint(faults)[: 2 * _FINDINGS]:
        request = int(drawn[part_forest.order[fault.branch.first]])
        # In the whole job the prompts of a branch point may have less in common, or as much and part later.
        depth = fault.branch.depth if fault.mend.sorts else None
        branch = _branch(forest, _node_at(forest, request, fault.branch.depth), depth)
        finding = _examine(requests, forest, branch, fault.mend, decode)
        if finding is not None and finding.saving >= _WORTH:
            findings.append(finding)
    findings.sort(key=lambda finding: -finding.spared_tokens)
    return Diagnosis(tuple(findings[:_FINDINGS]), len(part), len(nodes))


# --- branch points ------------------------------------------------------------------------------------------------


def _branching_nodes(forest: PrefixForest) -> list[int]:
    """The nodes with several children below which there are most tokens; -1 is above all roots."""
    nodes = np.arange(len(forest))
    # The nodes below one are those after it whose requests are among its own.
    stop = np.searchsorted(forest.first, forest.first + forest.requests)
    before = np.concatenate(([0], np.cumsum(forest.length, dtype=np.int64)))
    below = before[stop] - before[nodes + 1]
    children = np.bincount(forest.parent + 1, minlength=len(forest) + 1)[1:]
    worth = nodes[(children > 1) & (below >= _WORTH * forest.prompt_logical)]
    largest = worth[np.lexsort((worth, -below[worth]))][: _BRANCHES - 1].tolist()
    return [-1, *largest] if (forest.parent < 0).sum() > 1 else largest


def _branch(forest: PrefixForest, node: int, depth: int | None = None) -> _Branch:
    """The prompts of a node; -1 is above all roots.

    Args:
        depth: the first so many of their tokens; up to the end of the node if None.
    """
    if node < 0:
        return _Branch(0, forest.order.size, 0, forest.prompt_physical)
    first, requests = int(forest.first[node]), int(forest.requests[node])
    stop = int(np.searchsorted(forest.first, first + requests))
    end = _end(forest, node)
    depth = end if depth is None else depth
    return _Branch(first, requests, depth, end - depth + int(forest.length[node + 1 : stop].sum(dtype=np.int64)))


def _node_at(forest: PrefixForest, request: int, depth: int) -> int:
    """The node whose prompts are those that have the first `depth` tokens of a request; -1 if these are none."""
    node = int(forest.node[request]) if depth else -1
    while node >= 0 and forest.depth[node] >= depth:
        node = int(forest.parent[node])
    return node


def _line_start(tokens: TokenTable, forest: PrefixForest, node: int, line_ends: Bool) -> _Branch:
    """The prompts that begin as those of a node do up to the line in which these part."""
    if node < 0:
        return _branch(forest, node)
    request = int(forest.order[forest.first[node]])
    ended = np.flatnonzero(line_ends[tokens[request][: _end(forest, node)]])
    depth = int(ended[-1]) + 1 if ended.size else 0
    return _branch(forest, _node_at(forest, request, depth), depth)


def _end(forest: PrefixForest, node: int) -> int:
    """Tokens up to the end of a node."""
    return int(forest.depth[node] + forest.length[node])


def _mend(
    tokens: TokenTable, forest: PrefixForest, branch: _Branch, mend: _Mend, compared: int
) -> tuple[int, Int32, _Mended | None]:
    """Mend what goes on below a branch point.

    Returns:
        Tokens of the forest that this spares; the requests, int32 `[M]`; what becomes of them.
    """
    members = forest.order[branch.first : branch.first + branch.requests]
    members = members[tokens.lengths[members] > branch.depth]
    mended = mend.rewrite(_tails(tokens, members, branch.depth), compared) if members.size > 1 else None
    spared = branch.below - build_forest(mended.tails).prompt_physical if mended is not None else 0
    return spared, members, mended


def _disjoint(faults: list[_Fault]) -> list[_Fault]:
    """Of faults within each other those that spare most together, the gravest first."""
    beside: list[tuple[_Branch, int, list[_Fault]]] = []  # branches beside each other, with the best that is in each
    # From the last to the first, so that what is within a branch comes before it.
    for fault in sorted(faults, key=lambda fault: (-fault.branch.first, fault.branch.requests, -fault.branch.depth)):
        branch, spared, best = fault.branch, 0, list[_Fault]()
        while beside and beside[-1][0].first < branch.first + branch.requests:
            _, inner, within = beside.pop()
            spared += inner
            best += within
        if fault.spared >= spared:
            spared, best = fault.spared, [fault]
        beside.append((branch, spared, best))
    return sorted((fault for _, _, best in beside for fault in best), key=lambda fault: -fault.spared)


# --- a field in front ---------------------------------------------------------------------------------------------


def _field_mend(anchor: int, share: float) -> _Mend:
    return _Mend(False, partial(_move_fields, anchor, share))


def _move_fields(anchor: int, share: float, tails: TokenTable, compared: int) -> _Mended | None:
    """Move the tokens by which tails differ behind those that follow and are shared."""
    start, length = tails.offsets[:-1], tails.lengths.astype(np.int64)
    # How many tails have each window, of those that stand behind several continuations of the branch point. A window is
    # a number below 2^44, a tail one below 2^20.
    some = _evenly(length.size, compared)
    windows = _windows(tails.ids, start[some], length[some], anchor)
    numbered = (windows << np.uint64(20)) | np.arange(some.size, dtype=np.uint64)[:, None]
    pairs = np.sort(numbered[windows > 0])  # np.unique hashes, which takes several times as long
    pairs = pairs[np.diff(pairs, prepend=np.uint64(0)) > 0]
    if not pairs.size:
        return None
    known = pairs >> np.uint64(20)
    first = np.flatnonzero(np.diff(known, prepend=np.uint64(0)))
    known, counts = known[first], np.diff(np.append(first, pairs.size))
    branch = tails.ids[start[some]][(pairs & np.uint64((1 << 20) - 1)).astype(np.int64)]
    several = np.minimum.reduceat(branch, first) < np.maximum.reduceat(branch, first)
    known, counts = known[several], counts[several]
    if not known.size:
        return None

    field, changed = np.zeros(length.size, dtype=np.int64), np.zeros(length.size, dtype=bool)
    for low in range(0, length.size, _BLOCK):
        block = slice(low, low + _BLOCK)
        windows = _windows(tails.ids, start[block], length[block], anchor)
        place = np.minimum(np.searchsorted(known, windows), known.size - 1)
        count = np.where(known[place] == windows, counts[place], 0)
        most = count.max(axis=1)
        # The first window that as many have as any, or nearly: a rarer one before it is part of the field, by chance.
        field[block] = np.argmax(count >= share * most[:, None], axis=1)
        changed[block] = most > 0
    field[~changed] = 0

    behind, rest = start + field, length - field
    forest = build_forest(TokenTable(*gather(tails.ids, behind[changed], rest[changed])))
    node = forest.node
    alike = np.zeros(length.size, dtype=np.int64)
    alike[changed] = forest.depth[node] + np.where(forest.requests[node] > 1, forest.length[node], 0)
    begin = np.stack((behind, start, behind + alike), axis=1)
    size = np.stack((alike, field, rest - alike), axis=1)
    rewritten, _ = gather(tails.ids, begin.ravel(), size.ravel())
    return _Mended(TokenTable(rewritten, tails.offsets), changed, field, alike)


def _windows(ids: Int32, start: Int64, length: Int64, width: int) -> Uint64:
    """A number for each window of `width` tokens that begins in the first `_FIELD` tokens of a tail or right after
    them, uint64 `[tails, _FIELD + 1]`, below 2^44; 0 where the tail is too short."""
    tokens = ids.take(start[:, None] + np.arange(_FIELD + width), mode="clip").astype(np.uint64)
    tokens = (tokens + np.uint64(1)) * _MIX
    value = np.zeros((start.size, _FIELD + 1), dtype=np.uint64)
    for offset in range(width):
        value = value * _POWER + tokens[:, offset : offset + _FIELD + 1]
    inside = np.arange(_FIELD + 1) + width <= length[:, None]
    return np.where(inside, (value >> np.uint64(20)) | np.uint64(1), np.uint64(0))


# --- the same lines in another order ------------------------------------------------------------------------------


def _line_mend(line_ends: Bool) -> _Mend:
    return _Mend(True, partial(_sort_lines, line_ends))


def _sort_lines(line_ends: Bool, tails: TokenTable, compared: int) -> _Mended | None:
    """Put the lines that tails begin with into one order, where several tails have the same ones in different orders.

    A line is its content and the token that ends it. Contents change places; what ends the lines stays, because the
    last one may end in another way (an empty line).
    """
    count = len(tails)
    if count > _PROBED and _sort_lines(line_ends, _tails(tails, _evenly(count, _PROBED), 0), compared) is None:
        return None
    ids, offsets = tails.ids, tails.offsets
    ends = line_ends[ids]
    begins = np.zeros(ids.size, dtype=bool)
    begins[1:] = ends[:-1]
    begins[offsets[:-1]] = True
    start = np.flatnonzero(begins)
    size = np.diff(np.append(start, ids.size))
    ended = ends[start + size - 1].astype(np.int64)
    content = size - ended
    tail = np.searchsorted(offsets, start, side="right") - 1
    first = np.searchsorted(tail, np.arange(count))  # of each tail's lines
    number = np.arange(start.size) - first[tail]

    # Equal contents get equal names.
    value = (ids.astype(np.uint64) + np.uint64(1)) * _MIX
    value[ends] = 0
    value *= _powers(int(size.max()))[np.arange(ids.size) - np.repeat(start, size)]
    name = np.unique(np.add.reduceat(value, start) + content.astype(np.uint64), return_inverse=True)[1]

    # A tail's block: the lines at its front that at least half of the tails have.
    tails_with = np.bincount(np.unique(name.astype(np.int64) * count + tail) // count)
    common = (ended > 0) & (tails_with > 1)[name] & (2 * tails_with >= count)[name]
    block = np.minimum.reduceat(np.where(common, start.size, number), first)
    inside = number < block[tail]

    # Tails whose blocks have the same lines, of which there are several orders.
    hashed = (name.astype(np.uint64) + np.uint64(1)) * _MIX
    hashed = (hashed ^ (hashed >> np.uint64(29))) * _POWER
    hashed[~inside] = 0
    same_lines = np.unique(np.add.reduceat(hashed, first), return_inverse=True)[1]
    in_order = np.add.reduceat(hashed * _powers(int(number.max()) + 1)[number], first)
    lowest, highest = np.full(count, ~np.uint64(0)), np.zeros(count, dtype=np.uint64)
    np.minimum.at(lowest, same_lines, in_order)
    np.maximum.at(highest, same_lines, in_order)
    changed = (lowest < highest)[same_lines]
    if not changed.any():
        return None

    # All get the order in which the lines are first seen.
    seen = np.unique(name, return_index=True)[1][name]
    moved = np.flatnonzero(inside & changed[tail])
    source = np.arange(start.size)
    source[moved] = moved[np.lexsort((seen[moved], tail[moved]))]
    begin = np.stack((start[source], start + content), axis=1)
    rewritten, _ = gather(ids, begin.ravel(), np.stack((content[source], ended), axis=1).ravel())
    return _Mended(
        TokenTable(rewritten, offsets),
        changed,
        np.where(changed, content[first], 0),
        np.where(changed, np.add.reduceat(np.where(inside, size, 0), first), 0),
    )


def _line_ends(ids: Int32, decode: Decode) -> Bool:
    """Whether a token has a line end in its text, bool `[highest token id + 1]`."""
    found = np.zeros(int(ids.max(initial=0)) + 1, dtype=bool)
    found[ids] = True
    for token in np.flatnonzero(found).tolist():
        found[token] = "\n" in decode([token])
    return found


def _powers(count: int) -> Uint64:
    """The powers of `_POWER` from the 0th on, uint64 `[count]`."""
    powers = np.full(count, _POWER)
    powers[0] = 1
    return np.cumprod(powers)


# --- what was found -----------------------------------------------------------------------------------------------


def _examine(requests: Requests, forest: PrefixForest, branch: _Branch, mend: _Mend, decode: Decode) -> Finding | None:
    """Mend a fault in all prompts that have it, and say what it is."""
    spared, members, mended = _mend(requests.tokens, forest, branch, mend, _COMPARED_AGAIN)
    if mended is None or spared <= 0:
        return None
    changed = np.flatnonzero(mended.changed)
    fields: list[str] = []
    shown: dict[str, list[int]] = {}  # requests by what is shown of them
    for place in changed[_evenly(changed.size, _SHOWN)].tolist():
        prompt = requests.tokens[int(members[place])]
        field, words = _difference(prompt, branch.depth, branch.depth + int(mended.differing[place]), decode)
        fields.append(field)
        shown.setdefault(field if mend.sorts else words, []).append(int(members[place]))
    one, *more = sorted(shown, key=lambda text: -len(shown[text]))
    other = more[0] if more else one
    cause = "order" if mend.sorts else _cause(fields, shown)
    return Finding(
        cause=cause,
        requests=changed.size,
        shared_tokens=branch.depth,
        alike_tokens=int(np.median(mended.alike[changed])),
        lines=(_custom_id(requests, shown[one][0]), _custom_id(requests, shown[other][-1])),
        texts=(one, other) if cause == "white space" else (one.strip(), other.strip()),
        spared_tokens=spared,
        saving=spared / forest.prompt_logical,
    )


def _custom_id(requests: Requests, request: int) -> str:
    return requests.custom_ids[requests.line[request]]


def _difference(prompt: Int32, start: int, stop: int, decode: Decode) -> tuple[str, str]:
    """The text of some tokens of a prompt; and the same with the rest of the words that it begins and ends in."""
    begin = max(start - _CONTEXT, 0)
    before, text, after = (decode(prompt[begin:end].tolist()) for end in (start, stop, stop + _CONTEXT))
    cut = len(before) if text.startswith(before) else 0
    end = len(text) if after.startswith(text) else len(after)
    head = re.search(r"\S*$", after[:cut])
    tail = re.match(r"\S*", after[end:])
    assert head is not None and tail is not None  # both match nothing at all
    words = "" if text[cut : cut + 1].isspace() else head[0]
    rest = "" if text[-1:].isspace() else tail[0]
    return text[cut:], words + after[cut:end] + rest


def _cause(fields: Collection[str], words: Collection[str]) -> str:
    """What texts differ in, nine of ten of them or more.

    Args:
        fields: the texts.
        words: the distinct texts, in whole words.
    """
    if len(set(fields)) == 1:
        return "text"
    if len({"".join(field.split()) for field in fields}) == 1:
        return "white space"
    for kind, pattern in _KINDS.items():
        if sum(pattern.search(text.strip()) is not None for text in words) >= _MOST * len(words):
            return kind
    return "text"


# --- tables of tokens ---------------------------------------------------------------------------------------------


def _evenly(count: int, most: int) -> Int64:
    """Places among `count`, `most` of them at most, evenly spread, ascending."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _tails(tokens: TokenTable, rows: Int32 | Int64, depth: int) -> TokenTable:
    """Some rows of a table without their first `depth` tokens."""
    return TokenTable(*gather(tokens.ids, tokens.offsets[rows] + depth, tokens.lengths[rows] - depth))
