"""The semantics of the actor kit, one test a promise, under virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from covey.actor import (
    ESCALATE,
    Actor,
    ActorCrashed,
    ActorStats,
    ActorStopped,
    Ask,
    Inbox,
    Overloaded,
    Ref,
    Restart,
    Supervisor,
    supervise,
)
from covey.actor import inbox as inbox_module
from covey.errors import CoveyError, DeadlineExceeded, Miss
from covey.testing import virtual_time


@dataclass(frozen=True, slots=True)
class Add(Ask[int]):
    n: int


@dataclass(frozen=True, slots=True)
class Work(Ask[str]):
    seconds: float


@dataclass(frozen=True, slots=True)
class Refuse(Ask[None]):
    pass


@dataclass(frozen=True, slots=True)
class Boom:
    pass


Command = Add | Work | Refuse | Boom | str | int


class Counter:
    """Adds, works for a while, refuses and crashes on demand; records what it saw."""

    def __init__(self, seen: list[object] | None = None) -> None:
        self.total = 0
        self.seen = [] if seen is None else seen

    async def run(self, inbox: Inbox[Command]) -> None:
        async for msg in inbox:
            self.seen.append(msg)
            match msg:
                case Add(n=n, reply=reply):
                    self.total += n
                    reply.set(self.total)
                case Work(seconds=seconds, reply=reply):
                    await anyio.sleep(seconds)
                    reply.set("done")
                case Refuse(reply=reply):
                    reply.fail(Miss("not here"))
                case Boom():
                    raise KeyError("boom")


class Stuck:
    """Takes one message and never answers."""

    async def run(self, inbox: Inbox[Any]) -> None:
        await inbox.get()
        await anyio.sleep_forever()


def starting_after(delay_s: float, seen: list[object]) -> Callable[[], Actor[Command]]:
    class Late(Counter):
        async def run(self, inbox: Inbox[Command]) -> None:
            await anyio.sleep(delay_s)
            await super().run(inbox)

    return lambda: Late(seen)


async def outcome(ref: Ref[Any], msg: Ask[Any], into: list[object]) -> None:
    try:
        into.append(await ref.ask(msg, timeout_s=None))
    except CoveyError as error:
        into.append(type(error))


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


# -- crashes -----------------------------------------------------------------


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
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
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
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
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


# -- stopping ----------------------------------------------------------------


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
