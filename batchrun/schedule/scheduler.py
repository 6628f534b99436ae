"""The scheduler: says in each step which sequences advance by how many tokens, and in which pages.

It knows no phases. Every step takes each sequence that has one token left to compute (those that decode), then fills
up with the tokens of others, in the order of their admission. What limits how many requests are under way is KV
memory and the rows that a step can use, not a number of requests (BatchLLM, arXiv 2412.03594, section 4.3).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchrun.planning.lengths import OutputLengths
from batchrun.planning.planner import Plan
from batchrun.request import FinishReason, Requests
from batchrun.schedule.pages import PagePool
from batchrun.schedule.sequence import Sequences
from batchrun.schedule.step import PrefixReads, Step, StepOutput

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has its answer.

    Attributes:
        request: its index.
        token_ids: int32, the sampled tokens; where `ended`, the last one ended the answer and is not part of the text.
        reason: why it ended.
        ended: whether a token of the model ended it (end of text or a stop token).
        cached_tokens: tokens of its prompt that shared prefixes computed.
    """

    request: int
    token_ids: Int32
    reason: FinishReason
    ended: bool
    cached_tokens: int


@dataclass(slots=True)
class Counters:
    """What the scheduler counts.

    Attributes:
        prompt_computed: rows whose input was a prompt token.
        recomputed: rows that a preemption or an eviction made necessary a second time.
        sampled: tokens sampled.
        preemptions: requests that gave their pages back before they were done.
        prefix_evictions: shared prefixes that gave their pages back while requests that read them had yet to run.
        idle_rows: rows computed for requests that had their answer already (with several steps in flight, an end is
            learnt late).
    """

    prompt_computed: int = 0
    recomputed: int = 0
    sampled: int = 0
    preemptions: int = 0
    prefix_evictions: int = 0
    idle_rows: int = 0


