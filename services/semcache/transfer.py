"""Entries on their way out and in: what `export` writes, `warm` reads, and replicas copy."""

from __future__ import annotations

from collections.abc import AsyncIterator

from covey.errors import InvalidArgument
from covey.types.ids import TenantId
from covey.types.semcache import CacheOffer, CacheQuery, CacheRecord, ExportCache, WarmReply

from .cache import AnswerCache
from .entry import Document, Partition, Scope, Shelf, label_of, pack_ids
from .library import Library

BATCH = 128
WARM_S = 30.0
"""The most that one record may wait for the encoder."""


class Transfer:
    """Reads the library for others and fills it from others' records."""

    def __init__(self, library: Library, cache: AnswerCache) -> None:
        self._library = library
        self._cache = cache

    async def export(self, request: ExportCache, *, now: float) -> AsyncIterator[CacheRecord]:
        """Yield a tenant's entries. Raises `InvalidArgument` without one, `Unavailable` when they cannot be read."""
        if not request.tenant:
            raise InvalidArgument("name the tenant whose entries are to be exported", field="tenant")
        held = self._library.store.matching(request.tenant, model=request.model, category=request.category)
        labels = [entry.label for entry in held]
        for at in range(0, len(labels), BATCH):
            for document in await self._library.documents.get(labels[at : at + BATCH]):
                if document.label in self._library.store:
                    yield record_of(document, now)

    async def warm(self, records: AsyncIterator[CacheRecord]) -> WarmReply:
        """Take records in as if they were offered now, under this mesh's categories; an old one keeps its age.

        Vectors are made anew: nothing says which encoder made those of a file.
        """
        stored = refused = 0
        async for record in records:
            offer = CacheOffer(
                query=record.query,
                text=record.text,
                ids=record.ids,
                reason=record.reason,
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
                tags=record.tags,
            )
            reply = await self._cache.offer(offer, timeout_s=WARM_S, age_s=record.age_s)
            stored += reply.stored
            refused += not reply.stored
        return WarmReply(stored=stored, refused=refused)


def record_of(document: Document, now: float) -> CacheRecord:
    """A document as other processes see it; its age instead of its date."""
    scope = document.scope
    return CacheRecord(
        entry=document.id,
        query=CacheQuery(
            tenant=scope.tenant,
            model=scope.model,
            exact_key=document.exact_key,
            context_key=document.shelf.context_key,
            text=document.text,
            category=document.asked_category,
        ),
        category=document.shelf.partition.category,
        text=document.answer,
        ids=tuple(document.token_ids),
        reason=document.reason,
        prompt_tokens=document.prompt_tokens,
        completion_tokens=document.completion_tokens,
        age_s=max(0.0, now - document.stored_at),
        vector=document.vector,
        tags=document.tags,
    )


def document_of(record: CacheRecord, tenant: TenantId, *, encoder: str, ttl_s: float, now: float) -> Document | None:
    """The document that a record stands for, under its own name; None for a record of another tenant or no name."""
    label = label_of(record.entry)
    query = record.query
    if label is None or query.tenant != tenant:
        return None
    stored_at = now - record.age_s
    texts = len(record.text.encode()) + len(query.text.encode())
    return Document(
        label=label,
        shelf=Shelf(Partition(Scope(tenant, query.model), record.category), query.context_key),
        asked_category=query.category,
        exact_key=query.exact_key,
        text=query.text,
        answer=record.text,
        token_ids=pack_ids(record.ids),
        reason=record.reason,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        stored_at=stored_at,
        expires_at=stored_at + ttl_s,
        size_bytes=1024 + texts + 4 * len(record.ids) + len(record.vector) * 3 // 2,
        tags=record.tags,
        vector=record.vector,
        encoder=encoder if record.vector else "",
    )
