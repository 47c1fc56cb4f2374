"""Spans of served calls: how each ended, whose fault it was, and nothing of what was said."""

from __future__ import annotations

from contextlib import suppress

import anyio
import pytest
from anyio import to_thread
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from covey.auth import MeshToken
from covey.codec.methods import Decode
from covey.errors import CoveyError, InvalidArgument, Unavailable
from covey.net.rpc import Call, Channel, serve
from covey.net.spans import CODE, served
from covey.telemetry import Tracing
from covey.types.common import Empty
from covey.types.generate import EngineLoad

TOKEN = MeshToken("the-token-of-the-test-mesh")
SECRET = "what the user asked"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    return Tracing("test", exporter=exporter)


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (None, "OK", StatusCode.UNSET),
        (InvalidArgument(SECRET, field="prompt"), "INVALID_ARGUMENT", StatusCode.UNSET),
        (Unavailable(SECRET), "UNAVAILABLE", StatusCode.ERROR),
        (ValueError(SECRET), "INTERNAL", StatusCode.ERROR),
        (ExceptionGroup("one", [Unavailable(SECRET)]), "UNAVAILABLE", StatusCode.ERROR),
    ],
)
def test_a_span_says_how_its_call_ended(
    tracing: Tracing, exporter: InMemorySpanExporter, error: Exception | None, code: str, status: StatusCode
) -> None:
    with suppress(Exception), served(tracing.tracer, "covey.v1.Decode/Load"):
        if error is not None:
            raise error
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes[CODE] == code
    assert span.status.status_code is status
    assert SECRET not in span.to_json()


async def test_a_cancelled_call_is_no_fault(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with anyio.CancelScope() as scope, served(tracing.tracer, "covey.v1.Decode/Load"):
        scope.cancel()
        await anyio.sleep_forever()
    await to_thread.run_sync(tracing.close)
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert (span.attributes[CODE], span.status.status_code) == ("CANCELLED", StatusCode.UNSET)


async def test_a_server_opens_one_span_a_call_under_its_callers(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:

    async def load(_: Empty, __: Call) -> EngineLoad:
        raise InvalidArgument(SECRET)

    async with (
        serve("127.0.0.1:0", {Decode.LOAD: load}, token=TOKEN, tracer=tracing.tracer) as server,
        Channel.open(server.address, token=TOKEN) as channel,
    ):
        with tracing.span("caller"), pytest.raises(CoveyError):
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)
    await to_thread.run_sync(tracing.close)
    call, caller = exporter.get_finished_spans()
    assert (call.name, call.kind) == ("covey.v1.Decode/Load", SpanKind.SERVER)
    assert call.parent is not None
    assert caller.context is not None
    assert call.parent.span_id == caller.context.span_id
    assert SECRET not in call.to_json()
