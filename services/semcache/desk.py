"""Where requests arrive: the cache's answer, else a flight; an offer lands the flight that it was computed in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from covey.clock import Clock
from covey.types.program import CacheOutcome
from covey.types.semcache import (
    AbandonRequest,
    CachedAnswer,
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
)

from .cache import AnswerCache
from .encoder import Embedder
from .flights import Flights
from .invalidation import Invalidation
from .library import Library
from .metrics import CacheMetrics
from .transfer import Transfer

WAIT_SHARE = 0.9
"""Part of a caller's remaining time that is spent waiting, so that an answer still arrives."""


class Desk:
    """Look-ups and offers of the entries that this process writes."""

    def __init__(
        self,
        cache: AnswerCache,
        library: Library,
        embedder: Embedder,
        flights: Flights,
        metrics: CacheMetrics,
        clock: Clock,
    ) -> None:
        self.cache = cache
        self.library = library
        self.flights = flights
        self._invalidation = Invalidation(library, flights, embedder, clock=clock, metrics=metrics)
        self._transfer = Transfer(library, cache)
        self._clock = clock

    async def lookup(self, query: CacheQuery, *, timeout_s: float) -> CacheReply:
        """Answer from the cache; on a miss of a request that others may repeat, wait or lead. Raises as the cache."""
        reply = await self.cache.lookup(query, timeout_s=timeout_s)
        if not query.wait_s or not query.exact_key or reply.outcome is not CacheOutcome.MISS:
            return reply
        key = (query.tenant, query.model, query.category, query.exact_key)
        turn = await self.flights.join(key, wait_s=min(query.wait_s, WAIT_SHARE * timeout_s))
        if turn.answer is not None:
            return CacheReply(outcome=CacheOutcome.EXACT, category=reply.category, similarity=1.0, answer=turn.answer)
        return replace(reply, flight=turn.flight)

    async def offer(self, offer: CacheOffer, *, timeout_s: float) -> OfferReply:
        """Keep an answer, and hand it to those who wait for it, kept or not. Raises as the cache."""
        landed = False
        try:
            reply = await self.cache.offer(offer, timeout_s=timeout_s)
            landed = bool(offer.flight) and self.flights.land(offer.query.tenant, offer.flight, _answer(offer, reply))
        finally:
            if offer.flight and not landed:
                self.flights.land(offer.query.tenant, offer.flight, None)
        return reply

    def abandon(self, request: AbandonRequest) -> None:
        """Let those who wait for a flight go on; one that is not under way is no error."""
        self.flights.land(request.tenant, request.flight, None)

    async def feedback(self, request: FeedbackRequest) -> None:
        """Take a verdict; raises as the cache."""
        await self.cache.feedback(request)

    async def invalidate(self, request: InvalidateRequest, *, timeout_s: float) -> InvalidateReply:
        """Void a tenant's entries; raises as `Invalidation.run`."""
        return await self._invalidation.run(request, timeout_s=timeout_s)

    async def export(self, request: ExportCache) -> AsyncIterator[CacheRecord]:
        """Yield a tenant's entries; raises as `Transfer.export`."""
        async for record in self._transfer.export(request, now=self._clock.now()):
            yield record

    async def warm(self, records: AsyncIterator[CacheRecord]) -> WarmReply:
        """Take records in."""
        return await self._transfer.warm(records)


def _answer(offer: CacheOffer, reply: OfferReply) -> CachedAnswer:
    return CachedAnswer(
        entry=reply.entry,
        text=offer.text,
        ids=offer.ids,
        reason=offer.reason,
        prompt_tokens=offer.prompt_tokens,
        completion_tokens=offer.completion_tokens,
    )
