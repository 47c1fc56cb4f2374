"""The cache's rules, over an encoder of bags of words: keys, isolation, ages, quotas, feedback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from anyio import to_thread

from covey.errors import InvalidArgument, NotFound
from covey.policy.reuse import ReuseMode
from covey.testing import VirtualClock
from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from covey.types.program import CacheOutcome
from covey.types.semcache import CacheQuery, FeedbackRequest, InvalidateRequest, Verdict
from services.semcache.config import CategoryConfig, Config
from tests.support.semcache import ACME, RIVAL, Parts, offer, query, running_cache


async def ask(parts: Parts, asked: CacheQuery) -> CacheOutcome:
    return (await parts.cache.lookup(asked, timeout_s=5.0)).outcome


async def keep(parts: Parts, asked: CacheQuery, answer: str = "an answer") -> str:
    reply = await parts.cache.offer(offer(asked, answer), timeout_s=5.0)
    assert reply.stored, reply.why
    return reply.entry


async def test_an_equal_request_gets_the_stored_answer_with_its_age(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        asked = query("hello there", exact=b"k1", category="")
        assert await ask(parts, asked) is CacheOutcome.MISS
        entry = await keep(parts, asked, "hi")
        clock.advance(5)
        reply = await parts.cache.lookup(asked, timeout_s=5.0)
        assert reply.outcome is CacheOutcome.EXACT
        assert reply.category == "general"
        assert reply.answer is not None
        assert (reply.answer.entry, reply.answer.text, reply.answer.ids) == (entry, "hi", (1, 2, 3))
        assert (reply.answer.age_s, reply.answer.prompt_tokens) == (5.0, 9)
        assert await ask(parts, replace(asked, exact_key=b"k2")) is CacheOutcome.MISS
        assert await ask(parts, replace(asked, model="other")) is CacheOutcome.MISS


async def test_no_tenant_sees_anothers_entries_by_any_tier_or_call(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        mine = query("the opening hours", exact=b"k")
        entry = await keep(parts, mine)
        theirs = replace(mine, tenant=RIVAL)
        assert await ask(parts, theirs) is CacheOutcome.MISS
        assert await ask(parts, replace(theirs, exact_key=b"")) is CacheOutcome.MISS
        explained = await parts.cache.explain(replace(theirs, exact_key=b""), timeout_s=5.0)
        assert (explained.entry, explained.similarity) == ("", 0.0)
        with pytest.raises(NotFound):
            await parts.cache.feedback(FeedbackRequest(tenant=RIVAL, entry=entry, verdict=Verdict.WRONG))
        assert (await parts.desk.invalidate(InvalidateRequest(tenant=RIVAL), timeout_s=5.0)).removed == 0
        # positive control: the owner hits by both tiers
        assert await ask(parts, mine) is CacheOutcome.EXACT
        assert await ask(parts, replace(mine, exact_key=b"")) is CacheOutcome.SEMANTIC


async def test_only_the_same_context_model_and_category_may_hit_semantically(clock: VirtualClock) -> None:
    config = Config(categories={name: CategoryConfig(mode=ReuseMode.SEMANTIC) for name in ("faq", "shop")})
    async with running_cache(clock, config) as parts:
        asked = query("the opening hours")
        await keep(parts, asked)
        for other in (
            replace(asked, context_key=b"another"),
            replace(asked, model="other"),
            replace(asked, category="shop"),
        ):
            assert await ask(parts, other) is CacheOutcome.MISS
        assert await ask(parts, asked) is CacheOutcome.SEMANTIC


async def test_time_to_live_is_absolute_and_a_hit_does_not_renew_it(clock: VirtualClock) -> None:
    config = Config(categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC, ttl_s=100.0)})
    async with running_cache(clock, config) as parts:
        asked = query("the opening hours", exact=b"k")
        await keep(parts, asked)
        clock.advance(99)
        assert await ask(parts, asked) is CacheOutcome.EXACT
        assert await ask(parts, replace(asked, max_age_s=50.0)) is CacheOutcome.MISS
        clock.advance(1)
        assert await ask(parts, asked) is CacheOutcome.MISS
        assert await ask(parts, replace(asked, exact_key=b"")) is CacheOutcome.MISS
        assert len(parts.store) == 1
        await parts.upkeep.once()
        assert len(parts.store) == 0


async def test_quota_evicts_the_longest_unused_of_its_own_partition(clock: VirtualClock) -> None:
    config = Config(categories={"faq": CategoryConfig(mode=ReuseMode.EXACT, quota_entries=2)})
    async with running_cache(clock, config) as parts:
        other = query(exact=b"other", tenant=RIVAL)
        await keep(parts, other)
        for key in (b"1", b"2"):
            await keep(parts, query(exact=key))
        assert await ask(parts, query(exact=b"1")) is CacheOutcome.EXACT
        await keep(parts, query(exact=b"3"))
        hits = [await ask(parts, query(exact=key)) is CacheOutcome.EXACT for key in (b"1", b"2", b"3")]
        assert hits == [True, False, True]
        assert await ask(parts, other) is CacheOutcome.EXACT


async def test_wrong_and_stale_answers_go_at_once_right_ones_stay(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        for verdict, outcome in (
            (Verdict.RIGHT, CacheOutcome.SEMANTIC),
            (Verdict.WRONG, CacheOutcome.MISS),
            (Verdict.STALE, CacheOutcome.MISS),
        ):
            entry = await keep(parts, query("the opening hours"))
            await parts.cache.feedback(FeedbackRequest(tenant=ACME, entry=entry, verdict=verdict))
            assert await ask(parts, query("the opening hours")) is outcome


@pytest.mark.parametrize(
    ("scope", "removed"),
    [({}, 3), ({"model": "tiny"}, 2), ({"category": "faq"}, 2), ({"model": "tiny", "category": "faq"}, 1)],
)
async def test_invalidate_takes_what_every_set_field_matches(
    clock: VirtualClock, scope: dict[str, Any], removed: int
) -> None:
    async with running_cache(clock) as parts:
        await keep(parts, query("one", exact=b"1"))
        await keep(parts, query("two", exact=b"2", category="code"))
        await keep(parts, query("three", exact=b"3", model="other"))
        await keep(parts, query("one", exact=b"1", tenant=RIVAL))
        assert (await parts.desk.invalidate(InvalidateRequest(tenant=ACME, **scope), timeout_s=5.0)).removed == removed
        assert len(parts.store) == 4 - removed
        parts.store.check()


async def test_invalidate_one_entry(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        entry = await keep(parts, query("one", exact=b"1"))
        await keep(parts, query("two", exact=b"2"))
        assert (await parts.desk.invalidate(InvalidateRequest(tenant=ACME, entry=entry), timeout_s=5.0)).removed == 1
        assert await ask(parts, query("two", exact=b"2")) is CacheOutcome.EXACT


async def test_what_is_not_kept_says_why(clock: VirtualClock) -> None:
    off = CategoryConfig(mode=ReuseMode.OFF)
    config = Config(entry_size_bytes_max=3000, categories={"private": off, "none": CategoryConfig(quota_entries=0)})
    async with running_cache(clock, config) as parts:
        asked = query("hi", exact=b"k", category="")
        for refused, why in (
            (offer(replace(asked, category="private")), "keeps nothing"),
            (offer(replace(asked, category="none")), "keeps nothing"),
            (offer(asked, reason=FinishReason.TOOL_CALLS), "TOOL_CALLS"),
            (offer(asked, reason=FinishReason.CANCELLED), "CANCELLED"),
            (offer(asked, "x" * 3000), "over the limit"),
            (replace(offer(asked, ""), ids=()), "empty"),
            (offer(replace(asked, exact_key=b"")), "no exact key"),
        ):
            reply = await parts.cache.offer(refused, timeout_s=5.0)
            assert not reply.stored
            assert why in reply.why
        assert len(parts.store) == 0
        assert await ask(parts, replace(asked, category="private")) is CacheOutcome.OFF
        assert await ask(parts, replace(asked, exact_key=b"")) is CacheOutcome.OFF


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (query("x", exact=b"k", tenant=TenantId("")), "tenant"),
        (query("x", exact=b"k", model=""), "model"),
        (query("x", exact=b"k", category="nope"), "category"),
    ],
)
async def test_a_wrong_query_names_its_field(clock: VirtualClock, wrong: CacheQuery, field: str) -> None:
    async with running_cache(clock) as parts:
        for call in (parts.cache.lookup, parts.cache.explain):
            with pytest.raises(InvalidArgument) as caught:
                await call(wrong, timeout_s=5.0)
            assert caught.value.field == field
        with pytest.raises(InvalidArgument):
            await parts.cache.offer(offer(wrong), timeout_s=5.0)
        assert len(parts.store) == 0


async def test_a_token_id_that_is_none_is_refused(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        with pytest.raises(InvalidArgument, match="token ids"):
            await parts.cache.offer(replace(offer(query(exact=b"k")), ids=(-1,)), timeout_s=5.0)


async def test_a_text_too_long_for_the_encoder_never_hits_semantically(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        beginning = " ".join(f"w{i}" for i in range(60))
        await keep(parts, query(f"{beginning} north", exact=b"k"))
        assert await ask(parts, query(f"{beginning} south")) is CacheOutcome.OFF
        assert "too long" in (await parts.cache.explain(query(f"{beginning} south"), timeout_s=5.0)).why


async def test_requests_without_a_category_are_classified_by_examples(clock: VirtualClock) -> None:
    config = Config(
        categories={
            "bank": CategoryConfig(mode=ReuseMode.SEMANTIC, examples=("card account money", "money card")),
            "secret": CategoryConfig(mode=ReuseMode.OFF, examples=("salary payslip",)),
        }
    )
    async with running_cache(clock, config) as parts:
        asked = query("money card account", category="")
        await keep(parts, asked)
        reply = await parts.cache.lookup(asked, timeout_s=5.0)
        assert (reply.outcome, reply.category) == (CacheOutcome.SEMANTIC, "bank")
        assert (await parts.cache.explain(query("zebra", category=""), timeout_s=5.0)).category == "general"
        hidden = query("salary payslip", exact=b"k", category="")
        assert not (await parts.cache.offer(offer(hidden), timeout_s=5.0)).stored
        assert await ask(parts, hidden) is CacheOutcome.OFF


async def test_explain_counts_nothing_and_stats_count_what_was_served(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        asked = query("the opening hours", exact=b"k")
        entry = await keep(parts, asked)
        explained = await parts.cache.explain(query("the opening hours today"), timeout_s=5.0)
        assert (explained.category, explained.mode, explained.threshold, explained.entry) == (
            "faq", "semantic", 0.92, entry,
        )  # fmt: skip
        assert 0.5 < explained.similarity < 0.92
        assert "under the threshold" in explained.why
        assert parts.cache.stats().misses == 0
        await ask(parts, asked)
        await ask(parts, query("the opening hours"))
        await ask(parts, query("something else entirely"))
        stats = parts.cache.stats()
        assert (stats.entries, stats.exact_hits, stats.semantic_hits, stats.misses) == (1, 1, 1, 1)
        assert stats.encoder_ready
        assert stats.size_bytes > 1000
        await parts.upkeep.once()
        text = (await to_thread.run_sync(parts.metrics.render)).decode()
        assert 'covey_semcache_lookups_total{category="faq",outcome="SEMANTIC"} 1.0' in text
        assert "opening" not in text


async def test_a_crowded_shelf_moves_into_an_index_and_still_answers(clock: VirtualClock) -> None:
    config = Config(exact_search_max=8, categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC)})
    async with running_cache(clock, config) as parts:
        for number in range(40):
            await keep(parts, query(f"topic word{number} detail{number * 7}"), f"answer {number}")
        await parts.upkeep.once()
        gone = await keep(parts, query("topic late entry"))
        await parts.cache.feedback(FeedbackRequest(tenant=ACME, entry=gone, verdict=Verdict.STALE))
        for number in range(40):
            reply = await parts.cache.lookup(query(f"topic word{number} detail{number * 7}"), timeout_s=5.0)
            assert reply.answer is not None
            assert reply.answer.text == f"answer {number}"
        parts.store.check()
