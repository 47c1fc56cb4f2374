"""The double's faults: seeded, typed, and under virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from covey.codec.methods import Decode
from covey.errors import DeadlineExceeded, Unavailable
from covey.net.memory import Faults, MemoryBroker, MemoryNetwork
from covey.net.rpc import Call
from covey.testing import virtual_time
from covey.types.common import Empty
from covey.types.generate import Event, Progress, Stage
from tests.support.rpc import generate_request, load


async def outcomes(seed: int) -> list[str]:
    network = MemoryNetwork(seed=seed, faults=Faults(drop=0.1, disconnect=0.1, delay=0.3, delay_s=0.2))
    seen: list[str] = []
    async with network.serve("127.0.0.1:0", {Decode.LOAD: load}) as server, network.channel(server.address) as channel:
        for _ in range(50):
            try:
                await channel.call(Decode.LOAD, Empty(), timeout_s=0.25)
                seen.append("ok")
            except (Unavailable, DeadlineExceeded) as error:
                seen.append(error.code)
    return seen


def test_the_same_seed_fails_in_the_same_places() -> None:
    first, again, other = (virtual_time(outcomes)(seed) for seed in (1, 1, 2))
    assert first == again != other
    assert {"ok", "UNAVAILABLE", "DEADLINE_EXCEEDED"} >= set(first) >= {"ok", "UNAVAILABLE"}


@virtual_time
async def test_a_cut_address_ends_its_streams_until_it_is_reconnected() -> None:
    ended = anyio.Event()

    async def endless(request: object, call: Call) -> AsyncIterator[Event]:
        try:
            while True:
                yield Progress(stage=Stage.DECODE)
                await anyio.sleep(0.1)
        finally:
            ended.set()

    network = MemoryNetwork()
    async with (
        network.serve("127.0.0.1:0", {Decode.GENERATE: endless, Decode.LOAD: load}) as server,
        network.channels() as channels,
    ):
        channel = channels.to(server.address)
        async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=3600) as events:
            assert await anext(events)
            network.disconnect(server.address)
            with pytest.raises(Unavailable):
                [event async for event in events]
        with anyio.fail_after(1):
            await ended.wait()
        with pytest.raises(Unavailable):
            await channel.call(Decode.LOAD, Empty(), timeout_s=1)
        network.reconnect(server.address)
        assert (await channel.call(Decode.LOAD, Empty(), timeout_s=1)).running == 7


@virtual_time
async def test_a_slow_reader_holds_the_writer_back() -> None:
    made = 0

    async def eager(request: object, call: Call) -> AsyncIterator[Event]:
        nonlocal made
        while True:
            made += 1
            yield Progress(stage=Stage.DECODE)

    network = MemoryNetwork()
    async with (
        network.serve("127.0.0.1:0", {Decode.GENERATE: eager}) as server,
        network.channel(server.address) as channel,
        channel.stream(Decode.GENERATE, generate_request(), timeout_s=3600) as events,
    ):
        await anext(events)
        await anyio.sleep(60)
        assert made < 100


@virtual_time
async def test_lost_and_cut_messages_of_the_bus() -> None:
    broker = MemoryBroker(seed=3, faults=Faults(drop=0.5))
    async with broker.bus() as bus, bus.subscribe("a", capacity=1000) as messages:
        for i in range(100):
            await bus.publish("a", b"%d" % i)
        broker.faults = Faults(disconnect=1.0)
        with pytest.raises(Unavailable):
            await bus.publish("a", b"x")
        assert not bus.connected
        bus.reconnect()
        broker.faults = Faults()
        await bus.publish("a", b"end")
        got = []
        async for message in messages:
            got.append(int(message.payload) if message.payload != b"end" else 100)
            if message.payload == b"end":
                break
    assert got == sorted(set(got))
    assert 20 < len(got) < 80
