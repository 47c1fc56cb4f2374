"""The state of every sequence that a worker has taken on: waiting, admitted or running."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from .chunk import Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a sequence asks for. `arrived_at` and `first_token_by` are on the clock of `now`, in seconds."""

    tokens: int
    """Known tokens: those of the prompt, and those generated elsewhere."""
    arrived_at: float = 0.0
    first_token_by: float | None = None
    """When the first token is due (arrival + objective); None: no objective, or it is there already."""
    priority: int = 0
    """Greater is more important."""


@dataclass(slots=True)
class Entry:
    """One sequence. Positions before `computed` are in its blocks, tokens before `known` exist."""

    seq: int
    demand: Demand
    order: int
    """Place in order of arrival; a preempted sequence keeps it."""
    known: int
    computed: int = 0
    drawn: int = 0
    """Tokens drawn here."""
    suspended: Chunk | None = None
    """A chunk that stopped between two layers; `first_layer` is where it goes on."""
    layers: int | None = None
    """Leading layers whose keys and values are there, while others are still being loaded; None: all are."""
    is_paused: bool = False
    preemptions: int = 0

    @property
    def left(self) -> int:
        """Known tokens to compute."""
        return self.known - self.computed

    @property
    def is_prefilling(self) -> bool:
        """Whether more is to be computed than the one token that decoding computes."""
        return self.left > 1 or self.suspended is not None


class Ledger:
    """Which sequence is where, in order of arrival. A policy orders and cuts; only the ledger changes places."""

    def __init__(self) -> None:
        self._count = 0
        self._returning: dict[int, Entry] = {}
        self._newcomers: dict[int, Entry] = {}
        self._admitted: dict[int, Entry] = {}
        self._running: dict[int, Entry] = {}
        self._ahead = 0

    @property
    def newcomers(self) -> int:
        """Waiting sequences that never ran."""
        return len(self._newcomers)

    @property
    def waiting(self) -> int:
        """Sequences without room."""
        return len(self._returning) + len(self._newcomers)

    @property
    def holding(self) -> int:
        """Sequences with room, started or not."""
        return len(self._admitted) + len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Known tokens that must be computed before every sequence decodes."""
        return self._ahead + sum(entry.left for entry in self._running.values() if entry.left > 1)

    @property
    def running(self) -> Mapping[int, Entry]:
        """Started sequences."""
        return self._running

    def line(self) -> Iterator[Entry]:
        """Waiting sequences: the preempted ones, then the newcomers, each in order of arrival."""
        return chain(sorted(self._returning.values(), key=lambda entry: entry.order), self._newcomers.values())

    def submit(self, seq: int, demand: Demand) -> None:
        """Put a new sequence at the end of the line."""
        assert all(seq not in place for place in self._places()), f"sequence {seq} is here already"
        self._count += 1
        self._ahead += demand.tokens
        self._newcomers[seq] = Entry(seq=seq, demand=demand, order=self._count, known=demand.tokens)

    def admit(self, seq: int) -> None:
        """Move a waiting sequence to those that hold blocks."""
        place = self._returning if seq in self._returning else self._newcomers
        self._admitted[seq] = place.pop(seq)

    def start(self, seq: int, *, computed: int, known: int, layers: int | None = None) -> None:
        """Let an admitted sequence run, through `layers` layers at first."""
        assert 0 <= computed < known, "a token is left to compute, or none could be drawn"
        entry = self._running[seq] = self._admitted.pop(seq)
        self._ahead -= entry.known
        entry.computed, entry.known, entry.layers = computed, known, layers

    def settle(self, seq: int, *, computed: int) -> None:
        """End the loading of a running sequence: `computed` of its tokens turned out to be there, in all layers."""
        entry = self._running[seq]
        entry.layers = None
        if computed != entry.computed:
            entry.computed, entry.suspended = computed, None

    def requeue(self, seq: int) -> None:
        """Move a running sequence back to the line, ahead of the newcomers; what it had computed is gone."""
        entry = self._returning[seq] = self._running.pop(seq)
        self._ahead += entry.known
        entry.computed, entry.suspended, entry.layers, entry.is_paused = 0, None, None, False
        entry.preemptions += 1

    def remove(self, seq: int) -> None:
        """Forget a sequence, wherever it is; without effect when it is not here."""
        if self._running.pop(seq, None) is not None:
            return
        for place in (self._returning, self._newcomers, self._admitted):
            if (entry := place.pop(seq, None)) is not None:
                self._ahead -= entry.known

    def check(self) -> None:
        """Assert the ledger's invariants."""
        seqs = [seq for place in self._places() for seq in place]
        assert len(seqs) == len(set(seqs)), "a sequence is in two places"
        assert all(entry.seq == seq for place in self._places() for seq, entry in place.items())
        idle = [*self._returning.values(), *self._newcomers.values(), *self._admitted.values()]
        assert self._ahead == sum(entry.known for entry in idle)
        assert all(entry.suspended is None and entry.layers is None and not entry.is_paused for entry in idle)
        for entry in self._running.values():
            assert 0 <= entry.computed < entry.known, "a running sequence has a token to compute"
            chunk = entry.suspended
            if chunk is not None and entry.layers is not None:
                assert chunk.first_layer <= entry.layers, "it ran ahead of what is loaded"
            assert chunk is None or (chunk.start == entry.computed and chunk.count <= entry.left and not chunk.draft)

    def _places(self) -> tuple[dict[int, Entry], ...]:
        return self._returning, self._newcomers, self._admitted, self._running
