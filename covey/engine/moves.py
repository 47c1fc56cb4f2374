"""Sequences on the move: loaded, handed over or swapped out in the background, while their blocks stay held."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Items

import anyio

from covey import failpoint
from covey.clock import Clock
from covey.errors import CoveyError
from covey.types.generate import Event, Handover, Stage, Tokens

from .background import Background
from .board import Board
from .borrowing import Borrowing
from .endings import failed
from .holdings import Holdings
from .migration import Migration
from .sequence import Sequence
from .write_ahead import WriteAhead

Work = Callable[[Sequence], Awaitable[Handover | None]]


class Moves:
    """Runs work that copies a sequence's blocks, one at a time for each sequence."""

    def __init__(
        self,
        migration: Migration,
        ahead: WriteAhead,
        borrowing: Borrowing | None,
        holdings: Holdings,
        board: Board,
        clock: Clock,
        *,
        block_size: int,
        end: Callable[[Sequence, Event], None],
    ) -> None:
        """`end` ends a sequence with an event."""
        self._migration = migration
        self._ahead = ahead
        self._borrowing = borrowing
        self._holdings = holdings
        self._board = board
        self._clock = clock
        self._block_size = block_size
        self._end = end
        self.background: Background | None = None
        """Where the work runs; set before anything is moved."""
        self.swapping = 0
        """Sequences that are being swapped out: there is more room when they are."""

    @property
    def are_running(self) -> bool:
        """Whether anything runs in the background."""
        return self.background is not None and self.background.running > 0

    def run(self, seq: Sequence, work: Work, then: Callable[[Sequence], None]) -> None:
        """Run `work`; until it has ended the blocks stay held, whatever happens. An event of its ends the sequence."""
        seq.transfer = anyio.CancelScope()
        self._spawn(self._run, seq, seq.transfer, work, then)

    async def _run(self, seq: Sequence, scope: anyio.CancelScope, work: Work, then: Callable[[Sequence], None]) -> None:
        event: Event | None = None
        with scope:
            try:
                event = await work(seq)
            except CoveyError as error:
                event = failed(error, retryable=True)
        seq.transfer = None
        if seq.is_over:
            self.forget_leases(seq)
            self._holdings.release(seq)
        elif event is not None:
            self._end(seq, event)
        else:
            then(seq)

    def wake(self) -> None:
        """Say that a sequence may have something to do."""
        assert self.background is not None, "the engine has been opened"
        self.background.wake()

    def write_ahead(self, seq: Sequence) -> None:
        """Store the blocks of an unfinished prompt that are full, in the background."""
        self._ahead.follow(seq, self._spawn)

    def move_out(self, seq: Sequence) -> None:
        """Give the blocks of a long sequence to other workers, so that its window has room again."""
        assert self._borrowing is not None, "only then are sequences longer than the pool"
        self.run(seq, self._borrowing.move_out, lambda _: self.wake())

    def sweep(self, now: float, live: Items[Sequence]) -> None:
        """Keep the loans of long sequences alive."""
        if self._borrowing is not None:
            self._borrowing.sweep(now, live, self._spawn)

    def swap_out(self, seq: Sequence) -> None:
        """Free the blocks of a sequence that waits again: stored first, where there is a store, else just dropped."""
        seq.show(Stage.QUEUE)
        if seq.computed and self._migration.has_store:
            self.swapping += 1
            self.run(seq, self._store, self._set_aside)
        else:
            self._set_aside(seq)

    async def _store(self, seq: Sequence) -> None:
        """Write what the store has not; what it does not take is computed again."""
        began = self._clock.now()
        try:
            seq.handed_over = (await self._migration.stash(seq, self._block_size)).covered
            self._board.swapped_out += 1
        except CoveyError:
            seq.handed_over = 0
        finally:
            self.swapping -= 1
            seq.transfer_s += self._clock.now() - began

    def _set_aside(self, seq: Sequence) -> None:
        self._holdings.release(seq)
        seq.computed = 0

    async def hand_over(self, seq: Sequence, *, first: Tokens) -> Handover:
        """Store a prompt's blocks for the worker that goes on with it."""
        seq.show(Stage.TRANSFER)
        began = self._clock.now()
        await self._ahead.settle(seq)
        try:
            ticket = await self._migration.stash(seq, self._block_size)
        except CoveyError:  # a store that is full or gone costs a second prefill, not the request
            ticket = self._migration.bare_ticket(seq)
            self._board.bare_handovers += 1
        seq.transfer_s += self._clock.now() - began
        await failpoint.hit_async("prefill.before_handover")
        return Handover(ticket=ticket, first=first, usage=seq.usage(), timings=seq.timings(self._clock.now()))

    def _spawn(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        assert self.background is not None, "the engine has been opened"
        self.background.spawn(work, *args)

    def forget_leases(self, seq: Sequence) -> None:
        """Give back the leases on what was stored of a sequence."""
        self._migration.forget(seq.request.request_id, self._spawn)

    def forget_written(self, seq: Sequence) -> None:
        """Give back the leases on what was stored of an unfinished prompt, and what others keep of a long one."""
        self._ahead.forget(seq, self._spawn)
        if self._borrowing is not None:
            self._borrowing.forget(seq, self._spawn)
