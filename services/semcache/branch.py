"""One semcache of several: it writes some tenants' entries, follows the writers of others, and forwards to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import TypedDict, TypeVar

import anyio
from anyio.abc import TaskGroup
from structlog.typing import FilteringBoundLogger

from covey.clock import Clock
from covey.codec import decode, encode
from covey.codec.methods import SemCache, Unary
from covey.errors import CoveyError, FailedPrecondition, Fenced, InvalidArgument, Unavailable
from covey.net.bus import SCHEMA, Bus
from covey.net.channels import Channel, Channels
from covey.types.common import Empty
from covey.types.event import Invalidation as InvalidationEvent
from covey.types.event import WorkerRecord
from covey.types.ids import TenantId
from covey.types.program import CacheOutcome
from covey.types.semcache import (
    AbandonRequest,
    CacheEvent,
    CacheOffer,
    CacheQuery,
    CacheRecord,
    CacheReply,
    ExportCache,
    FeedbackRequest,
    InvalidateReply,
    InvalidateRequest,
    OfferReply,
    WarmReply,
    WatchCacheRequest,
)

from .desk import Desk
from .documents import Voided
from .journal import Journals
from .peers import ENCODER, Peers
from .replica import Replica, Ttl

Q = TypeVar("Q")
R = TypeVar("R")

FORWARDED = {"x-covey-forwarded": "1"}
FORWARD_SHARE = 0.9
"""Part of a caller's remaining time that another process gets."""
FOLLOWED_MAX = 1024
"""Tenants followed at a time; the requests of more are forwarded."""
TENANTS_MAX = 65_536
TAKEOVER_S = 5.0
STREAM_S = 3600.0
CHECK_S = 0.5
SUBJECT = "covey.v1.invalidate.semcache"


