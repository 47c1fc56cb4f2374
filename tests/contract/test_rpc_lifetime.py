"""How calls end on every RPC wire: deadlines, cancellation, drained, dead and returning servers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import anyio
import pytest

from covey.codec.methods import Decode
from covey.errors import (
    CoveyError,
    DeadlineExceeded,
    Unavailable,
)
from covey.net.rpc import Call, Channel
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import EngineLoad, Event, GenerateRequest, Progress, Stage
from tests.support.rpc import Wire, generate_request, load


async def test_deadlines_end_the_handler_and_tell_the_caller(wire: Wire) -> None:
    seen: list[float] = []
    ended = anyio.Event()

    async def slow(request: Empty, call: Call) -> EngineLoad:
        seen.append(call.remaining_s())
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    async with wire.serve("127.0.0.1:0", {Decode.LOAD: slow}) as server, wire.open(server.address) as channel:
        with pytest.raises(DeadlineExceeded):
            await channel.call(Decode.LOAD, Empty(), timeout_s=0.3)
        with anyio.fail_after(2):
            await ended.wait()
    assert 0 < seen[0] <= 0.35


async def test_no_deadline_is_infinite_and_none_left_is_exceeded(wire: Wire) -> None:
    async def tell(request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
        assert call.remaining_s() == math.inf
        assert call.within(3.0) == 3.0
        yield Progress(stage=Stage.QUEUE)

    async with wire.serve("127.0.0.1:0", {Decode.GENERATE: tell}) as server, wire.open(server.address) as channel:
        async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=None) as events:
            assert await anext(events)
        with pytest.raises(DeadlineExceeded):
            async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=0.0):
                pass


async def test_leaving_a_stream_cancels_the_handler_and_runs_its_finally(wire: Wire) -> None:
    ended = anyio.Event()

    async def endless(request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
        try:
            while True:
                yield Progress(stage=Stage.DECODE)
                await anyio.sleep(0.001)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()  # releasing something takes an await
            ended.set()

    async with wire.serve("127.0.0.1:0", {Decode.GENERATE: endless}) as server, wire.open(server.address) as channel:
        async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=60) as events:
            assert await anext(events)
        with anyio.fail_after(2):
            await ended.wait()


async def test_cancelling_the_caller_cancels_the_handler(wire: Wire) -> None:
    started, ended = anyio.Event(), anyio.Event()

    async def slow(request: Empty, call: Call) -> EngineLoad:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    async with wire.serve("127.0.0.1:0", {Decode.LOAD: slow}) as server, wire.open(server.address) as channel:
        async with anyio.create_task_group() as tg:
            tg.start_soon(_call_load, channel)
            await started.wait()
            tg.cancel_scope.cancel()
        with anyio.fail_after(2):
            await ended.wait()


async def _call_load(channel: Channel) -> None:
    await channel.call(Decode.LOAD, Empty(), timeout_s=60)


async def test_nobody_there_is_unavailable(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: load}) as server:
        address = server.address
    async with wire.open(address) as channel:
        with pytest.raises(Unavailable):
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=5) as events:
            with pytest.raises(Unavailable):
                await anext(events)


async def test_channels_reconnect(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: load}) as server:
        address = server.address
    async with wire.open(address) as channel:
        with pytest.raises(Unavailable):
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        async with wire.serve(address, {Decode.LOAD: load}):

            async def answered() -> bool:
                try:
                    reply = await channel.call(Decode.LOAD, Empty(), timeout_s=5)
                    return reply.running == 7
                except Unavailable:
                    return False

            await assert_eventually(answered, timeout_s=10)


async def test_a_stopping_server_lets_calls_finish_within_the_grace_period(wire: Wire) -> None:
    started, release = anyio.Event(), anyio.Event()
    outcome: list[EngineLoad] = []

    async def slow(request: Empty, call: Call) -> EngineLoad:
        started.set()
        await release.wait()
        return EngineLoad(running=1)

    async def call(channel: Channel) -> None:
        outcome.append(await channel.call(Decode.LOAD, Empty(), timeout_s=30))

    async with anyio.create_task_group() as tg:
        async with wire.serve("127.0.0.1:0", {Decode.LOAD: slow}, grace_s=20) as server:
            channel = await _entered(tg, wire, server.address)
            tg.start_soon(call, channel)
            await started.wait()
            tg.start_soon(_set_soon, release)
        assert outcome == [EngineLoad(running=1)] or await assert_eventually(lambda: outcome)
        tg.cancel_scope.cancel()


async def _set_soon(event: anyio.Event) -> None:
    await anyio.sleep(0.05)
    event.set()


async def _entered(tg: anyio.abc.TaskGroup, wire: Wire, address: str) -> Channel:
    async def hold(*, task_status: anyio.abc.TaskStatus[Channel]) -> None:
        async with wire.open(address) as channel:
            task_status.started(channel)
            await anyio.sleep_forever()

    channel: Channel = await tg.start(hold)
    return channel


async def test_after_the_grace_period_calls_are_cut_and_their_finally_blocks_run(wire: Wire) -> None:
    started = anyio.Event()
    ended: list[bool] = []
    errors: list[CoveyError] = []

    async def stuck(request: Empty, call: Call) -> EngineLoad:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)
        raise AssertionError

    async def call(channel: Channel) -> None:
        try:
            await channel.call(Decode.LOAD, Empty(), timeout_s=30)
        except CoveyError as error:
            errors.append(error)

    async with anyio.create_task_group() as tg:
        async with wire.serve("127.0.0.1:0", {Decode.LOAD: stuck}, grace_s=0.1) as server:
            channel = await _entered(tg, wire, server.address)
            tg.start_soon(call, channel)
            await started.wait()
        assert ended == [True]
        await assert_eventually(lambda: errors)
        assert isinstance(errors[0], Unavailable)
        tg.cancel_scope.cancel()
