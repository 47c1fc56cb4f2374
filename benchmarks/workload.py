"""How much is asked of a system, and when."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """In each round, `alone` requests one at a time, then an open loop of `requests` at each rate."""

    rates_per_s: tuple[float, ...]
    requests: int
    alone: int
    rounds: int = 1


QUICK = Workload(rates_per_s=(0.5,), requests=12, alone=3)
FULL = Workload(rates_per_s=(0.25, 0.5, 1.0), requests=40, alone=6)
AGAINST_PEERS = Workload(rates_per_s=(0.25, 0.5, 1.0), requests=20, alone=6, rounds=3)
"""Systems take turns, so that a slow minute of the machine meets all of them; ratios are medians over the rounds."""


def workload(*, quick: bool, peers: bool) -> Workload:
    """The one that fits the flags of the command."""
    if quick:
        return QUICK
    return AGAINST_PEERS if peers else FULL