class Branch:
    """Where requests go. Owned by the event loop; with nobody else in the mesh it does what its desk does."""

    def __init__(
        self,
        desk: Desk,
        journals: Journals,
        peers: Peers,
        channels: Channels,
        bus: Bus,
        *,
        ttl: Ttl,
        epoch: int,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        """`epoch` is this process's own, higher with each start: no two of its reigns have one number."""
        self.desk = desk
        self._journals = journals
        self._peers = peers
        self._channels = channels
        self._bus = bus
        self._ttl = ttl
        self._epoch = epoch
        self._clock = clock
        self._log = log
        self._library = desk.library
        self._reigns: dict[TenantId, Voided] = {}
        self._floors: dict[TenantId, int] = {}
        self._wanted: dict[TenantId, int] = {}
        self._replicas: dict[TenantId, tuple[Replica, anyio.CancelScope]] = {}
        self._taking: set[TenantId] = set()
        self._sent = 0
        self._tasks: TaskGroup | None = None
        self.on_invalidated: Callable[[TenantId], None] | None = None
        """Told whose entries were invalidated, by whichever process, so that nothing else here goes on using them."""

    async def run(self) -> None:
        """Hear of invalidations and of who comes and goes, until cancelled."""
        async with anyio.create_task_group() as tg, self._bus.subscribe(f"{SUBJECT}.*", capacity=4096) as messages:
            self._tasks = tg
            tg.start_soon(self._check_often)
            async for message in messages:
                try:
                    event: InvalidationEvent = decode(InvalidationEvent, message.payload)
                except InvalidArgument:
                    continue
                self._want(event.tenant, event.epoch)
                if self.on_invalidated is not None:
                    self.on_invalidated(event.tenant)

    async def lookup(self, query: CacheQuery, *, timeout_s: float, is_forwarded: bool) -> CacheReply:
        """Answer from here if this process writes or follows the tenant, else ask its writer."""
        writer = None if is_forwarded else self._writer(query.tenant)
        if writer is None:
            if not await self._reign(query.tenant) or not self._has_reached(query.tenant):
                return CacheReply(outcome=CacheOutcome.MISS)
            return await self.desk.lookup(query, timeout_s=timeout_s)
        replica = self._follow(query.tenant)
        if replica is not None and replica.is_current and replica.epoch >= self._wanted.get(query.tenant, 0):
            reply = await self.desk.lookup(replace(query, wait_s=0.0), timeout_s=timeout_s)
            # The look-up may have waited for the encoder: what holds is what is known now.
            is_known = replica.is_current and replica.epoch >= self._wanted.get(query.tenant, 0)
            if is_known and (reply.answer is not None or not query.wait_s):
                return reply
        try:
            return await self._forward(writer, SemCache.LOOKUP, query, timeout_s)
        except Unavailable:  # the registry will name another one in a moment
            return CacheReply(outcome=CacheOutcome.MISS)

    async def offer(self, offer: CacheOffer, *, timeout_s: float, is_forwarded: bool) -> OfferReply:
        """Keep an answer here or at the tenant's writer."""
        tenant = offer.query.tenant
        writer = None if is_forwarded else self._writer(tenant)
        if writer is not None:
            try:
                return await self._forward(writer, SemCache.OFFER, offer, timeout_s)
            except Unavailable as error:
                return OfferReply(stored=False, why=f"the writer of the tenant's entries is gone: {error.message}")
        if not await self._reign(tenant):
            return OfferReply(stored=False, why="this process is taking the tenant's entries over: offer again later")
        return await self.desk.offer(offer, timeout_s=timeout_s)

    async def abandon(self, request: AbandonRequest, *, timeout_s: float, is_forwarded: bool) -> None:
        writer = None if is_forwarded else self._writer(request.tenant)
        if writer is None:
            self.desk.abandon(request)
        else:
            await self._forward(writer, SemCache.ABANDON, request, timeout_s)

    async def feedback(self, request: FeedbackRequest, *, timeout_s: float, is_forwarded: bool) -> Empty:
        writer = None if is_forwarded else self._writer(request.tenant)
        if writer is not None:
            return await self._forward(writer, SemCache.FEEDBACK, request, timeout_s)
        await self.desk.feedback(request)
        return Empty()

    async def invalidate(self, request: InvalidateRequest, *, timeout_s: float, is_forwarded: bool) -> InvalidateReply:
        """Void entries here or at the tenant's writer, and tell every replica by which epoch to go."""
        writer = None if is_forwarded else self._writer(request.tenant)
        if writer is not None:
            return await self._forward(writer, SemCache.INVALIDATE, request, timeout_s)
        if request.tenant and not await self._reign(request.tenant):
            raise Unavailable("this process is taking the tenant's entries over", retry_after_ms=1000)
        reply = await self.desk.invalidate(request, timeout_s=timeout_s)
        if not request.dry_run:
            reign = self._reigns[request.tenant]
            self._reigns[request.tenant] = replace(reign, epoch=reply.epoch)
            self._want(request.tenant, reply.epoch)
            await self._tell(request, reply.epoch)
        return reply

    async def watch(self, request: WatchCacheRequest) -> AsyncIterator[CacheEvent]:
        """Yield a tenant's changes to a replica. Raises `Fenced`, `Unavailable` or `FailedPrecondition`: look again."""
        reign = self._reigns.get(request.tenant)
        if reign is not None and request.epoch > reign.reign:
            self._floors[request.tenant] = request.epoch
            self._abdicate(request.tenant)
            raise Fenced("another process has written this tenant's entries since", field="epoch")
        if reign is None:
            if self._writer(request.tenant) is not None:
                raise FailedPrecondition("this process does not write this tenant's entries", field="tenant")
            await self._reign(request.tenant)
            raise Unavailable("this process is taking the tenant's entries over", retry_after_ms=200)
        async for event in self._journals.watch(request):
            yield event

    async def export(self, request: ExportCache, *, is_forwarded: bool) -> AsyncIterator[CacheRecord]:
        """Yield a tenant's entries as its writer has them."""
        writer = None if is_forwarded else self._writer(request.tenant)
        if writer is None:
            async for record in self.desk.export(request):
                yield record
            return
        channel = self._channels.to(writer.address)
        async with channel.stream(SemCache.EXPORT, request, timeout_s=STREAM_S, headers=FORWARDED) as records:
            async for record in records:
                yield record

    async def warm(self, records: AsyncIterator[CacheRecord], *, is_forwarded: bool) -> WarmReply:
        """Take a tenant's records in at its writer. Raises `InvalidArgument` when they are of several tenants."""
        first = await anext(records, None)
        if first is None:
            return WarmReply(stored=0, refused=0)
        tenant = first.query.tenant

        async def of_one_tenant() -> AsyncIterator[CacheRecord]:
            yield first
            async for record in records:
                if record.query.tenant != tenant:
                    raise InvalidArgument("warm one tenant's entries at a time", field="tenant")
                yield record

        writer = None if is_forwarded else self._writer(tenant)
        if writer is not None:
            channel = self._channels.to(writer.address)
            return await channel.upload(SemCache.WARM, of_one_tenant(), timeout_s=STREAM_S, headers=FORWARDED)
        if not await self._reign(tenant):
            raise Unavailable("this process is taking the tenant's entries over", retry_after_ms=1000)
        return await self.desk.warm(of_one_tenant())

    def _writer(self, tenant: TenantId) -> WorkerRecord | None:
        return self._peers.rank(tenant)[0]

    def _has_reached(self, tenant: TenantId) -> bool:
        """Whether what is here is of the tenant's last known epoch; if not, another process wrote meanwhile."""
        if self._reigns[tenant].epoch >= self._wanted.get(tenant, 0):
            return True
        self._abdicate(tenant)
        return False

    async def _reign(self, tenant: TenantId) -> bool:
        """Whether this process writes for a tenant; if not yet, it begins to take over."""
        if tenant in self._reigns:
            return True
        if len(self._peers.rank(tenant)) == 1 and not self._wanted.get(tenant):
            standing = await self._library.documents.standing(tenant)
            self._begin(tenant, Voided(epoch=standing.epoch, reign=max(standing.reign + 1, self._epoch)))
            return True
        if tenant not in self._taking and self._tasks is not None:
            self._taking.add(tenant)
            self._tasks.start_soon(self._take_over, tenant)
        return False

    async def _take_over(self, tenant: TenantId) -> None:
        try:
            known = await self._inherit(tenant)
            wanted = self._wanted.get(tenant, 0)
            # Nobody who knows the last invalidation is there any more: what is here may be what it voided.
            doomed = [h.label for h in self._library.store.matching(tenant)] if known.epoch < wanted else []
            reign = max(known.reign + 1, self._floors.pop(tenant, 0) + 1, self._epoch)
            voided = Voided(epoch=max(known.epoch, wanted), reign=reign)
            await self._library.void(tenant, voided, doomed)
            if self._writer(tenant) is None:
                self._begin(tenant, voided)
                self._log.info("writes a tenant's entries from now on", reign=reign, dropped=len(doomed))
        except CoveyError as error:
            self._log.warning("could not take a tenant's entries over", error=error.code)
        finally:
            self._taking.discard(tenant)

    async def _inherit(self, tenant: TenantId) -> Voided:
        """Have what the last writer had: as its replica so far, or from it, if it is still there."""
        standing = await self._library.documents.standing(tenant)
        replica = self._leave(tenant)
        if replica is not None:
            standing = Voided(epoch=max(standing.epoch, replica.epoch), reign=max(standing.reign, replica.reign))
        for record in self._peers.rank(tenant)[1:2]:
            if record is None:
                continue
            fresh = Replica(tenant, self._library, self._ttl, self._clock, reign=standing.reign, epoch=standing.epoch)
            fresh.encoder = record.labels.get(ENCODER, "")
            try:
                await fresh.sync(self._channels.to(record.address), timeout_s=TAKEOVER_S)
            except (CoveyError, TimeoutError):
                continue  # it never wrote for this tenant
            standing = Voided(epoch=fresh.epoch, reign=fresh.reign)
        return standing

    def _begin(self, tenant: TenantId, voided: Voided) -> None:
        if len(self._reigns) >= TENANTS_MAX:
            self._abdicate(next(iter(self._reigns)))
        self._reigns[tenant] = voided
        self._journals.open(tenant, reign=voided.reign, epoch=voided.epoch)

    def _abdicate(self, tenant: TenantId) -> None:
        if self._reigns.pop(tenant, None) is not None:
            self._journals.close(tenant)
            self.desk.flights.void(tenant)

    def _follow(self, tenant: TenantId) -> Replica | None:
        """Return the replica of a tenant, beginning one if there is room."""
        held = self._replicas.get(tenant)
        if held is not None:
            return held[0]
        if len(self._replicas) >= FOLLOWED_MAX or self._tasks is None or tenant in self._taking:
            return None
        reign = self._reigns.get(tenant, Voided())
        replica = Replica(tenant, self._library, self._ttl, self._clock, reign=reign.reign, epoch=reign.epoch)
        scope = anyio.CancelScope()
        self._replicas[tenant] = replica, scope

        async def follow() -> None:
            with scope:
                await replica.follow(lambda: self._channel(replica), lambda: self._abdicate(tenant))

        self._tasks.start_soon(follow)
        return replica

    def _leave(self, tenant: TenantId) -> Replica | None:
        held = self._replicas.pop(tenant, None)
        if held is None:
            return None
        held[1].cancel()
        return held[0]

    def _channel(self, replica: Replica) -> Channel | None:
        writer = self._writer(replica.tenant)
        if writer is None:
            return None
        replica.encoder = writer.labels.get(ENCODER, "")
        return self._channels.to(writer.address)

    async def _forward(self, writer: WorkerRecord, method: Unary[Q, R], request: Q, timeout_s: float) -> R:
        channel = self._channels.to(writer.address)
        return await channel.call(method, request, timeout_s=FORWARD_SHARE * timeout_s, headers=FORWARDED)

    async def _check_often(self) -> None:
        """Take over from writers that are gone before anybody asks, and follow those who took over from here."""
        seen = self._peers.names()
        while True:
            await anyio.sleep(CHECK_S)
            names = self._peers.names()
            if names == seen and not self._taking:
                continue
            seen = names
            for tenant in tuple(self._replicas):
                if self._writer(tenant) is None:
                    await self._reign(tenant)
            for tenant in tuple(self._reigns):
                if self._writer(tenant) is not None:
                    self._follow(tenant)
                await anyio.lowlevel.checkpoint()

    def _want(self, tenant: TenantId, epoch: int) -> None:
        if tenant not in self._wanted and len(self._wanted) >= TENANTS_MAX:
            del self._wanted[next(iter(self._wanted))]
        self._wanted[tenant] = max(epoch, self._wanted.get(tenant, 0))

    async def _tell(self, request: InvalidateRequest, epoch: int) -> None:
        self._sent += 1
        event = InvalidationEvent(
            epoch=epoch,
            seq=self._sent,
            schema=SCHEMA,
            worker=self._peers.me,
            tenant=request.tenant,
            model=request.model,
            category=request.category,
        )
        try:
            await self._bus.publish(f"{SUBJECT}.{self._peers.me}", encode(event))
        except CoveyError as error:  # replicas hear it from their streams too
            self._log.warning("an invalidation was not published", error=error.code)


class Routing(TypedDict):
    """How long a caller waits, and whether it is another semcache, whose calls are not passed on again."""

    timeout_s: float
    is_forwarded: bool


def routing(timeout_s: float, headers: Mapping[str, str]) -> Routing:
    """Read what a call's headers say."""
    return Routing(timeout_s=timeout_s, is_forwarded=not FORWARDED.keys().isdisjoint(headers))
