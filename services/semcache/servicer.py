"""The RPCs of `SemCache` over the cache and the encoder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from covey.codec.methods import SemCache
from covey.errors import ContextLengthExceeded, InvalidArgument, NotFound, PayloadTooLarge
from covey.net.rpc import Call, Handlers
from covey.types.common import Empty
from covey.types.program import EmbedReply, EmbedRequest, Vector
from covey.types.semcache import (
    AbandonRequest,
    CacheEvent,
    CacheExplanation,
    CacheOffer,
    CacheQuery,
    CacheRecord,
    CacheReply,
    CacheStats,
    ExportCache,
    FeedbackRequest,
    InvalidateReply,
    InvalidateRequest,
    OfferReply,
    RouteOutcome,
    RouteQuery,
    RouteReply,
    Verdict,
    WarmReply,
    WatchCacheRequest,
)

from .branch import Branch, Routing, routing
from .encoder import Embedder
from .minilm import Encoded
from .tutor import Tutor

REPLY_SHARE = 0.9
"""Part of a caller's remaining time that is spent before the answer, so that a typed one still arrives."""
INPUTS_MAX = 1024
"""Texts of one Embed call: more vectors would not fit into one message."""


class SemCacheServicer:
    """Handlers of the service `SemCache`."""

    def __init__(
        self, branch: Branch, embedder: Embedder, tutor: Tutor, *, model: str, embed_batch: int, embed_wait_s: float
    ) -> None:
        self._branch = branch
        self._cache = branch.desk.cache
        self._embedder = embedder
        self._tutor = tutor
        self._model = model
        self._embed_batch = embed_batch
        self._embed_wait_s = embed_wait_s

    def handlers(self) -> Handlers:
        """Return every method of the service with its handler."""
        return {
            SemCache.LOOKUP: self.lookup,
            SemCache.OFFER: self.offer,
            SemCache.FEEDBACK: self.feedback,
            SemCache.INVALIDATE: self.invalidate,
            SemCache.EXPLAIN: self.explain,
            SemCache.EMBED: self.embed,
            SemCache.STATS: self.stats,
            SemCache.ABANDON: self.abandon,
            SemCache.EXPORT: self.export,
            SemCache.WARM: self.warm,
            SemCache.WATCH: self.watch,
            SemCache.ROUTE: self.route,
            SemCache.LEARN: self.learn,
        }

    async def lookup(self, request: CacheQuery, call: Call) -> CacheReply:
        reply = await self._branch.lookup(request, **_by(call))
        if not request.examples_max or reply.answer is not None:
            return reply
        return replace(reply, examples=await self._tutor.examples(request))

    async def offer(self, request: CacheOffer, call: Call) -> OfferReply:
        reply = await self._branch.offer(request, **_by(call))
        await self._tutor.offer(request, reply.entry)
        return reply

    async def abandon(self, request: AbandonRequest, call: Call) -> Empty:
        await self._branch.abandon(request, **_by(call))
        return Empty()

    async def explain(self, request: CacheQuery, call: Call) -> CacheExplanation:
        return await self._cache.explain(request, timeout_s=call.remaining_s())

    async def feedback(self, request: FeedbackRequest, call: Call) -> Empty:
        if request.verdict is not Verdict.RIGHT:
            self._tutor.remove(request.tenant, request.entry)
        return await self._branch.feedback(request, **_by(call))

    async def invalidate(self, request: InvalidateRequest, call: Call) -> InvalidateReply:
        if not request.dry_run:
            self._tutor.forget(request.tenant)
        return await self._branch.invalidate(request, **_by(call))

    async def watch(self, request: WatchCacheRequest, call: Call) -> AsyncIterator[CacheEvent]:
        async for event in self._branch.watch(request):
            yield event

    async def export(self, request: ExportCache, call: Call) -> AsyncIterator[CacheRecord]:
        async for record in self._branch.export(request, is_forwarded=_by(call)["is_forwarded"]):
            yield record

    async def warm(self, records: AsyncIterator[CacheRecord], call: Call) -> WarmReply:
        return await self._branch.warm(records, is_forwarded=_by(call)["is_forwarded"])

    async def route(self, request: RouteQuery, call: Call) -> RouteReply:
        return await self._tutor.route(request)

    async def learn(self, request: RouteOutcome, call: Call) -> Empty:
        self._tutor.learn(request)
        return Empty()

    async def stats(self, request: Empty, call: Call) -> CacheStats:
        return self._cache.stats()

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedReply:
        """Encode every input to a unit vector, waiting for the encoder to load within the caller's deadline.

        Raises:
            NotFound: another model than the encoder of this service.
            InvalidArgument: no inputs, or an empty one.
            PayloadTooLarge: more than `INPUTS_MAX` inputs.
            ContextLengthExceeded: an input is longer than the encoder reads; nothing is cut off.
            Unavailable: the encoder is not loaded in time; with a hint when to try again.
        """
        if request.model != self._model:
            raise NotFound(f"the embedding model of this mesh is {self._model}", field="model")
        if not request.inputs:
            raise InvalidArgument("give at least one text", field="input")
        if len(request.inputs) > INPUTS_MAX:
            raise PayloadTooLarge(f"at most {INPUTS_MAX} texts are embedded in one call; split them", field="input")
        for index, text in enumerate(request.inputs):
            if not text:
                raise InvalidArgument("a text to embed must not be empty", field=f"input[{index}]")
        encoded: list[Encoded] = []
        for start in range(0, len(request.inputs), self._embed_batch):
            timeout_s = min(self._embed_wait_s, REPLY_SHARE * call.remaining_s())
            batch = request.inputs[start : start + self._embed_batch]
            encoded.extend(await self._embedder.many(batch, timeout_s=timeout_s))
        vectors = tuple(_vector(index, item) for index, item in enumerate(encoded))
        return EmbedReply(vectors=vectors, prompt_tokens=sum(item.tokens for item in encoded))


def _by(call: Call) -> Routing:
    return routing(call.remaining_s(), call.headers)


def _vector(index: int, encoded: Encoded) -> Vector:
    if encoded.vector is None:
        raise ContextLengthExceeded(
            f"the text has {encoded.tokens} tokens or characters, more than the encoder reads; split it",
            field=f"input[{index}]",
        )
    return Vector(values=tuple(encoded.vector.tolist()))
