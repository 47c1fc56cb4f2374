"""What a process tells about itself: metrics, JSON logs and traces; never the text of prompts or outputs.

Nothing here is global: the runtime owns one `Metrics`, one log and one `Tracing` a process and passes them on.
Trace context travels in plain `dict[str, str]` headers, so gRPC, NATS and HTTP carry it alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

import prometheus_client
import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from structlog.typing import FilteringBoundLogger

METRICS_CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
FLUSH_TIMEOUT_MS = 2000
EXPORT_EVERY_MS = 1000
TEXT_CHARS_MAX = 500
"""Longer strings in a log record are cut: a bound, and a second net under content that slipped through."""

PRIVATE_KEYS = frozenset(
    {
        *("prompt", "prompts", "message", "messages", "text", "content", "completion", "output", "input", "value"),
        *("answer", "question", "arguments", "body", "token_ids", "ids", "authorization", "api_key", "secret"),
    }
)
"""Keys under which content or credentials would stand; a log record shows only their size."""

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_propagator = TraceContextTextMapPropagator()


# -- metrics -----------------------------------------------------------------


class Metrics(prometheus_client.CollectorRegistry):
    """A process's own registry: not the library's global one. Names get the prefix `covey_`."""

    def __init__(self) -> None:
        super().__init__(auto_describe=True)
        prometheus_client.ProcessCollector(registry=self)
        prometheus_client.PlatformCollector(registry=self)
        prometheus_client.GCCollector(registry=self)

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> prometheus_client.Counter:
        """Register a counter. Raises `ValueError` when the name is taken; so do the others."""
        return prometheus_client.Counter(name, help_text, labels, namespace="covey", registry=self)

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> prometheus_client.Gauge:
        """Register a gauge that code sets."""
        return prometheus_client.Gauge(name, help_text, labels, namespace="covey", registry=self)

    def histogram(
        self, name: str, help_text: str, labels: Sequence[str] = (), *, buckets: Sequence[float] = SECONDS_BUCKETS
    ) -> prometheus_client.Histogram:
        """Register a histogram; the default buckets fit latencies in seconds."""
        return prometheus_client.Histogram(name, help_text, labels, namespace="covey", registry=self, buckets=buckets)

    def sampled(
        self, name: str, help_text: str, labels: Sequence[str], read: Callable[[], Mapping[tuple[str, ...], float]]
    ) -> None:
        """Register a gauge family that is read when scraped: label values to value, at no cost in between."""
        self.register(_Sampled(f"covey_{name}", help_text, tuple(labels), read))

    def render(self) -> bytes:
        """Return everything in the text format, of `METRICS_CONTENT_TYPE`."""
        return prometheus_client.generate_latest(self)


class _Sampled(Collector):
    def __init__(
        self, name: str, help_text: str, labels: tuple[str, ...], read: Callable[[], Mapping[tuple[str, ...], float]]
    ) -> None:
        self._name, self._help_text, self._labels, self._read = name, help_text, labels, read

    def describe(self) -> list[Metric]:
        return [GaugeMetricFamily(self._name, self._help_text, labels=self._labels)]

    def collect(self) -> list[Metric]:
        family = GaugeMetricFamily(self._name, self._help_text, labels=self._labels)
        for values, value in self._read().items():
            family.add_metric(list(values), value)
        return [family]


# -- logs --------------------------------------------------------------------


def new_log(service: str, *, stream: TextIO, level: str = "info", **bound: str) -> FilteringBoundLogger:
    """Return a log that writes one JSON object a line to `stream`, with `service`, `bound` and the context.

    Pass names, ids, counts and codes. Content under `PRIVATE_KEYS` is replaced by its size wherever it stands.
    """
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
            ),
            _hide_content,
            structlog.processors.JSONRenderer(default=repr),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return log.bind(service=service, **bound)


def log_context(**ids: str) -> AbstractContextManager[None]:
    """Add `request_id`, `program_id` and the like to every record of this task and those it starts."""
    return structlog.contextvars.bound_contextvars(**ids)


@contextmanager
def stdlib_logs_to(log: FilteringBoundLogger, *, level: str = "warning") -> Iterator[None]:
    """Send what libraries log through `logging` into `log` for the length of a block."""
    handler, root = _Forward(log), logging.getLogger()
    replaced, level_before = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    try:
        yield
    finally:
        root.handlers[:] = replaced
        root.setLevel(level_before)


class _Forward(logging.Handler):
    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        event = record.getMessage()[:TEXT_CHARS_MAX]
        self._log.log(record.levelno, event, logger=record.name, exc_info=record.exc_info)


def _add_trace(_: Any, __: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        record["trace_id"] = trace.format_trace_id(span.trace_id)
    return record


def _hide_content(_: Any, __: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: _shown(key, value) for key, value in record.items()}


def _shown(key: str, value: Any) -> Any:
    if key in PRIVATE_KEYS:
        return f"<hidden: {len(value)}>" if hasattr(value, "__len__") else "<hidden>"
    if isinstance(value, Mapping):
        return {str(name): _shown(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shown("", inner) for inner in value]
    if isinstance(value, bytes):
        return value[:TEXT_CHARS_MAX].hex()
    if isinstance(value, str) and len(value) > TEXT_CHARS_MAX:
        return f"{value[:TEXT_CHARS_MAX]}… ({len(value)} characters)"
    return value


# -- traces ------------------------------------------------------------------


def inject(headers: MutableMapping[str, str]) -> None:
    """Add the current trace context (W3C `traceparent`, `tracestate`) to outgoing headers, if there is one."""
    _propagator.inject(headers)


@contextmanager
def extracted(headers: Mapping[str, str]) -> Iterator[None]:
    """Continue the trace of incoming headers (lower-case names) for the length of a block; bad ones are ignored."""
    token = otel_context.attach(_propagator.extract(headers))
    try:
        yield
    finally:
        otel_context.detach(token)


class Tracing:
    """A process's tracer. Without an endpoint spans record nothing, yet incoming context is still passed on."""

    def __init__(self, service: str, *, endpoint: str | None = None, exporter: SpanExporter | None = None) -> None:
        """Export to an OTLP collector's gRPC `endpoint` (`http://host:4317`, https for TLS), or to `exporter`."""
        self._provider: TracerProvider | None = None
        self.tracer: trace.Tracer = trace.NoOpTracer()
        if endpoint is not None:
            exporter = _otlp_exporter(endpoint)
        if exporter is not None:
            resource = Resource.create({"service.name": f"covey-{service}"})
            self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
            self.tracer = self._provider.get_tracer("covey")

    @contextmanager
    def span(self, name: str, **attributes: str | int | float | bool) -> Iterator[trace.Span]:
        """Trace a block, as a child of the current span. Attributes follow the rule of logs: no content.

        An exception marks the span with its type only: messages of foreign exceptions may quote content.
        """
        with self.tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_status(trace.StatusCode.ERROR, type(error).__name__)
                raise

    def close(self) -> None:
        """Send what is left, for at most `FLUSH_TIMEOUT_MS`; blocks, so call it from a thread or at the very end."""
        if self._provider is not None:
            self._provider.force_flush(FLUSH_TIMEOUT_MS)
            self._provider.shutdown()


def _otlp_exporter(endpoint: str) -> SpanExporter:
    # Imported here: it brings grpc, which a process without tracing need not load.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(
        endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=FLUSH_TIMEOUT_MS / 1000
    )
