"""A node's part in agreeing who owns blocks: it watches the registry and proposes the next ring when it differs."""

from __future__ import annotations

from typing import Final

import anyio

from covey.clock import Clock
from covey.net.kv.agreed import AgreedRing
from covey.net.registry import Registry
from covey.policy.ring import Membership, RingLimits
from covey.types.event import WorkerState
from covey.types.generate import Role
from covey.types.ids import WorkerId
from covey.types.kv_state import RingMember

LOOK_S: Final = 0.2
TURN_S: Final = 0.4
"""The first node by name proposes at once, each further one so much later: one proposal is enough."""


class RingKeeper:
    """Every node runs one; no node is special, whoever proposes first wins."""

    def __init__(
        self, registry: Registry, ring: AgreedRing, *, worker: WorkerId, replicas: int, clock: Clock,
        limits: RingLimits | None = None,
    ) -> None:  # fmt: skip
        self._registry = registry
        self._ring = ring
        self._worker = worker
        self._replicas = replicas
        self._clock = clock
        self._membership = Membership(limits)
        self._wanted_since: float | None = None

    async def run(self) -> None:
        """Keep the ring as it should be."""
        while True:
            await self.look()
            await anyio.sleep(LOOK_S)

    async def look(self) -> None:
        """Compare the ring with who is there, once; propose another one when it is this node's turn."""
        now = self._clock.now()
        present = self._present()
        self._membership.observe(present, now)
        wanted = self._membership.proposal(self._ring.current, now)
        if wanted is None:
            self._wanted_since = None
            return
        if self._wanted_since is None:
            self._wanted_since = now
        before_us = sum(member.worker < self._worker for member in present)
        if now - self._wanted_since >= TURN_S * before_us:
            await self._ring.propose(wanted, replicas=self._replicas, proposer=self._worker)

    def _present(self) -> list[RingMember]:
        return [
            RingMember(
                worker=view.record.worker,
                epoch=view.record.epoch,
                host=view.record.host,
                capacity_bytes=view.record.store.arena_bytes,
            )
            for view in self._registry.workers(Role.KVSTORE)
            if view.record.store is not None and view.record.state is WorkerState.READY and not view.load.draining
        ]
