"""What a crash does to state, queue and asks, and when it escalates."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from covey.actor import (
    ActorCrashed,
    Inbox,
    Restart,
    supervise,
)
from covey.testing import virtual_time
from tests.support.actors import Add, Boom, Counter, Stuck, outcome


@virtual_time
async def test_a_crash_rebuilds_state_and_keeps_the_queue() -> None:
    async with supervise(seed=1) as sup:
        ref = sup.start(Counter, name="counter", restart=Restart())
        assert await ref.ask(Add(10), timeout_s=1) == 10
        ref.offer(Boom())
        assert await ref.ask(Add(3), timeout_s=5) == 3  # queued behind the poison, served by the next life
        assert sup.stats()[0].crashes == 1


@virtual_time
async def test_a_held_ask_fails_with_the_cause() -> None:
    class Bad:
        async def run(self, inbox: Inbox[Any]) -> None:
            async for _ in inbox:
                raise KeyError("secret")

    async with supervise() as sup:
        ref = sup.start(Bad, name="bad", restart=Restart())
        with pytest.raises(ActorCrashed) as caught:
            await ref.ask(Add(1), timeout_s=5)
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.code == "INTERNAL"
        assert "secret" not in str(caught.value)


@virtual_time
async def test_each_held_ask_gets_an_error_of_its_own() -> None:
    class Collects:
        async def run(self, inbox: Inbox[Add]) -> None:
            held = [await inbox.get() for _ in range(3)]
            raise RuntimeError(str(len(held)))

    replies = [Add(n) for n in range(3)]
    async with supervise() as sup:  # the second life ends with the stream, which is no crash
        ref = sup.start(Collects, name="collects", restart=Restart())
        for msg in replies:
            ref.offer(msg)
        errors: list[ActorCrashed] = []
        for msg in replies:
            with pytest.raises(ActorCrashed) as caught:
                await msg.reply.wait()
            errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3


@virtual_time
async def test_a_poison_message_crashes_once() -> None:
    seen: list[object] = []
    async with supervise() as sup:
        ref = sup.start(lambda: Counter(seen), name="counter", restart=Restart(limit=1))
        poison = Boom()
        ref.offer(poison)
        assert await ref.ask(Add(1), timeout_s=5) == 1
    assert seen.count(poison) == 1


@virtual_time
async def test_over_budget_the_failure_escalates() -> None:
    crashes: list[tuple[str, str, bool]] = []
    sibling_outcomes: list[object] = []
    with pytest.raises(ExceptionGroup) as caught:
        async with (
            supervise(
                on_crash=lambda name, error, restarting: crashes.append((name, type(error).__name__, restarting))
            ) as sup,
            anyio.create_task_group() as tg,
        ):
            tg.start_soon(outcome, sup.start(Stuck, name="sibling"), Add(1), sibling_outcomes)
            ref = sup.start(Counter, name="counter", restart=Restart(limit=2, window_s=1e9))
            for _ in range(3):
                await ref.tell(Boom())
            await anyio.sleep_forever()
    assert caught.group_contains(KeyError)
    assert crashes == [("counter", "KeyError", True), ("counter", "KeyError", True), ("counter", "KeyError", False)]


@virtual_time
async def test_crashes_outside_the_window_do_not_count() -> None:
    async with supervise() as sup:
        ref = sup.start(Counter, name="counter", restart=Restart(limit=1, window_s=10))
        for _ in range(5):
            await ref.tell(Boom())
            await anyio.sleep(11)
        assert await ref.ask(Add(1), timeout_s=1) == 1
        assert sup.stats()[0].crashes == 5


@virtual_time
async def test_escalation_is_the_default() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with supervise() as sup:
            sup.start(Counter, name="counter").offer(Boom())
            await anyio.sleep_forever()
    assert caught.group_contains(KeyError)


@virtual_time
async def test_a_constructor_that_fails_is_a_crash() -> None:
    lives = iter([None, None])

    def make() -> Counter:
        if next(lives, "alive") is None:
            raise OSError("no device yet")
        return Counter()

    async with supervise() as sup:
        ref = sup.start(make, name="counter", restart=Restart(limit=2))
        assert await ref.ask(Add(1), timeout_s=60) == 1


@virtual_time
async def test_the_end_of_another_stream_is_a_crash() -> None:
    class Reads:
        async def run(self, inbox: Inbox[object]) -> None:
            raise anyio.EndOfStream

    async with supervise() as sup:
        ref = sup.start(Reads, name="reads", restart=Restart(limit=100))
        with anyio.move_on_after(0.3):
            await ref.ask(Add(1), timeout_s=None)
        assert sup.stats()[0].crashes > 1


def test_a_restart_budget_makes_sense() -> None:
    with pytest.raises(ValueError, match="limit"):
        Restart(limit=-1)
    with pytest.raises(ValueError, match="window_s"):
        Restart(window_s=0)
