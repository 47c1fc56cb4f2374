"""What a handler knows of the call it serves, and how errors and headers cross a process boundary."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from opentelemetry import context as trace_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from covey.codec.messages import decode, encode
from covey.codec.methods import Method
from covey.errors import CoveyError, DeadlineExceeded, InvalidArgument, from_code
from covey.types.common import ErrorDetail

MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Default bound of one message; a larger one is `PayloadTooLarge` before it reaches the wire."""
HEADERS_MAX: Final = 64
ERROR_MESSAGE_CHARS_MAX: Final = 1024
AUTHORIZATION: Final = "authorization"
REQUEST_ID: Final = "x-request-id"
ERROR_TRAILER: Final = "covey-error-bin"

Handler = Callable[..., Awaitable[Any] | AsyncIterator[Any]]
"""Unary: `async (request, call) -> reply`. ServerStream: async generator `(request, call)`. ClientStream:
`async (requests, call) -> reply`. BidiStream: async generator `(requests, call)`; `requests` is an async iterator."""
Handlers = Mapping[Method[Any, Any], Handler]

_propagator = TraceContextTextMapPropagator()  # not `covey.telemetry`: clients lack what that imports
_request_id: ContextVar[str] = ContextVar("covey_request_id", default="")


class Token(Protocol):
    """The credential of the mesh, as `covey.auth.MeshToken` holds it."""

    def matches(self, presented: str) -> bool:
        """Compare in constant time."""
        ...

    def bearer(self) -> str:
        """Return the value of the `authorization` header."""
        ...

    def keys(self) -> tuple[bytes, ...]:
        """Return what proves that one knows the token, without sending it: the first is ours, all count."""
        ...


@runtime_checkable
class Gatekeeper(Protocol):
    """A server's own rule for who may call, in place of the mesh token: for edges, where tenants call."""

    def admit(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers that the handler sees, without credentials; raise `Unauthenticated`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One incoming call. `headers` are lower-case and hold no credential."""

    headers: Mapping[str, str]
    request_id: str
    peer: str
    time_left: Callable[[], float]

    def remaining_s(self) -> float:
        """Return the seconds left before the caller gives up: never negative, `inf` without a deadline."""
        return max(0.0, self.time_left())

    def within(self, timeout_s: float) -> float:
        """Return the budget of an onward call: `timeout_s`, or what the caller has left if that is less."""
        return min(timeout_s, self.remaining_s())


def current_request_id() -> str:
    """Return the id of the request being served in this task, or an empty string."""
    return _request_id.get()


def enter_request(headers: Mapping[str, str]) -> str:
    """Set this task's request id from the headers, or to a fresh one; return it."""
    request_id = headers.get(REQUEST_ID, "")[:128] or secrets.token_hex(8)
    _request_id.set(request_id)
    return request_id


@contextmanager
def extracted(headers: Mapping[str, str]) -> Iterator[None]:
    """Continue the trace that the headers carry."""
    token = trace_context.attach(_propagator.extract(headers))
    try:
        yield
    finally:
        trace_context.detach(token)


def with_trace(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return headers with the current trace context added, if there is one: what a bus message carries onward."""
    traced = dict(headers or {})
    _propagator.inject(traced)
    return traced


def outgoing_headers(extra: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers of an onward call: `extra`, the trace context and the id of the request being served.

    Raises:
        InvalidArgument: a header that gRPC cannot carry, or too many of them.
    """
    headers = with_trace({name.lower(): value for name, value in (extra or {}).items()})
    if current_request_id():
        headers.setdefault(REQUEST_ID, current_request_id())
    for name, value in headers.items():
        if name == AUTHORIZATION or name.startswith(("grpc-", ":")) or name.endswith("-bin"):
            raise InvalidArgument(f"header {name!r} is reserved", field=f"headers.{name}")
        if not name or not (value.isascii() and value.isprintable()):
            raise InvalidArgument(f"header {name!r} must be printable ASCII", field=f"headers.{name}")
    if len(headers) > HEADERS_MAX:
        raise InvalidArgument(f"at most {HEADERS_MAX} headers are carried", field="headers")
    return headers


def checked_timeout(timeout_s: float | None, path: str) -> float | None:
    """Return the deadline for the wire (None: none); raise `DeadlineExceeded` when nothing is left of it."""
    if timeout_s is None or timeout_s == math.inf:
        return None
    if not timeout_s > 0:
        raise DeadlineExceeded(f"{path}: no time was left to call it")
    return timeout_s


def encode_error(error: CoveyError) -> bytes:
    """Serialise what the caller rebuilds with `decode_error`."""
    message = error.message[:ERROR_MESSAGE_CHARS_MAX]
    return encode(ErrorDetail(code=error.code, message=message, field=error.field, retry_after_ms=error.retry_after_ms))


def decode_error(data: bytes) -> CoveyError:
    """Rebuild the error that another process sent."""
    detail: ErrorDetail = decode(ErrorDetail, data)
    return from_code(detail.code, detail.message, field=detail.field, retry_after_ms=detail.retry_after_ms)


def sole(error: BaseException) -> BaseException:
    """Unwrap groups of one: what a task group makes of a single failure."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def services_of(methods: Iterable[Method[Any, Any]]) -> tuple[str, ...]:
    """Return the full names of the services that the methods belong to, each once, in order."""
    return tuple(dict.fromkeys(method.path.split("/")[1] for method in methods))
