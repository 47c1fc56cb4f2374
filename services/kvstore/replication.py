"""Keeps blocks where the ring wants them: copies of what is committed, moves after a change, never on the data path."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import anyio

from covey.errors import CoveyError, InvalidArgument, NotFound, Unavailable
from covey.net.kv.agreed import AgreedRing
from covey.policy.rebalance import Duty, duty, without
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv_state import KvEventKind, RingVersion, StartTask, StoreStats

from .event_log import EventLog
from .spreading import Duties, Spread, Spreader
from .tasks import Progress

RETRY_S: Final = 1.0
TRIES_MAX: Final = 6
"""The pause doubles, so half a minute in all. A node that stays out of reach leaves the ring, and that starts over."""
LOOK_S: Final = 1.0

log = logging.getLogger(__name__)


class Replication:
    """Copies and moves of one node. Bounded: a batch at a time, at a pace; the queue is the node's own event log."""

    def __init__(self, events: EventLog, spreader: Spreader, ring: AgreedRing, worker: WorkerId) -> None:
        self._events = events
        self._spreader = spreader
        self._ring = ring
        self._worker = worker
        self._settled: RingVersion | None = None
        """The last ring under which everything was brought where it belonged."""

    def with_ring(self, stats: StoreStats) -> StoreStats:
        """Return statistics completed by what is known here."""
        ring = self._ring.current
        return replace(
            stats,
            ring_version=ring.version if ring is not None else 0,
            ring_nodes=len(ring.members) if ring is not None else 0,
            copied_blocks=self._spreader.copied_blocks,
            dropped_blocks=self._spreader.dropped_blocks,
            waiting_blocks=self._spreader.waiting_blocks,
        )

    # -- in the background -------------------------------------------------------

    async def follow(self) -> None:
        """Copy what is committed here to the chain's other nodes; too far behind, look at everything instead."""
        events = self._events
        seq = events.seq
        while not events.closed:
            if not events.can_follow(events.epoch, seq):
                seq, self._settled = events.seq, None
            for event in tuple(events.after(seq)):
                seq = event.seq
                ring = self._ring.current
                if event.kind is KvEventKind.STORED and ring is not None and self._has_duties(ring):
                    await self._copy(event.namespace, event.hashes, ring)
            await events.changed(seq)

    async def settle(self) -> None:
        """After each change of the ring, bring everything where it belongs and give up what others own."""
        while True:
            ring = self._ring.current
            if ring is None or ring == self._settled:
                with anyio.move_on_after(LOOK_S):
                    await self._ring.changed()
                continue
            async with anyio.create_task_group() as tg:
                tg.start_soon(self._settle, ring, tg.cancel_scope)
                while self._ring.current == ring:
                    with anyio.move_on_after(LOOK_S):
                        await self._ring.changed()
                tg.cancel_scope.cancel()

    async def _settle(self, ring: RingVersion, done: anyio.CancelScope) -> None:
        before = self._settled
        late = 0
        for tried in range(TRIES_MAX):
            try:
                spread = await self._spreader.sweep(
                    lambda namespace, root: duty(self._worker, ring, namespace, root, before=before)
                )
                late = len(spread.late)
            except CoveyError as error:
                log.info("ring %d: not settled: %s", ring.version, error)
            else:
                if not late:
                    break
            await anyio.sleep(RETRY_S * 2**tried)
        if late:
            log.warning("ring %d: %d blocks are not where it wants them", ring.version, late)
        self._settled = ring
        done.cancel()

    # -- on demand ---------------------------------------------------------------

    async def acknowledge(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> None:
        """Return once committed blocks are on all nodes that own them. Raises `Unavailable` when they are not."""
        ring = self._ring.current
        if ring is None:
            return
        spread = await self._spreader.spread(namespace, hashes, self._keeping(ring))
        if spread.late:
            raise Unavailable(f"stored here, but {len(spread.late)} blocks are not on {ring.replicas} nodes yet")

    async def replicate(self, request: StartTask, progress: Progress) -> str:
        """Task REPLICATE: blocks also on the chain's other nodes, `replicas` of them or as many as the ring says."""
        ring = self._ring.current
        if ring is None:
            raise Unavailable("the nodes have not agreed on a ring yet", retry_after_ms=1000)
        ring = replace(ring, replicas=request.replicas or ring.replicas)
        spread = await self._run(request, progress, self._keeping(ring))
        return f"{spread.blocks} blocks, of them {len(spread.late)} late and {len(spread.lossy)} lossy"

    async def move(self, request: StartTask, progress: Progress) -> str:
        """Task MOVE: blocks to the node `to`, and away here. Without hashes: all of them."""
        if not request.to or request.to == self._worker:
            raise InvalidArgument("name another node", field="to")
        there = Duty(keep=False, to=(request.to,))
        spread = await self._run(request, progress, lambda _, __: there)
        return f"{spread.dropped} of {spread.blocks} blocks moved, {len(spread.late)} late, {len(spread.lossy)} lossy"

    async def leave(self, progress: Progress | None = None) -> str:
        """Bring all blocks to those who own them once this node is gone; until then it still serves them."""
        ring = self._ring.current
        rest = without(ring, self._worker) if ring is not None else None
        if rest is None or not rest.members:
            return "there is no other node to take the blocks"
        spread = await self._spreader.sweep(self._keeping(rest), progress)
        kept = len(spread.late) + len(spread.lossy)
        return f"{spread.blocks - kept} of {spread.blocks} blocks are with other nodes"

    # -- inside ------------------------------------------------------------------

    async def _run(self, request: StartTask, progress: Progress, duties: Duties) -> Spread:
        if not request.hashes:
            return await self._spreader.sweep(duties, progress)
        progress.expect(len(request.hashes))
        placed = await self._spreader.visible(request.namespace, request.hashes)
        if not placed or any(each.tenant != request.tenant for each in placed):
            raise NotFound("none of these blocks is stored", field="hashes")
        spread = await self._spreader.spread(request.namespace, request.hashes, duties)
        progress.step(spread.blocks)
        return spread

    def _keeping(self, ring: RingVersion) -> Duties:
        return lambda namespace, root: replace(duty(self._worker, ring, namespace, root), keep=True)

    def _has_duties(self, ring: RingVersion) -> bool:
        return ring.replicas > 1 or all(member.worker != self._worker for member in ring.members)

    async def _copy(self, namespace: NamespaceId, hashes: Sequence[BlockHash], ring: RingVersion) -> None:
        try:
            await self._spreader.spread(namespace, hashes, self._keeping(ring))
        except CoveyError as error:
            log.info("not copied: %s", error)
