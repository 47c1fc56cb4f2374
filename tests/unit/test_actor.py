"""Asking, lanes and backpressure of the actor kit, one test a promise, under virtual time."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from covey.actor import (
    ESCALATE,
    ActorStats,
    Inbox,
    Overloaded,
    supervise,
)
from covey.actor import inbox as inbox_module
from covey.errors import DeadlineExceeded, Miss
from covey.testing import virtual_time
from tests.support.actors import Add, Counter, Refuse, Stuck, Work, starting_after

# -- asking ------------------------------------------------------------------


@virtual_time
async def test_an_ask_is_answered() -> None:
    async with supervise() as sup:
        ref = sup.start(Counter, name="counter")
        assert await ref.ask(Add(2), timeout_s=1) == 2
        assert await ref.ask(Add(3), timeout_s=1) == 5


@virtual_time
async def test_an_expected_error_is_an_answer_and_not_a_crash() -> None:
    async with supervise() as sup:
        ref = sup.start(Counter, name="counter", restart=ESCALATE)
        await ref.ask(Add(1), timeout_s=1)
        with pytest.raises(Miss):
            await ref.ask(Refuse(), timeout_s=1)
        assert await ref.ask(Add(1), timeout_s=1) == 2


@virtual_time
async def test_only_the_first_answer_counts() -> None:
    msg = Add(1)
    msg.reply.set(1)
    msg.reply.set(2)
    msg.reply.fail(Miss("late"))
    assert await msg.reply.wait() == 1
    assert msg.reply.done
    assert not msg.reply.abandoned


@virtual_time
async def test_an_ask_out_of_time_is_abandoned() -> None:
    async with supervise(grace_s=1000) as sup:
        ref = sup.start(Counter, name="counter")
        msg = Work(50)
        with pytest.raises(DeadlineExceeded, match="counter"):
            await ref.ask(msg, timeout_s=1)
        assert anyio.current_time() == pytest.approx(1)
        assert msg.reply.abandoned


@virtual_time
async def test_queueing_and_work_share_one_deadline() -> None:
    async with supervise(grace_s=1000) as sup:
        ref = sup.start(Counter, name="counter", capacity=1)
        ref.offer(Work(6))
        await anyio.wait_all_tasks_blocked()
        ref.offer(Work(6))
        blocked = Work(6)
        started = anyio.current_time()
        with pytest.raises(DeadlineExceeded):
            await ref.ask(blocked, timeout_s=8)  # 6 s for room, then 6 + 6 s of work
        assert anyio.current_time() - started == pytest.approx(8)
        assert blocked.reply.abandoned


@virtual_time
async def test_a_timeout_of_the_actor_itself_is_not_the_askers_deadline() -> None:
    class TimesOut:
        async def run(self, inbox: Inbox[Add]) -> None:
            (await inbox.get()).reply.fail(TimeoutError("inside"))

    async with supervise() as sup:
        with pytest.raises(TimeoutError, match="inside"):
            await sup.start(TimesOut, name="t").ask(Add(1), timeout_s=5)


# -- lanes and backpressure --------------------------------------------------


@virtual_time
async def test_a_full_inbox_refuses_offers_and_blocks_tells_in_order() -> None:
    seen: list[object] = []
    async with supervise(grace_s=1000) as sup:
        ref = sup.start(starting_after(100, seen), name="late", capacity=2)
        ref.offer(1)
        ref.offer(2)
        with pytest.raises(Overloaded):
            ref.offer(3)
        async with anyio.create_task_group() as tg:
            tg.start_soon(ref.tell, 4)
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(ref.tell, 5)
            await anyio.wait_all_tasks_blocked()
            inbox = sup.stats()[0].inbox
            assert (inbox.queued, inbox.blocked, inbox.rejected) == (2, 2, 1)
    assert seen == [1, 2, 4, 5]


@virtual_time
async def test_a_cancelled_blocked_tell_leaves_nothing_behind() -> None:
    seen: list[object] = []
    async with supervise(grace_s=1000) as sup:
        ref = sup.start(starting_after(100, seen), name="late", capacity=1)
        ref.offer(1)
        with anyio.move_on_after(1) as scope:
            await ref.tell(2)
        assert scope.cancelled_caught
        assert sup.stats()[0].inbox.blocked == 0
        await ref.tell(3)
    assert seen == [1, 3]


@virtual_time
async def test_an_offer_cannot_overtake_a_blocked_sender() -> None:
    async with supervise(grace_s=1000) as sup:
        taken = anyio.Event()

        class TakesOne:
            async def run(self, inbox: Inbox[int]) -> None:
                await anyio.sleep(1)
                assert inbox.next() == 1
                taken.set()
                async for _ in inbox:
                    pass

        ref = sup.start(TakesOne, name="one", capacity=1)
        ref.offer(1)
        async with anyio.create_task_group() as tg:
            tg.start_soon(ref.tell, 2)
            await taken.wait()
            with pytest.raises(Overloaded):
                ref.offer(3)


@virtual_time
async def test_control_overtakes_work() -> None:
    seen: list[object] = []
    async with supervise(grace_s=1000) as sup:
        ref = sup.start(starting_after(1, seen), name="late", capacity=10)
        for n in range(10):
            ref.offer(n)
        assert ref.signal("abort") is True
    assert seen == ["abort", *range(10)]


@virtual_time
async def test_the_control_lane_is_bounded_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "CONTROL_MAX", 2)
    async with supervise(grace_s=1) as sup:
        ref = sup.start(Stuck, name="stuck")
        await ref.tell("first")
        await anyio.wait_all_tasks_blocked()
        refused = Add(1)
        assert [ref.signal("a"), ref.signal("b"), ref.signal("c"), ref.signal(refused)] == [True, True, False, False]
        assert sup.stats()[0].inbox.rejected == 2
        with pytest.raises(Overloaded):
            await refused.reply.wait()


@virtual_time
async def test_stats_show_held_asks_and_the_time_in_queue() -> None:
    async with supervise(grace_s=0) as sup:
        ref = sup.start(Stuck, name="stuck", capacity=7)
        asks = [Add(1), Add(2), Add(3)]
        for msg in asks:
            ref.offer(msg)
        await anyio.sleep(5)
        stats = sup.stats()[0]
        assert stats == ActorStats(name="stuck", crashes=0, inbox=stats.inbox)
        assert (stats.inbox.capacity, stats.inbox.queued, stats.inbox.held) == (7, 2, 1)
        assert stats.inbox.oldest_wait_s == pytest.approx(5)


@virtual_time
async def test_asks_that_nobody_keeps_are_not_held() -> None:
    class Forgets:
        async def run(self, inbox: Inbox[Any]) -> None:
            async for msg in inbox:
                del msg

    async with supervise() as sup:
        ref = sup.start(Forgets, name="forgets", capacity=100)
        for n in range(100):
            ref.offer(Add(n))
        await anyio.wait_all_tasks_blocked()
        assert sup.stats()[0].inbox.held == 0


@virtual_time
async def test_cancelling_get_loses_no_message() -> None:
    inbox: Inbox[int] = Inbox(8)
    got: list[int] = []
    for n in range(4):
        inbox.offer(n)
        with anyio.CancelScope() as scope:
            scope.cancel()
            got.append(await inbox.get())
    while (msg := inbox.next()) is not None:
        got.append(msg)
    assert got == [0, 1, 2, 3]


def test_an_inbox_has_room() -> None:
    with pytest.raises(ValueError, match="capacity"):
        Inbox(0)
