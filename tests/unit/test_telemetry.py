"""Telemetry: registries of our own, JSON logs without content, traces that cross headers and reach a collector."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import anyio
import grpc
import prometheus_client
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from covey.telemetry import (
    FLUSH_TIMEOUT_MS,
    SECONDS_BUCKETS,
    TEXT_CHARS_MAX,
    Metrics,
    Tracing,
    extracted,
    inject,
    log_context,
    new_log,
    stdlib_logs_to,
)
from covey.testing import free_port

# -- metrics -----------------------------------------------------------------


def test_metrics_are_named_and_kept_out_of_the_global_registry() -> None:
    metrics = Metrics()
    metrics.counter("requests", "Requests by code.", ["code"]).labels("OK").inc(3)
    metrics.gauge("queue", "Waiting.").set(7)
    metrics.histogram("step_seconds", "Step time.").observe(0.02)
    text = metrics.render().decode()
    assert 'covey_requests_total{code="OK"} 3.0' in text
    assert "covey_queue 7.0" in text
    assert 'covey_step_seconds_bucket{le="0.025"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert b"covey_" not in prometheus_client.generate_latest(prometheus_client.REGISTRY)
    assert b"covey_" not in Metrics().render()


def test_a_name_is_registered_once() -> None:
    metrics = Metrics()
    metrics.gauge("queue", "Waiting.")
    with pytest.raises(ValueError, match="covey_queue"):
        metrics.counter("queue", "Again.")
    with pytest.raises(ValueError, match="covey_queue"):
        metrics.sampled("queue", "Again.", [], dict)


def test_a_sampled_gauge_is_read_at_the_scrape() -> None:
    waiting: dict[tuple[str, ...], float] = {}
    metrics = Metrics()
    metrics.sampled("actor_queued", "Work that waits.", ["actor"], lambda: waiting)
    assert "covey_actor_queued{" not in metrics.render().decode()
    waiting[("engine",)] = 5
    assert 'covey_actor_queued{actor="engine"} 5.0' in metrics.render().decode()


def test_latency_buckets_rise() -> None:
    assert list(SECONDS_BUCKETS) == sorted(set(SECONDS_BUCKETS))


# -- logs --------------------------------------------------------------------


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_a_record_is_one_line_of_json(stream: io.StringIO) -> None:
    new_log("decode", stream=stream, worker="decode-1").info("finished", reason="stop", tokens=5)
    (record,) = records(stream)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "event": "finished",
        "level": "info",
        "service": "decode",
        "worker": "decode-1",
        "reason": "stop",
        "tokens": 5,
    }


def test_levels_filter(stream: io.StringIO) -> None:
    log = new_log("decode", stream=stream, level="warning")
    log.info("quiet")
    log.warning("loud")
    assert [record["event"] for record in records(stream)] == ["loud"]


SECRET = "the patient's name is Ada"


def test_content_and_credentials_are_hidden_wherever_they_stand(stream: io.StringIO) -> None:
    new_log("gateway", stream=stream).info(
        "request",
        prompt=SECRET,
        messages=[{"role": "user", "content": SECRET}],
        request={"model": "m", "text": SECRET, "inner": [{"arguments": SECRET}]},
        authorization=SECRET,
        ids=[1, 2, 3],
    )
    (record,) = records(stream)
    assert SECRET not in stream.getvalue()
    assert record["prompt"] == f"<hidden: {len(SECRET)}>"
    assert record["ids"] == "<hidden: 3>"
    assert record["request"]["model"] == "m"


def test_long_text_is_cut(stream: io.StringIO) -> None:
    new_log("gateway", stream=stream).info("x", path="a" * 10_000, digest=b"\x01\xff")
    (record,) = records(stream)
    assert len(record["path"]) < TEXT_CHARS_MAX + 40
    assert record["digest"] == "01ff"


def test_a_traceback_is_logged_without_local_variables(stream: io.StringIO) -> None:
    def fails() -> None:
        prompt = SECRET
        raise ValueError(len(prompt))

    try:
        fails()
    except ValueError:
        new_log("gateway", stream=stream).exception("failed")
    (record,) = records(stream)
    assert SECRET not in stream.getvalue()
    assert record["exception"][0]["exc_type"] == "ValueError"
    assert [frame["name"] for frame in record["exception"][0]["frames"]][-1] == "fails"


async def test_ids_follow_their_task_and_no_other(stream: io.StringIO) -> None:
    log = new_log("gateway", stream=stream)

    async def serve(request_id: str) -> None:
        with log_context(request_id=request_id, program_id="p"):
            await anyio.lowlevel.checkpoint()
            log.info(request_id)

    async with anyio.create_task_group() as tg:
        for request_id in ("r1", "r2"):
            tg.start_soon(serve, request_id)
    log.info("outside")
    seen = {record["event"]: record.get("request_id") for record in records(stream)}
    assert seen == {"r1": "r1", "r2": "r2", "outside": None}


def test_libraries_logs_are_forwarded_and_the_root_logger_is_restored(stream: io.StringIO) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    with stdlib_logs_to(new_log("gateway", stream=stream)):
        logging.getLogger("nats").warning("slow consumer %s", 7)
        logging.getLogger("nats").info("quiet")
    assert (logging.getLogger().handlers, logging.getLogger().level) == before
    (record,) = records(stream)
    assert (record["event"], record["level"], record["logger"]) == ("slow consumer 7", "warning", "nats")


# -- traces ------------------------------------------------------------------

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


def outgoing() -> dict[str, str]:
    headers: dict[str, str] = {}
    inject(headers)
    return headers


def test_context_passes_through_a_process_that_records_nothing() -> None:
    tracing = Tracing("gateway")
    assert outgoing() == {}
    with extracted({"traceparent": TRACEPARENT, "tracestate": "a=b"}), tracing.span("hop"):
        assert outgoing() == {"traceparent": TRACEPARENT, "tracestate": "a=b"}
    assert outgoing() == {}
    tracing.close()


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, {"traceparent": "00-" + "0" * 32 + "-1-01"}])
def test_bad_context_is_ignored(headers: dict[str, str]) -> None:
    with extracted(headers):
        assert outgoing() == {}


def test_spans_form_one_trace_across_processes(stream: io.StringIO) -> None:
    exporters = InMemorySpanExporter(), InMemorySpanExporter()
    gateway, decode = Tracing("gateway", exporter=exporters[0]), Tracing("decode", exporter=exporters[1])
    with extracted({"traceparent": TRACEPARENT}), gateway.span("request", tenant="acme"):
        headers = outgoing()
        new_log("gateway", stream=stream).info("routed")
    with extracted(headers), decode.span("decode"):
        pass
    gateway.close()
    decode.close()
    spans = {span.name: span for exporter in exporters for span in exporter.get_finished_spans()}
    assert {trace.format_trace_id(span.context.trace_id) for span in spans.values() if span.context} == {TRACE_ID}
    assert spans["request"].context is not None
    assert spans["decode"].parent is not None
    assert spans["decode"].parent.span_id == spans["request"].context.span_id
    assert dict(spans["request"].attributes or {}) == {"tenant": "acme"}
    assert spans["decode"].resource.attributes["service.name"] == "covey-decode"
    assert records(stream)[0]["trace_id"] == TRACE_ID


def test_a_failed_span_says_what_failed_and_quotes_nothing() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("gateway", exporter=exporter)
    with pytest.raises(ValueError, match="Ada"), tracing.span("request"):
        raise ValueError(SECRET)
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == "ValueError"
    assert SECRET not in span.to_json()


class Collector:
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.arrived = threading.Event()
        method = grpc.unary_unary_rpc_method_handler(
            self._export,
            request_deserializer=ExportTraceServiceRequest.FromString,
            response_serializer=ExportTraceServiceResponse.SerializeToString,
        )
        name = "opentelemetry.proto.collector.trace.v1.TraceService"
        self.server = grpc.server(futures.ThreadPoolExecutor(1))
        self.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {"Export": method})])
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def _export(self, request: ExportTraceServiceRequest, _: grpc.ServicerContext) -> ExportTraceServiceResponse:
        spans = [span for r in request.resource_spans for scope in r.scope_spans for span in scope.spans]
        self.names += [span.name for span in spans]
        self.arrived.set()
        return ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    collector.server.start()
    yield collector
    collector.server.stop(None).wait(5)


def test_spans_reach_an_otlp_collector_when_the_process_ends(collector: Collector) -> None:
    tracing = Tracing("gateway", endpoint=f"http://127.0.0.1:{collector.port}")
    with tracing.span("request"):
        pass
    tracing.close()
    assert collector.arrived.wait(10)
    assert collector.names == ["request"]


def test_a_dead_collector_holds_up_nobody() -> None:
    tracing = Tracing("gateway", endpoint=f"http://127.0.0.1:{free_port()}")
    started = time.perf_counter()
    with tracing.span("request"):
        pass
    assert time.perf_counter() - started < 1
    tracing.close()
    assert time.perf_counter() - started < 3 * FLUSH_TIMEOUT_MS / 1000
