"""A collector of traces: a real OTLP/gRPC endpoint that keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSeen:
    """What one exported span said; ids are hex."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, str]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps spans in the order of arrival."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[SpanSeen] = []
        self.endpoint = ""

    def Export(self, request: Any, context: Any) -> Any:
        found = [
            SpanSeen(
                service=_attributes(group.resource.attributes).get("service.name", ""),
                name=span.name,
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                attributes=_attributes(span.attributes),
            )
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += found
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> tuple[SpanSeen, ...]:
        with self._lock:
            return tuple(self._spans)

    def trace(self, trace_id: str) -> tuple[SpanSeen, ...]:
        return tuple(span for span in self.spans if span.trace_id == trace_id)


@contextmanager
def collector() -> Iterator[Collector]:
    """Serve a collector on a free loopback port for a block."""
    servicer = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(servicer, server)
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield servicer
    finally:
        server.stop(0).wait()


def _attributes(pairs: Any) -> dict[str, str]:
    return {pair.key: str(getattr(pair.value, pair.value.WhichOneof("value") or "string_value")) for pair in pairs}
