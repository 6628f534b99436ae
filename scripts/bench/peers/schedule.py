"""What is run, in which order: everyone takes turns, so that a disturbance hits nobody alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.bench.peers.registry import FLOOR, OURS, SHUFFLED, SORTED, Peer

WORKLOADS = ("micro", "pressure", "tree", "mixed", "skew", "none")
DTYPES = ("float32", "bfloat16")
BOTH_ORDERS = ("pressure", "tree")  # here the order of the input decides what a cache of recent prefixes is good for
MAIN = ("micro", "pressure")  # the others are run once, against the strongest alone
WITH_ALL = "micro"  # where the slow ones take part


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of one peer."""

    peer: Peer
    workload: str
    dtype: str
    order: str
    round: int


def turns(
    peers: Sequence[Peer],
    *,
    workloads: Sequence[str] = WORKLOADS,
    dtypes: Sequence[str] = DTYPES,
    repeats: int = 3,
    quick: bool = False,
    everywhere: bool = False,
) -> Iterator[Turn]:
    """All runs of a measurement.

    Args:
        repeats: rounds of the three strongest on `MAIN`; the slow ones take part in the first of `WITH_ALL` alone.
        quick: `micro` with the three strongest and `pressure` in the first dtype with the two strongest, once each.
        everywhere: all of `peers` take part in all rounds of all workloads.
    """
    for workload in workloads:
        if quick and workload not in MAIN:
            continue  # each run of a peer takes its time to load too
        for dtype in dtypes[:1] if quick and workload != "micro" else dtypes:
            rounds = repeats if workload in MAIN and not quick else 1
            for number in range(rounds):
                most = 3 if everywhere else _highest_rank(workload, number, quick)
                asked = [peer for peer in (OURS, *peers) if peer.rank <= most and dtype in peer.dtypes]
                once = [
                    Turn(peer, workload, dtype, order, number) for peer in asked for order in _orders(peer, workload)
                ]
                start = number % len(once)
                yield Turn(FLOOR, workload, dtype, SHUFFLED, number)
                yield from once[start:] + once[:start]


def _highest_rank(workload: str, number: int, quick: bool) -> int:
    if workload not in MAIN:
        return 1
    if quick:
        return 2 if workload == "micro" else 1
    return 3 if workload == WITH_ALL and number == 0 else 2


def _orders(peer: Peer, workload: str) -> tuple[str, ...]:
    return (SHUFFLED, SORTED) if workload in BOTH_ORDERS and not peer.sorts else (SHUFFLED,)
