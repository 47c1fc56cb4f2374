"""What travels beside a request on every RPC wire: credentials, headers, request ids, traces."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import anyio
import pytest
from opentelemetry import trace

from covey.codec.methods import Decode, Prefill
from covey.errors import (
    InvalidArgument,
    Unauthenticated,
)
from covey.net.rpc import Call, Channel
from covey.types.common import Empty
from covey.types.generate import EngineLoad
from tests.support.rpc import PlainToken, Wire, load


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
    assert 0 < seen[1].remaining_s() <= 5.1  # gRPC rounds a deadline up


async def test_the_trace_goes_on_at_the_other_side(wire: Wire) -> None:
    seen: list[trace.SpanContext] = []

    async def tell(request: Empty, call: Call) -> EngineLoad:
        seen.append(trace.get_current_span().get_span_context())
        return EngineLoad()

    context = trace.SpanContext(trace_id=0x1234, span_id=0x56, is_remote=False, trace_flags=trace.TraceFlags(1))
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: tell}) as server, wire.open(server.address) as channel:
        with trace.use_span(trace.NonRecordingSpan(context)):
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        await channel.call(Decode.LOAD, Empty(), timeout_s=5)
    assert [(span.trace_id, span.span_id) for span in seen] == [(0x1234, 0x56), (0, 0)]


async def test_clients_need_none_of_what_servers_need() -> None:
    code = (
        "import sys, covey.net.rpc\n"
        "extra = {'covey.net.rpc_server', 'nats', 'structlog', 'prometheus_client', 'opentelemetry.sdk'}\n"
        "sys.exit(', '.join(extra & set(sys.modules)) or 0)"
    )
    done = await anyio.run_process([sys.executable, "-c", code], check=False)
    assert done.returncode == 0, done.stderr.decode()


async def test_credentials_cannot_be_set_by_hand(wire: Wire) -> None:
    async with wire.serve("127.0.0.1:0", {Decode.LOAD: load}) as server, wire.open(server.address) as channel:
        with pytest.raises(InvalidArgument):
            await channel.call(Decode.LOAD, Empty(), timeout_s=5, headers={"Authorization": "Bearer x"})
