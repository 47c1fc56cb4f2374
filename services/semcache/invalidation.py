"""Voiding entries: what an invalidation matches, and the epoch that it moves its tenant to."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from covey.clock import Clock
from covey.errors import InvalidArgument
from covey.types.semcache import InvalidateReply, InvalidateRequest

from .documents import Voided
from .encoder import Embedder
from .entry import Document, Held
from .flights import Flights
from .library import Library
from .metrics import CacheMetrics
from .vectors import Vectors

BATCH = 256
ROUNDS_MAX = 4
"""Passes over what was stored while documents were read; what comes later was asked after the invalidation."""


class Invalidation:
    """Selects and removes; owned by the event loop, removes everything that it selected in one step."""

    def __init__(
        self, library: Library, flights: Flights, embedder: Embedder, *, clock: Clock, metrics: CacheMetrics
    ) -> None:
        self._library = library
        self._flights = flights
        self._embedder = embedder
        self._clock = clock
        self._metrics = metrics

    async def run(self, request: InvalidateRequest, *, timeout_s: float) -> InvalidateReply:
        """Void what matches every field that is set, or count it in a dry run.

        Raises `InvalidArgument` for a wrong request; `NoSpace` or `Unavailable` when the disk does not take it: the
        entries are not served then, but may come back with a restart, so ask again.
        """
        if not request.tenant:
            raise InvalidArgument("name the tenant whose entries are to go", field="tenant")
        vector = await self._vector(request, timeout_s)
        labels = await self._select(request, vector)
        standing = await self._library.documents.standing(request.tenant)
        if request.dry_run:
            return InvalidateReply(removed=len(labels), epoch=standing.epoch)
        self._flights.void(request.tenant)
        if request == InvalidateRequest(tenant=request.tenant):
            self._embedder.forget(request.tenant)
        voided = Voided(epoch=standing.epoch + 1, reign=standing.reign)
        removed = await self._library.void(request.tenant, voided, labels)
        self._metrics.removed(removed, "invalidated")
        return InvalidateReply(removed=removed, epoch=voided.epoch)

    async def _vector(self, request: InvalidateRequest, timeout_s: float) -> Vectors | None:
        if not request.similar_to:
            return None
        if not request.similarity:
            raise InvalidArgument(
                "say from which cosine similarity on entries are to go, for example 0.9", field="similarity"
            )
        encoded = await self._embedder.one(request.tenant, request.similar_to, timeout_s=timeout_s)
        if encoded.vector is None:
            raise InvalidArgument("the text is too long for the encoder: shorten it", field="similar_to")
        return encoded.vector

    async def _select(self, request: InvalidateRequest, vector: Vectors | None) -> list[int]:
        """What tables alone can tell is selected in one step; tags and meaning are read from the documents."""
        if vector is None and not request.tag:
            return [held.label for held in self._matching(request)]
        seen: set[int] = set()
        selected: list[int] = []
        for _ in range(ROUNDS_MAX):
            fresh = [held.label for held in self._matching(request) if held.label not in seen]
            if not fresh:
                break
            seen.update(fresh)
            for at in range(0, len(fresh), BATCH):
                found = await self._library.documents.get(fresh[at : at + BATCH])
                selected.extend(document.label for document in found if self._matches(request, vector, document))
        return selected

    def _matching(self, request: InvalidateRequest) -> Iterable[Held]:
        now = self._clock.now()
        for held in self._library.store.matching(request.tenant, model=request.model, category=request.category):
            is_old = not request.older_than_s or now - held.stored_at > request.older_than_s
            if is_old and request.entry in ("", held.id):
                yield held

    def _matches(self, request: InvalidateRequest, vector: Vectors | None, document: Document) -> bool:
        if request.tag and request.tag not in document.tags:
            return False
        if vector is None:
            return True
        held = self._library.vector_of(document)
        return held is not None and len(held) == len(vector) and float(np.dot(held, vector)) >= request.similarity
