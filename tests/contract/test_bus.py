"""What every bus promises: NATS with a real server and the in-process double, one suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from covey.errors import Fenced, InvalidArgument, NoSpace, PayloadTooLarge, Unavailable
from covey.net.bus import PAYLOAD_BYTES_MAX, Bus, Change, Record, Stream
from covey.net.memory import MemoryBroker
from covey.net.nats import NatsBus
from covey.testing import assert_eventually
from tests.support.nats import NatsServer


@dataclass(frozen=True, slots=True)
class Control:
    """A bus provider whose server can be stopped and started empty of what is in memory."""

    bus: Callable[[], AbstractAsyncContextManager[Bus]]
    stop: Callable[[], Awaitable[None]]
    start: Callable[[], Awaitable[None]]


@asynccontextmanager
async def nats_control(run_dir: Path) -> AsyncIterator[Control]:
    async with NatsServer(run_dir) as server:
        yield Control(lambda: NatsBus.open(server.url, token=server.token), server.kill, server.start)


@asynccontextmanager
async def memory_control(_run_dir: Path) -> AsyncIterator[Control]:
    broker = MemoryBroker()

    async def stop() -> None:
        broker.stop()

    async def start() -> None:
        broker.start()

    yield Control(broker.bus, stop, start)


@pytest.fixture(params=["nats", "memory"])
def control(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Control]:
    return nats_control(tmp_path) if request.param == "nats" else memory_control(tmp_path)


Provider = AbstractAsyncContextManager[Control]


async def next_of(messages: Any) -> Any:
    with anyio.fail_after(5):
        return await anext(messages)


async def test_messages_reach_matching_subscriptions_in_order(control: Provider) -> None:
    async with control as c, c.bus() as bus, c.bus() as other:
        async with other.subscribe("covey.v1.load.*.w1") as loads, other.subscribe("covey.v1.>") as all_of_them:
            for i in range(50):
                await bus.publish("covey.v1.load.decode.w1", b"%d" % i, headers={"traceparent": "x"})
            await bus.publish("covey.v1.kv.decode.w1", b"kv")
            got = [await next_of(loads) for _ in range(50)]
            assert [message.payload for message in got] == [b"%d" % i for i in range(50)]
            assert got[0].subject == "covey.v1.load.decode.w1"
            assert got[0].headers["traceparent"] == "x"
            assert [(await next_of(all_of_them)).payload for _ in range(51)][-1] == b"kv"


async def test_large_payloads_are_refused_before_they_are_sent(control: Provider) -> None:
    async with control as c, c.bus() as bus, bus.subscribe("a.b") as messages:
        with pytest.raises(PayloadTooLarge):
            await bus.publish("a.b", b"x" * (PAYLOAD_BYTES_MAX + 1))
        await bus.publish("a.b", b"x" * PAYLOAD_BYTES_MAX)
        assert len((await next_of(messages)).payload) == PAYLOAD_BYTES_MAX


async def test_a_full_subscription_drops_the_newest_and_counts(control: Provider) -> None:
    async with control as c, c.bus() as bus, bus.subscribe("a", capacity=3) as slow, bus.subscribe("a") as fast:
        for i in range(10):
            await bus.publish("a", b"%d" % i)
        for _ in range(10):
            await next_of(fast)
        await assert_eventually(lambda: slow.dropped == 7)
        assert [(await next_of(slow)).payload for _ in range(3)] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("subject", ["", "a..b", "a b", "a.*", "a.>", "a\r\nPUB x 1"])
async def test_bad_subjects_are_refused(control: Provider, subject: str) -> None:
    async with control as c, c.bus() as bus:
        with pytest.raises(InvalidArgument):
            await bus.publish(subject, b"")


async def test_while_down_publishing_is_unavailable_and_nothing_is_kept(control: Provider) -> None:
    async with control as c, c.bus() as bus, bus.subscribe("a") as messages:
        await bus.publish("a", b"before")
        assert (await next_of(messages)).payload == b"before"
        connections = bus.connections
        await c.stop()
        await assert_eventually(lambda: not bus.connected)
        with pytest.raises(Unavailable):
            await bus.publish("a", b"lost")
        await c.start()
        with anyio.fail_after(10):
            await bus.until_connected()
        assert bus.connections == connections + 1
        await bus.publish("a", b"after")
        assert (await next_of(messages)).payload == b"after"


async def test_connecting_to_nothing_is_unavailable(control: Provider) -> None:
    async with control as c:
        await c.stop()
        with pytest.raises(Unavailable):
            async with c.bus():
                pass


async def test_bucket_puts_deletes_and_watches(control: Provider) -> None:
    async with control as c, c.bus() as bus, c.bus() as other:
        bucket = await bus.kv("things", ttl_s=60)
        same = await other.kv("things", ttl_s=60)
        assert await bucket.put("decode.w1", b"1") < await bucket.put("decode.w1", b"2")
        async with same.watch() as changes:
            assert await same.entries() == {"decode.w1": b"2"}
            await bucket.put("decode.w2", b"3")
            await bucket.delete("decode.w1")
            first, second = await next_of(changes), await next_of(changes)
        assert (first.key, first.change, first.value) == ("decode.w2", Change.PUT, b"3")
        assert (second.key, second.change) == ("decode.w1", Change.GONE)
        assert await same.entries() == {"decode.w2": b"3"}


async def test_a_bucket_takes_a_value_only_over_the_revision_that_its_writer_knows(control: Provider) -> None:
    async with control as c, c.bus() as bus, c.bus() as other:
        bucket, same = await bus.kv("agreed"), await other.kv("agreed")
        assert await bucket.get("k") is None
        first = await bucket.put("k", b"1", revision=0)
        with pytest.raises(Fenced):
            await same.put("k", b"late", revision=0)
        second = await same.put("k", b"2", revision=first)
        with pytest.raises(Fenced):
            await bucket.put("k", b"late", revision=first)
        found = await bucket.get("k")
        assert found is not None
        assert (found.value, found.revision) == (b"2", second)
        await c.stop()
        await assert_eventually(lambda: not bus.connected)
        await c.start()
        with anyio.fail_after(10):
            await bus.until_connected()
        assert await bucket.get("k") is None
        assert await bucket.put("k", b"again", revision=0)


async def test_bucket_entries_end_with_their_time_to_live(control: Provider) -> None:
    async with control as c, c.bus() as bus:
        bucket = await bus.kv("brief", ttl_s=1)
        await bucket.put("k", b"v")
        assert await bucket.entries() == {"k": b"v"}

        async def empty() -> bool:
            return not await bucket.entries()

        await assert_eventually(empty, timeout_s=5, every_s=0.1)


async def test_a_bucket_in_memory_is_made_again_after_a_restart(control: Provider) -> None:
    async with control as c, c.bus() as bus:
        bucket = await bus.kv("things", ttl_s=60)
        await bucket.put("k", b"1")
        async with bucket.watch() as changes:
            await c.stop()
            await assert_eventually(lambda: not bus.connected)
            with pytest.raises(Unavailable):
                await bucket.put("k", b"2")
            await c.start()
            with anyio.fail_after(10):
                await bus.until_connected()
            await bucket.put("other", b"3")
            assert (await next_of(changes)).value == b"3"
        assert await bucket.entries() == {"other": b"3"}


async def journal(bus: Bus, bytes_max: int = 1_000_000) -> Stream:
    return await bus.stream("flow", ("flow.run.>",), bytes_max=bytes_max)


async def all_of(stream: Stream, subject: str, from_seq: int = 1) -> list[Record]:
    return [record async for record in stream.read(subject, from_seq)]


async def test_stream_appends_and_reads_by_subject_and_position(control: Provider) -> None:
    async with control as c, c.bus() as bus:
        stream = await journal(bus)
        assert await all_of(stream, "flow.run.>") == []
        seqs = [await stream.append(f"flow.run.r{i % 2}", b"%d" % i) for i in range(600)]
        assert seqs == sorted(seqs)
        mine = await all_of(stream, "flow.run.r0")
        assert [record.payload for record in mine] == [b"%d" % i for i in range(0, 600, 2)]
        assert [record.seq for record in await all_of(stream, "flow.run.>", seqs[590])] == seqs[590:]


async def test_stream_append_is_optimistic_and_idempotent(control: Provider) -> None:
    async with control as c, c.bus() as bus:
        stream = await journal(bus)
        first = await stream.append("flow.run.a", b"1", expected_seq=0, msg_id="a1")
        await stream.append("flow.run.b", b"other", expected_seq=0)
        with pytest.raises(Fenced):
            await stream.append("flow.run.a", b"late", expected_seq=0)
        assert await stream.append("flow.run.a", b"1", msg_id="a1") == first
        second = await stream.append("flow.run.a", b"2", expected_seq=first)
        assert [record.seq for record in await all_of(stream, "flow.run.a")] == [first, second]


async def test_a_full_stream_refuses_and_keeps_what_it_has(control: Provider) -> None:
    async with control as c, c.bus() as bus:
        stream = await journal(bus, bytes_max=100_000)
        acknowledged: list[int] = []

        async def fill() -> None:
            while len(acknowledged) < 100:
                acknowledged.append(await stream.append("flow.run.a", b"x" * 10_000))

        with pytest.raises(NoSpace):
            await fill()
        assert [record.seq for record in await all_of(stream, "flow.run.a")] == acknowledged != []
        await stream.purge("flow.run.a")
        assert await all_of(stream, "flow.run.a") == []
        await stream.append("flow.run.a", b"room again")


async def test_a_stream_outlives_a_kill_of_the_server(control: Provider) -> None:
    async with control as c, c.bus() as bus:
        stream = await journal(bus)
        seqs = [await stream.append("flow.run.a", b"%d" % i, msg_id=f"m{i}") for i in range(20)]
        await c.stop()
        await assert_eventually(lambda: not bus.connected)
        with pytest.raises(Unavailable):
            await stream.append("flow.run.a", b"x")
        await c.start()
        with anyio.fail_after(10):
            await bus.until_connected()
        assert [record.seq for record in await all_of(stream, "flow.run.a")] == seqs
        assert await stream.append("flow.run.a", b"19", msg_id="m19") == seqs[-1]
