"""Continuous batching: which sequences wait, which run, and what the next step computes (Orca §4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from covey.errors import Overloaded

from .batch_limits import BatchLimits
from .chunk import Chunk
from .cutting import Cutting, chunk_of, follow_load
from .ledger import Demand, Entry, Ledger
from .order import Order
from .pace import Pace

NONE: Mapping[int, int] = MappingProxyType({})
PREEMPTION_GAP_STEPS = 4
"""Steps from one preemption that an order asks for to the next (FastSwitch: priorities change every k steps)."""


class Batcher:
    """A ledger of sequences, an order that ranks them, and a cutting that fills steps with them.

    A sequence is submitted, admitted when the caller finds room for it, started once its blocks are there (loading them
    may take a while), then planned at every step until it is removed, or preempted, which puts it back in the line
    before all newcomers. Decoding sequences go first with one token each, then their drafts, then prefills.
    """

    def __init__(self, limits: BatchLimits, order: Order, cutting: Cutting, pace: Pace, *, n_layers: int) -> None:
        self.limits = limits
        self._order = order
        self._cutting = cutting
        self._pace = pace
        self._n_layers = n_layers
        self._ledger = Ledger()
        self._blocked: int | None = None
        self._in_step: tuple[Entry, ...] = ()
        self._steps_since_preemption = PREEMPTION_GAP_STEPS

    # -- what it holds ------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Sequences without room."""
        return self._ledger.waiting

    @property
    def running(self) -> int:
        """Sequences with room, started or not."""
        return self._ledger.holding

    @property
    def queued_tokens(self) -> int:
        """Tokens that must still be computed before every sequence here decodes."""
        return self._ledger.queued_tokens

    def retry_after_ms(self) -> int:
        """A guess at when there is room again: the time that the queued tokens take."""
        return min(10_000, max(100, round(1000 * self.queued_tokens * (self._pace.s_per_token or 0.001))))

    # -- coming and going -----------------------------------------------------------

    def submit(self, seq: int, demand: Demand) -> None:
        """Put a sequence in the line. Raises Overloaded when the line is full."""
        if self._ledger.newcomers >= max(1, self.limits.queue_max):
            raise Overloaded("the worker's queue is full", retry_after_ms=self.retry_after_ms())
        self._ledger.submit(seq, demand)

    def admit(self, find_room: Callable[[int], bool], now: float) -> tuple[int, ...]:
        """Admit waiting sequences in the policy's order for as long as `find_room` gives them their blocks."""
        admitted: list[int] = []
        self._blocked = None
        room = max(0, self.limits.max_running - self.running)
        for entry in tuple(self._order.line(self._ledger.line(), room, now)) if room and self.waiting else ():
            if not find_room(entry.seq):
                self._blocked = entry.seq
                break
            self._ledger.admit(entry.seq)
            admitted.append(entry.seq)
        return tuple(admitted)

    def start(self, seq: int, *, computed: int, known: int, layers: int | None = None) -> None:
        """Let an admitted sequence run: `computed` of its `known` tokens are in its blocks.

        With `layers`, only those leading layers of them are, and it runs no further until `advance` or `settle`.
        """
        self._ledger.start(seq, computed=computed, known=known, layers=layers)

    def layers_of(self, seq: int) -> int:
        """How many leading layers of a running sequence are there, while it is loaded."""
        return self._ledger.running[seq].layers or 0

    def advance(self, seq: int, layers: int) -> None:
        """More leading layers of a running sequence are loaded; it is drawn from only after `settle`."""
        self._ledger.running[seq].layers = layers

    def settle(self, seq: int, *, computed: int) -> None:
        """The loading of a running sequence has ended, and `computed` of its tokens are there in all layers.

        When those are fewer than it started with, what it has done since is void. Not while a step runs it.
        """
        self._ledger.settle(seq, computed=computed)

    def is_waiting_for_layers(self, seq: int) -> bool:
        """Whether a running sequence has done all that the layers loaded so far allow."""
        entry = self._ledger.running[seq]
        done = entry.suspended.first_layer if entry.suspended is not None else 0
        return entry.layers is not None and done >= entry.layers

    def computed(self, seq: int) -> int:
        """Leading tokens of a running sequence whose keys and values are in its blocks."""
        return self._ledger.running[seq].computed

    def pause(self, seq: int, *, is_paused: bool) -> None:
        """Leave a running sequence out of the batch, or take it in again."""
        self._ledger.running[seq].is_paused = is_paused

    def remove(self, seq: int) -> None:
        """Forget a sequence, wherever it is; without effect when it is not here."""
        self._ledger.remove(seq)

    # -- preemption -----------------------------------------------------------------

    def preempt(self, now: float) -> tuple[int, ...]:
        """Running sequences to swap out so that the one that `admit` found no room for can enter; mostly none.

        The caller takes their blocks and calls `requeue`. Call it after `admit`.
        """
        if not self.waiting or self._steps_since_preemption < PREEMPTION_GAP_STEPS:
            return ()
        head = next(iter(self._order.line(self._ledger.line(), 1, now)))
        if self.running < self.limits.max_running and head.seq != self._blocked:
            return ()
        settled = [e for e in self._ledger.running.values() if e.layers is None]
        candidates = [e for e in settled if e.preemptions < self.limits.preemptions_max]
        loser = self._order.makes_way(head, candidates, now)
        if loser is None:
            return ()
        self._steps_since_preemption = 0
        return (loser.seq,)

    def victim(self, spare: Collection[int] = ()) -> int | None:
        """The running sequence to swap out when blocks run out: the lowest priority, then the latest arrival.

        Who stands still goes first, and who was preempted often goes last. The oldest of the highest priority is never
        chosen while there is another one, so that somebody always gets to the end. None when only `spare` ones run, or
        such as are still being loaded.
        """
        running = self._ledger.running
        protected = max(running.values(), key=_importance, default=None)
        candidates = [e for e in running.values() if e.seq not in spare and e.layers is None]
        others = [e for e in candidates if e is not protected] or candidates
        return min(others, key=self._resistance).seq if others else None

    def requeue(self, seq: int) -> None:
        """Put a running sequence, whose blocks were taken, back in the line before the newcomers."""
        self._ledger.requeue(seq)

    # -- steps --------------------------------------------------------------------------

    def plan(self, now: float, drafts: Mapping[int, int] = NONE) -> tuple[Chunk, ...]:
        """What the next step computes: each sequence at most once; empty when nothing can run.

        `drafts` says how many guesses are offered for sequences that decode; as many as fit are taken.
        """
        unpaused = [entry for entry in self._ledger.running.values() if not entry.is_paused]
        active = [entry for entry in unpaused if entry.layers is None]
        ready = [entry for entry in active if entry.is_prefilling]
        decodes = [chunk_of(entry, 1) for entry in active if not entry.is_prefilling]
        if drafts:
            decodes = self._with_drafts(decodes, drafts, self.limits.chunk_min if ready else 0)
        decoding = sum(chunk.tokens for chunk in decodes)
        prefills = self._cutting.prefill(ready, decoding, now)
        self._in_step = tuple(self._ledger.running[chunk.seq] for chunk in prefills)
        if len(active) == len(unpaused):
            return (*decodes, *prefills)
        budget = self.limits.prefill_budget(self._pace, decoding) - sum(chunk.count for chunk in prefills)
        loading = [entry for entry in unpaused if entry.layers is not None]
        return (*decodes, *prefills, *follow_load(loading, budget, prefills))

    def wakes_at(self) -> float | None:
        """When to plan again though nothing happens: a prefill is held back until then. None: nothing is."""
        return self._cutting.wakes_at

    def interrupts_at(self) -> float | None:
        """From when on the prefills of the plan made last shall stop at the next layer, for decoding's sake."""
        return self._cutting.interrupts_at if self._in_step else None

    def should_interrupt(self, now: float) -> bool:
        """Whether the prefills of the running step shall stop at the next layer: somebody more urgent is there.

        To be asked when a sequence arrives or starts during a step; it stays false while nothing prefills.
        """
        if not self._in_step:
            return False
        running = self._ledger.running.values()
        others = [e for e in running if e.is_prefilling and not e.is_paused and e.layers is None]
        if self.running < self.limits.max_running:
            others += (entry for entry in self._ledger.line() if entry.seq != self._blocked)
        return self._order.outranks(others, self._in_step, now)

    def apply(
        self,
        plan: Sequence[Chunk],
        drawn: Mapping[int, int],
        elapsed_s: float,
        *,
        suspended: Mapping[int, int] = NONE,
    ) -> None:
        """Book a finished step, before those that failed, ended or were cancelled in it are removed.

        `drawn` says how many tokens were drawn for a sequence, `suspended` with which layer a chunk goes on.
        """
        self._in_step = ()
        self._steps_since_preemption += 1
        work = 0.0
        for chunk in plan:
            until = suspended.get(chunk.seq, chunk.last_layer)
            work += chunk.tokens * chunk.share(self._n_layers, until=until)
            entry = self._ledger.running.get(chunk.seq)
            if entry is None:
                continue
            if until is not None:
                assert not chunk.draft, "a chunk with guesses runs through all layers"
                entry.suspended = replace(chunk, first_layer=until, last_layer=None)
                continue
            draws = drawn.get(chunk.seq, 0)
            assert draws <= chunk.draft + 1
            entry.suspended = None
            entry.known += draws
            entry.drawn += draws
            entry.computed = min(chunk.start + chunk.count + max(0, draws - 1), entry.known - 1)
        self._pace.observe(work, elapsed_s)

    def check(self) -> None:
        """Assert the batcher's invariants."""
        self._ledger.check()
        assert self._ledger.newcomers <= max(1, self.limits.queue_max)
        assert self.running <= self.limits.max_running

    # -- inside ------------------------------------------------------------------------------

    def _with_drafts(self, decodes: list[Chunk], drafts: Mapping[int, int], reserved: int) -> list[Chunk]:
        spare = self.limits.max_tokens - len(decodes) - reserved
        drafted = []
        for chunk in decodes:
            draft = max(0, min(drafts.get(chunk.seq, 0), spare))
            spare -= draft
            drafted.append(replace(chunk, draft=draft) if draft else chunk)
        return drafted

    def _resistance(self, entry: Entry) -> tuple[bool, bool, int, int]:
        is_spared = entry.preemptions >= self.limits.preemptions_max
        return (is_spared, not entry.is_paused, *_importance(entry))


def _importance(entry: Entry) -> tuple[int, int]:
    return entry.demand.priority, -entry.order
