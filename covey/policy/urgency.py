"""Deadline order: those that can still make it, nearest first; the hopeless last (FlowPrefill)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from .ledger import Entry
from .pace import Pace

Rank = tuple[bool, int, float, int]


class ByUrgency:
    """Ranks by priority, then by sign(slack) / |time to the deadline|, where the slack is what the predicted prefill
    leaves of that time. Without a deadline the urgency is 0: after the rescuable, before the hopeless. Who has waited
    for `patience_s` goes before all others, the oldest first, so that nobody starves.
    """

    def __init__(self, pace: Pace, *, patience_s: float) -> None:
        self._pace = pace
        self._patience_s = patience_s

    def due(self, entry: Entry) -> float:
        """When the first token must be there; never, when it is, or nobody minds."""
        due = entry.demand.first_token_by
        return math.inf if due is None or entry.drawn else due

    def is_hopeless(self, entry: Entry, now: float) -> bool:
        """Whether the first token comes too late even if nothing else is computed."""
        return self.due(entry) - now < self._pace.predict_s(entry.left)

    def rank(self, entry: Entry, now: float) -> Rank:
        """The smaller, the sooner."""
        if now - entry.demand.arrived_at > self._patience_s:
            return False, 0, 0.0, entry.order
        left_s = max(1e-9, abs(self.due(entry) - now))
        urgency = (-1 if self.is_hopeless(entry, now) else 1) / left_s
        return True, -entry.demand.priority, -urgency, entry.order

    def line(self, waiting: Iterable[Entry], room: int, now: float) -> Iterable[Entry]:
        """The most urgent first."""
        return heapq.nsmallest(room, waiting, key=lambda entry: self.rank(entry, now))

    def outranks(self, others: Iterable[Entry], step: Sequence[Entry], now: float) -> bool:
        """Whether somebody who can make it is more urgent than all of the step."""
        first = min(self.rank(entry, now) for entry in step)
        return any(self.rank(entry, now) < first and not self.is_hopeless(entry, now) for entry in others)

    def makes_way(self, head: Entry, running: Iterable[Entry], now: float) -> Entry | None:
        """Somebody of lower priority, or, when the head can make it, a hopeless one; the least urgent of them."""
        can_make_it = not self.is_hopeless(head, now) and self.due(head) < math.inf
        losers = [
            entry
            for entry in running
            if entry.demand.priority < head.demand.priority
            or (can_make_it and entry.demand.priority == head.demand.priority and self.is_hopeless(entry, now))
        ]
        return max(losers, key=lambda entry: (-entry.demand.priority, self.rank(entry, now)), default=None)
