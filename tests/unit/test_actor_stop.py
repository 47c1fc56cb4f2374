"""Stopping and cancelling actors: drained in order, and no ask hangs."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from covey.actor import (
    Actor,
    ActorStopped,
    Inbox,
    Supervisor,
    supervise,
)
from covey.testing import virtual_time
from tests.support.actors import Add, Boom, Counter, Stuck, Work, outcome


@virtual_time
async def test_draining_serves_what_is_queued() -> None:
    async with supervise(grace_s=1000) as sup:
        ref = sup.start(Counter, name="counter")
        outcomes: list[object] = []
        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(outcome, ref, Work(10), outcomes)
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(sup.drain)
        assert outcomes == ["done"] * 3
        with pytest.raises(ActorStopped):
            await ref.tell(Boom())
        with pytest.raises(ActorStopped):
            ref.offer(Boom())
        with pytest.raises(ActorStopped):
            await ref.ask(Add(1), timeout_s=1)
        late = Add(1)
        assert ref.signal(late) is False
        with pytest.raises(ActorStopped):
            await late.reply.wait()
        with pytest.raises(ActorStopped, match="another"):
            sup.start(Counter, name="another")
        assert sup.stats() == ()


@virtual_time
async def test_no_ask_hangs_when_grace_runs_out() -> None:
    async with supervise(grace_s=5) as sup:
        ref = sup.start(Counter, name="counter", capacity=1)
        outcomes: list[object] = []
        async with anyio.create_task_group() as tg:
            for _ in range(5):
                tg.start_soon(outcome, ref, Work(1e9), outcomes)  # 1 held, 1 queued, 3 blocked
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(sup.drain)
        assert outcomes == [ActorStopped] * 5
        assert 5 <= anyio.current_time() < 6


@virtual_time
async def test_blocked_senders_learn_of_a_stop_at_once() -> None:
    async with supervise(grace_s=100) as sup:
        ref = sup.start(Stuck, name="stuck", capacity=1)
        await ref.tell(0)
        await anyio.wait_all_tasks_blocked()
        ref.offer(1)
        outcomes: list[object] = []
        async with anyio.create_task_group() as tg:
            tg.start_soon(outcome, ref, Add(1), outcomes)
            await anyio.wait_all_tasks_blocked()
            async with anyio.create_task_group() as draining:
                draining.start_soon(sup.drain)
                await anyio.wait_all_tasks_blocked()
                assert outcomes == [ActorStopped]
                assert anyio.current_time() < 1


@virtual_time
async def test_control_still_arrives_while_draining() -> None:
    async with supervise(grace_s=100) as sup:
        aborted = anyio.Event()

        class Engine:
            async def run(self, inbox: Inbox[str]) -> None:
                assert await inbox.get() == "job"
                while True:  # busy with the job: drains only when it was aborted
                    await anyio.sleep(1)
                    if inbox.next() == "abort":
                        aborted.set()
                        return

        ref = sup.start(Engine, name="engine")
        await ref.tell("job")
        async with anyio.create_task_group() as tg:
            tg.start_soon(sup.drain)
            await anyio.sleep(3.5)
            assert ref.signal("abort")
        assert aborted.is_set()
        assert anyio.current_time() < 10


@virtual_time
async def test_actors_stop_youngest_first() -> None:
    order: list[str] = []

    def named(name: str) -> Callable[[], Actor[object]]:
        class Notes:
            async def run(self, inbox: Inbox[object]) -> None:
                async for _ in inbox:
                    pass
                order.append(name)

        return Notes

    async with supervise() as sup:
        for name in ("store", "engine", "server"):
            sup.start(named(name), name=name)
    assert order == ["server", "engine", "store"]


@virtual_time
async def test_an_older_actor_serves_a_draining_younger_one() -> None:
    async with supervise() as sup:
        store = sup.start(Counter, name="store")
        flushed: list[int] = []

        class Writer:
            async def run(self, inbox: Inbox[object]) -> None:
                async for _ in inbox:
                    pass
                flushed.append(await store.ask(Add(7), timeout_s=1))

        sup.start(Writer, name="writer")
    assert flushed == [7]


@virtual_time
async def test_cancelling_the_block_fails_every_ask() -> None:
    outcomes: list[object] = []
    async with anyio.create_task_group() as outer:
        with anyio.CancelScope() as scope:
            async with supervise(grace_s=1e6) as sup:
                ref = sup.start(Counter, name="counter", capacity=1)
                for _ in range(4):
                    outer.start_soon(outcome, ref, Work(1e9), outcomes)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
                await anyio.sleep_forever()
    assert outcomes == [ActorStopped] * 4
    assert anyio.current_time() < 1


@virtual_time
async def test_an_actor_that_returns_has_stopped() -> None:
    class Once:
        async def run(self, inbox: Inbox[Add]) -> None:
            (await inbox.get()).reply.set(1)

    async with supervise() as sup:
        ref = sup.start(Once, name="once")
        assert await ref.ask(Add(0), timeout_s=1) == 1
        await anyio.wait_all_tasks_blocked()
        assert sup.stats() == ()
        with pytest.raises(ActorStopped):
            await ref.ask(Add(0), timeout_s=1)


async def _scenario(sup: Supervisor, cancel_at: int, outcomes: list[object]) -> bool:
    """Run asks against a small actor, cancel one asker after `cancel_at` turns; return whether it was in time."""
    ref = sup.start(Counter, name="counter", capacity=1)
    in_time = False
    async with anyio.create_task_group() as tg:
        victim = anyio.CancelScope()

        async def doomed() -> None:
            nonlocal in_time
            with victim:
                await outcome(ref, Add(100), outcomes)
            in_time = victim.cancelled_caught

        tg.start_soon(outcome, ref, Add(1), outcomes)
        tg.start_soon(doomed)
        tg.start_soon(outcome, ref, Add(1), outcomes)
        for _ in range(cancel_at):
            await anyio.lowlevel.checkpoint()
        victim.cancel()
    return in_time


@pytest.mark.parametrize("cancel_at", range(12))
def test_cancelling_an_asker_at_any_turn_disturbs_nobody(cancel_at: int) -> None:
    @virtual_time
    async def main() -> None:
        outcomes: list[object] = []
        async with supervise() as sup:
            cancelled = await _scenario(sup, cancel_at, outcomes)
            inbox = sup.stats()[0].inbox
            assert (inbox.queued, inbox.blocked, inbox.held) == (0, 0, 0)
        assert len(outcomes) == (2 if cancelled else 3)
        assert all(isinstance(answer, int) for answer in outcomes)

    main()
