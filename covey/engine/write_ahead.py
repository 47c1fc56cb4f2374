"""A prompt's blocks on their way to the store while the rest of the prompt is still being computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio

from covey.errors import CoveyError
from covey.policy.blocks import BlockPool, Pin
from covey.types.ids import WorkerId
from covey.types.store import Held

from .board import Board
from .chain import Stretch
from .limits import EngineLimits
from .sequence import Sequence
from .transfer import Spawn, Transfers


@dataclass(slots=True, kw_only=True)
class _Written:
    """What was written of one sequence, and whether more is being written."""

    leases: list[Held] = field(default_factory=list)
    under_way: anyio.Event | None = None
    """Set when the write under way has ended."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    """Of the write under way."""
    is_broken: bool = False
    """Whether the store refused: then all is left to the hand-over."""


class WriteAhead:
    """Stores full blocks behind the chunks that fill them, so that a hand-over waits for its last blocks only.

    One write of a sequence at a time, `ahead_bytes` in flight over all; what is not written ahead, for want of room or
    because the store refused, is written at hand-over. The leases keep what was written from eviction until then.
    """

    def __init__(
        self,
        pool: BlockPool,
        transfers: Transfers | None,
        limits: EngineLimits,
        board: Board,
        *,
        worker: WorkerId,
        block_bytes: int,
    ) -> None:
        self._pool = pool
        self._transfers = transfers
        self._limits = limits
        self._board = board
        self._worker = worker
        self._room = limits.ahead_bytes // block_bytes
        """Blocks that may still be put in flight."""
        self._written: dict[int, _Written] = {}

    def follow(self, seq: Sequence, spawn: Spawn) -> None:
        """Write the blocks that became full, in the background; without effect while a write is under way."""
        if self._transfers is None or seq.named <= seq.stored:
            return
        written = self._written.setdefault(seq.id, _Written())
        count = min(seq.named - seq.stored, self._room)
        if written.is_broken or written.under_way is not None or count <= 0:
            return
        self._room -= count
        written.under_way, written.scope = anyio.Event(), anyio.CancelScope()
        first, end = seq.stored, seq.stored + count
        pin = self._pool.pin(seq.blocks[first:end], expires_at=float("inf"))
        spawn(self._write, seq, written, tuple(seq.chain.stretches(first, end)), end, pin, spawn)

    async def settle(self, seq: Sequence) -> None:
        """Wait until nothing of a sequence is being written."""
        written = self._written.get(seq.id)
        if written is not None and written.under_way is not None:
            written.is_broken = True  # no further write
            await written.under_way.wait()

    def forget(self, seq: Sequence, spawn: Spawn) -> None:
        """Give back the leases of a sequence that has been handed over or has ended; a write under way ends too."""
        written = self._written.pop(seq.id, None)
        if written is None:
            return
        written.scope.cancel()
        if written.leases:
            assert self._transfers is not None
            spawn(self._transfers.release, written.leases)

    async def _write(
        self, seq: Sequence, written: _Written, stretches: tuple[Stretch, ...], end: int, pin: Pin, spawn: Spawn
    ) -> None:
        assert self._transfers is not None
        owner, ttl_s = f"{self._worker}/{seq.id}/ahead", self._limits.handover_ttl_s
        leases: list[Held] = []
        try:
            with written.scope:
                leases = await self._transfers.put(seq.request.tenant, stretches, pin.blocks, owner=owner, ttl_s=ttl_s)
        except CoveyError:
            written.is_broken = True
        finally:
            self._pool.unpin(pin.id)
            self._room += len(pin.blocks)
            if written.under_way is not None:
                written.under_way.set()
                written.under_way = None
        if self._written.get(seq.id) is not written:
            await self._transfers.release(leases)
        elif leases:
            written.leases += leases
            seq.stored = max(seq.stored, end)
            seq.blocks_moved += len(pin.blocks)
            self._board.written_ahead += len(pin.blocks)
            if seq.is_running:
                self.follow(seq, spawn)
