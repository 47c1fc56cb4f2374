"""Single flight: one of equal requests computes, the others get its answer, whatever becomes of the one."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from covey.testing import VirtualClock, virtual_time
from covey.types.generate import FinishReason
from covey.types.program import CacheOutcome
from covey.types.semcache import AbandonRequest, CacheReply
from services.semcache.config import Config
from tests.support.semcache import ACME, RIVAL, Parts, offer, query, running_cache

ASKED = replace(query("the opening hours", exact=b"k"), wait_s=20.0)


async def ask(parts: Parts, replies: list[CacheReply], asked: object = ASKED) -> None:
    replies.append(await parts.desk.lookup(asked, timeout_s=100.0))  # type: ignore[arg-type]


@virtual_time
async def test_followers_get_the_leaders_answer_even_one_that_is_not_kept() -> None:
    for reason in (FinishReason.STOP, FinishReason.TOOL_CALLS):
        async with running_cache(VirtualClock(), Config(preload=False), wait=False) as parts:
            leader = await parts.desk.lookup(ASKED, timeout_s=5.0)
            assert (leader.outcome, bool(leader.flight)) == (CacheOutcome.MISS, True)
            replies: list[CacheReply] = []
            async with anyio.create_task_group() as tg:
                for _ in range(5):
                    tg.start_soon(ask, parts, replies)
                await anyio.sleep(1)
                assert replies == []
                landing = replace(offer(ASKED, "at nine", reason), flight=leader.flight)
                kept = await parts.desk.offer(landing, timeout_s=5.0)
                assert kept.stored == (reason is FinishReason.STOP)
            assert [(r.outcome, r.answer.text if r.answer else "", r.flight) for r in replies] == [
                (CacheOutcome.EXACT, "at nine", "")
            ] * 5
            assert len(parts.desk.flights) == 0


@virtual_time
async def test_an_abandoned_flight_has_one_new_leader() -> None:
    async with running_cache(VirtualClock(), Config(preload=False), wait=False) as parts:
        leader = await parts.desk.lookup(ASKED, timeout_s=5.0)
        replies: list[CacheReply] = []
        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(ask, parts, replies)
            await anyio.sleep(1)
            parts.desk.abandon(AbandonRequest(tenant=RIVAL, flight=leader.flight))
            await anyio.sleep(1)
            assert replies == [], "a stranger ended a flight"
            parts.desk.abandon(AbandonRequest(tenant=ACME, flight=leader.flight))
            await anyio.sleep(1)
            (second,) = replies
            assert second.flight not in ("", leader.flight)
            await parts.desk.offer(replace(offer(ASKED, "late"), flight=leader.flight), timeout_s=5.0)
            await anyio.sleep(1)
            await parts.desk.offer(replace(offer(ASKED, "at nine"), flight=second.flight), timeout_s=5.0)
        assert [r.answer.text for r in replies if r.answer is not None] == ["at nine"] * 2


@virtual_time
async def test_a_dead_leaders_lease_ends_and_patience_ends() -> None:
    config = Config(preload=False, flight_lease_s=30.0, flight_waiting_max=2)
    clock = VirtualClock()
    async with running_cache(clock, config, wait=False) as parts:
        await parts.desk.lookup(ASKED, timeout_s=5.0)
        began = clock.now()
        impatient = await parts.desk.lookup(ASKED, timeout_s=100.0)
        assert (impatient.flight, impatient.outcome) == ("", CacheOutcome.MISS)
        assert clock.now() - began == pytest.approx(20.0)
        heir = await parts.desk.lookup(ASKED, timeout_s=100.0)
        assert heir.flight
        assert clock.now() - began == pytest.approx(30.0)
        replies: list[CacheReply] = []
        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(ask, parts, replies)
            await anyio.sleep(1)
            assert [reply.flight for reply in replies] == [""], "beyond the bound it computes by itself"
            parts.desk.flights.void(ACME)
        assert sum(bool(reply.flight) for reply in replies) == 1


async def test_only_equal_requests_of_one_tenant_fly_together_and_only_who_asks_for_it(clock: VirtualClock) -> None:
    async with running_cache(clock, Config(preload=False), wait=False) as parts:
        others = [
            ASKED,
            replace(ASKED, tenant=RIVAL),
            replace(ASKED, model="other"),
            replace(ASKED, exact_key=b"j"),
            replace(ASKED, category="code"),
        ]
        flights = [(await parts.desk.lookup(asked, timeout_s=5.0)).flight for asked in others]
        assert all(flights)
        assert len(set(flights)) == 5
        assert (await parts.desk.lookup(replace(ASKED, wait_s=0.0), timeout_s=5.0)).flight == ""
        assert (await parts.desk.lookup(replace(ASKED, exact_key=b""), timeout_s=5.0)).flight == ""
