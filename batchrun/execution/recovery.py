"""Finds the requests that bring a worker down, leaves them out, and lets all others go on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from batchrun.errors import BatchrunError
from batchrun.schedule.scheduler import Scheduler

log = logging.getLogger(__name__)

_GIVE_UP = 32  # crashes one after the other, without an answer in between: it takes some ten to find one in a thousand


class Recovery:
    """What to do about a worker that was lost.

    After the first time all goes on as before: it may have been chance. Requests that were in the steps both times are
    suspects, and are run by themselves (a trial); of those that bring the worker down again, one half is tried, then
    the other, down to the one that does it alone, twice: it is left out. Whoever comes through a trial has its answer.

    Where it was killed, which is what the system does when memory runs out, all goes on with smaller steps and less KV.

    Logits that are no numbers tell whose they are: that request is computed once more from the start, and left out if
    it happens again.

    Args:
        scheduler: of the run.
        on_quarantined: told of a request that is left out, of how many times it was tried, and why.
        on_lost: called each time that the worker was lost.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        on_quarantined: Callable[[int, int, str], None],
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.crashes = 0
        self._scheduler = scheduler
        self._on_quarantined = on_quarantined
        self._on_lost = on_lost
        self._seen: Counter[int] = Counter()  # by request, how often it was there when a worker was lost
        self._alone: Counter[int] = Counter()  # of these, how often it was there alone
        self._unsound: Counter[int] = Counter()  # and how often its logits were no numbers
        self._trials: list[list[int]] = []  # the last one is under way
        self._in_a_row = 0

    def crashed(self, cause: str, *, killed: bool = False) -> None:
        """The worker was lost with all it had; `killed` as in `WorkerLost`.

        Raises:
            BatchrunError: it happens again and again, and no request is to blame.
        """
        present = sorted(self._scheduler.requests_in_steps().tolist())
        self._count(cause)
        self._scheduler.restart()
        if killed and self._scheduler.shrink():
            log.warning("from now on steps are smaller and fewer KV pages are taken")
        self._seen.update(present)
        if self._trials:
            suspects = [request for request in self._trials.pop() if request in present]
            if len(suspects) > 1:
                self._split(suspects)
            elif suspects:
                self._alone.update(suspects)
                if self._alone[suspects[0]] > 1:
                    self._quarantine(suspects[0], cause)
                else:  # even alone it may have been chance
                    self._trials.append(suspects)
        else:
            suspects = [request for request in present if self._seen[request] > 1]
            if suspects:
                log.warning("%s requests were in both crashes; they are tried by themselves", len(suspects))
                self._trials = [suspects]
        self._next_trial()

    def no_numbers(self, requests: list[int]) -> None:
        """The logits of these were no numbers.

        Raises:
            BatchrunError: as `crashed`.
        """
        cause = "the logits of the model were not numbers (NaN or infinite)"
        self._count(cause)
        self._scheduler.restart()
        for request in requests:
            self._unsound[request] += 1
            if self._unsound[request] > 1:
                self._quarantine(request, cause)
        self._next_trial()

    def stuck(self, request: int, cause: str) -> None:
        """The grammar of a request allows no token: it would allow none the next time either."""
        self._quarantine(request, f"no token can follow by its grammar: {cause}", attempts=1)

    def finished(self) -> None:
        """A request got its answer."""
        self._in_a_row = 0

    def widen(self) -> bool:
        """Nothing is left to do as things stand; whether there is something else now."""
        if not self._trials:
            return False
        self._trials.pop()
        self._next_trial()
        return True

    def _count(self, cause: str) -> None:
        self.crashes += 1
        self._in_a_row += 1
        self._on_lost()
        log.warning("the worker was lost (%s time): %s", self.crashes, cause)
        if self._in_a_row >= _GIVE_UP:
            raise BatchrunError(
                f"The worker was lost {self._in_a_row} times, and no request got its answer in between; the last "
                f"time: {cause}.",
                hint="What is finished is kept: the same command goes on once the cause is mended.",
                code="worker_lost",
            )

    def _split(self, suspects: list[int]) -> None:
        half = len(suspects) // 2
        self._trials += [suspects[half:], suspects[:half]]

    def _next_trial(self) -> None:
        self._scheduler.confine(self._trials[-1] if self._trials else None)

    def _quarantine(self, request: int, cause: str, attempts: int = 0) -> None:
        self._scheduler.drop([request])
        log.warning("request %s is left out: %s", request, cause)
        self._on_quarantined(request, self._seen[request] + self._unsound[request] + attempts, cause)