class Scheduler:
    """Turns a plan into steps. `schedule()` gives the next step, `update()` takes what it brought.

    Every request must fit into the pool on its own, with its prefixes (`planning.planner.pages_needed`).
    """

    def __init__(self, plan: Plan, requests: Requests) -> None:
        self.pool = PagePool(plan.budget.pages)
        self.counters = Counters()
        self.sequences = Sequences()
        self.lengths = OutputLengths(requests, plan.options.first_guess)
        self._plan = plan
        self._requests = requests
        self._page_size = plan.budget.page_size
        self._step_tokens = plan.options.step_tokens
        self._steps = 0

        groups = plan.groups
        self._slot_of_group = np.full(len(groups), -1, dtype=np.int32)
        self._to_come = groups.requests.copy()  # requests of each group that are not finished

        self._next = 0  # place in plan.order
        self._preempted: deque[int] = deque()  # slots, to be admitted again before any new request
        self._advancing = np.empty(0, dtype=np.int32)  # slots with something to compute, in order of admission
        self._pages: dict[int, list[npt.NDArray[np.int32]]] = {}
        self._releases: list[int] = []
        self._grants: list[tuple[int, npt.NDArray[np.int32]]] = []

    @property
    def num_waiting(self) -> int:
        """Requests not under way yet."""
        return self._plan.order.size - self._next + len(self._preempted)

    def schedule(self) -> Step | None:
        """The next step, or None when every request has its answer."""
        self._admit()
        if not self._advancing.size:
            if self.num_waiting:
                raise AssertionError("requests wait and none can be admitted")
            return None
        slots, length = self._fill()
        while not self._reserve_pages(slots, length):
            slots, length = self._fill()
        return self._make_step(slots, length)

    def update(self, step: Step, output: StepOutput, stopped: npt.NDArray[np.bool_] | None = None) -> list[Finished]:
        """Take the outcome of a step.

        Args:
            step: a step that `schedule()` gave, the oldest not yet updated.
            output: what the worker sampled.
            stopped: bool `[S]`, rows whose text ended by a stop string, or None.
        """
        seqs = self.sequences
        slots = step.sequence[step.samples]
        stops = output.ended if stopped is None else output.ended | stopped
        token_ids, ended = output.token_ids, output.ended
        current = seqs.request[slots] == step.request[step.samples]
        if not current.all():
            self.counters.idle_rows += int((~current).sum())
            slots, stops, token_ids, ended = (column[current] for column in (slots, stops, token_ids, ended))
        seqs.append_sampled(slots, token_ids)
        self.counters.sampled += slots.size
        done = stops | (seqs.num_sampled[slots] >= seqs.max_new_tokens[slots])
        seqs.num_tokens[slots[~done]] += 1
        # Nothing left to compute: requests that are done, and prefixes that are complete.
        left = seqs.num_tokens[self._advancing] - seqs.num_computed[self._advancing]
        self._advancing = self._advancing[left > 0]

        finished = [
            self._finish(slot, FinishReason.STOP if stop else FinishReason.LENGTH, by_token)
            for slot, stop, by_token in zip(
                slots[done].tolist(), stops[done].tolist(), ended[done].tolist(), strict=True
            )
        ]
        if finished:
            self.lengths.observe(
                np.array([f.request for f in finished], dtype=np.int32),
                np.array([f.token_ids.size for f in finished], dtype=np.int32),
            )
        return finished

    # Admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let requests in while their expected KV, and that of all under way, fits; alone, anything may run."""
        if not self.num_waiting:
            return
        room = self._room()
        under_way = self._under_way().size
        while self.num_waiting and under_way < self._step_tokens:
            request = self._peek()
            pages, missing = self._pages_to_finish(request)
            if pages > room and under_way:
                break
            self._let_in(request, missing)
            room -= pages
            under_way += 1

    def _under_way(self) -> Int32:
        """Slots of requests under way."""
        return self._advancing[self.sequences.request[self._advancing] >= 0]

    def _room(self) -> int:
        """Pages left when everything under way has grown to its expected length; idle prefixes count as free."""
        seqs = self.sequences
        slots = self._under_way()
        new = np.maximum(self.lengths.expected(seqs.request[slots]), seqs.num_sampled[slots] + 1)
        own = seqs.num_prompt[slots] + np.minimum(new, seqs.max_new_tokens[slots]) - 1
        resident = self._slot_of_group[self._slot_of_group >= 0]
        resident = resident[(seqs.readers[resident] > 0) | (seqs.num_computed[resident] < seqs.num_tokens[resident])]
        reserved = (-(-own // self._page_size)).sum() + (-(-seqs.num_tokens[resident] // self._page_size)).sum()
        return self.pool.size - int(reserved)

    def _peek(self) -> int:
        """The request to admit next."""
        if self._preempted:
            return int(self.sequences.request[self._preempted[0]])
        return int(self._plan.order[self._next])

    def _pages_to_finish(self, request: int) -> tuple[int, list[int]]:
        """Pages that admitting a request would take at its expected length, and the groups that have to be computed
        (or woken: idle ones count, since they were counted as free)."""
        groups = self._plan.groups
        new = int(self.lengths.expected(np.array([request], dtype=np.int32))[0])
        if self._preempted:
            new = max(new, int(self.sequences.num_sampled[self._preempted[0]]) + 1)
        new = min(new, int(self._requests.max_new_tokens[request]))
        prompt = self._requests.tokens.span(request).length - int(groups.request_depth[request])
        pages = -(-(prompt + new - 1) // self._page_size)
        missing = []
        for group in self._path(int(groups.request_group[request])):
            slot = int(self._slot_of_group[group])
            if slot < 0:
                missing.append(group)
            if slot < 0 or self._idle(slot):
                pages += -(-int(groups.length[group]) // self._page_size)
        return pages, missing

    def _idle(self, slot: int) -> bool:
        """Whether a prefix is computed and no request under way reads it."""
        seqs = self.sequences
        return seqs.readers[slot] == 0 and seqs.num_computed[slot] == seqs.num_tokens[slot]

    def _path(self, group: int) -> list[int]:
        """The groups from the root down to `group`; empty for -1."""
        if group < 0:
            return []
        path = self._plan.groups.path[group]
        return path[path >= 0].tolist()

    def _let_in(self, request: int, missing: list[int]) -> None:
        groups, seqs = self._plan.groups, self.sequences
        entering = []
        for group in missing:
            slot = seqs.add(
                token_start=int(groups.start[group]),
                request=-1,
                group=group,
                parent=int(groups.parent[group]),
                rank=int(groups.rank[group]),
                depth=int(groups.depth[group]),
                num_prompt=int(groups.length[group]),
                num_tokens=int(groups.length[group]),
            )
            self._slot_of_group[group] = slot
            self._pages[slot] = []
            entering.append(slot)
        group = int(groups.request_group[request])
        if self._preempted:
            slot = self._preempted.popleft()
            seqs.stamp(slot)
        else:
            self._next += 1
            span = self._requests.tokens.span(request)
            depth = int(groups.request_depth[request])
            slot = seqs.add(
                token_start=span.start + depth,
                request=request,
                group=-1,
                parent=group,
                rank=int(groups.request_rank[request]),
                depth=depth,
                num_prompt=span.length - depth,
                num_tokens=span.length - depth,
                max_new_tokens=int(self._requests.max_new_tokens[request]),
            )
        self._pages[slot] = []
        entering.append(slot)
        seqs.readers[self._slot_of_group[self._path(group)]] += 1
        self._advancing = np.concatenate((self._advancing, np.array(entering, dtype=np.int32)))

    # Filling a step ---------------------------------------------------------------------------------------------

    def _fill(self) -> tuple[Int32, Int32]:
        """The sequences that advance in the next step and by how much, int32 `[C]` each.

        Those with one token left first (a decode is one of them), then the others in the order of admission until
        the step is full. A prefix precedes its readers there, so a reader gets rows only where its prefixes are
        complete by the end of the same step: the KV of all rows of a layer is stored before any row attends.
        """
        seqs = self.sequences
        slots = self._advancing
        left = seqs.num_tokens[slots] - seqs.num_computed[slots]
        decodes = (left == 1) & (seqs.num_sampled[slots] > 0)
        room = max(self._step_tokens - int(decodes.sum()), 0)
        others = np.where(decodes, 0, left)
        length = np.clip(room - (np.cumsum(others) - others), 0, others)
        length = np.where(decodes, 1, length).astype(np.int32)
        return slots[length > 0], length[length > 0]

    def _reserve_pages(self, slots: Int32, length: Int32) -> bool:
        """Grant the pages that a step needs. Where they run out, take some back and return False: the step must be
        filled anew, since a sequence of it may be gone."""
        seqs = self.sequences
        # A prefix gets all its pages at once, so that they are neighbours.
        reach = np.where(seqs.request[slots] < 0, seqs.num_tokens[slots], seqs.num_computed[slots] + length)
        needed = -(-reach // self._page_size) - seqs.num_pages[slots]
        short = int(needed[needed > 0].sum()) - self.pool.num_free
        if short > 0:
            self._reclaim(slots)
            return False
        for i in np.flatnonzero(needed > 0).tolist():
            slot, count = int(slots[i]), int(needed[i])
            held = self._pages[slot]
            pages = self.pool.take(count, after=int(held[-1][-1]) if held else -1)
            held.append(pages)
            self._grants.append((slot, pages))
            seqs.num_pages[slot] += count
        return True

    def _reclaim(self, slots: Int32) -> None:
        """Take pages back: from an idle prefix if there is one, else from the request that loses least."""
        seqs = self.sequences
        resident = self._slot_of_group[self._slot_of_group >= 0]
        idle = resident[(seqs.readers[resident] == 0) & (seqs.num_pages[resident] > 0)]
        if idle.size:
            self._evict(int(idle[np.argmin(seqs.admitted[idle])]))
            return
        candidates = self._under_way()
        candidates = candidates[seqs.admitted[candidates] > seqs.admitted[candidates].min()]  # the oldest goes on
        holding = candidates[seqs.num_pages[candidates] > 0]
        if not candidates.size:
            raise AssertionError("a request does not fit into the pool on its own")
        # Without pages of its own, a request may still be the only reader of a prefix that has some.
        chosen = holding if holding.size else candidates
        least = np.lexsort((-seqs.admitted[chosen], seqs.num_computed[chosen]))[0]
        self._preempt(int(chosen[least]))

    def _evict(self, slot: int) -> None:
        """Give back the pages of a prefix that nobody reads at the moment; it is computed again when needed."""
        self.counters.prefix_evictions += 1
        self.counters.recomputed += int(self.sequences.num_computed[slot])
        self._slot_of_group[self.sequences.group[slot]] = -1
        self._advancing = self._advancing[self._advancing != slot]
        self._release(slot)
        self.sequences.remove(slot)

    def _preempt(self, slot: int) -> None:
        """Give back the pages of a request under way; it waits, keeps what it sampled, and is computed again."""
        seqs = self.sequences
        self.counters.preemptions += 1
        self.counters.recomputed += int(seqs.num_computed[slot])
        seqs.num_computed[slot] = 0
        self._advancing = self._advancing[self._advancing != slot]
        self._release(slot)
        seqs.readers[self._slot_of_group[self._path(int(seqs.parent[slot]))]] -= 1
        self._preempted.appendleft(slot)

    def _finish(self, slot: int, reason: FinishReason, ended: bool) -> Finished:
        seqs = self.sequences
        request = int(seqs.request[slot])
        done = Finished(
            request=request,
            token_ids=seqs.sampled[slot, : seqs.num_sampled[slot]].copy(),
            reason=reason,
            ended=ended,
            cached_tokens=int(seqs.depth[slot]),
        )
        path = self._path(int(seqs.parent[slot]))
        self._release(slot)
        seqs.remove(slot)
        self._to_come[path] -= 1
        seqs.readers[self._slot_of_group[path]] -= 1
        for group in path:
            if self._to_come[group] == 0:
                prefix = int(self._slot_of_group[group])
                self._slot_of_group[group] = -1
                self._release(prefix)
                seqs.remove(prefix)
        return done

    def _release(self, slot: int) -> None:
        """Return the pages of a slot to the pool; workers learn of it with the next step."""
        pages = self._pages.pop(slot)
        if pages:
            self.pool.give_back(np.concatenate(pages))
            self._releases.append(slot)
        self.sequences.num_pages[slot] = 0

    # Making a step ----------------------------------------------------------------------------------------------

    def _make_step(self, slots: Int32, length: Int32) -> Step:
        seqs = self.sequences
        by_rank = np.argsort(seqs.rank[slots])
        slots, length = slots[by_rank], length[by_rank]
        start = seqs.num_computed[slots]
        request = seqs.request[slots]
        stop = start + length
        step = Step(
            index=self._steps,
            sequence=slots,
            request=request,
            start=start,
            length=length,
            depth=seqs.depth[slots],
            samples=(request >= 0) & (stop == seqs.num_tokens[slots]),
            num_sampled=seqs.num_sampled[slots],
            token_ids=self._token_ids(slots, start, length),
            prefix_reads=self._prefix_reads(slots, length),
            releases=np.array(self._releases, dtype=np.int32),
            grant_sequence=np.repeat(
                np.array([slot for slot, _ in self._grants], dtype=np.int32), [p.size for _, p in self._grants]
            ),
            grant_page=np.concatenate([np.empty(0, dtype=np.int32), *(pages for _, pages in self._grants)]),
        )
        prompt_rows = np.clip(seqs.num_prompt[slots] - start, 0, length)
        self.counters.prompt_computed += int(prompt_rows.sum())
        seqs.num_computed[slots] = stop
        self._steps += 1
        self._releases, self._grants = [], []
        return step

    def _token_ids(self, slots: Int32, start: Int32, length: Int32) -> Int32:
        """The inputs of all rows, int32 `[T]`: from the table, or what the sequence sampled."""
        seqs = self.sequences
        row_slot = np.repeat(slots, length)
        first = np.cumsum(length) - length
        own = np.arange(row_slot.size) - np.repeat(first - start, length)
        past = own - seqs.num_prompt[row_slot]  # >= 0: a sampled token
        ids = self._requests.tokens.ids[np.where(past < 0, seqs.token_start[row_slot] + own, 0)]
        return np.where(past >= 0, seqs.sampled[row_slot, np.maximum(past, 0)], ids).astype(np.int32)

    def _prefix_reads(self, slots: Int32, length: Int32) -> PrefixReads:
        """Which rows read which prefix: per level, runs of neighbouring chunks that read the same KV."""
        seqs, groups = self.sequences, self._plan.groups
        first_row = np.cumsum(length) - length
        parent = seqs.parent[slots]
        columns = []
        levels = groups.path.shape[1] if len(groups) and (parent >= 0).any() else 0
        for level in range(levels):
            group = np.where(parent >= 0, groups.path[parent, level], -1)
            reads = np.where(group >= 0, np.minimum(groups.length[group], seqs.depth[slots] - groups.depth[group]), 0)
            group = np.where(reads > 0, group, -1)
            if not (group >= 0).any():
                continue
            edge = np.flatnonzero(np.diff(group, prepend=-2) | np.diff(reads, prepend=-1))
            last = np.append(edge[1:], slots.size) - 1
            rows = first_row[last] + length[last] - first_row[edge]
            real = group[edge] >= 0
            edge, rows = edge[real], rows[real]
            of = group[edge]
            columns.append(
                (
                    np.full(edge.size, level),
                    first_row[edge],
                    rows,
                    self._slot_of_group[of],
                    reads[edge],
                    groups.depth[of],
                )
            )
        stacked = zip(*columns, strict=True) if columns else ([np.empty(0)] for _ in range(6))
        return PrefixReads(*(np.concatenate(column).astype(np.int32) for column in stacked))
