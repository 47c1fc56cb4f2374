"""How prompts become chunks: the part of a batching policy that fills a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from .chunk import Chunk
from .ledger import Entry


class Cutting(Protocol):
    """A way to fill steps. It reads the ledger's entries and changes none."""

    wakes_at: float | None
    """When chunks that the last `prefill` held back are due, though nothing else happens."""
    interrupts_at: float | None
    """From when on the chunks of the last `prefill` shall stop at the next layer."""

    def prefill(self, ready: Sequence[Entry], decoding: int, now: float) -> list[Chunk]:
        """Chunks for sequences that prefill, given in order of start, in a step that also decodes `decoding` tokens."""


def all_layers(_first: int) -> None:
    """The `last_layer` of chunks that go on to the end."""


def resume(ready: Iterable[Entry], last_layer: Callable[[int], int | None] = all_layers) -> list[Chunk]:
    """The suspended chunks that can go on in one step: those that stopped where the first of them did.

    `last_layer` maps the layer to go on with to the one to stop at.
    """
    stopped = [entry.suspended for entry in ready if entry.suspended is not None]
    if not stopped:
        return []
    first = stopped[0].first_layer
    return [replace(chunk, last_layer=last_layer(first)) for chunk in stopped if chunk.first_layer == first]


def cut(entries: Iterable[Entry], budget: int) -> list[Chunk]:
    """Chunks for the entries that are not suspended, in the given order, of `budget` tokens in all."""
    chunks = []
    for entry in entries:
        if budget <= 0:
            break
        if entry.suspended is None:
            chunks.append(chunk_of(entry, min(entry.left, budget)))
            budget -= chunks[-1].count
    return chunks


def follow_load(loading: Iterable[Entry], budget: int, taken: Sequence[Chunk]) -> list[Chunk]:
    """Chunks through the layers that are loaded already, for sequences whose others are still on their way.

    `taken` are the step's other prompt chunks: all that run through some layers only must share one range. The first
    sequence with something to do sets it; the others join when they stand where it does and have the same layers.
    """
    if any(chunk.first_layer or chunk.last_layer is not None for chunk in taken):
        return []
    found: list[Chunk] = []
    for entry in loading:
        chunk = entry.suspended or chunk_of(entry, max(1, min(entry.left, budget)))
        layers = entry.layers or 0
        first, last = (found[0].first_layer, found[0].last_layer or 0) if found else (chunk.first_layer, layers)
        fits = chunk.count <= max(1, budget) or not (found or taken)
        if fits and chunk.first_layer == first < last <= layers:
            found.append(replace(chunk, last_layer=last))
            budget -= chunk.count
    return found


def chunk_of(entry: Entry, count: int) -> Chunk:
    """The next `count` tokens of a sequence."""
    return Chunk(seq=entry.seq, start=entry.computed, count=count, is_last=count == entry.left)
