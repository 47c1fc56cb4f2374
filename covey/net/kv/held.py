"""A lease on blocks of one node, as its holder keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import anyio

from covey.clock import Clock
from covey.codec.methods import KvStore, Unary
from covey.errors import CoveyError, Fenced, LeaseExpired
from covey.net.kv.node import Node
from covey.types.block import BlockLocation
from covey.types.ids import BlockHash, TenantId
from covey.types.kv import LeaseGrant, LeaseRequest, RenewRequest
from covey.types.store import StoreKey

RELEASE_TIMEOUT_S = 1.0
RENEW_RETRY_S = 1.0
"""A node that did not answer is not asked at every step: each question would hold the reading up."""

Q = TypeVar("Q", bound="Asking")
L = TypeVar("L", bound="Leasing")


class StoreHeld:
    """Blocks under one lease. `asked_at` is a moment before the grant, so that our deadline is never late."""

    def __init__(
        self,
        *,
        node: Node,
        key: StoreKey,
        grant: LeaseGrant,
        asked_at: float,
        clock: Clock,
        hashes: tuple[BlockHash, ...],
        locations: Sequence[BlockLocation] = (),
    ) -> None:
        self.node = node
        self.key = key
        self.grant = grant
        self.locations = locations
        self._hashes = hashes
        self._clock = clock
        self._ends_at = asked_at + grant.ttl_s
        self._renew_at = asked_at + grant.ttl_s / 2
        self._progress = 0
        self._released = False

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        return self._hashes

    def check(self) -> None:
        """Raise `LeaseExpired` if the lease may have ended: what was read under it then proves nothing."""
        if self._released or self._clock.now() >= self._ends_at:
            raise LeaseExpired("the lease on these blocks has ended; look them up again", field="lease")

    async def advance(self, blocks: int) -> None:
        """Report progress; past half of its time the lease is renewed by it. Raises `LeaseExpired`."""
        self.check()
        self._progress += blocks
        if self._clock.now() < self._renew_at:
            return
        request = self._renewal(self._progress)
        asked_at = self._clock.now()
        try:
            renewed = await self.node.call(KvStore.RENEW, request)
        except (LeaseExpired, Fenced) as error:
            raise LeaseExpired("the lease on these blocks has ended; look them up again", field="lease") from error
        except CoveyError:
            self.check()  # the node does not answer: what is left of the lease still counts
            self._renew_at = self._clock.now() + RENEW_RETRY_S
            return
        self._ends_at = max(self._ends_at, asked_at + renewed.ttl_s)
        self._renew_at = asked_at + renewed.ttl_s / 2

    async def confirm(self) -> None:
        """Ask the node whether the lease stands. Raises `LeaseExpired`; a node that is gone says nothing."""
        request = self._renewal(0)
        try:
            await self.node.call(KvStore.RENEW, request)
        except (LeaseExpired, Fenced) as error:
            raise LeaseExpired("the lease on these blocks has ended; look them up again", field="lease") from error
        except CoveyError:
            return

    async def release(self) -> None:
        """Give the lease back; safe to call twice, and in a cancelled scope; never raises for a node that is gone."""
        if self._released:
            return
        self._released = True
        with anyio.CancelScope(shield=True):
            await release(self.node, self.key.tenant, self.grant)

    def _renewal(self, done: int) -> RenewRequest:
        grant = self.grant
        return RenewRequest(tenant=self.key.tenant, lease=grant.lease, epoch=grant.epoch, done=done, ttl_s=grant.ttl_s)


class Asking(Protocol):
    """A request for a lease."""

    @property
    def tenant(self) -> TenantId: ...


class Leasing(Protocol):
    """A reply that grants a lease."""

    @property
    def lease(self) -> LeaseGrant | None: ...


async def enter(node: Node, method: Unary[Q, L], request: Q) -> L:
    """Ask a node for a lease; being cancelled meanwhile waits for the answer, or nobody could give the lease back.

    Raises `Unavailable`, within the node's call timeout, and what it answers.
    """
    with anyio.CancelScope(shield=True):
        reply = await node.enter(method, request)
    try:
        await anyio.lowlevel.checkpoint_if_cancelled()
    except BaseException:
        if reply.lease is not None:
            with anyio.CancelScope(shield=True):
                await release(node, request.tenant, reply.lease)
        raise
    return reply


async def release(node: Node, tenant: TenantId, grant: LeaseGrant) -> None:
    """End a lease at its node; if the node does not answer the lease ends by itself."""
    request = LeaseRequest(tenant=tenant, lease=grant.lease, epoch=grant.epoch)
    try:
        await node.channel.call(KvStore.RELEASE, request, timeout_s=RELEASE_TIMEOUT_S)
    except CoveyError:
        return


class NothingHeld:
    """What a look-up without a hit returns."""

    __slots__ = ()

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        return ()

    async def release(self) -> None:
        """Nothing is held."""
