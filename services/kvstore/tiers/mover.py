"""The background of the tiers: copies the coldest blocks down before memory is full, heals what was in the way."""

from __future__ import annotations

import logging

import anyio

from covey.errors import CoveyError
from covey.policy.store_index import Placed, StoreIndex
from covey.policy.tiering import Chain, Tiering
from covey.types import kv_state
from covey.types.ids import TenantId

from .below import Below
from .demotion import Demotion
from .memory import Memory

TICK_S = 0.5
LOOKED_AT_MAX = 1024
PASS_BYTES_MAX = 64 << 20
"""After so much the mover looks anew at what is coldest."""

log = logging.getLogger(__name__)


class Mover:
    """Runs beside the store for its life."""

    def __init__(self, index: StoreIndex, memory: Memory, below: Below, demotion: Demotion, policy: Tiering) -> None:
        self._index = index
        self._memory = memory
        self._below = below
        self._demotion = demotion
        self._policy = policy
        self._woken = anyio.Event()

    def wake(self) -> None:
        """Say that memory has become fuller."""
        stats = self._index.stats()
        if self._policy.clean_bytes(stats.used_bytes, stats.capacity_bytes):
            self._woken.set()

    async def run(self) -> None:
        while True:
            try:
                await self._below.heal()
                busy = await self._clean()
            except CoveyError as error:
                log.info("the mover pauses: %s", error)
                busy = False
            if not busy:
                self._woken = anyio.Event()
                with anyio.move_on_after(TICK_S):
                    await self._woken.wait()

    async def _clean(self) -> bool:
        """Copy down what eviction would take next, if memory is fuller than it should be; False when all is done."""
        stats = self._index.stats()
        want = self._policy.clean_bytes(stats.used_bytes, stats.capacity_bytes)
        if not want or not any(tier.writable for tier in self._below.stats()):
            return False
        count = min(LOOKED_AT_MAX, 1 + want * max(1, stats.blocks) // max(1, stats.used_bytes))
        coldest = await self._memory.ask(lambda store, now: store.index.coldest(count, now))
        todo = [each for each in coldest if not self._below.knows_everywhere(each.namespace, each.location.hash)]
        moved = moved_bytes = 0
        for placed in await self._in_order(todo):
            if await self._demotion.copy_down(placed.namespace, placed.location.hash):
                moved += 1
                moved_bytes += placed.shape.size_bytes
            if moved_bytes >= PASS_BYTES_MAX:
                break
        return moved > 0

    async def _in_order(self, blocks: list[Placed]) -> list[Placed]:
        """Those worth a place below: tenants over their quota first, then the least worth in memory."""
        over = {tenant for tenant in {each.tenant for each in blocks} if await self._is_over_quota(tenant)}
        chains = [Chain(tenant=each.tenant, size_bytes=each.shape.size_bytes, depth=0) for each in blocks]
        load_s = self._below.load_s
        order = self._policy.demote_first(chains, frozenset(over))
        return [blocks[at] for at in order if self._policy.can_demote(chains[at], load_s(chains[at].size_bytes))]

    async def _is_over_quota(self, tenant: TenantId) -> bool:
        quota = await self._memory.ask(lambda store, _: store.index.quota(kv_state.QuotaRequest(tenant=tenant)))
        return bool(quota.quota_bytes) and quota.used_bytes > quota.quota_bytes
