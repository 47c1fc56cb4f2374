"""What every RPC wire promises of requests, replies and errors: gRPC over real sockets and the double, one suite."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from covey.codec.methods import Decode, KvStore, Prefill, Tools
from covey.errors import (
    CoveyError,
    Fenced,
    Internal,
    InvalidArgument,
    Overloaded,
    PayloadTooLarge,
    Unimplemented,
)
from covey.net.rpc import Call
from covey.types.common import Empty
from covey.types.flow import ToolServerMessage, ToolWorkerMessage
from covey.types.generate import CancelRequest, EngineLoad, Event, GenerateRequest, Progress, Sampling, Stage
from covey.types.ids import BlockHash, LeaseId, RequestId
from covey.types.kv import WriteChunk, WriteReply
from tests.support.rpc import Wire, count, generate_request, load, ping, pong


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


async def test_methods_without_handler_are_named(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: load}) as server, wire.open(server.address) as channel:
        with pytest.raises(Unimplemented, match="Decode/Cancel"):
            await channel.call(Decode.CANCEL, CancelRequest(request_id=RequestId("r")), timeout_s=5)
        with pytest.raises(Unimplemented, match="Prefill/Generate"):
            async with channel.stream(Prefill.GENERATE, generate_request(), timeout_s=5) as events:
                await anext(events)


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
