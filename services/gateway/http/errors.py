"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with the headers that SDKs heed."""

from __future__ import annotations

import math
from typing import Any

from covey.errors import (
    ContextLengthExceeded,
    CoveyError,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)

from .body import NotSupportedYet, UnknownField

RETRY_AFTER_MS = 1000
"""When an error that can be retried does not say when."""

_CODES: tuple[tuple[type[CoveyError], str], ...] = (
    (NotSupportedYet, "unsupported_parameter"),
    (UnknownField, "unknown_parameter"),
    (ContextLengthExceeded, "context_length_exceeded"),
    (Unauthenticated, "invalid_api_key"),
    (QuotaExceeded, "rate_limit_exceeded"),
)
_TYPES: tuple[tuple[type[CoveyError], str], ...] = (
    (Unauthenticated, "authentication_error"),
    (PermissionDenied, "permission_error"),
    (NotFound, "not_found_error"),
    (QuotaExceeded, "rate_limit_error"),
    (Overloaded, "overloaded_error"),
    (Unavailable, "overloaded_error"),
    (DeadlineExceeded, "timeout_error"),
)


def error_body(error: CoveyError) -> dict[str, Any]:
    """What the client gets to read."""
    kind = next((name for cls, name in _TYPES if isinstance(error, cls)), None)
    code = next((name for cls, name in _CODES if isinstance(error, cls)), error.code.lower())
    if isinstance(error, NotFound) and error.field == "model":
        code = "model_not_found"
    fallback = "server_error" if error.http >= 500 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind or fallback, "param": error.field, "code": code}}


def error_headers(error: CoveyError) -> dict[str, str]:
    """`Retry-After` with 429 and 503; `x-should-retry` tells SDKs what the status alone does not."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.http in (429, 503):
        headers["retry-after"] = str(math.ceil((error.retry_after_ms or RETRY_AFTER_MS) / 1000))
        headers["retry-after-ms"] = str(error.retry_after_ms or RETRY_AFTER_MS)
    return headers
