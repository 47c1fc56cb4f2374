"""One span a served call: what was called and how it ended, never content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

from covey.errors import Cancelled, CoveyError, Internal
from covey.net.call import sole

CODE = "covey.code"
"""The attribute that says how a call ended: `OK`, or the code of its error."""


@contextmanager
def served(tracer: Tracer, name: str, **attributes: str) -> Iterator[Span]:
    """Trace a call that is served for a block, as a child of the current span.

    Only what is this side's fault marks the span as failed; messages of errors stay out, they may quote content.
    """
    with tracer.start_as_current_span(
        name, kind=SpanKind.SERVER, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except BaseException as error:
            end_with(span, error)
            raise
        span.set_attribute(CODE, "OK")


def end_with(span: Span, error: BaseException) -> None:
    """Say what a call failed with."""
    cause = sole(error)
    if isinstance(cause, CoveyError):
        code, fault = cause.code, cause.http >= 500
    else:
        stopped = not isinstance(cause, Exception)  # cancelled: the caller went away, or we drain
        code, fault = (Cancelled if stopped else Internal).code, not stopped
    span.set_attribute(CODE, code)
    if fault:
        span.set_status(StatusCode.ERROR, code)
