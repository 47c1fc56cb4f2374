"""Invalidation by every criterion, dry and wet; entries out and in again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from covey.errors import InvalidArgument
from covey.testing import VirtualClock
from covey.types.program import CacheOutcome
from covey.types.semcache import CacheRecord, ExportCache, InvalidateRequest
from services.semcache.documents import MemoryDocuments
from tests.support.semcache import ACME, RIVAL, Parts, offer, query, running_cache


async def fill(parts: Parts, clock: VirtualClock) -> None:
    """Four entries of one tenant, the oldest first, and one of another."""
    offers = (
        replace(offer(query("the opening hours", exact=b"1")), tags=("prices", "eu")),
        offer(query("the opening hours today", exact=b"2")),
        replace(offer(query("cancel my card", exact=b"3", model="other")), tags=("prices",)),
        offer(query("", exact=b"4", category="code")),
        replace(offer(query("the opening hours", exact=b"1", tenant=RIVAL)), tags=("prices",)),
    )
    for one in offers:
        assert (await parts.desk.offer(one, timeout_s=5.0)).stored
        clock.advance(10)


@pytest.mark.parametrize(
    ("criteria", "removed"),
    [
        ({}, 4),
        ({"tag": "prices"}, 2),
        ({"tag": "prices", "model": "tiny"}, 1),
        ({"tag": "nothing"}, 0),
        ({"similar_to": "opening hours the", "similarity": 0.99}, 1),
        ({"similar_to": "the opening hours", "similarity": 0.8}, 2),
        ({"older_than_s": 35.0}, 2),
        ({"older_than_s": 35.0, "tag": "eu"}, 1),
        ({"category": "code"}, 1),
    ],
)
async def test_invalidate_matches_every_set_field(clock: VirtualClock, criteria: dict[str, Any], removed: int) -> None:
    async with running_cache(clock) as parts:
        await fill(parts, clock)
        request = InvalidateRequest(tenant=ACME, **criteria)
        dry = await parts.desk.invalidate(replace(request, dry_run=True), timeout_s=5.0)
        assert (dry.removed, dry.epoch, len(parts.store)) == (removed, 0, 5)
        wet = await parts.desk.invalidate(request, timeout_s=5.0)
        assert (wet.removed, wet.epoch, len(parts.store)) == (removed, 1, 5 - removed)
        again = await parts.desk.invalidate(request, timeout_s=5.0)
        assert (again.removed, again.epoch) == (0, 2)
        rival = await parts.cache.lookup(query("", exact=b"1", tenant=RIVAL), timeout_s=5.0)
        assert rival.outcome is CacheOutcome.EXACT
        parts.store.check()


async def test_a_wrong_invalidation_says_what_to_do(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        for request, field in (
            (InvalidateRequest(tenant=replace(query(), tenant="").tenant), "tenant"),  # type: ignore[arg-type]
            (InvalidateRequest(tenant=ACME, similar_to="hello"), "similarity"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                await parts.desk.invalidate(request, timeout_s=5.0)
            assert caught.value.field == field


async def test_an_answer_that_is_being_written_does_not_outlive_an_invalidation(clock: VirtualClock) -> None:
    class Slow(MemoryDocuments):
        parts: Parts

        async def put(self, documents: Sequence[Any]) -> None:
            await super().put(documents)
            await self.parts.desk.invalidate(InvalidateRequest(tenant=ACME), timeout_s=5.0)

    documents = Slow()
    async with running_cache(clock, documents=documents) as parts:
        documents.parts = parts
        reply = await parts.desk.offer(offer(query("the opening hours", exact=b"1")), timeout_s=5.0)
        assert not reply.stored
        assert "invalidated meanwhile" in reply.why
        assert len(parts.store) == 0


async def exported(parts: Parts) -> list[CacheRecord]:
    return [record async for record in parts.desk.export(ExportCache(tenant=ACME))]


async def stream(records: Sequence[CacheRecord]) -> AsyncIterator[CacheRecord]:
    for record in records:
        yield record


async def test_what_was_exported_warms_another_cache_with_its_age(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        await fill(parts, clock)
        records = await exported(parts)
    assert len(records) == 4
    async with running_cache(clock) as parts:
        reply = await parts.desk.warm(stream([*records, replace(records[0], age_s=1e9)]))
        assert (reply.stored, reply.refused) == (4, 1)
        hit = await parts.cache.lookup(query("the opening hours"), timeout_s=5.0)
        assert hit.outcome is CacheOutcome.SEMANTIC
        assert hit.answer is not None
        assert hit.answer.age_s == pytest.approx(50.0)
        assert {r.query.exact_key: r.tags for r in await exported(parts)} == {
            r.query.exact_key: r.tags for r in records
        }
