"""What batching policies differ in: who enters next, how prompts are cut, when a running prefill gives way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from .chunk import Chunk
from .ledger import Entry


class Discipline(Protocol):
    """A way of ordering and cutting. It sees the ledger's entries and changes none of them."""

    def arrived(self, entry: Entry) -> None:
        """Take note of a new sequence."""

    def line(self, waiting: Iterable[Entry], room: int, now: float) -> Iterable[Entry]:
        """At most `room` of the waiting sequences, given in order of arrival, in the order in which they may enter."""

    def prefill(self, ready: Sequence[Entry], decoding: int, now: float) -> list[Chunk]:
        """Chunks for sequences that prefill, given in order of start, in a step that also decodes `decoding` tokens."""

    def wakes_at(self) -> float | None:
        """When a `prefill` that was held back is due, though nothing else happens."""

    def interrupts_at(self) -> float | None:
        """When the prefill chunks of the plan made last shall stop at the next layer."""

    def outranks(self, waiting: Iterable[Entry], running: Iterable[Entry], step: Sequence[Entry], now: float) -> bool:
        """Whether a sequence that is not in the running step, started or not, should prefill before those in it."""

    def makes_way(self, head: Entry, running: Iterable[Entry], now: float) -> Entry | None:
        """The sequence to swap out so that `head`, for which there is no room, can enter."""


def in_order(waiting: Iterable[Entry], room: int) -> Iterator[Entry]:
    """The first `room` of a line."""
    return (entry for entry, _ in zip(waiting, range(room), strict=False))


def resume(ready: Iterable[Entry], end: Callable[[int], int | None] = lambda _first: None) -> list[Chunk]:
    """The suspended chunks that can go on in one step: those that stopped where the first of them did.

    `end` maps the layer to go on with to the `last_layer` of the chunk.
    """
    stopped = [entry.suspended for entry in ready if entry.suspended is not None]
    if not stopped:
        return []
    first = stopped[0].first_layer
    return [replace(chunk, last_layer=end(first)) for chunk in stopped if chunk.first_layer == first]


def cut(entries: Iterable[Entry], budget: int) -> list[Chunk]:
    """Chunks for entries without a suspended one, in the given order, of `budget` tokens in all."""
    chunks = []
    for entry in entries:
        if budget <= 0:
            break
        if entry.suspended is None:
            chunks.append(chunk_of(entry, min(entry.left, budget)))
            budget -= chunks[-1].count
    return chunks


def chunk_of(entry: Entry, count: int) -> Chunk:
    """The next `count` tokens of a sequence."""
    return Chunk(seq=entry.seq, start=entry.computed, count=count, is_last=count == entry.left)
