"""What only the real gRPC server and its sockets can show: health, reflection, malformed bytes, dead peers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import anyio
import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from covey.auth import MeshToken
from covey.codec.methods import Decode
from covey.errors import CoveyError, InvalidArgument, Unavailable
from covey.net.call import ERROR_TRAILER, decode_error
from covey.net.rpc import Call, Channel, Channels, serve
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import EngineLoad, Event, GenerateRequest, Progress, Stage
from tests.support.rpc import generate_request, load

TOKEN = MeshToken("a-token-of-the-mesh-for-tests")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_needs_no_token_and_watch_hears_not_serving_first() -> None:
    async with aio.insecure_channel("127.0.0.1:1"):
        pass
    release = anyio.Event()
    started = anyio.Event()
    order: list[str] = []

    async def slow(request: Empty, call: Call) -> EngineLoad:
        started.set()
        await release.wait()
        return EngineLoad()

    async def call_slow(channel: Channel) -> None:
        await channel.call(Decode.LOAD, Empty(), timeout_s=20)
        order.append("answered")

    async with anyio.create_task_group() as tg:
        async with Channels.open(token=TOKEN) as channels:
            async with serve("127.0.0.1:0", {Decode.LOAD: slow}, token=TOKEN, grace_s=10) as server:
                raw = aio.insecure_channel(server.address)
                health = health_pb2_grpc.HealthStub(raw)
                for service in ("", "covey.v1.Decode"):
                    reply = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
                    assert reply.status == SERVING
                with pytest.raises(aio.AioRpcError) as raised:
                    await health.Check(health_pb2.HealthCheckRequest(service="covey.v1.Prefill"), timeout=5)
                assert raised.value.code() is grpc.StatusCode.NOT_FOUND
                watch = health.Watch(health_pb2.HealthCheckRequest())
                assert (await watch.read()).status == SERVING
                server.set_serving(False)
                assert (await watch.read()).status == NOT_SERVING
                server.set_serving(True)
                assert (await watch.read()).status == SERVING
                tg.start_soon(call_slow, channels.to(server.address))
                await started.wait()

                async def release_after_not_serving() -> None:
                    order.append("not serving" if (await watch.read()).status == NOT_SERVING else "?")
                    release.set()

                tg.start_soon(release_after_not_serving)
                left_at = anyio.current_time()
            assert anyio.current_time() - left_at < 5, "an open watch must not use up the grace period"
            await assert_eventually(lambda: order == ["not serving", "answered"])
            await raw.close()


async def test_reflection_lists_the_services_and_needs_the_token() -> None:
    async with serve("127.0.0.1:0", {Decode.LOAD: load}, token=TOKEN) as server:
        async with aio.insecure_channel(server.address) as raw:
            reflect = reflection_pb2_grpc.ServerReflectionStub(raw).ServerReflectionInfo
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            with pytest.raises(aio.AioRpcError) as raised:
                await reflect(iter([request]), timeout=5).read()
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
            call = reflect(iter([request]), timeout=5, metadata=(("authorization", TOKEN.bearer()),))
            names = {service.name for service in (await call.read()).list_services_response.service}
            assert {"covey.v1.Decode", "grpc.health.v1.Health"} <= names
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="covey.v1.Decode")
            call = reflect(iter([request]), timeout=5, metadata=(("authorization", TOKEN.bearer()),))
            assert (await call.read()).file_descriptor_response.file_descriptor_proto


async def test_malformed_bytes_are_invalid_and_say_nothing_of_internals() -> None:
    async def generate(request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
        yield Progress(stage=Stage.QUEUE)

    async with serve("127.0.0.1:0", {Decode.GENERATE: generate}) as server:
        async with aio.insecure_channel(server.address) as raw:
            with pytest.raises(aio.AioRpcError) as raised:
                await raw.unary_stream(Decode.GENERATE.path)(b"\xff\xff\xff garbage", timeout=5).read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailers = dict(raised.value.trailing_metadata() or ())
    error = decode_error(trailers[ERROR_TRAILER])
    assert isinstance(error, InvalidArgument)
    assert "GenerateRequest" in error.message


async def test_a_taken_port_is_unavailable() -> None:
    async with serve("127.0.0.1:0", {Decode.LOAD: load}) as server:
        with pytest.raises(Unavailable, match="port taken"):
            async with serve(server.address, {Decode.LOAD: load}):
                pass


async def test_servers_bind_loopback_unless_told_otherwise() -> None:
    async with serve(":0", {Decode.LOAD: load}) as server:
        assert server.address.startswith("127.0.0.1:")


PEER = """
import sys, anyio
from covey.codec.methods import Decode
from covey.net.rpc import serve
from covey.types.generate import EngineLoad, Progress, Stage
async def load(request, call):
    return EngineLoad(running=1)
async def generate(request, call):
    yield Progress(stage=Stage.QUEUE)
    await anyio.sleep_forever()
async def main():
    async with serve("127.0.0.1:0", {Decode.LOAD: load, Decode.GENERATE: generate}) as server:
        print(server.address, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_dead_peer_is_found_by_its_open_stream(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    async with await anyio.open_process(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    ) as process:
        assert process.stdout is not None
        address = (await process.stdout.receive()).decode().strip()
        try:
            async with Channel.open(address) as channel:
                async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=60) as events:
                    await anext(events)
                    process.send_signal(how)
                    started = anyio.current_time()
                    with pytest.raises(Unavailable):
                        await anext(events)
                    assert anyio.current_time() - started < 4
        finally:
            with suppress(ProcessLookupError):  # killed already
                process.kill()


async def test_channels_are_cached_and_closed() -> None:
    async with serve("127.0.0.1:0", {Decode.LOAD: load}) as server:
        async with Channels.open() as channels:
            channel = channels.to(server.address)
            assert channels.to(server.address) is channel
            assert (await channel.call(Decode.LOAD, Empty(), timeout_s=5)).running == 7
        with pytest.raises(Unavailable):
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        with pytest.raises(Unavailable):
            async with channel.stream(Decode.GENERATE, generate_request(), timeout_s=5):
                pass


async def test_closing_a_channel_under_a_call_is_unavailable_not_a_cancellation() -> None:
    started = anyio.Event()

    async def slow(request: Empty, call: Call) -> EngineLoad:
        started.set()
        await anyio.sleep_forever()
        raise AssertionError

    errors: list[CoveyError] = []

    async def call(channel: Channel) -> None:
        try:
            await channel.call(Decode.LOAD, Empty(), timeout_s=20)
        except CoveyError as error:
            errors.append(error)

    async with serve("127.0.0.1:0", {Decode.LOAD: slow}, grace_s=0.1) as server, anyio.create_task_group() as tg:
        async with Channel.open(server.address) as channel:
            tg.start_soon(call, channel)
            await started.wait()
        await assert_eventually(lambda: errors)
    assert isinstance(errors[0], Unavailable)
