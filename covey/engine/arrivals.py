"""From admission to the batch: what the store has of a sequence comes in, layer by layer while it already runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from covey.clock import Clock
from covey.policy.batching import Batcher
from covey.types.generate import Stage

from .holdings import Holdings
from .loading import Loader
from .moves import Moves
from .sequence import Sequence
from .stepping import Stepper

PIECES_MAX = 8
"""A piece of layers smaller than this part of them is not worth a step of its own."""


class Arrivals:
    """Lets admitted sequences run.

    One whose blocks are being loaded joins the batch with its first layers and is suspended in the runner between the
    layers that are there and those that are not, while the others decode through all of theirs. Nothing is drawn, and
    no block is named, before the load has ended well; when a block turns out bad, what the sequence did is void and it
    computes from the last good one. So layers may come in any order of bursts, or break off: the tokens are the same.
    """

    def __init__(
        self,
        batcher: Batcher,
        holdings: Holdings,
        loader: Loader,
        moves: Moves,
        stepper: Stepper,
        clock: Clock,
        *,
        n_layers: int,
        by_layer: bool,
        in_step: Callable[[Sequence], bool],
    ) -> None:
        """`in_step` says whether a step under way has a row of a sequence; `by_layer` whether loading overlaps."""
        self._batcher = batcher
        self._holdings = holdings
        self._loader = loader
        self._moves = moves
        self._stepper = stepper
        self._clock = clock
        self._n_layers = n_layers
        self._layers_max = n_layers - 1  # the last layer ends in a draw
        self._by_layer = by_layer and n_layers > 1
        self._in_step = in_step
        self._ended: list[Sequence] = []

    def admitted(self, seq: Sequence) -> None:
        """Take in a sequence that was given its blocks."""
        if self._loader.can_load(seq):
            self._moves.run(seq, self._load, self._loaded)
        else:
            self.start(seq)

    def start(self, seq: Sequence) -> None:
        """Let a sequence run whose first `computed` tokens are in its blocks."""
        self._join(seq, None)
        self._settled(seq)

    def after_step(self) -> None:
        """Settle the sequences whose loads ended during the step."""
        ended, self._ended = self._ended, []
        for seq in ended:
            if not seq.is_over:
                self._settle(seq)

    def stood_still(self, seq: Sequence) -> None:
        """Note that a loading sequence has left a step."""
        if self._batcher.is_waiting_for_layers(seq.id):
            seq.wait_for_kv(self._clock.now())

    async def _load(self, seq: Sequence) -> None:
        await self._loader.load(seq, partial(self._layers_came, seq) if self._by_layer else None)

    def _layers_came(self, seq: Sequence, tokens: int, layers: int) -> None:
        if seq.is_over:
            return
        done = self._batcher.layers_of(seq.id) if seq.is_loading else 0
        layers = min(layers, self._layers_max)
        if layers - done < self._piece(done):
            return
        seq.got_kv(self._clock.now())
        if seq.is_loading:
            self._batcher.advance(seq.id, layers)
        else:
            seq.is_loading, seq.computed = True, tokens
            self._join(seq, layers)
        self._moves.wake()

    def _piece(self, done: int) -> int:
        """Layers that make it worth to run on after `done`: half of what is left, so that pieces are few and the last,
        which nothing overlaps, is small.
        """
        return max(-(-(self._layers_max - done) // 2), self._n_layers // PIECES_MAX, 1)

    def _loaded(self, seq: Sequence) -> None:
        if not seq.is_loading:
            seq.computed = seq.brought
            self.start(seq)
        elif self._in_step(seq):
            self._ended.append(seq)
        else:
            self._settle(seq)

    def _settle(self, seq: Sequence) -> None:
        """All layers are there, or the row goes back to what is good."""
        seq.is_loading = False
        if seq.brought != seq.computed:
            seq.computed = seq.brought
            self._stepper.drop(seq)
        self._batcher.settle(seq.id, computed=seq.computed)
        self._settled(seq)

    def _join(self, seq: Sequence, layers: int | None) -> None:
        seq.started_at = seq.started_at or self._clock.now()
        seq.is_running = True
        self._batcher.start(seq.id, computed=seq.computed, known=len(seq.tokens), layers=layers)
        if seq.paused_at is not None:
            self._batcher.pause(seq.id, is_paused=True)
        seq.show(Stage.PREFILL)

    def _settled(self, seq: Sequence) -> None:
        if seq.preemptions:
            self._moves.forget_leases(seq)
        self._holdings.book(seq)
