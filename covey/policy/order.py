"""Who enters next, who gives way: the part of a batching policy that ranks sequences."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

from .ledger import Entry


class Order(Protocol):
    """A ranking of sequences. It reads the ledger's entries and changes none."""

    def line(self, waiting: Iterable[Entry], room: int, now: float) -> Iterable[Entry]:
        """At most `room` of the waiting sequences, given in order of arrival, in the order in which they may enter."""

    def outranks(self, others: Iterable[Entry], step: Sequence[Entry], now: float) -> bool:
        """Whether one of `others`, waiting or running, should prefill before those that do in the running step."""

    def makes_way(self, head: Entry, running: Iterable[Entry], now: float) -> Entry | None:
        """The sequence to swap out so that `head`, for which there is no room, can enter; None: it must wait."""


class ByArrival:
    """First come, first served: nobody is overtaken, interrupted or preempted."""

    def line(self, waiting: Iterable[Entry], room: int, now: float) -> Iterable[Entry]:
        """As they came; the preempted before the newcomers."""
        return islice(waiting, room)

    def outranks(self, others: Iterable[Entry], step: Sequence[Entry], now: float) -> bool:
        """Never."""
        return False

    def makes_way(self, head: Entry, running: Iterable[Entry], now: float) -> Entry | None:
        """Nobody."""
        return None


class ShortFirst:
    """Short prompts before long ones (LAPS), except that nobody is overtaken who has waited for `patience_s`."""

    def __init__(self, *, short_max: int, patience_s: float) -> None:
        self._short_max = short_max
        self._patience_s = patience_s

    def line(self, waiting: Iterable[Entry], room: int, now: float) -> Iterable[Entry]:
        """The patient, the short, the long; each in order of arrival."""
        return heapq.nsmallest(room, waiting, key=lambda entry: self._rank(entry, now))

    def outranks(self, others: Iterable[Entry], step: Sequence[Entry], now: float) -> bool:
        """Never: long prompts are cut, so that short ones come in between."""
        return False

    def makes_way(self, head: Entry, running: Iterable[Entry], now: float) -> Entry | None:
        """Nobody."""
        return None

    def _rank(self, entry: Entry, now: float) -> tuple[bool, bool, int]:
        is_young = now - entry.demand.arrived_at <= self._patience_s
        return is_young, is_young and entry.left > self._short_max, entry.order
