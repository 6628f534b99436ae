"""The scheduler: says in each step which sequences advance by how many tokens, and in which pages.

It knows no phases. Every step takes each sequence that has one token left to compute (those that decode), then fills
up with the tokens of others, in the order of their admission. What limits how many requests are under way is KV
memory, not a number of requests (memory-centric token batching; BatchLLM, arXiv 2412.03594, section 4.3): a request is
admitted when a step has rows for it and the pages booked in no coming step exceed the pool with it (`PageLedger`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.columns import concat_ranges
from batchrun.planning.lengths import OutputLengths
from batchrun.planning.planner import Plan, order_requests, pages_needed
from batchrun.request import FinishReason, Requests
from batchrun.schedule.ledger import PageLedger
from batchrun.schedule.pages import PagePool
from batchrun.schedule.sequence import Sequences
from batchrun.schedule.step import PastTokens, PrefixReads, Step, StepOutput

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
# Given the requests that were sampled, the token ids, and which of these end an answer by themselves, `[S]` each: which
# answers a stop string ends.
Watch = Callable[[Int32, Int32, Bool], Bool]

_AHEAD = 64
_SHRINK = 16  # to what share of what was planned steps and pool are made smaller at most
_NO_INTS = np.empty(0, dtype=np.int32)


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
        memory_retries: steps that were computed in parts, because the device had not enough memory for them.
    """

    prompt_computed: int = 0
    recomputed: int = 0
    sampled: int = 0
    preemptions: int = 0
    prefix_evictions: int = 0
    idle_rows: int = 0
    memory_retries: int = 0


class _Candidate(NamedTuple):
    """A request that may be admitted next; see `Sequences` for those fields that it has too.

    Attributes:
        group: the deepest group it reads, or -1.
        start: where its own tokens begin in the table.
        tokens: own tokens that it has to compute, sampled ones included.
        limit: tokens to sample at most.
        left: tokens it is expected to sample yet.
        slot: its slot if it was under way before, else -1.
    """

    request: int
    group: int
    depth: int
    start: int
    tokens: int
    rank: int
    limit: int
    left: int
    slot: int = -1


class _Booking(NamedTuple):
    """What is booked for a request: see `Sequences.until`, `held` and `growth`."""

    until: int
    held: int
    growth: int


