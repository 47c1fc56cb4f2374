"""What every RPC wire promises: gRPC over real sockets and the in-process double, one suite."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from covey.codec.methods import Decode, KvStore, Prefill, Tools
from covey.errors import (
    CoveyError,
    DeadlineExceeded,
    Fenced,
    Internal,
    InvalidArgument,
    Overloaded,
    PayloadTooLarge,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from covey.net.memory import MemoryNetwork
from covey.net.rpc import Call, Channel, Server, serve
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.flow import ToolServerMessage, ToolWorkerMessage
from covey.types.generate import CancelRequest, EngineLoad, Event, GenerateRequest, Progress, Sampling, Stage
from covey.types.ids import BlockHash, LeaseId, RequestId, TenantId
from covey.types.kv import WriteChunk, WriteReply
from tests.support.rpc import PlainToken, ping, pong


@dataclass(frozen=True, slots=True)
class Wire:
    serve: Callable[..., AbstractAsyncContextManager[Server]]
    open: Callable[..., AbstractAsyncContextManager[Channel]]


@pytest.fixture(params=["grpc", "memory"])
def wire(request: pytest.FixtureRequest) -> Wire:
    if request.param == "grpc":
        return Wire(serve, Channel.open)
    network = MemoryNetwork()
    return Wire(network.serve, network.channel)


def generate_request(**changes: Any) -> GenerateRequest:
    values: dict[str, Any] = {
        "request_id": RequestId("r1"),
        "tenant": TenantId("local"),
        "model": "m",
        "scopes": (),
        "token_ids": (1, 2, 3),
        "sampling": Sampling(max_tokens=4),
        "deadline_s": 5.0,
    }
    return GenerateRequest(**(values | changes))


async def load(request: Empty, call: Call) -> EngineLoad:
    return EngineLoad(running=7)


async def count(request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
    for i in range(request.sampling.max_tokens):
        yield Progress(stage=Stage.DECODE, done=i)


async def test_unary_returns_what_the_handler_returns(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: load}) as server, wire.open(server.address) as channel:
        assert await channel.call(Decode.LOAD, Empty(), timeout_s=5) == EngineLoad(running=7)


async def test_stream_yields_replies_in_order(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.GENERATE: count}) as server, wire.open(server.address) as channel:
        async with channel.stream(
            Decode.GENERATE, generate_request(sampling=Sampling(max_tokens=200)), timeout_s=5
        ) as events:
            done = [event.done async for event in events if isinstance(event, Progress)]
    assert done == list(range(200))


async def test_upload_collects_requests(wire: Wire) -> None:
    async def write(chunks: AsyncIterator[WriteChunk], call: Call) -> WriteReply:
        return WriteReply(size_bytes=sum([len(chunk.data) async for chunk in chunks]))

    async def chunks() -> AsyncIterator[WriteChunk]:
        for i in range(100):
            yield WriteChunk(lease=LeaseId("l"), hash=BlockHash(b"h" * 16), offset=i, data=b"x" * 1000)

    async with wire.serve("127.0.0.1:0", {KvStore.WRITE: write}) as server, wire.open(server.address) as channel:
        assert await channel.upload(KvStore.WRITE, chunks(), timeout_s=5) == WriteReply(size_bytes=100_000)


async def test_upload_fails_with_the_servers_error_in_the_middle(wire: Wire) -> None:
    async def write(chunks: AsyncIterator[WriteChunk], call: Call) -> WriteReply:
        async for _ in chunks:
            raise Fenced("a newer epoch writes", field="epoch")
        raise AssertionError

    closed = anyio.Event()

    async def endless() -> AsyncIterator[WriteChunk]:
        try:
            while True:
                yield WriteChunk(lease=LeaseId("l"), hash=BlockHash(b"h" * 16), offset=0, data=b"x" * 1000)
                await anyio.lowlevel.checkpoint()
        finally:
            closed.set()

    async with wire.serve("127.0.0.1:0", {KvStore.WRITE: write}) as server, wire.open(server.address) as channel:
        with pytest.raises(Fenced) as raised:
            await channel.upload(KvStore.WRITE, endless(), timeout_s=5)
    assert raised.value.field == "epoch"
    assert closed.is_set()


async def test_exchange_is_full_duplex(wire: Wire) -> None:
    async def attach(messages: AsyncIterator[ToolWorkerMessage], call: Call) -> AsyncIterator[ToolServerMessage]:
        async for message in messages:
            yield pong(message)

    to_send, sent = anyio.create_memory_object_stream[ToolWorkerMessage](1)

    async def outgoing() -> AsyncIterator[ToolWorkerMessage]:
        with sent:
            async for item in sent:
                yield item

    async with wire.serve("127.0.0.1:0", {Tools.ATTACH: attach}) as server, wire.open(server.address) as channel:
        async with channel.exchange(Tools.ATTACH, outgoing(), timeout_s=None) as incoming:
            for i in range(5):
                await to_send.send(ping(i))
                assert await anext(incoming) == pong(ping(i))
            to_send.close()
            with pytest.raises(StopAsyncIteration):
                await anext(incoming)


async def test_exchange_raises_what_outgoing_raises(wire: Wire) -> None:
    async def attach(messages: AsyncIterator[ToolWorkerMessage], call: Call) -> AsyncIterator[ToolServerMessage]:
        async for message in messages:
            yield pong(message)

    async def outgoing() -> AsyncIterator[ToolWorkerMessage]:
        yield ping(0)
        raise LookupError("mine")

    async with wire.serve("127.0.0.1:0", {Tools.ATTACH: attach}) as server, wire.open(server.address) as channel:

        async def attached() -> None:
            async with channel.exchange(Tools.ATTACH, outgoing(), timeout_s=5) as incoming:
                async for _ in incoming:
                    pass

        with pytest.raises(LookupError, match="mine"):
            await attached()


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("bad", field="sampling.top_p"),
        Overloaded("full", retry_after_ms=250),
        Fenced("old epoch"),
    ],
    ids=lambda e: e.code,
)
async def test_errors_keep_class_field_and_hint(wire: Wire, error: CoveyError) -> None:
    async def fails(request: Empty, call: Call) -> EngineLoad:
        raise error

    async with wire.serve("127.0.0.1:0", {Decode.LOAD: fails}) as server, wire.open(server.address) as channel:
        with pytest.raises(type(error)) as raised:
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)
    assert type(raised.value) is type(error)
    assert (raised.value.message, raised.value.field) == (error.message, error.field)
    assert raised.value.retry_after_ms == error.retry_after_ms


async def test_an_error_in_a_handlers_task_group_keeps_its_class(wire: Wire) -> None:
    async def child() -> None:
        raise Overloaded("full")

    async def fails(request: Empty, call: Call) -> EngineLoad:
        async with anyio.create_task_group() as tg:
            tg.start_soon(child)
        return EngineLoad()

    async with wire.serve("127.0.0.1:0", {Decode.LOAD: fails}) as server, wire.open(server.address) as channel:
        with pytest.raises(Overloaded):
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)


async def test_other_exceptions_leave_only_a_reference(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    async def boom(request: Empty, call: Call) -> EngineLoad:
        raise ValueError("secret internals")

    async with wire.serve("127.0.0.1:0", {Decode.LOAD: boom}) as server, wire.open(server.address) as channel:
        with pytest.raises(Internal) as raised:
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)
    assert "secret" not in raised.value.message
    reference = raised.value.message.split()[-1]
    assert reference in caplog.text
    assert "secret internals" in caplog.text


async def test_stream_errors_come_after_the_replies(wire: Wire) -> None:
    async def fails(request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
        yield Progress(stage=Stage.QUEUE)
        raise Overloaded("full")

    async with wire.serve("127.0.0.1:0", {Decode.GENERATE: fails}) as server, wire.open(server.address) as channel:
        async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=5) as events:
            assert await anext(events) == Progress(stage=Stage.QUEUE)
            with pytest.raises(Overloaded):
                await anext(events)


async def test_requests_out_of_bounds_name_their_field(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.GENERATE: count}) as server, wire.open(server.address) as channel:
        async with channel.stream(
            Decode.GENERATE, generate_request(sampling=Sampling(max_tokens=1, top_p=7.0)), timeout_s=5
        ) as events:
            with pytest.raises(InvalidArgument) as raised:
                await anext(events)
    assert raised.value.field == "sampling.top_p"


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


async def test_the_token_is_required(wire: Wire) -> None:
    token = PlainToken("sesame")
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: load}, token=token) as server:
        async with wire.open(server.address) as channel:
            with pytest.raises(Unauthenticated):
                await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        async with wire.open(server.address, token=PlainToken("other")) as channel:
            with pytest.raises(Unauthenticated):
                await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        async with wire.open(server.address, token=token) as channel:
            assert await channel.call(Decode.LOAD, Empty(), timeout_s=5) == EngineLoad(running=7)


async def test_a_gatekeeper_decides_in_place_of_the_token(wire: Wire) -> None:
    seen: list[Call] = []

    class Keys:
        def admit(self, headers: Mapping[str, str]) -> Mapping[str, str]:
            if headers.get("authorization") != "Bearer key-of-acme":
                raise Unauthenticated("no such key")
            kept = {name: value for name, value in headers.items() if name != "authorization"}
            return kept | {"x-covey-tenant": "acme"}

    async def tell(request: Empty, call: Call) -> EngineLoad:
        seen.append(call)
        return EngineLoad()

    async with wire.serve("127.0.0.1:0", {Decode.LOAD: tell}, token=Keys()) as server:
        async with wire.open(server.address, token=PlainToken("key-of-acme")) as channel:
            await channel.call(Decode.LOAD, Empty(), timeout_s=5, headers={"x-covey-tenant": "forged"})
        async with wire.open(server.address) as channel:
            with pytest.raises(Unauthenticated):
                await channel.call(Decode.LOAD, Empty(), timeout_s=5)
    assert [call.headers["x-covey-tenant"] for call in seen] == ["acme"]
    assert "authorization" not in seen[0].headers


async def test_methods_without_handler_are_named(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: load}) as server, wire.open(server.address) as channel:
        with pytest.raises(Unimplemented, match="Decode/Cancel"):
            await channel.call(Decode.CANCEL, CancelRequest(request_id=RequestId("r")), timeout_s=5)
        with pytest.raises(Unimplemented, match="Prefill/Generate"):
            async with channel.stream(Prefill.GENERATE, generate_request(), timeout_s=5) as events:
                await anext(events)


async def test_headers_and_request_id_travel_on(wire: Wire) -> None:
    seen: list[Call] = []
    onward: list[Channel] = []

    async def inner(request: Empty, call: Call) -> EngineLoad:
        seen.append(call)
        return EngineLoad()

    async def outer(request: Empty, call: Call) -> EngineLoad:
        seen.append(call)
        return await onward[0].call(Decode.LOAD, request, timeout_s=call.within(5))

    token = PlainToken("sesame")
    async with (
        wire.serve("127.0.0.1:0", {Decode.LOAD: inner}, token=token) as back,
        wire.serve("127.0.0.1:0", {Prefill.LOAD: outer}, token=token) as front,
        wire.open(back.address, token=token) as to_back,
        wire.open(front.address, token=token) as channel,
    ):
        onward.append(to_back)
        await channel.call(Prefill.LOAD, Empty(), timeout_s=5, headers={"x-request-id": "abc", "X-Tenant": "t"})
    assert [call.request_id for call in seen] == ["abc", "abc"]
    assert seen[0].headers["x-tenant"] == "t"
    assert "x-tenant" not in seen[1].headers
    assert all("authorization" not in call.headers for call in seen)
    assert 0 < seen[1].remaining_s() <= 5


async def test_credentials_cannot_be_set_by_hand(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: load}) as server, wire.open(server.address) as channel:
        with pytest.raises(InvalidArgument):
            await channel.call(Decode.LOAD, Empty(), timeout_s=5, headers={"Authorization": "Bearer x"})


async def test_messages_over_the_limit_are_refused_on_both_sides(wire: Wire) -> None:
    async def large(request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
        from covey.types.generate import Failed

        yield Failed(code="INTERNAL", message="x" * 5_000_000)

    async with wire.serve("127.0.0.1:0", {Decode.GENERATE: large}) as server, wire.open(server.address) as channel:
        with pytest.raises(PayloadTooLarge):
            async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=5) as events:
                await anext(events)
        with pytest.raises(PayloadTooLarge):
            async with channel.stream(Decode.GENERATE, generate_request(model="m" * 5_000_000), timeout_s=5):
                pass


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
