"""Room for a step: when blocks run out, somebody is swapped out for those that go first."""

from __future__ import annotations

from dataclasses import replace

from covey.policy.batching import Batcher
from covey.policy.chunk import Chunk

from .board import Board
from .holdings import Holdings
from .moves import Moves
from .register import Register
from .retention import Retention
from .sequence import Sequence
from .stepping import Stepper


class Preemption:
    """Takes blocks from running sequences, which wait for room and then go on where they were."""

    def __init__(
        self,
        live: Register,
        batcher: Batcher,
        holdings: Holdings,
        retention: Retention,
        moves: Moves,
        stepper: Stepper,
        board: Board,
    ) -> None:
        self._live = live
        self._batcher = batcher
        self._holdings = holdings
        self._retention = retention
        self._moves = moves
        self._stepper = stepper
        self._board = board

    def make_way(self, now: float) -> None:
        """Make room for a sequence that waits and found none, where the policy says so."""
        if not self._batcher.running:
            self._retention.give_way(now)
        elif not self._moves.swapping:
            for seq_id in self._batcher.preempt(now):
                if not (seq := self._live.running(seq_id)).is_long:
                    self._preempt(seq)

    def with_blocks(self, chunks: tuple[Chunk, ...], now: float) -> list[tuple[Sequence, Chunk]]:
        """The chunks that can run now, with their blocks."""
        work = []
        for chunk in chunks:
            seq = self._live.running(chunk.seq)
            if not seq.is_running:
                continue  # swapped out for an earlier one
            if seq.is_long:
                work += self._of_window(seq, chunk)
            elif self._holdings.cover(seq, chunk.start + chunk.tokens):
                work.append((seq, chunk))
            elif self._holdings.cover(seq, chunk.start + chunk.count) or self._make_room(seq, chunk, now):
                work.append((seq, replace(chunk, draft=0)))
        return [(seq, chunk) for seq, chunk in work if seq.is_running]

    def _of_window(self, seq: Sequence, chunk: Chunk) -> list[tuple[Sequence, Chunk]]:
        """As much of a chunk as fits the window of a long sequence; when that is full, its blocks move out first."""
        room = self._holdings.room(seq) - chunk.start
        if seq.transfer is not None:
            return []
        if room <= 0:
            self._moves.move_out(seq)
            return []
        if chunk.count > room and not chunk.first_layer:
            chunk = replace(chunk, count=room, is_last=False)
        has_room = self._holdings.cover(seq, chunk.start + chunk.count)
        assert has_room, "a window is promised at admission"
        return [(seq, replace(chunk, draft=0))]

    def _make_room(self, seq: Sequence, chunk: Chunk, now: float) -> bool:
        """Swap out others, or this one, until the chunk has its blocks; False when it must wait."""
        while not self._moves.swapping:
            victim = self._batcher.victim([other.id for other in self._live.all() if other.is_long])
            if victim is None or (victim == seq.id and self._is_alone):
                self._retention.give_way(now)
                return False
            self._preempt(self._live.running(victim))
            if victim == seq.id:
                return False
            if self._holdings.cover(seq, chunk.start + chunk.count):
                return True
        return False

    def _preempt(self, seq: Sequence) -> None:
        self._batcher.requeue(seq.id)
        self._stepper.drop(seq)
        seq.is_running = False
        seq.preemptions += 1
        self._board.preemptions += 1
        self._moves.swap_out(seq)

    @property
    def _is_alone(self) -> bool:
        return sum(seq.is_running for seq in self._live.all()) == 1