class Scheduler:
    """Turns a plan into steps. `schedule()` gives the next step, `update()` takes what it brought.

    With two steps in flight, a step is made before it is known what the one before it sampled. So a request goes on
    until its end is known, one row too far where a token ends it; that row is dropped and counted
    (`Counters.idle_rows`).

    Every request must fit into the pool on its own, with its prefixes (`planning.planner.pages_needed`).

    Args:
        plan: what to run, and in which order.
        requests: those that the plan speaks of.
        depth: steps in flight at a time, 1 or 2.

    Attributes:
        held_back: whether the last step had room for rows of a request that waits, and the pool had no pages for it.
    """

    def __init__(self, plan: Plan, requests: Requests, *, depth: int = 1) -> None:
        self.pool = PagePool(plan.budget.pages)
        self.counters = Counters()
        self.sequences = Sequences()
        self.lengths = OutputLengths(requests, plan.groups, plan.options.first_guess)
        self._plan = plan
        self._requests = requests
        self._page_size = plan.budget.page_size
        self._step_tokens = plan.options.step_tokens
        self._ledger = PageLedger(plan.budget.page_size)
        self._steps = 0
        self._updates = 0
        self.depth = depth
        looks_back = np.array([sampling.looks_back for sampling in requests.sampling], dtype=bool)
        self._looks_back = looks_back if looks_back.any() else None  # by settings
        # A grammar says what may come next only once the token before is known, so these wait for it.
        waits = np.array([sampling.grammar is not None for sampling in requests.sampling], dtype=bool)
        self._waits = waits if depth > 1 and waits.any() else None  # by settings
        self._lag = depth - 1  # steps that a request keeps its pages after the one that samples its last token

        groups = plan.groups
        self._slot_of_group = np.full(len(groups), -1, dtype=np.int32)
        # With one place more for no group, which is -1.
        self._path_of = np.concatenate((groups.path, np.full((1, groups.path.shape[1]), -1, dtype=np.int32)))
        self._length_of = np.append(groups.length, np.int32(0))
        self._depth_of = np.append(groups.depth, np.int32(0))
        self._level_of_group = (groups.path >= 0).sum(axis=1) - 1 if len(groups) else np.empty(0, dtype=np.int64)
        self._paths: dict[int, list[int]] = {}
        self._to_come = groups.requests.copy()  # requests of each group that are not finished

        self._order = plan.order
        self._next = 0  # place in the order
        self._probing = plan.probe  # answers still to come before the rest is ordered by what they teach
        self._ahead: deque[_Candidate] = deque()  # the requests in the order from this place on
        self._preempted: deque[int] = deque()  # slots, to be admitted again before any new request
        self._held: list[int] = []  # slots that wait and are not to be admitted yet
        self._confined = False  # whether only those in `_preempted` may be admitted
        self.held_back = False
        self._lost: dict[int, int] = {}  # by rank, tokens computed for nothing of sequences that are not there now
        self._advancing = np.empty(0, dtype=np.int32)  # slots with something to compute, in order of admission
        self._releases: list[int] = []
        self._grants: list[tuple[Int32, Int32]] = []  # sequences, pages

    @property
    def num_waiting(self) -> int:
        """Requests not under way yet."""
        return self._order.size - self._next + len(self._preempted) + len(self._held)

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return self._under_way().size

    @property
    def done(self) -> bool:
        """Whether every request has its answer, or gets none."""
        return not self.num_waiting and not self._under_way().size

    @property
    def _may_admit(self) -> bool:
        return bool(self._preempted) or (not self._confined and self._next < self._order.size)

    def schedule(self) -> Step | None:
        """The next step; None when every request has its answer, or nothing can go on before the next `update()`."""
        self._admit()
        slots, length = self._fill()
        while not self._reserve_pages(slots, length):
            slots, length = self._fill()
        if not slots.size:
            if self._may_admit and self._updates == self._steps:
                raise AssertionError("requests wait and none can be admitted")
            return None
        return self._make_step(slots, length)

    def update(self, step: Step, output: StepOutput, watch: Watch | None = None) -> list[Finished]:
        """Take the outcome of a step.

        Args:
            step: a step that `schedule()` gave, the oldest not yet updated.
            output: what the worker sampled.
            watch: says which answers a stop string ends.
        """
        seqs = self.sequences
        self._updates += 1
        if output.parts > 1:  # there was no memory for so many rows at a time
            self._step_tokens = max(min(self._step_tokens, step.num_rows // output.parts), 1)
            self.counters.memory_retries += 1
        slots, nth = step.sequence[step.samples], step.num_sampled[step.samples]
        token_ids, ended = output.token_ids, output.ended
        current = seqs.request[slots] == step.request[step.samples]
        if not current.all():
            self.counters.idle_rows += int((~current).sum())
        current &= token_ids >= 0  # what could not be sampled is as if it had not been tried
        if not current.all():
            slots, nth, token_ids, ended = (column[current] for column in (slots, nth, token_ids, ended))
        stops = ended if watch is None else ended | watch(seqs.request[slots].astype(np.int32), token_ids, ended)
        seqs.sampled[slots, nth] = token_ids
        self.counters.sampled += slots.size
        done = stops | (nth + 1 >= seqs.max_new_tokens[slots])
        # Nothing left to compute: requests that are done, and prefixes that are complete.
        advancing = self._advancing
        goes_on = (seqs.request[advancing] >= 0) | (seqs.num_tokens[advancing] > seqs.num_computed[advancing])
        self._advancing = advancing[goes_on & ~np.isin(advancing, slots[done])]

        finished = self._finish(slots[done], nth[done] + 1, stops[done], ended[done])
        if finished:
            self.lengths.observe(
                np.array([f.request for f in finished], dtype=np.int32),
                np.array([f.token_ids.size for f in finished], dtype=np.int32),
            )
            self._ahead.clear()  # what is expected of them has changed
            if self._probing:
                self._learn_order(np.array([f.request for f in finished]))
        outgrown = slots[~done & (seqs.until[slots] <= self._steps) & (seqs.num_computed[slots] > 0)]  # not preempted
        if outgrown.size:
            self._book_longer(outgrown)
        return finished

    # After a crash --------------------------------------------------------------------------------------------

    def requests_in_steps(self) -> Int32:
        """Requests that have begun and do not wait: those that steps are made of."""
        return self.sequences.request[self._under_way()].astype(np.int32)

    def requests_begun(self) -> Int32:
        """Requests that have begun and have no answer yet, those that wait to go on included."""
        return self.sequences.request[self._begun()].astype(np.int32)

    def restart(self) -> None:
        """Go on from nothing: all that was computed is gone, and the steps in flight are lost. Requests keep the tokens
        that they got, and wait to be computed again, in the order in which they were admitted."""
        seqs = self.sequences
        under_way, begun = self._under_way(), self._begun()
        places = np.arange(seqs.sampled.shape[1]) < seqs.num_sampled[begun][:, None]
        seqs.num_sampled[begun] = ((seqs.sampled[begun] >= 0) & places).sum(axis=1)
        seqs.num_tokens[begun] = seqs.num_prompt[begun] + seqs.num_sampled[begun]
        for slot in under_way[np.argsort(-seqs.admitted[under_way])].tolist():
            self._put_back(slot)
        for slot in self._slot_of_group[self._slot_of_group >= 0].tolist():
            self._drop_prefix(slot)
        self._releases, self._grants = [], []
        self._updates = self._steps

    def shrink(self) -> bool:
        """After a restart, take half as much memory, in rows of a step and in pages, so far as each request fits alone;
        returns whether that was possible."""
        plan = self._plan
        least = int(pages_needed(plan.groups, self._requests, plan.budget).max())
        tokens = max(self._step_tokens // 2, plan.options.step_tokens // _SHRINK, 1)
        pages = max(self.pool.size // 2, plan.budget.pages // _SHRINK, least)
        if tokens >= self._step_tokens and pages >= self.pool.size:
            return False
        self._step_tokens = min(tokens, self._step_tokens)
        if pages < self.pool.size:
            self.pool = PagePool(pages, peak_used=self.pool.peak_used)
        return True

    def confine(self, requests: Collection[int] | None) -> None:
        """After a restart, let only these requests go on, of those that wait; None: all of them again."""
        waiting = [*self._preempted, *self._held]
        self._confined = requests is not None
        wanted = [requests is None or int(self.sequences.request[slot]) in requests for slot in waiting]
        self._preempted = deque(slot for slot, want in zip(waiting, wanted, strict=True) if want)
        self._held = [slot for slot, want in zip(waiting, wanted, strict=True) if not want]

    def drop(self, requests: Collection[int]) -> None:
        """Leave out requests that have begun: they get no answer. Those that have left already are passed over."""
        begun = self._begun()
        leaving = begun[np.isin(self.sequences.request[begun], list(requests))]
        gone = self.sequences.request[leaving].copy()
        self._advancing = self._advancing[~np.isin(self._advancing, leaving)]
        for slot in leaving.tolist():
            self._leave(slot)
        if self._probing:
            self._learn_order(gone)

    def _learn_order(self, finished: npt.NDArray[np.int_]) -> None:
        """Once the probe has its answers, order what has not begun by the lengths that they show."""
        probe = self._plan.order[: self._plan.probe]
        self._probing -= int(np.isin(finished, probe).sum())
        if self._probing == 0:
            order = order_requests(self._plan, self._requests, self.lengths.expected())
            waiting = np.zeros(order.size, dtype=bool)
            waiting[self._order[self._next :]] = True
            self._order = np.concatenate((self._order[: self._next], order[waiting[order]]))
            self._ahead.clear()

    # Admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let requests in while the step has rows for them and, grown to their expected lengths, all under way fits
        into the pool in every coming step; alone, anything may run."""
        self.held_back = False
        if not self._may_admit:
            return
        seqs = self.sequences
        left = seqs.num_tokens[self._advancing] - seqs.num_computed[self._advancing]
        decodes = self._decodes(self._advancing, left)
        under_way = int((seqs.request[self._advancing] >= 0).sum())
        room = self._step_tokens - int(decodes.sum()) - int(left[~decodes].sum())
        entering: list[int] = []
        while room > 0 and self._may_admit:
            candidate = self._peek()
            path = self._path(candidate.group)
            missing = [group for group in path if self._slot_of_group[group] < 0]
            rows = candidate.tokens + sum(int(self._plan.groups.length[group]) for group in missing)
            # What of them this step has no room for, the steps after it have: those under way leave so many rows.
            steps = 1 + -(-max(rows - room, 0) // max(self._step_tokens - under_way - 1, 1))
            booking = self._book(candidate, path, steps, must_fit=under_way > 0)
            if booking is None:
                self.held_back = True
                break
            entering += self._let_in(candidate, path, missing, booking)
            room -= rows
            under_way += 1
        if entering:
            self._advancing = np.concatenate((self._advancing, np.array(entering, dtype=np.int32)))

    def _peek(self) -> _Candidate:
        """The request to admit next: one that was preempted, else the next in the order."""
        if self._preempted:
            return self._waiting_again(self._preempted[0])
        if not self._ahead:
            self._look_ahead()
        return self._ahead[0]

    def _waiting_again(self, slot: int) -> _Candidate:
        """A request that was under way before; it keeps its slot and what it sampled."""
        seqs = self.sequences
        expected = int(self.lengths.expected(seqs.request[slot : slot + 1])[0])
        return _Candidate(
            request=int(seqs.request[slot]),
            group=int(seqs.parent[slot]),
            depth=int(seqs.depth[slot]),
            start=int(seqs.token_start[slot]),
            tokens=int(seqs.num_tokens[slot]),
            rank=int(seqs.rank[slot]),
            limit=int(seqs.max_new_tokens[slot]),
            left=max(expected - int(seqs.num_sampled[slot]), 1),
            slot=slot,
        )

    def _look_ahead(self) -> None:
        """Find what admission asks of the next requests, for many at once."""
        requests = self._order[self._next : self._next + _AHEAD]
        groups, tokens = self._plan.groups, self._requests.tokens
        depth = groups.request_depth[requests]
        columns = (
            requests,
            groups.request_group[requests],
            depth,
            tokens.offsets[requests] + depth,
            tokens.offsets[requests + 1] - tokens.offsets[requests] - depth,
            groups.request_rank[requests],
            self._requests.max_new_tokens[requests],
            self.lengths.expected(requests),
        )
        self._ahead.extend(map(_Candidate, *(column.tolist() for column in columns)))

    def _book(self, candidate: _Candidate, path: list[int], steps: int, *, must_fit: bool) -> _Booking | None:
        """Book the pages of a request, and of the prefixes that it reads, up to its expected end.

        Args:
            steps: in which its prompt is computed. More than one is not known for certain, so that all pages that it
                will hold are booked from the start.
            must_fit: whether to book nothing and return None if the pool would not do.
        """
        tokens, left = candidate.tokens, candidate.left
        now, ledger = self._steps, self._ledger
        stop = now + steps - 1 + left + self._lag
        held = -(-(tokens + left - 1) // self._page_size) if steps > 1 else 0
        prefixes = [
            (self._booked_until(group), -(-int(self._plan.groups.length[group]) // self._page_size)) for group in path
        ]

        def book(sign: int) -> None:
            if held:
                ledger.book(now, stop, sign * held)
            else:
                ledger.book_growing(now, stop, tokens, sign)
            for until, pages in prefixes:
                ledger.book(until, stop, sign * pages)

        book(1)
        if must_fit and ledger.peak(now, stop) > self.pool.size:
            book(-1)
            return None
        return _Booking(stop, held, tokens - now)

    def _booked_until(self, group: int) -> int:
        """The step before which a group's pages are booked, this one where they are not."""
        slot = int(self._slot_of_group[group])
        return max(int(self.sequences.until[slot]), self._steps) if slot >= 0 else self._steps

    def _let_in(self, candidate: _Candidate, path: list[int], missing: list[int], booking: _Booking) -> list[int]:
        """Make a request that is booked, and the prefixes that are not there, advance; returns their slots."""
        groups, seqs = self._plan.groups, self.sequences
        entering = []
        for group in missing:
            prefix = seqs.add(
                token_start=int(groups.start[group]),
                group=group,
                parent=int(groups.parent[group]),
                rank=int(groups.rank[group]),
                depth=int(groups.depth[group]),
                num_prompt=int(groups.length[group]),
                num_tokens=int(groups.length[group]),
            )
            self._slot_of_group[group] = prefix
            entering.append(prefix)
            self.counters.recomputed += self._lost.pop(int(groups.rank[group]), 0)
        slot = candidate.slot
        if slot >= 0:
            self._preempted.popleft()
            seqs.stamp(slot)
            self.counters.recomputed += self._lost.pop(candidate.rank, 0)
        else:
            self._next += 1
            self._ahead.popleft()
            slot = seqs.add(
                token_start=candidate.start,
                request=candidate.request,
                parent=candidate.group,
                rank=candidate.rank,
                depth=candidate.depth,
                num_prompt=candidate.tokens,
                num_tokens=candidate.tokens,
                max_new_tokens=candidate.limit,
            )
        entering.append(slot)
        self._note(slot, booking)
        for group in path:
            prefix = self._slot_of_group[group]
            seqs.readers[prefix] += 1
            seqs.until[prefix] = max(seqs.until[prefix], booking.until)
        return entering

    def _path(self, group: int) -> list[int]:
        """The groups from the root down to `group`; empty for -1."""
        if group < 0:
            return []
        found = self._paths.get(group)
        if found is None:
            path = self._plan.groups.path[group]
            found = self._paths[group] = path[path >= 0].tolist()
        return found

    def _under_way(self) -> Int32:
        """Slots of requests under way."""
        return self._advancing[self.sequences.request[self._advancing] >= 0]

    def _begun(self) -> Int32:
        """Slots of requests that have begun: under way, or waiting to go on."""
        return np.array([*self._under_way().tolist(), *self._preempted, *self._held], dtype=np.int32)

    # Booking ----------------------------------------------------------------------------------------------------

    def _unbook(self, slot: int) -> None:
        """Take back what is booked for a request from now on. Its prefixes are booked on as far as others read them."""
        seqs, now = self.sequences, self._steps
        until = int(seqs.until[slot])
        if seqs.held[slot]:
            self._ledger.book(now, until, -int(seqs.held[slot]))
        else:
            self._ledger.book_growing(now, until, now + int(seqs.growth[slot]), -1)
        seqs.until[slot] = now
        if until <= now:
            return
        for group in self._path(int(seqs.parent[slot])):
            prefix = int(self._slot_of_group[group])
            if seqs.until[prefix] == until:
                self._book_prefix(group, prefix, max(self._last_end(group), now))

    def _book_prefix(self, group: int, prefix: int, until: int) -> None:
        """Book a prefix up to `until` in place of what is booked for it."""
        pages = -(-int(self._plan.groups.length[group]) // self._page_size)
        booked = max(int(self.sequences.until[prefix]), self._steps)
        if until > booked:
            self._ledger.book(booked, until, pages)
        else:
            self._ledger.book(until, booked, -pages)
        self.sequences.until[prefix] = until

    def _last_end(self, group: int) -> int:
        """The step before which the last of a group's readers under way is booked, or -1."""
        seqs = self.sequences
        slots = self._under_way()
        slots = slots[seqs.parent[slots] >= 0]
        reads = self._plan.groups.path[seqs.parent[slots], self._level_of_group[group]] == group
        return int(seqs.until[slots[reads]].max(initial=-1))

    def _note(self, slot: int, booking: _Booking) -> None:
        seqs = self.sequences
        seqs.until[slot], seqs.held[slot], seqs.growth[slot] = booking

    def _book_on(self, slot: int, left: int) -> None:
        """Book a request that decodes, or begins to, for `left` steps from this one, and its prefixes with it."""
        seqs, now = self.sequences, self._steps
        tokens, until = int(seqs.num_tokens[slot]), now + left + self._lag
        self._ledger.book_growing(now, until, tokens)
        self._note(slot, _Booking(until, 0, tokens - now))
        for group in self._path(int(seqs.parent[slot])):
            prefix = int(self._slot_of_group[group])
            if seqs.until[prefix] < until:
                self._book_prefix(group, prefix, until)

    def _book_longer(self, slots: Int32) -> None:
        """Book requests that have outgrown what was expected of them, each for what is expected now."""
        seqs = self.sequences
        sampled = seqs.num_sampled[slots]
        more = self.lengths.longer(seqs.request[slots], sampled) - sampled
        for slot, left in zip(slots.tolist(), more.tolist(), strict=True):
            self._book_on(slot, left)

    def _book_growing(self, slots: Int32) -> None:
        """Requests whose prompts are complete with the step being made: from now on they are known to grow."""
        left = np.maximum(self.lengths.expected(self.sequences.request[slots]) - self.sequences.num_sampled[slots], 1)
        for slot, steps in zip(slots.tolist(), left.tolist(), strict=True):
            self._unbook(slot)
            self._book_on(slot, steps)

    # Filling a step ---------------------------------------------------------------------------------------------

    def _decodes(self, slots: Int32, left: Int64) -> Bool:
        """Which sequences decode: they have sampled, and one token is left to compute."""
        return (left == 1) & (self.sequences.num_sampled[slots] > 0)

    def _fill(self) -> tuple[Int32, Int32]:
        """The sequences that advance in the next step and by how much, int32 `[C]` each.

        All that decode, then the others in the order of admission until the step is full. A prefix precedes its
        readers there, so a reader gets rows only where its prefixes are complete by the end of the same step: the KV
        of all rows of a layer is stored before any row attends.
        """
        seqs = self.sequences
        slots = self._advancing if self._waits is None else self._advancing[~self._wait(self._advancing)]
        left = seqs.num_tokens[slots] - seqs.num_computed[slots]
        decodes = self._decodes(slots, left)
        room = max(self._step_tokens - int(decodes.sum()), 0)
        others = np.where(decodes, 0, left)
        length = np.clip(room - (np.cumsum(others) - others), 0, others)
        length = np.where(decodes, 1, length).astype(np.int32)
        return slots[length > 0], length[length > 0]

    def _wait(self, slots: Int32) -> Bool:
        """Which requests cannot go on before it is known what the step under way samples for them."""
        assert self._waits is not None
        seqs = self.sequences
        request, last = seqs.request[slots], np.maximum(seqs.num_sampled[slots] - 1, 0)
        in_flight = (seqs.num_sampled[slots] > 0) & (seqs.sampled[slots, last] < 0)
        return (request >= 0) & in_flight & self._waits[self._requests.sampling_id[request]]

    def _reserve_pages(self, slots: Int32, length: Int32) -> bool:
        """Grant the pages that a step needs. Where they run out, take some back and return False: the step must be
        filled anew, since a sequence of it may be gone."""
        seqs = self.sequences
        # A prefix gets all its pages at once, so that they are neighbours.
        reach = np.where(seqs.request[slots] < 0, seqs.num_tokens[slots], seqs.num_computed[slots] + length)
        needed = -(-reach // self._page_size) - seqs.num_pages[slots]
        if int(needed[needed > 0].sum()) > self.pool.num_free:
            self._reclaim()
            return False
        for i in np.flatnonzero(needed > 1).tolist():
            slot, count = int(slots[i]), int(needed[i])
            pages = self.pool.take(slot, count, after=int(seqs.last_page[slot]))
            self._grants.append((np.full(count, slot, dtype=np.int32), pages))
            seqs.last_page[slot] = pages[-1]
        singles = slots[needed == 1]
        if singles.size:
            pages = self.pool.take_one_each(singles, seqs.last_page[singles])
            self._grants.append((singles, pages))
            seqs.last_page[singles] = pages
        seqs.num_pages[slots] += np.maximum(needed, 0)
        return True

    def _reclaim(self) -> None:
        """Take pages back: from an idle prefix if there is one, else from the request that loses least."""
        seqs = self.sequences
        resident = self._slot_of_group[self._slot_of_group >= 0]
        idle = resident[seqs.readers[resident] == 0]
        # Of those that were to read these all have been put back; and what one reads itself may not outlive it.
        unfinished = idle[seqs.num_computed[idle] < seqs.num_tokens[idle]]
        for slot in unfinished.tolist() or idle[np.argsort(seqs.admitted[idle])][:1].tolist():
            self._evict(slot)
        if idle.size:
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
        self.counters.prefix_evictions += bool(self.sequences.num_pages[slot])
        self._drop_prefix(slot)

    def _drop_prefix(self, slot: int) -> None:
        self._again(slot)
        self._slot_of_group[self.sequences.group[slot]] = -1
        self._release(slot)
        self.sequences.remove(slot)

    def _preempt(self, slot: int) -> None:
        """Give back the pages of a request under way; it waits, keeps what it sampled, and is computed again."""
        self.counters.preemptions += 1
        self._put_back(slot)
        self.lengths.widen()

    def _put_back(self, slot: int) -> None:
        seqs = self.sequences
        self._again(slot)
        seqs.num_computed[slot] = 0
        self._release(slot)
        seqs.readers[self._slot_of_group[self._path(int(seqs.parent[slot]))]] -= 1
        self._unbook(slot)
        self._preempted.appendleft(slot)

    def _again(self, slot: int) -> None:
        """A sequence stops advancing; what it has computed is computed a second time when it is let in again."""
        self._lost[int(self.sequences.rank[slot])] = int(self.sequences.num_computed[slot])
        self._advancing = self._advancing[self._advancing != slot]

    def _finish(self, slots: Int32, sampled: Int32, stops: Bool, ended: Bool) -> list[Finished]:
        """Requests that have their answers leave; so do prefixes that none will read."""
        seqs = self.sequences
        if not slots.size:
            return []
        finished = []
        columns = (slots, stops, ended, seqs.request[slots], sampled, seqs.depth[slots])
        for slot, stop, by_token, request, tokens, depth in zip(*(c.tolist() for c in columns), strict=True):
            finished.append(
                Finished(
                    request=request,
                    token_ids=seqs.sampled[slot, :tokens].copy(),
                    reason=FinishReason.STOP if stop else FinishReason.LENGTH,
                    ended=by_token,
                    cached_tokens=depth,
                )
            )
            self._leave(slot)
        return finished

    def _leave(self, slot: int) -> None:
        """A request under way, or that waits to go on, is gone; so are prefixes that none will read."""
        seqs = self.sequences
        path = self._path(int(seqs.parent[slot]))
        if slot in self._preempted:  # it may be, while the step that samples its last token is under way
            self._preempted.remove(slot)
        elif slot in self._held:
            self._held.remove(slot)
        else:
            self._unbook(slot)
            self._release(slot)
            seqs.readers[self._slot_of_group[path]] -= 1
        self._lost.pop(int(seqs.rank[slot]), None)
        seqs.remove(slot)
        self._to_come[path] -= 1
        for group in path:
            prefix = int(self._slot_of_group[group])
            if self._to_come[group] == 0 and prefix >= 0:
                self._book_prefix(group, prefix, self._steps)
                self._slot_of_group[group] = -1
                self._release(prefix)
                self._advancing = self._advancing[self._advancing != prefix]  # it may not be complete
                seqs.remove(prefix)
                self._paths.pop(group, None)

    def _release(self, slot: int) -> None:
        """Return the pages of a sequence to the pool; workers learn of it with the next step."""
        seqs = self.sequences
        if seqs.num_pages[slot]:
            self.pool.release(slot)
            self._releases.append(slot)
        seqs.num_pages[slot] = 0
        seqs.last_page[slot] = -1

    # Making a step ----------------------------------------------------------------------------------------------

    def _make_step(self, slots: Int32, length: Int32) -> Step:
        seqs = self.sequences
        by_rank = np.argsort(seqs.rank[slots])
        slots, length = slots[by_rank], length[by_rank]
        start = seqs.num_computed[slots].astype(np.int32)
        request = seqs.request[slots].astype(np.int32)
        stop = start + length
        samples = (request >= 0) & (stop == seqs.num_tokens[slots])
        step = Step(
            index=self._steps,
            sequence=slots,
            request=request,
            start=start,
            length=length,
            depth=seqs.depth[slots].astype(np.int32),
            samples=samples,
            num_sampled=seqs.num_sampled[slots].astype(np.int32),
            token_ids=self._token_ids(slots, start, length),
            prefix_reads=self._prefix_reads(slots, length),
            releases=np.array(self._releases, dtype=np.int32),
            grant_sequence=np.concatenate([_NO_INTS, *(owners for owners, _ in self._grants)]),
            grant_page=np.concatenate([_NO_INTS, *(pages for _, pages in self._grants)]),
            past=self._past(slots, request, samples),
        )
        complete = (seqs.held[slots] > 0) & step.samples
        if complete.any():
            self._book_growing(slots[complete])
        self.counters.prompt_computed += int(np.clip(seqs.num_prompt[slots] - start, 0, length).sum())
        seqs.num_computed[slots] = stop
        seqs.sample(slots[step.samples])
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

    def _past(self, slots: Int32, request: Int32, samples: Bool) -> PastTokens | None:
        """What those of the requests that look back have sampled."""
        if self._looks_back is None:
            return None
        seqs = self.sequences
        looks = samples & self._looks_back[self._requests.sampling_id[request]]
        length = np.where(looks, seqs.num_sampled[slots], 0).astype(np.int32)
        places = concat_ranges(np.zeros_like(length), length)
        return PastTokens(length, seqs.sampled[np.repeat(slots, length), places])

    def _prefix_reads(self, slots: Int32, length: Int32) -> PrefixReads:
        """Which rows read which prefix: per level, runs of neighbouring chunks that read the same KV."""
        seqs = self.sequences
        first_row = np.cumsum(length) - length
        parent, depth = seqs.parent[slots], seqs.depth[slots]
        columns = []
        levels = int(self._level_of_group[parent[parent >= 0]].max(initial=-1)) + 1
        for level in range(levels):
            group = self._path_of[parent, level]
            reads = np.minimum(self._length_of[group], depth - self._depth_of[group])
            group = np.where(reads > 0, group, -1)
            changes = (group[1:] != group[:-1]) | (reads[1:] != reads[:-1])
            edge = np.concatenate(([0], np.flatnonzero(changes) + 1))
            rows = np.append(first_row[edge[1:]], first_row[-1] + length[-1]) - first_row[edge]
            real = group[edge] >= 0
            if not real.any():
                continue
            edge, rows = edge[real], rows[real]
            of = group[edge]
            columns.append(
                (
                    np.full(edge.size, level),
                    first_row[edge],
                    rows,
                    self._slot_of_group[of],
                    reads[edge],
                    self._depth_of[of],
                )
            )
        stacked = zip(*columns, strict=True) if columns else ([_NO_INTS] for _ in range(6))
        return PrefixReads(*(np.concatenate(column).astype(np.int32) for column in stacked))
