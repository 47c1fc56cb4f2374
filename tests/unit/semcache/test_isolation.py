"""No tenant meets another one's entries, whatever they are called; nor can it tell by time that they exist."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.clock import MonotonicClock
from covey.testing import VirtualClock
from covey.types.ids import TenantId
from covey.types.program import CacheOutcome
from covey.types.semcache import CacheQuery, ExportCache, InvalidateRequest
from services.semcache.entry import Scope, hash_of
from tests.support.semcache import Parts, offer, query, running_cache

WORDS = st.text(alphabet="a1:/\0|_ ☃", max_size=6)
NAMES = (
    (("org_1", "2345"), ("org_12345", "")),
    (("a", "b:c"), ("a:b", "c")),
    (("a/b", "c"), ("a", "b/c")),
    (("a", "\0m"), ("a\0", "m")),
    (("Acme", "m"), ("acme", "m")),
    (("acme", "m"), ("acme ", "m")),
    (("\u00e9", "m"), ("e\u0301", "m")),
    (("' OR '1'='1", "m"), ("acme", "m")),
    (("*", "m"), ("acme", "m")),
)
"""(tenant, model) of two who would meet if names were joined, folded, normalised or taken for patterns."""


@settings(max_examples=300)
@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS, WORDS, WORDS))
def test_equal_hashes_mean_equal_names(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    def hashed(names: tuple[str, ...]) -> int:
        return hash_of(Scope(TenantId(names[0]), names[1]), names[2], names[3].encode())

    assert (hashed(one) == hashed(other)) == (one == other)


async def reads(parts: Parts, asked: CacheQuery) -> list[CacheOutcome]:
    """What each tier says: both keys, the exact key alone, the text alone."""
    queries = (asked, replace(asked, text="", context_key=b""), replace(asked, exact_key=b""))
    return [(await parts.cache.lookup(one, timeout_s=5.0)).outcome for one in queries]


@pytest.mark.parametrize(("owner", "stranger"), NAMES)
async def test_names_that_would_meet_if_joined_never_do(
    clock: VirtualClock, owner: tuple[str, str], stranger: tuple[str, str]
) -> None:
    async with running_cache(clock) as parts:
        mine = query("the opening hours", exact=b"k", tenant=TenantId(owner[0]), model=owner[1] or "x")
        theirs = replace(mine, tenant=TenantId(stranger[0]), model=stranger[1] or "x")
        assert (await parts.desk.offer(offer(mine, "my secret"), timeout_s=5.0)).stored
        assert await reads(parts, theirs) == [CacheOutcome.MISS] * 3
        explained = await parts.cache.explain(theirs, timeout_s=5.0)
        assert (explained.entry, explained.similarity) == ("", 0.0)
        assert [record async for record in parts.desk.export(ExportCache(tenant=theirs.tenant))] == []
        assert (await parts.desk.invalidate(InvalidateRequest(tenant=theirs.tenant), timeout_s=5.0)).removed == 0
        # The control: the owner hits by every tier.
        assert await reads(parts, mine) == [CacheOutcome.EXACT, CacheOutcome.EXACT, CacheOutcome.SEMANTIC]
        parts.store.check()


async def test_time_does_not_tell_whether_another_tenant_has_an_answer(clock: VirtualClock) -> None:
    watch, rng = MonotonicClock(), Random(3)
    async with running_cache(clock) as parts:
        for number in range(50):
            mine = query(f"held {number}", exact=b"held%d" % number, tenant=TenantId("owner"))
            assert (await parts.desk.offer(offer(mine), timeout_s=5.0)).stored
        samples: list[tuple[float, bool]] = []
        for _ in range(800):
            is_held, number = rng.random() < 0.5, rng.randrange(50)
            name = "held" if is_held else "free"
            asked = query("", exact=f"{name}{number}".encode(), tenant=TenantId("stranger"))
            began = watch.now()
            assert (await parts.cache.lookup(asked, timeout_s=5.0)).outcome is CacheOutcome.MISS
            samples.append((watch.now() - began, is_held))
    assert abs(rank_z(samples)) < 4.0


def rank_z(samples: list[tuple[float, bool]]) -> float:
    """The standard score of Mann and Whitney's U: about normal if both kinds take equally long."""
    ranks = sum(rank for rank, (_, is_held) in enumerate(sorted(samples), start=1) if is_held)
    held = sum(is_held for _, is_held in samples)
    free = len(samples) - held
    mean = held * (held + free + 1) / 2
    return (ranks - mean) / math.sqrt(held * free * (held + free + 1) / 12)


def test_the_rank_test_sees_a_difference() -> None:
    rng = Random(1)
    samples = [(rng.gauss(1.0 if held else 1.3, 0.5), held) for held in (True, False) * 400]
    assert rank_z(samples) < -4.0
